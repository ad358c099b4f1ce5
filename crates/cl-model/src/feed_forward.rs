use cl_adapters::{Linear, Mode};
use cl_torch::tch::Tensor;

use crate::config::Activation;
use crate::delta::DeltaMlp;
use crate::routing::{Projection, Router};

/// The feed-forward block of a layer.
#[expect(clippy::large_enum_variant, reason = "one a layer, beside weights of megabytes")]
pub(crate) enum FeedForward {
    /// One MLP.
    Dense(Mlp),
    /// Several, of which a router chooses for each token.
    Experts(Experts),
    /// One MLP, and experts stored as differences from it.
    Deltas(DeltaMlp),
}

/// A gated MLP (Shazeer, arXiv:2002.05202): `down(act(gate(x)) · up(x))`.
pub(crate) struct Mlp {
    pub(crate) gate_up: GateUp,
    pub(crate) down: Projection,
    pub(crate) activation: Activation,
}

/// The input projections of an MLP.
#[expect(clippy::large_enum_variant, reason = "one a layer, beside weights of megabytes")]
pub(crate) enum GateUp {
    /// `gate_proj` and `up_proj`.
    Split(Projection, Projection),
    /// `gate_up_proj`: the rows of gate, then those of up.
    Fused(Projection),
}

/// Several MLPs behind a router, each an expert as a whole, and beside them one that every token goes through.
pub(crate) struct Experts {
    pub(crate) router: Router,
    pub(crate) shared: Option<Mlp>,
    pub(crate) experts: Vec<Mlp>,
}

impl FeedForward {
    /// `x` `(tokens, hidden)` in, `(tokens, hidden)` out.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        match self {
            FeedForward::Dense(mlp) => mlp.forward(x, mode),
            FeedForward::Experts(experts) => experts.forward(x, mode),
            FeedForward::Deltas(mlp) => mlp.forward(x, mode),
        }
    }

    pub(crate) fn routers(&self) -> Vec<&Router> {
        match self {
            FeedForward::Dense(mlp) => mlp.projections().into_iter().filter_map(Projection::router).collect(),
            FeedForward::Experts(experts) => vec![&experts.router],
            FeedForward::Deltas(mlp) => vec![&mlp.router],
        }
    }

    pub(crate) fn routers_mut(&mut self) -> Vec<&mut Router> {
        match self {
            FeedForward::Dense(mlp) => mlp.projections_mut().into_iter().filter_map(Projection::router_mut).collect(),
            FeedForward::Experts(experts) => vec![&mut experts.router],
            FeedForward::Deltas(mlp) => vec![&mut mlp.router],
        }
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears(),
            FeedForward::Experts(e) => {
                let mlps = e.shared.iter().chain(&e.experts);
                std::iter::once(&e.router.linear).chain(mlps.flat_map(Mlp::linears)).collect()
            }
            FeedForward::Deltas(mlp) => mlp.linears(),
        }
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears_mut(),
            FeedForward::Experts(e) => {
                let mlps = e.shared.iter_mut().chain(&mut e.experts);
                std::iter::once(&mut e.router.linear).chain(mlps.flat_map(Mlp::linears_mut)).collect()
            }
            FeedForward::Deltas(mlp) => mlp.linears_mut(),
        }
    }

    pub(crate) fn shallow_clone(&self) -> FeedForward {
        match self {
            FeedForward::Dense(mlp) => FeedForward::Dense(mlp.shallow_clone()),
            FeedForward::Experts(e) => FeedForward::Experts(Experts {
                router: e.router.shallow_clone(),
                shared: e.shared.as_ref().map(Mlp::shallow_clone),
                experts: e.experts.iter().map(Mlp::shallow_clone).collect(),
            }),
            FeedForward::Deltas(mlp) => FeedForward::Deltas(mlp.shallow_clone()),
        }
    }
}

impl Activation {
    pub(crate) fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Activation::Silu => x.silu(),
            Activation::GeluTanh => x.gelu("tanh"),
        }
    }
}

impl Mlp {
    fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let (gate, up) = match &self.gate_up {
            GateUp::Split(gate, up) => Projection::forward_all([gate, up], x, mode).into(),
            GateUp::Fused(both) => {
                let mut halves = both.forward(x, mode).chunk(2, -1);
                let up = halves.pop().expect("two halves");
                (halves.pop().expect("two halves"), up)
            }
        };
        self.down.forward(&(self.activation.apply(&gate) * up), mode)
    }

    fn linears(&self) -> Vec<&Linear> {
        self.projections().into_iter().flat_map(Projection::linears).collect()
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        self.projections_mut().into_iter().flat_map(Projection::linears_mut).collect()
    }

    fn projections(&self) -> Vec<&Projection> {
        match &self.gate_up {
            GateUp::Split(gate, up) => vec![gate, up, &self.down],
            GateUp::Fused(both) => vec![both, &self.down],
        }
    }

    fn projections_mut(&mut self) -> Vec<&mut Projection> {
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
        let selection = self.router.select(x, mode);
        let y = selection.apply(x, self.experts.len(), |e, rows| self.experts[e].forward(rows, mode));
        self.shared.as_ref().map_or_else(|| y.shallow_clone(), |shared| shared.forward(x, mode) + &y)
    }
}
