use cl_adapters::{Linear, Mode, RouterRecorder, top_k};
use cl_torch::tch::{Device, Kind, Tensor};

use crate::delta::Deltas;

/// What the layers of a forward pass have in common.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) mode: Mode,
    /// The experts that the model's global router selected for the tokens, if it has one.
    pub(crate) selection: Option<&'a Selection>,
}

/// How a module's tokens find their experts.
#[expect(clippy::large_enum_variant, reason = "one a module, beside weights of megabytes")]
pub(crate) enum Gate {
    /// By the module's own router.
    Router(Router),
    /// By the model's router, once for all layers.
    Global,
    /// All experts have the same weight.
    Gateless { name: String, experts: i64 },
}

impl Gate {
    /// The experts of tokens `x` `(tokens, in)`.
    pub(crate) fn select(&self, x: &Tensor, pass: Pass<'_>) -> Selection {
        match self {
            Gate::Router(router) => router.select(x, pass.mode),
            Gate::Global => pass.selection.expect("the decoder asks its global router first").shallow_clone(),
            Gate::Gateless { experts, .. } => Selection::all(x.size()[0], *experts, x.device()),
        }
    }

    pub(crate) fn router(&self) -> Option<&Router> {
        if let Gate::Router(router) = self { Some(router) } else { None }
    }

    pub(crate) fn router_mut(&mut self) -> Option<&mut Router> {
        if let Gate::Router(router) = self { Some(router) } else { None }
    }

    pub(crate) fn linear(&self) -> Option<&Linear> {
        self.router().map(|router| &router.linear)
    }

    pub(crate) fn linear_mut(&mut self) -> Option<&mut Linear> {
        self.router_mut().map(|router| &mut router.linear)
    }

    pub(crate) fn shallow_clone(&self) -> Gate {
        match self {
            Gate::Router(router) => Gate::Router(router.shallow_clone()),
            Gate::Global => Gate::Global,
            Gate::Gateless { name, experts } => Gate::Gateless { name: name.clone(), experts: *experts },
        }
    }
}

/// A router (Jiang et al., "Mixtral of Experts", arXiv:2401.04088): softmax over all logits, in f32, of which the largest k are
/// renormalised to a sum of 1. Among equal logits the expert with the lowest index comes first.
pub(crate) struct Router {
    pub(crate) linear: Linear, // input to experts, f32 whatever the model computes in
    pub(crate) num_experts_per_tok: i64,
    /// Whether the selected weights are renormalised; Qwen2-MoE can leave them as they are.
    pub(crate) norm_topk_prob: bool,
    pub(crate) recorder: Option<RouterRecorder>,
}

/// Whether a tensor of a checkpoint is a router's weight, which is held in f32.
pub(crate) fn is_router_weight(name: &str) -> bool {
    [".block_sparse_moe.gate.weight", ".mlp.gate.weight", ".router.weight"].iter().any(|end| name.ends_with(end))
}

/// The experts that a router selects for some tokens, and their weights.
pub(crate) struct Selection {
    /// `(tokens, k)`.
    experts: Tensor,
    /// `(tokens, k)`, f32.
    weights: Tensor,
}

impl Router {
    /// A router without adapters, from a linear layer of any dtype.
    pub(crate) fn new(mut linear: Linear, num_experts_per_tok: i64) -> Router {
        (linear.weight, linear.adapter_kind) = (linear.weight.to_kind(Kind::Float).into(), None);
        Router { linear, num_experts_per_tok, norm_topk_prob: true, recorder: None }
    }

    /// `x` is `(tokens, in)`.
    pub(crate) fn select(&self, x: &Tensor, mode: Mode) -> Selection {
        let logits = self.linear.forward(&x.to_kind(Kind::Float), mode);
        let experts = top_k(&logits, self.num_experts_per_tok);
        let weights = if self.norm_topk_prob {
            // Renormalising the softmax over all logits leaves the softmax over those selected.
            logits.gather(-1, &experts, false).softmax(-1, Kind::Float)
        } else {
            logits.softmax(-1, Kind::Float).gather(-1, &experts, false)
        };
        if let Some(recorder) = &self.recorder {
            let gates = || logits.zeros_like().scatter(-1, &experts, &weights);
            recorder.record(&logits, self.num_experts_per_tok, gates);
        }
        Selection { experts, weights }
    }

