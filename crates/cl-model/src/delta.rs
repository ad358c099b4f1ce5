//! Experts stored as differences from the base: the base's product is computed once, and the products of the
//! differences are added to it.

use cl_adapters::Linear;
use cl_torch::tch::{Kind, Tensor};

use crate::config::Activation;
use crate::routing::{Gate, Pairs, Pass, Selection};

/// The differences `ΔWₑ` of all experts from one weight matrix of the base.
pub(crate) enum Deltas {
    /// `ΔWₑ = uₑᵀ·vₑ`: u `(experts, r, out)`, v `(experts, r, in)`.
    LowRank { u: Tensor, v: Tensor },
    /// `ΔWₑ = scaleₑ · signₑ`: `signs` U8 `(experts, out, ⌈in / 8⌉)`, one bit per weight; `scales` f32 `(experts)`;
    /// `columns` is `in`.
    Signs { signs: Tensor, scales: Tensor, columns: i64 },
}

/// An MLP whose experts are whole MLPs, stored as differences from the base's MLP.
///
/// The products with the base's weights are shared: gate and up are computed once for all experts of a token. Because
/// `down` is linear, the base's is applied once, to the weighted sum of its inputs.
pub(crate) struct DeltaMlp {
    /// Selects the experts; the weights of the selected ones sum to 1.
    pub(crate) routing: Gate,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    /// The differences of gate, up and down.
    pub(crate) deltas: [Deltas; 3],
    pub(crate) activation: Activation,
}

/// Maximum total rank of all experts, as a fraction of the width, up to which they are computed in one product, with
/// zeros for experts that are not selected. Above it, gathering the tokens of each expert is cheaper.
const FUSED: f64 = 0.25;

impl Deltas {
    /// Computes `ΔWₑ·x` for rows `x` `(pairs, in)` sorted by expert, with `counts[e]` rows of expert e: `(pairs, out)`.
    fn of_pairs(&self, x: &Tensor, counts: &[i64]) -> Tensor {
        let mut start = 0;
        let mut products = Vec::new();
        for (e, &count) in (0..).zip(counts).filter(|(_, count)| **count > 0) {
            products.push(self.product(e, &x.narrow(0, start, count)));
            start += count;
        }
        Tensor::cat(&products, 0)
    }

    /// Computes `ΔWₑ·x` for one expert: `(rows, out)`.
    fn product(&self, e: i64, x: &Tensor) -> Tensor {
        match self {
            Deltas::LowRank { u, v } => x.matmul(&v.get(e).to_kind(x.kind()).tr()).matmul(&u.get(e).to_kind(x.kind())),
            Deltas::Signs { signs, scales, columns } => {
                let signs = unpacked(&signs.get(e), *columns, x.kind());
                x.matmul(&signs.tr()) * scales.get(e).to_kind(x.kind())
            }
        }
    }

    /// Computes `Σₑ gₑ·ΔWₑ·x` over the selected experts, with their weights gₑ: `(tokens, out)`.
    pub(crate) fn weighted(&self, x: &Tensor, selection: &Selection) -> Tensor {
        match self {
            Deltas::LowRank { u, v } => {
                let (u, v) = (stacked(u, x.kind()), stacked(v, x.kind()));
                let gates = selection.gates(self.experts()).repeat_interleave_self_int(self.rank(), -1, None);
                (x.matmul(&v.tr()) * gates.to_kind(x.kind())).matmul(&u)
            }
            Deltas::Signs { .. } => {
                let pairs = selection.pairs(self.experts());
                let products = self.of_pairs(&x.index_select(0, &pairs.tokens), &pairs.counts);
                pairs.sum(&(products * pairs.weights(x.kind())), x.size()[0])
            }
        }
    }

    fn experts(&self) -> i64 {
        match self {
            Deltas::LowRank { u, .. } => u.size()[0],
            Deltas::Signs { signs, .. } => signs.size()[0],
        }
    }

    /// Rank of each low-rank difference; 0 for signs.
    fn rank(&self) -> i64 {
        match self {
            Deltas::LowRank { u, .. } => u.size()[1],
            Deltas::Signs { .. } => 0,
        }
    }

    pub(crate) fn shallow_clone(&self) -> Deltas {
        match self {
            Deltas::LowRank { u, v } => Deltas::LowRank { u: u.shallow_clone(), v: v.shallow_clone() },
            Deltas::Signs { signs, scales, columns } => {
                Deltas::Signs { signs: signs.shallow_clone(), scales: scales.shallow_clone(), columns: *columns }
            }
        }
    }
}

/// Flattens `(experts, r, width)` to `(experts·r, width)`.
fn stacked(factors: &Tensor, kind: Kind) -> Tensor {
    factors.flatten(0, 1).to_kind(kind)
}

/// Unpacks signs `(out, bytes)` to ±1 `(out, columns)`.
fn unpacked(signs: &Tensor, columns: i64, kind: Kind) -> Tensor {
    let bits: Vec<f32> = (0..256 * 8).map(|i| if ((i / 8) >> (i % 8)) & 1 == 1 { 1.0 } else { -1.0 }).collect();
    let table = Tensor::from_slice(&bits).reshape([256, 8]).to_kind(kind).to_device(signs.device());
    let rows = signs.size()[0];
    table.index_select(0, &signs.flatten(0, 1).to_kind(Kind::Int)).reshape([rows, -1]).narrow(1, 0, columns)
}

