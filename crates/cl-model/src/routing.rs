use cl_adapters::{Linear, Mode, RouterRecorder, is_router, top_k};
use cl_torch::tch::{Device, Kind, Tensor};

/// Settings and router decisions that all layers of a forward pass share.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) mode: Mode,
    /// The experts that the model's global router selected for the tokens, if it has one.
    pub(crate) selection: Option<&'a Selection>,
}

/// How the experts of a module are selected for each token.
#[expect(clippy::large_enum_variant, reason = "one a module, beside weights of megabytes")]
pub(crate) enum Gate {
    /// By a router of the module.
    Router(Router),
    /// By the model's global router, once for all layers.
    Global,
    /// There is no router: all experts are used with equal weights.
    Gateless { name: String, experts: i64 },
}

impl Gate {
    /// Selects the experts of tokens `x` `(tokens, in)`.
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

/// A top-k router (Jiang et al., "Mixtral of Experts", arXiv:2401.04088): softmax over all logits in f32, of which the
/// k largest are renormalized to a sum of 1. Of experts with equal logits, the one with the lowest index comes first.
pub(crate) struct Router {
    pub(crate) linear: Linear, // maps inputs to experts; f32 regardless of the model's compute dtype
    pub(crate) num_experts_per_tok: i64,
    /// Whether the weights of the selected experts are renormalized; Qwen2-MoE can turn this off.
    pub(crate) norm_topk_prob: bool,
    pub(crate) recorder: Option<RouterRecorder>,
}

/// Returns whether a tensor of a checkpoint is the weight of a router; these are kept in f32.
pub(crate) fn is_router_weight(name: &str) -> bool {
    name.strip_suffix(".weight").is_some_and(is_router)
}

/// The experts selected for each token, and their weights.
pub(crate) struct Selection {
    /// `(tokens, k)`.
    experts: Tensor,
    /// `(tokens, k)`, f32.
    weights: Tensor,
}

impl Router {
    /// Creates a router without adapters from a linear layer of any dtype.
    pub(crate) fn new(mut linear: Linear, num_experts_per_tok: i64) -> Router {
        (linear.weight, linear.adapter_kind) = (linear.weight.to_kind(Kind::Float).into(), None);
        Router { linear, num_experts_per_tok, norm_topk_prob: true, recorder: None }
    }

    /// Selects experts for `x` `(tokens, in)`.
    pub(crate) fn select(&self, x: &Tensor, mode: Mode) -> Selection {
        let logits = self.linear.forward(&x.to_kind(Kind::Float), mode);
        let experts = top_k(&logits, self.num_experts_per_tok);
        let weights = if self.norm_topk_prob {
            // Renormalizing the softmax over all logits gives the softmax over the selected logits.
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

/// Pairs of a token and a selected expert, sorted by expert, so that each expert processes its tokens in one product.
pub(crate) struct Pairs {
    /// The token of each pair.
    pub(crate) tokens: Tensor,
    /// Number of pairs of each expert.
    pub(crate) counts: Vec<i64>,
    /// Weights, f32 `(pairs, 1)`.
    weights: Tensor,
}

impl Selection {
    /// Selects all experts with equal weights.
    fn all(tokens: i64, experts: i64, device: Device) -> Selection {
        let indices = Tensor::arange(experts, (Kind::Int64, device)).unsqueeze(0).expand([tokens, -1], false);
        let weights = Tensor::full([tokens, experts], 1.0 / experts as f64, (Kind::Float, device));
        Selection { experts: indices.contiguous(), weights }
    }

    /// Returns the same experts with other weights, f32 `(tokens, k)`.
    pub(crate) fn with_weights(&self, weights: &Tensor) -> Selection {
        Selection { experts: self.experts.shallow_clone(), weights: weights.shallow_clone() }
    }

    pub(crate) fn shallow_clone(&self) -> Selection {
        self.with_weights(&self.weights)
    }

    /// Returns the weighted sum of the selected experts' outputs, `(tokens, out)`. `expert(e, rows)` computes expert e
    /// on all of its tokens at once.
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

    /// Sorts the selection into pairs of tokens and experts; their counts are copied to the host.
    pub(crate) fn pairs(&self, experts: i64) -> Pairs {
        let (sorted, order) = self.experts.flatten(0, -1).sort_stable(true, 0, false);
        let tokens = order.divide_scalar_mode(self.experts.size()[1], "floor");
        let counts = Vec::try_from(sorted.bincount::<Tensor>(None, experts)).expect("a vector of whole numbers");
        Pairs { tokens, counts, weights: self.weights.flatten(0, -1).index_select(0, &order).unsqueeze(-1) }
    }

    /// The weights, converted to `kind`: `(tokens, k)`.
    pub(crate) fn weights(&self, kind: Kind) -> Tensor {
        self.weights.to_kind(kind)
    }

    /// One-hot encoding of the k selections, `(tokens, k, experts)`.
    pub(crate) fn one_hot(&self, experts: i64) -> Tensor {
        self.experts.one_hot(experts)
    }

    /// The weights of all experts, f32 `(tokens, experts)`; 0 for experts that are not selected.
    pub(crate) fn gates(&self, experts: i64) -> Tensor {
        let zeros = Tensor::zeros([self.experts.size()[0], experts], (Kind::Float, self.weights.device()));
        zeros.scatter(-1, &self.experts, &self.weights)
    }
}

impl Pairs {
    /// The weights, converted to `kind`: `(pairs, 1)`.
    pub(crate) fn weights(&self, kind: Kind) -> Tensor {
        self.weights.to_kind(kind)
    }

    /// Sums `values` `(pairs, n)` over the pairs of each token: `(tokens, n)`.
    pub(crate) fn sum(&self, values: &Tensor, tokens: i64) -> Tensor {
        Tensor::zeros([tokens, values.size()[1]], (values.kind(), values.device())).index_add(0, &self.tokens, values)
    }
}