    pub(crate) fn shallow_clone(&self) -> Router {
        Router { linear: self.linear.shallow_clone(), recorder: self.recorder.clone(), ..*self }
    }
}

/// Pairs of a token and a selected expert, ordered by expert, so that each expert processes its tokens in one product.
pub(crate) struct Pairs {
    /// The token of each pair.
    pub(crate) tokens: Tensor,
    /// Number of pairs of each expert.
    pub(crate) counts: Vec<i64>,
    /// f32 `(pairs, 1)`.
    weights: Tensor,
}

impl Selection {
    /// All experts, with equal weights.
    fn all(tokens: i64, experts: i64, device: Device) -> Selection {
        let indices = Tensor::arange(experts, (Kind::Int64, device)).unsqueeze(0).expand([tokens, -1], false);
        let weights = Tensor::full([tokens, experts], 1.0 / experts as f64, (Kind::Float, device));
        Selection { experts: indices.contiguous(), weights }
    }

    /// The same experts with these weights, f32 `(tokens, k)`.
    pub(crate) fn with_weights(&self, weights: &Tensor) -> Selection {
        Selection { experts: self.experts.shallow_clone(), weights: weights.shallow_clone() }
    }

    pub(crate) fn shallow_clone(&self) -> Selection {
        self.with_weights(&self.weights)
    }

    /// The weighted sum of the selected experts' outputs, `(tokens, out)`: `expert(e, rows)` is that of expert e on its tokens,
    /// which it gets in one piece.
    pub(crate) fn apply(&self, x: &Tensor, experts: usize, expert: impl Fn(usize, &Tensor) -> Tensor) -> Tensor {
        let pairs = self.pairs(experts as i64);
        let rows = x.index_select(0, &pairs.tokens);
        let mut outputs = Vec::new();
        let mut start = 0;
        for (e, &count) in pairs.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            outputs.push(expert(e, &rows.narrow(0, start, count)));
            start += count;
        }
        pairs.sum(&(Tensor::cat(&outputs, 0) * pairs.weights(x.kind())), x.size()[0])
    }

    /// The pairs of tokens and experts; their counts are copied to the host.
    pub(crate) fn pairs(&self, experts: i64) -> Pairs {
        let (sorted, order) = self.experts.flatten(0, -1).sort_stable(true, 0, false);
        let tokens = order.divide_scalar_mode(self.experts.size()[1], "floor");
        let counts = Vec::try_from(sorted.bincount::<Tensor>(None, experts)).expect("a vector of whole numbers");
        Pairs { tokens, counts, weights: self.weights.flatten(0, -1).index_select(0, &order).unsqueeze(-1) }
    }

    /// Weights `(tokens, k)`.
    pub(crate) fn weights(&self, kind: Kind) -> Tensor {
        self.weights.to_kind(kind)
    }

    /// One-hot encoding of the k selections, `(tokens, k, experts)`.
    pub(crate) fn one_hot(&self, experts: i64) -> Tensor {
        self.experts.one_hot(experts)
    }

    /// Weights of all experts, f32 `(tokens, experts)`; 0 if not selected.
    pub(crate) fn gates(&self, experts: i64) -> Tensor {
        let zeros = Tensor::zeros([self.experts.size()[0], experts], (Kind::Float, self.weights.device()));
        zeros.scatter(-1, &self.experts, &self.weights)
    }
}

impl Pairs {
    /// The weights `(pairs, 1)`.
    pub(crate) fn weights(&self, kind: Kind) -> Tensor {
        self.weights.to_kind(kind)
    }

    /// The sum over each token's pairs of `values` `(pairs, n)`: `(tokens, n)`.
    pub(crate) fn sum(&self, values: &Tensor, tokens: i64) -> Tensor {
        Tensor::zeros([tokens, values.size()[1]], (values.kind(), values.device())).index_add(0, &self.tokens, values)
    }
}