impl DeltaMlp {
    /// Maps `x` `(tokens, hidden)` to `(tokens, hidden)`.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        let selection = self.routing.select(x, pass);
        let total = self.deltas[0].experts() * self.deltas[0].rank();
        match &self.deltas {
            [Deltas::LowRank { u: gate_u, v: gate_v }, Deltas::LowRank { u: up_u, v: up_v }, down]
                if total as f64 <= FUSED * x.size()[1] as f64 =>
            {
                self.fused(x, &selection, [(gate_u, gate_v), (up_u, up_v)], down, pass)
            }
            _ => self.by_expert(x, &selection.pairs(self.deltas[0].experts()), pass),
        }
    }

    /// Computes all experts in one product, with zeros for those that are not selected. This needs no synchronization
    /// with the device.
    fn fused(
        &self,
        x: &Tensor,
        selection: &Selection,
        gate_up: [(&Tensor, &Tensor); 2],
        down: &Deltas,
        pass: Pass<'_>,
    ) -> Tensor {
        let kind = x.kind();
        // (tokens, k, experts·r)
        let chosen = selection.one_hot(down.experts()).repeat_interleave_self_int(down.rank(), -1, None).to_kind(kind);
        let with = |base: &Linear, (u, v): (&Tensor, &Tensor)| {
            let ranks = x.matmul(&stacked(v, kind).tr()).unsqueeze(1) * &chosen;
            base.forward(x, pass.mode).unsqueeze(1) + ranks.matmul(&stacked(u, kind))
        };
        let [gate, up] = gate_up;
        let inner = self.activation.gated(&with(&self.gate, gate), &with(&self.up, up)); // (tokens, k, inner)
        let weighted = inner * selection.weights(kind).unsqueeze(-1);
        let sum = weighted.sum_dim_intlist([1].as_slice(), false, kind);
        let Deltas::LowRank { u, v } = down else { unreachable!("all three are of one kind") };
        let ranks = weighted.matmul(&stacked(v, kind).tr()) * chosen;
        let ranks = ranks.sum_dim_intlist([1].as_slice(), false, kind);
        self.down.forward(&sum, pass.mode) + ranks.matmul(&stacked(u, kind))
    }

    /// Computes the tokens of each expert in a separate product.
    fn by_expert(&self, x: &Tensor, pairs: &Pairs, pass: Pass<'_>) -> Tensor {
        let rows = x.index_select(0, &pairs.tokens);
        let with = |base: &Linear, deltas: &Deltas| {
            base.forward(x, pass.mode).index_select(0, &pairs.tokens) + deltas.of_pairs(&rows, &pairs.counts)
        };
        let [gate, up, down] = &self.deltas;
        let inner = self.activation.gated(&with(&self.gate, gate), &with(&self.up, up));
        let weighted = inner * pairs.weights(x.kind());
        let tokens = x.size()[0];
        let of_base = self.down.forward(&pairs.sum(&weighted, tokens), pass.mode);
        of_base + pairs.sum(&down.of_pairs(&weighted, &pairs.counts), tokens)
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        self.routing.linear().into_iter().chain([&self.gate, &self.up, &self.down]).collect()
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        self.routing.linear_mut().into_iter().chain([&mut self.gate, &mut self.up, &mut self.down]).collect()
    }

    pub(crate) fn shallow_clone(&self) -> DeltaMlp {
        DeltaMlp {
            routing: self.routing.shallow_clone(),
            gate: self.gate.shallow_clone(),
            up: self.up.shallow_clone(),
            down: self.down.shallow_clone(),
            deltas: self.deltas.each_ref().map(Deltas::shallow_clone),
            activation: self.activation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feed_forward::{Experts, FeedForward, GateUp, Mlp};
    use crate::projection::Projection;
    use crate::routing::Router;
    use cl_adapters::Mode;
    use cl_adapters::normal;

    const EXPERTS: i64 = 3;

    fn noise(name: &str, shape: &[i64]) -> Tensor {
        let n = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&normal(1, name, n)).reshape(shape)
    }

    fn linear(name: &str, weight: Tensor) -> Linear {
        Linear::new(name, weight, None)
    }

    /// A router that selects k experts, or no router if k is 0.
    fn routing(width: i64, k: i64) -> Gate {
        match k {
            0 => Gate::Gateless { name: "router".to_owned(), experts: EXPERTS },
            k => Gate::Router(Router::new(linear("router", noise("router", &[EXPERTS, width])), k)),
        }
    }

    fn pass(mode: Mode) -> Pass<'static> {
        Pass { mode, selection: None }
    }

    fn deltas(name: &str, out: i64, input: i64, rank: Option<i64>) -> Deltas {
        match rank {
            Some(rank) => Deltas::LowRank {
                u: noise(&format!("{name}u"), &[EXPERTS, rank, out]),
                v: noise(&format!("{name}v"), &[EXPERTS, rank, input]),
            },
            None => Deltas::Signs {
                signs: (noise(name, &[EXPERTS, out, (input + 7) / 8]) * 1000.0)
                    .to_kind(Kind::Int)
                    .remainder(256)
                    .to_kind(Kind::Uint8),
                scales: noise(name, &[EXPERTS]).abs(),
                columns: input,
            },
        }
    }

    /// The full weight matrix of an expert, computed element by element.
    fn whole(base: &Tensor, deltas: &Deltas, e: i64) -> Tensor {
        match deltas {
            Deltas::LowRank { u, v } => base + u.get(e).tr().matmul(&v.get(e)),
            Deltas::Signs { signs, scales, columns } => {
                let scale = scales.double_value(&[e]);
                let value = |i: i64| {
                    let (row, column) = (i / columns, i % columns);
                    let byte = signs.int64_value(&[e, row, column / 8]);
                    if byte >> (column % 8) & 1 == 1 { scale as f32 } else { -scale as f32 }
                };
                let values: Vec<f32> = (0..base.numel() as i64).map(value).collect();
                base + Tensor::from_slice(&values).reshape(base.size())
            }
        }
    }

    fn largest(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!(a.size(), b.size());
        ((a - b).abs().max() / b.abs().max()).double_value(&[])
    }

    #[test]
    fn an_mlp_equals_one_whose_experts_are_whole() {
        // Ranks below and above the limit for the fused product; widths that are not multiples of eight.
        let (hidden, inner) = (20, 13);
        let x = noise("x", &[11, hidden]);
        for (rank, k) in [
            (Some(1), 1),
            (Some(1), 2),
            (Some(1), 3),
            (Some(4), 2),
            (Some(4), 3),
            (None, 1),
            (None, 2),
            (Some(1), 0),
            (None, 0),
        ] {
            let shapes = [("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)];
            let base = shapes.map(|(name, out, input)| noise(name, &[out, input]));
            let delta = shapes.map(|(name, out, input)| deltas(name, out, input, rank));
            let expert = |e: i64| {
                let part = |i: usize| Projection::Dense(linear(shapes[i].0, whole(&base[i], &delta[i], e)));
                Mlp { gate_up: GateUp::Split(part(0), part(1)), down: part(2), activation: Activation::Silu }
            };
            let experts = (0..EXPERTS).map(expert).collect();
            let whole = FeedForward::Experts(Experts { gate: routing(hidden, k), shared: None, experts });
            let [gate, up, down] = [0, 1, 2].map(|i: usize| linear(shapes[i].0, base[i].shallow_clone()));
            let mlp =
                DeltaMlp { routing: routing(hidden, k), gate, up, down, deltas: delta, activation: Activation::Silu };
            for mode in [Mode::Eval, Mode::Train { seed: 1 }] {
                // f32 sums in another order.
                let difference = largest(&mlp.forward(&x, pass(mode)), &whole.forward(&x, pass(mode)));
                assert!(difference < 1e-5, "{rank:?} {k}: {difference}");
            }
            let eval = pass(Mode::Eval);
            let by_expert = mlp.by_expert(&x, &mlp.routing.select(&x, eval).pairs(EXPERTS), eval);
            assert!(largest(&mlp.forward(&x, eval), &by_expert) < 1e-5);
        }
    }

    #[test]
    fn a_projection_equals_one_whose_experts_are_whole_and_its_router_has_the_same_gradient() {
        let (out, input) = (9, 21);
        let x = noise("x", &[11, input]);
        for (rank, k) in [(Some(2), 1), (Some(2), 2), (None, 2), (None, 3)] {
            let base = noise("base", &[out, input]);
            let deltas = deltas("d", out, input, rank);
            let experts = (0..EXPERTS).map(|e| linear("e", whole(&base, &deltas, e))).collect();
            let whole = Projection::Experts { gate: routing(input, k), shared: None, experts };
            let ours = Projection::Deltas { gate: routing(input, k), base: linear("base", base), deltas };
            let outputs = [&ours, &whole].map(|projection| {
                let _ = projection
                    .gate()
                    .and_then(Gate::router)
                    .unwrap()
                    .linear
                    .weight
                    .dense()
                    .unwrap()
                    .set_requires_grad(true);
                let y = projection.forward(&x, pass(Mode::Train { seed: 1 }));
                (&y * noise("direction", &y.size())).sum(Kind::Float).backward();
                (y.detach(), projection.gate().and_then(Gate::router).unwrap().linear.weight.dense().unwrap().grad())
            });
            assert!(largest(&outputs[0].0, &outputs[1].0) < 1e-5, "{rank:?} {k}");
            let gradient = (&outputs[0].1 - &outputs[1].1).abs().max().double_value(&[]);
            assert!(gradient < 1e-4, "{rank:?} {k}: {gradient}");
            assert_eq!(outputs[0].1.abs().max().double_value(&[]) > 1e-3, k > 1, "one expert's gate has no gradient");
        }
    }
}
