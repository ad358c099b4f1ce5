//! Linear layers of attention and feed-forward blocks: dense, or experts with a router.

use cl_adapters::Linear;
use cl_torch::tch::Tensor;

use crate::delta::Deltas;
use crate::routing::{Gate, Pass};

/// A projection: one linear layer, or several as experts with their own router.
pub(crate) enum Projection {
    /// One linear layer.
    Dense(Linear),
    /// Several linear layers as experts, of which the gate selects some for each token, and an optional shared expert
    /// for all tokens.
    Experts { gate: Gate, shared: Option<Linear>, experts: Vec<Linear> },
    /// The base's linear layer, and experts stored as differences from it.
    Deltas { gate: Gate, base: Linear, deltas: Deltas },
}

impl Projection {
    /// Maps `x` `(tokens, in)` to `(tokens, out)`.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        match self {
            Projection::Dense(linear) => linear.forward(x, pass.mode),
            Projection::Experts { gate, shared, experts } => {
                let selection = gate.select(x, pass);
                let y = selection.apply(x, experts.len(), |e, rows| experts[e].forward(rows, pass.mode));
                shared.as_ref().map_or_else(|| y.shallow_clone(), |shared| shared.forward(x, pass.mode) + &y)
            }
            // The weights of the selected experts sum to 1, so the base counts once.
            Projection::Deltas { gate, base, deltas } => {
                base.forward(x, pass.mode) + deltas.weighted(x, &gate.select(x, pass))
            }
        }
    }

    /// Computes [`Projection::forward`] for several projections of the same input; if all are dense, as one fused
    /// operation.
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
    use cl_adapters::{Mode, normal};
    use cl_torch::tch::{Device, Kind};

    use super::*;
    use crate::routing::Router;

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

    /// Computes the definition token by token and expert by expert, in f64.
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
            // f32 sums of four values of order 1, in another order.
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
