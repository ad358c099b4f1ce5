use cl_adapters::{Linear, Mode, RouterRecorder, top_k};
use cl_torch::tch::{Kind, Tensor};

use crate::config::Activation;

/// What a layer does to each token by itself.
#[expect(clippy::large_enum_variant, reason = "one a layer, beside weights of megabytes")]
pub(crate) enum FeedForward {
    /// One MLP.
    Dense(Mlp),
    /// Several, of which a router chooses for each token.
    Experts(Experts),
}

/// A gated MLP (Shazeer, arXiv:2002.05202): `down(act(gate(x)) · up(x))`.
pub(crate) struct Mlp {
    pub(crate) gate_up: GateUp,
    pub(crate) down: Linear,
    pub(crate) activation: Activation,
}

/// The first projections of an MLP.
#[expect(clippy::large_enum_variant, reason = "one a layer, beside weights of megabytes")]
pub(crate) enum GateUp {
    /// `gate_proj` and `up_proj`.
    Split(Linear, Linear),
    /// `gate_up_proj`: the rows of gate, then those of up.
    Fused(Linear),
}

/// Experts behind a router (Jiang et al., "Mixtral of Experts", arXiv:2401.04088): softmax over all router logits, in f32, the
/// largest k renormalised to a sum of 1, and the sum of those experts' outputs with these weights. Among equal logits the
/// expert with the lowest index comes first.
pub(crate) struct Experts {
    pub(crate) gate: Linear, // hidden to experts, f32 whatever the model computes in
    pub(crate) experts: Vec<Mlp>,
    pub(crate) num_experts_per_tok: i64,
    pub(crate) recorder: Option<RouterRecorder>,
}

/// Whether a tensor of a checkpoint is a router's weight, which is held in f32.
pub(crate) fn is_router_weight(name: &str) -> bool {
    name.ends_with(".block_sparse_moe.gate.weight")
}

impl FeedForward {
    /// `x` `(tokens, hidden)` in, `(tokens, hidden)` out.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        match self {
            FeedForward::Dense(mlp) => mlp.forward(x, mode),
            FeedForward::Experts(experts) => experts.forward(x, mode),
        }
    }

    /// The experts, where there are any.
    pub(crate) fn experts(&self) -> Option<&Experts> {
        match self {
            FeedForward::Dense(_) => None,
            FeedForward::Experts(experts) => Some(experts),
        }
    }

    pub(crate) fn experts_mut(&mut self) -> Option<&mut Experts> {
        match self {
            FeedForward::Dense(_) => None,
            FeedForward::Experts(experts) => Some(experts),
        }
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears(),
            FeedForward::Experts(e) => {
                std::iter::once(&e.gate).chain(e.experts.iter().flat_map(Mlp::linears)).collect()
            }
        }
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears_mut(),
            FeedForward::Experts(e) => {
                std::iter::once(&mut e.gate).chain(e.experts.iter_mut().flat_map(Mlp::linears_mut)).collect()
            }
        }
    }

    pub(crate) fn shallow_clone(&self) -> FeedForward {
        match self {
            FeedForward::Dense(mlp) => FeedForward::Dense(mlp.shallow_clone()),
            FeedForward::Experts(e) => FeedForward::Experts(Experts {
                gate: e.gate.shallow_clone(),
                experts: e.experts.iter().map(Mlp::shallow_clone).collect(),
                num_experts_per_tok: e.num_experts_per_tok,
                recorder: e.recorder.clone(),
            }),
        }
    }
}

impl Mlp {
    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let (gate, up) = match &self.gate_up {
            GateUp::Split(gate, up) => (gate.forward(x, mode), up.forward(x, mode)),
            GateUp::Fused(both) => {
                let mut halves = both.forward(x, mode).chunk(2, -1);
                let up = halves.pop().expect("two halves");
                (halves.pop().expect("two halves"), up)
            }
        };
        let gate = match self.activation {
            Activation::Silu => gate.silu(),
            Activation::GeluTanh => gate.gelu("tanh"),
        };
        self.down.forward(&(gate * up), mode)
    }

    fn linears(&self) -> Vec<&Linear> {
        match &self.gate_up {
            GateUp::Split(gate, up) => vec![gate, up, &self.down],
            GateUp::Fused(both) => vec![both, &self.down],
        }
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match &mut self.gate_up {
            GateUp::Split(gate, up) => vec![gate, up, &mut self.down],
            GateUp::Fused(both) => vec![both, &mut self.down],
        }
    }

    fn shallow_clone(&self) -> Mlp {
        let gate_up = match &self.gate_up {
            GateUp::Split(gate, up) => GateUp::Split(gate.shallow_clone(), up.shallow_clone()),
            GateUp::Fused(both) => GateUp::Fused(both.shallow_clone()),
        };
        Mlp { gate_up, down: self.down.shallow_clone(), activation: self.activation }
    }
}

impl Experts {
    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let logits = self.gate.forward(&x.to_kind(Kind::Float), mode);
        let chosen = top_k(&logits, self.num_experts_per_tok);
        // Renormalising the softmax over all logits leaves the softmax over those selected.
        let weights = logits.gather(-1, &chosen, false).softmax(-1, Kind::Float);
        if let Some(recorder) = &self.recorder {
            let gates = || logits.zeros_like().scatter(-1, &chosen, &weights);
            recorder.record(&logits, self.num_experts_per_tok, gates);
        }
        let weights = weights.to_kind(x.kind());
        // All (token, expert) pairs in the order of experts, so that each expert sees its tokens in one product.
        let (sorted, order) = chosen.flatten(0, -1).sort_stable(true, 0, false);
        let tokens = order.divide_scalar_mode(self.num_experts_per_tok, "floor");
        let counts: Vec<i64> = Vec::try_from(sorted.bincount::<Tensor>(None, self.experts.len() as i64))
            .expect("a vector of whole numbers");
        let rows = x.index_select(0, &tokens);
        let mut outputs = Vec::new();
        let mut start = 0;
        for (expert, count) in self.experts.iter().zip(counts).filter(|(_, count)| *count > 0) {
            outputs.push(expert.forward(&rows.narrow(0, start, count), mode));
            start += count;
        }
        let weighted = Tensor::cat(&outputs, 0) * weights.flatten(0, -1).index_select(0, &order).unsqueeze(-1);
        x.zeros_like().index_add(0, &tokens, &weighted)
    }
}
