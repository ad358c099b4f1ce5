use cl_adapters::Linear;
use cl_torch::silu_mul;
use cl_torch::tch::Tensor;

use crate::config::Activation;
use crate::delta::DeltaMlp;
use crate::projection::Projection;
use crate::routing::{Gate, Pass};

/// The feed-forward block of a layer.
#[expect(clippy::large_enum_variant, reason = "one a layer, beside weights of megabytes")]
pub(crate) enum FeedForward {
    /// A single MLP.
    Dense(Mlp),
    /// Several MLPs as experts, of which each token uses some.
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
    /// Separate `gate_proj` and `up_proj`.
    Split(Projection, Projection),
    /// Fused `gate_up_proj`: the rows of gate, then those of up.
    Fused(Projection),
}

/// Several MLPs as experts, and an optional shared MLP that every token uses.
pub(crate) struct Experts {
    pub(crate) gate: Gate,
    pub(crate) shared: Option<Shared>,
    pub(crate) experts: Vec<Mlp>,
}

/// A shared expert: an MLP that every token uses.
pub(crate) struct Shared {
    pub(crate) mlp: Mlp,
    /// Qwen2-MoE's `shared_expert_gate` `(1, hidden)`: the output is multiplied by the sigmoid of the gate's product
    /// with the input.
    pub(crate) gate: Option<Linear>,
}

impl Shared {
    fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        let y = self.mlp.forward(x, pass);
        match &self.gate {
            Some(gate) => gate.forward(x, pass.mode).sigmoid() * y,
            None => y,
        }
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.mlp.linears().into_iter().chain(&self.gate)
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.mlp.linears_mut().into_iter().chain(&mut self.gate)
    }

    fn shallow_clone(&self) -> Shared {
        Shared { mlp: self.mlp.shallow_clone(), gate: self.gate.as_ref().map(Linear::shallow_clone) }
    }
}

impl FeedForward {
    /// Maps `x` `(tokens, hidden)` to `(tokens, hidden)`.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        match self {
            FeedForward::Dense(mlp) => mlp.forward(x, pass),
            FeedForward::Experts(experts) => experts.forward(x, pass),
            FeedForward::Deltas(mlp) => mlp.forward(x, pass),
        }
    }

    pub(crate) fn gates(&self) -> Vec<&Gate> {
        match self {
            FeedForward::Dense(mlp) => mlp.projections().into_iter().filter_map(Projection::gate).collect(),
            FeedForward::Experts(experts) => vec![&experts.gate],
            FeedForward::Deltas(mlp) => vec![&mlp.routing],
        }
    }

    pub(crate) fn gates_mut(&mut self) -> Vec<&mut Gate> {
        match self {
            FeedForward::Dense(mlp) => mlp.projections_mut().into_iter().filter_map(Projection::gate_mut).collect(),
            FeedForward::Experts(experts) => vec![&mut experts.gate],
            FeedForward::Deltas(mlp) => vec![&mut mlp.routing],
        }
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears(),
            FeedForward::Experts(e) => {
                let shared = e.shared.iter().flat_map(Shared::linears);
                e.gate.linear().into_iter().chain(shared).chain(e.experts.iter().flat_map(Mlp::linears)).collect()
            }
            FeedForward::Deltas(mlp) => mlp.linears(),
        }
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears_mut(),
            FeedForward::Experts(e) => {
                let shared = e.shared.iter_mut().flat_map(Shared::linears_mut);
                let experts = e.experts.iter_mut().flat_map(Mlp::linears_mut);
                e.gate.linear_mut().into_iter().chain(shared).chain(experts).collect()
            }
            FeedForward::Deltas(mlp) => mlp.linears_mut(),
        }
    }

    pub(crate) fn shallow_clone(&self) -> FeedForward {
        match self {
            FeedForward::Dense(mlp) => FeedForward::Dense(mlp.shallow_clone()),
            FeedForward::Experts(e) => FeedForward::Experts(Experts {
                gate: e.gate.shallow_clone(),
                shared: e.shared.as_ref().map(Shared::shallow_clone),
                experts: e.experts.iter().map(Mlp::shallow_clone).collect(),
            }),
            FeedForward::Deltas(mlp) => FeedForward::Deltas(mlp.shallow_clone()),
        }
    }
}

impl Activation {
    /// Computes `act(gate) · up`.
    pub(crate) fn gated(self, gate: &Tensor, up: &Tensor) -> Tensor {
        match self {
            Activation::Silu => silu_mul(gate, up),
            Activation::GeluTanh => gate.gelu("tanh") * up,
        }
    }
}

impl Mlp {
    fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        let (gate, up) = match &self.gate_up {
            GateUp::Split(gate, up) => Projection::forward_all([gate, up], x, pass).into(),
            GateUp::Fused(both) => {
                let mut halves = both.forward(x, pass).chunk(2, -1);
                let up = halves.pop().expect("two halves");
                (halves.pop().expect("two halves"), up)
            }
        };
        self.down.forward(&self.activation.gated(&gate, &up), pass)
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
    fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        let selection = self.gate.select(x, pass);
        let y = selection.apply(x, self.experts.len(), |e, rows| self.experts[e].forward(rows, pass));
        self.shared.as_ref().map_or_else(|| y.shallow_clone(), |shared| shared.forward(x, pass) + &y)
    }
}
