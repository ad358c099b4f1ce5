use cl_adapters::{Linear, Mode, RouterRecorder, top_k};
use cl_torch::tch::{Kind, Tensor};

/// A router (Jiang et al., "Mixtral of Experts", arXiv:2401.04088): softmax over all logits, in f32, of which the largest k are
/// renormalised to a sum of 1. Among equal logits the expert with the lowest index comes first.
pub(crate) struct Router {
    pub(crate) linear: Linear, // input to experts, f32 whatever the model computes in
    pub(crate) num_experts_per_tok: i64,
    pub(crate) recorder: Option<RouterRecorder>,
}

/// Whether a tensor of a checkpoint is a router's weight, which is held in f32.
pub(crate) fn is_router_weight(name: &str) -> bool {
    name.ends_with(".block_sparse_moe.gate.weight") || name.ends_with(".router.weight")
}

/// Which experts a router selects for some tokens, and with which weights.
pub(crate) struct Selection {
    /// `(tokens, k)`.
    experts: Tensor,
    /// `(tokens, k)`, f32.
    weights: Tensor,
}

impl Router {
    /// A router without adapters, from a linear layer of any dtype.
    pub(crate) fn new(mut linear: Linear, num_experts_per_tok: i64) -> Router {
        (linear.weight, linear.adapter_kind) = (linear.weight.to_kind(Kind::Float), None);
        Router { linear, num_experts_per_tok, recorder: None }
    }

    /// `x` is `(tokens, in)`.
    pub(crate) fn select(&self, x: &Tensor, mode: Mode) -> Selection {
        let logits = self.linear.forward(&x.to_kind(Kind::Float), mode);
        let experts = top_k(&logits, self.num_experts_per_tok);
        // Renormalising the softmax over all logits leaves the softmax over those selected.
        let weights = logits.gather(-1, &experts, false).softmax(-1, Kind::Float);
        if let Some(recorder) = &self.recorder {
            let gates = || logits.zeros_like().scatter(-1, &experts, &weights);
            recorder.record(&logits, self.num_experts_per_tok, gates);
        }
        Selection { experts, weights }
    }

    pub(crate) fn shallow_clone(&self) -> Router {
        Router {
            linear: self.linear.shallow_clone(),
            num_experts_per_tok: self.num_experts_per_tok,
            recorder: self.recorder.clone(),
        }
    }
}

impl Selection {
    /// The weighted sum of the selected experts' outputs, `(tokens, out)`: `expert(e, rows)` is that of expert e on its tokens,
    /// which it gets in one piece.
    pub(crate) fn apply(&self, x: &Tensor, experts: usize, expert: impl Fn(usize, &Tensor) -> Tensor) -> Tensor {
        let weights = self.weights.to_kind(x.kind());
        // All (token, expert) pairs in the order of experts, so that each expert sees its tokens in one product.
        let (sorted, order) = self.experts.flatten(0, -1).sort_stable(true, 0, false);
        let tokens = order.divide_scalar_mode(self.experts.size()[1], "floor");
        let counts: Vec<i64> =
            Vec::try_from(sorted.bincount::<Tensor>(None, experts as i64)).expect("a vector of whole numbers");
        let rows = x.index_select(0, &tokens);
        let mut outputs = Vec::new();
        let mut start = 0;
        for (e, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            outputs.push(expert(e, &rows.narrow(0, start, count)));
            start += count;
        }
        let weighted = Tensor::cat(&outputs, 0) * weights.flatten(0, -1).index_select(0, &order).unsqueeze(-1);
        let shape = [x.size()[0], weighted.size()[1]];
        Tensor::zeros(shape, (x.kind(), x.device())).index_add(0, &tokens, &weighted)
    }
}

/// A projection: one linear layer, or several behind a router of their own.
#[expect(clippy::large_enum_variant, reason = "a few a layer, beside weights of megabytes")]
pub(crate) enum Projection {
    /// One linear layer.
    Dense(Linear),
    /// Several, of which the router selects some for each token.
    Experts { router: Router, experts: Vec<Linear> },
}

impl Projection {
    /// `x` `(tokens, in)` in, `(tokens, out)` out.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        match self {
            Projection::Dense(linear) => linear.forward(x, mode),
            Projection::Experts { router, experts } => {
                router.select(x, mode).apply(x, experts.len(), |e, rows| experts[e].forward(rows, mode))
            }
        }
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        match self {
            Projection::Dense(linear) => vec![linear],
            Projection::Experts { router, experts } => std::iter::once(&router.linear).chain(experts).collect(),
        }
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Projection::Dense(linear) => vec![linear],
            Projection::Experts { router, experts } => std::iter::once(&mut router.linear).chain(experts).collect(),
        }
    }

    pub(crate) fn router(&self) -> Option<&Router> {
        match self {
            Projection::Dense(_) => None,
            Projection::Experts { router, .. } => Some(router),
        }
    }

    pub(crate) fn router_mut(&mut self) -> Option<&mut Router> {
        match self {
            Projection::Dense(_) => None,
            Projection::Experts { router, .. } => Some(router),
        }
    }

    pub(crate) fn shallow_clone(&self) -> Projection {
        match self {
            Projection::Dense(linear) => Projection::Dense(linear.shallow_clone()),
            Projection::Experts { router, experts } => Projection::Experts {
                router: router.shallow_clone(),
                experts: experts.iter().map(Linear::shallow_clone).collect(),
            },
        }
    }
}