/// A projection: one linear layer, or several as experts with their own router.
pub(crate) enum Projection {
    /// One linear layer.
    Dense(Linear),
    /// Several, of which each token goes through some, and beside them one that every token goes through.
    Experts { gate: Gate, shared: Option<Linear>, experts: Vec<Linear> },
    /// The base's, and the experts' differences from it.
    Deltas { gate: Gate, base: Linear, deltas: Deltas },
}

impl Projection {
    /// `x` `(tokens, in)` in, `(tokens, out)` out.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        match self {
            Projection::Dense(linear) => linear.forward(x, pass.mode),
            Projection::Experts { gate, shared, experts } => {
                let selection = gate.select(x, pass);
                let y = selection.apply(x, experts.len(), |e, rows| experts[e].forward(rows, pass.mode));
                shared.as_ref().map_or_else(|| y.shallow_clone(), |shared| shared.forward(x, pass.mode) + &y)
            }
            // The selected gates add up to 1, and so do their shares of the base.
            Projection::Deltas { gate, base, deltas } => {
                base.forward(x, pass.mode) + deltas.weighted(x, &gate.select(x, pass))
            }
        }
    }

    /// [`Projection::forward`] of several over the same input, the dense ones together.
    pub(crate) fn forward_all<const N: usize>(all: [&Projection; N], x: &Tensor, pass: Pass<'_>) -> [Tensor; N] {
        let dense = |p: &&Projection| matches!(**p, Projection::Dense(_));
        if !all.iter().all(dense) {
            return all.map(|p| p.forward(x, pass));
        }
        let linears: Vec<&Linear> = all.into_iter().flat_map(Projection::linears).collect();
        Linear::forward_all(&linears, x, pass.mode).try_into().expect("one output a layer")
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        match self {
            Projection::Dense(linear) => vec![linear],
            Projection::Experts { gate, shared, experts } => {
                gate.linear().into_iter().chain(shared).chain(experts).collect()
            }
            Projection::Deltas { gate, base, .. } => gate.linear().into_iter().chain([base]).collect(),
        }
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Projection::Dense(linear) => vec![linear],
            Projection::Experts { gate, shared, experts } => {
                gate.linear_mut().into_iter().chain(shared).chain(experts).collect()
            }
            Projection::Deltas { gate, base, .. } => gate.linear_mut().into_iter().chain([base]).collect(),
        }
    }

    pub(crate) fn gate(&self) -> Option<&Gate> {
        match self {
            Projection::Dense(_) => None,
            Projection::Experts { gate, .. } | Projection::Deltas { gate, .. } => Some(gate),
        }
    }

    pub(crate) fn gate_mut(&mut self) -> Option<&mut Gate> {
        match self {
            Projection::Dense(_) => None,
            Projection::Experts { gate, .. } | Projection::Deltas { gate, .. } => Some(gate),
        }
    }

    pub(crate) fn shallow_clone(&self) -> Projection {
        match self {
            Projection::Dense(linear) => Projection::Dense(linear.shallow_clone()),
            Projection::Experts { gate, shared, experts } => Projection::Experts {
                gate: gate.shallow_clone(),
                shared: shared.as_ref().map(Linear::shallow_clone),
                experts: experts.iter().map(Linear::shallow_clone).collect(),
            },
            Projection::Deltas { gate, base, deltas } => Projection::Deltas {
                gate: gate.shallow_clone(),
                base: base.shallow_clone(),
                deltas: deltas.shallow_clone(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cl_adapters::normal;

    fn matrix(name: &str, rows: i64, columns: i64) -> Tensor {
        Tensor::from_slice(&normal(1, name, (rows * columns) as usize)).reshape([rows, columns])
    }

    fn projection(top_k: i64, router: Tensor) -> Projection {
        let expert = |e: i64| Linear::new(&format!("e{e}"), matrix(&format!("e{e}"), 5, 6), None);
        let gate = Gate::Router(Router::new(Linear::new("router", router, None), top_k));
        Projection::Experts { gate, shared: None, experts: (0..4).map(expert).collect() }
    }

    fn pass(mode: Mode) -> Pass<'static> {
        Pass { mode, selection: None }
    }

    /// The definition, token by token and expert by expert, in f64.
    fn reference(projection: &Projection, x: &Tensor) -> Tensor {
        let Projection::Experts { gate: Gate::Router(router), experts, .. } = projection else { panic!("experts") };
        let row = |t: i64| {
            let x = x.get(t).to_kind(Kind::Double);
            let logits: Vec<f64> = Vec::try_from(router.linear.weight.to_kind(Kind::Double).mv(&x)).unwrap();
            let all: f64 = logits.iter().map(|v| v.exp()).sum();
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            order.truncate(router.num_experts_per_tok as usize);
            let p = |e: usize| logits[e].exp() / all;
            let kept: f64 = order.iter().map(|&e| p(e)).sum();
            let output = |&e: &usize| experts[e].weight.to_kind(Kind::Double).mv(&x) * (p(e) / kept);
            order.iter().map(output).reduce(|a, b| a + b).unwrap()
        };
        Tensor::stack(&(0..x.size()[0]).map(row).collect::<Vec<_>>(), 0)
    }

    #[test]
    fn one_product_for_each_expert_equals_the_definition_in_f64() {
        let x = matrix("x", 9, 6);
        for (top_k, mode) in (1..=4).flat_map(|k| [(k, Mode::Eval), (k, Mode::Train { seed: 1 })]) {
            let projection = projection(top_k, matrix("router", 4, 6));
            let difference = projection.forward(&x, pass(mode)).to_kind(Kind::Double) - reference(&projection, &x);
            // f32 sums of six products of order 1.
            assert!(difference.abs().max().double_value(&[]) < 1e-5);
        }
    }

    #[test]
    fn equal_logits_select_the_first_experts_in_any_dtype() {
        let x = matrix("x", 300, 6);
        let projection = projection(1, Tensor::zeros([4, 6], (Kind::Float, Device::Cpu)));
        let Projection::Experts { experts, .. } = &projection else { panic!("experts") };
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = x.to_kind(kind);
            assert_eq!(projection.forward(&x, pass(Mode::Eval)), experts[0].forward(&x, Mode::Eval));
        }
    }

    #[test]
    fn without_a_gate_a_projection_is_the_mean_of_its_experts_outputs() {
        let x = matrix("x", 9, 6);
        let Projection::Experts { experts, .. } = projection(1, matrix("router", 4, 6)) else { panic!("experts") };
        let outputs: Vec<Tensor> = experts.iter().map(|expert| expert.forward(&x, Mode::Eval)).collect();
        let expected = Tensor::stack(&outputs, 0).mean_dim(0, false, Kind::Float);
        let gate = Gate::Gateless { name: "router".to_owned(), experts: 4 };
        let gateless = Projection::Experts { gate, shared: None, experts };
        assert!(gateless.linears().len() == 4 && gateless.gate().is_some_and(|gate| gate.router().is_none()));
        for mode in [Mode::Eval, Mode::Train { seed: 1 }] {
            // Four f32 values of order 1 in another order.
            let difference = (gateless.forward(&x, pass(mode)) - &expected).abs().max().double_value(&[]);
            assert!(difference < 1e-5, "{difference}");
        }
    }

    #[test]
    fn a_global_selection_counts_whatever_the_input_is() {
        let (x, embeddings) = (matrix("x", 9, 6), matrix("embeddings", 9, 3));
        let router = Router::new(Linear::new("model.router", matrix("router", 4, 3), None), 2);
        let selection = router.select(&embeddings, Mode::Eval);
        let Projection::Experts { experts, .. } = projection(1, matrix("router", 4, 6)) else { panic!("experts") };
        let gates = selection.gates(4);
        let each: Vec<Tensor> = experts.iter().map(|expert| expert.forward(&x, Mode::Eval)).collect();
        let weighted = each.iter().enumerate().map(|(e, y)| y * gates.select(1, e as i64).unsqueeze(1));
        let expected = weighted.reduce(|a, b| a + b).unwrap();
        let global = Projection::Experts { gate: Gate::Global, shared: None, experts };
        let pass = Pass { mode: Mode::Eval, selection: Some(&selection) };
        assert!((global.forward(&x, pass) - expected).abs().max().double_value(&[]) < 1e-5);
    }
}
