//! DoRA (Liu et al., arXiv:2402.09353): direction and magnitude of each output are trained separately.

use cl_torch::linear;
use cl_torch::tch::{self, Kind, Tensor};

use crate::{Lora, Mode, Weight};

/// The trained magnitudes of a layer's outputs.
pub struct Magnitude {
    /// `m`, `[out]`, f32.
    pub vector: Tensor,
    /// `‖W‖²` of each row, `[out]`, f32.
    squares: Tensor,
}

impl Magnitude {
    /// Creates the magnitudes: the given vector, or `‖W + scaling·B·A‖` of each row, with which the layer's output is
    /// unchanged.
    pub(crate) fn new(weight: &Weight, lora: &Lora, vector: Option<Tensor>) -> Magnitude {
        let weight = weight.to_kind(Kind::Float);
        let squares = weight.square().sum_dim_intlist(1i64, false, Kind::Float);
        let vector = vector.unwrap_or_else(|| row_norms(&weight, &squares, lora));
        Magnitude { vector: vector.detach().set_requires_grad(true), squares }
    }

    /// Returns a second handle to the same tensors.
    pub(crate) fn shallow_clone(&self) -> Magnitude {
        Magnitude { vector: self.vector.shallow_clone(), squares: self.squares.shallow_clone() }
    }

    /// Computes `y = (m / ‖W + s·B·A‖) ⊙ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ) + b`; the gradient treats the norm as a constant (section
    /// 4.3 of the paper).
    ///
    /// As in PEFT, dropout applies to all terms except `x·Wᵀ`. These terms are computed in the dtype `adapters`, which
    /// is also the dtype of the result.
    pub(crate) fn forward(
        &self,
        weight: &Weight,
        bias: Option<&Tensor>,
        lora: &Lora,
        x: &Tensor,
        adapters: Kind,
        mode: Mode,
    ) -> Tensor {
        let norms = row_norms(&weight.to_kind(x.kind()), &self.squares, lora);
        let factor = (&self.vector / norms).to_kind(adapters);
        let dropped = mode.dropout(&x.to_kind(adapters), lora.dropout, lora.key);
        let narrow = linear(&dropped, &lora.a.to_kind(adapters), None) * lora.scaling;
        let update = narrow.matmul(&lora.b.to_kind(adapters).tr());
        let y = weight.linear(x, bias.map(|b| b.to_kind(x.kind())).as_ref());
        // Without dropout, PEFT derives `x·Wᵀ` from the layer's output, which may be rounded.
        let product = match (mode, bias) {
            (Mode::Train { .. }, _) if lora.dropout > 0.0 => weight.linear(&dropped, None),
            (_, Some(bias)) => &y - bias.to_kind(x.kind()),
            (_, None) => y.shallow_clone(),
        };
        y + product * (&factor - 1.0) + update * factor
    }
}

/// Computes `‖W + s·B·A‖` of each row without a graph, as `‖w‖² + 2 s w·(Aᵀb) + s² bᵀ(A·Aᵀ)b`, so that no tensor of the
/// size of W is created.
fn row_norms(weight: &Tensor, squares: &Tensor, lora: &Lora) -> Tensor {
    let _no_graph = tch::no_grad_guard();
    let (a, b) = (lora.a.to_kind(Kind::Float), lora.b.to_kind(Kind::Float));
    let sum = |x: Tensor| x.sum_dim_intlist(1i64, false, Kind::Float);
    let cross = sum(weight.to_kind(Kind::Float).matmul(&a.tr()) * &b);
    let own = sum(b.matmul(&a.matmul(&a.tr())) * &b);
    (squares + cross * (2.0 * lora.scaling) + own * (lora.scaling * lora.scaling)).clamp_min(0.0).sqrt()
}
