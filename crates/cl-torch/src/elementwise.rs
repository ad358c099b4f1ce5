use tch::{Device, Kind, Tensor};

use crate::ffi::{self, filled, pointer};

/// `silu(gate) · up` with `silu(g) = g / (1 + e⁻ᵍ)`, for tensors of one shape and dtype.
///
/// On a CPU in f32 or bf16, the forward and the backward pass are fused into one pass over memory each; other devices
/// and dtypes use libtorch's operators. In bf16, `silu(gate)` is rounded before the product, as libtorch's operators
/// do. There is no second derivative.
///
/// ```
/// use cl_torch::tch::Tensor;
/// let y = cl_torch::silu_mul(&Tensor::from(0.5f32), &Tensor::from(2.0f32));
/// assert!((y.double_value(&[]) - 0.5 / (1.0 + (-0.5f64).exp()) * 2.0).abs() < 1e-6);
/// ```
///
/// # Panics
/// Panics if shapes or dtypes do not match.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Tensor {
    if !is_fused(gate) {
        return gate.silu() * up;
    }
    // SAFETY: live tensors; the result is filled on success with a tensor that nobody else owns.
    unsafe { filled("silu_mul", |y| ffi::cl_silu_mul(pointer(gate), pointer(up), y)) }
}

/// Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv:1910.07467):
/// `weight · x / √(mean(x²) + eps)`.
///
/// `x` is `[…, n]` and `weight` is `[n]`, in the dtype of `x` or in f32; the result has the dtype of `x`.
/// `x / √(mean(x²) + eps)` is computed in f32 and rounded to the dtype of `weight` before it is multiplied by `weight`.
/// The implementations of model families differ in this dtype.
///
/// On a CPU in f32 or bf16, the forward and the backward pass are fused into one pass over memory each; other devices
/// and dtypes use libtorch's operators. There is no second derivative.
///
/// ```
/// use cl_torch::tch::Tensor;
/// let (x, weight) = (Tensor::from_slice(&[3f32, 4.0]), Tensor::from_slice(&[1f32, 2.0]));
/// let y = Vec::<f32>::try_from(cl_torch::rms_norm(&x, &weight, 0.0))?;
/// assert!((y[0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6 && (y[1] - 8.0 / 12.5f32.sqrt()).abs() < 1e-6);
/// # Ok::<(), cl_torch::tch::TchError>(())
/// ```
///
/// # Panics
/// Panics if shapes or dtypes do not match.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    if is_fused(x) {
        // SAFETY: live tensors; the result is filled on success with a tensor that nobody else owns.
        return unsafe { filled("rms_norm", |y| ffi::cl_rms_norm(pointer(x), pointer(weight), eps, y)) };
    }
    let kind = x.kind();
    if kind == Kind::Float {
        return x.internal_fused_rms_norm(weight.size(), Some(weight), eps).0;
    }
    let wide = x.to_kind(Kind::Float);
    let mean_square = (&wide * &wide).mean_dim(-1, true, Kind::Float);
    let quotient: Tensor = wide * (mean_square + eps).rsqrt();
    (quotient.to_kind(weight.kind()) * weight).to_kind(kind)
}

/// Applies rotary position embeddings to every head (Su et al., arXiv:2104.09864).
///
/// `x` is `[tokens, heads, n]`, `cos` and `sin` are `[tokens, 1, half]` in the dtype of `x`, with `2·half ≤ n`. Element
/// `i` is paired with element `i + half` (the layout of Hugging Face checkpoints); elements from `2·half` on are not
/// rotated.
///
/// On a CPU in f32 or bf16, the forward and the backward pass are fused into one pass over memory each; other devices
/// and dtypes use libtorch's operators. There is no second derivative.
///
/// ```
/// use cl_torch::tch::Tensor;
/// let x = Tensor::from_slice(&[1f32, 2.0, 9.0]).view([1, 1, 3]);
/// let (cos, sin) = (Tensor::from_slice(&[0f32]).view([1, 1, 1]), Tensor::from_slice(&[1f32]).view([1, 1, 1]));
/// assert_eq!(Vec::<f32>::try_from(cl_torch::rotate(&x, &cos, &sin).view([3]))?, [-2.0, 1.0, 9.0]);
/// # Ok::<(), cl_torch::tch::TchError>(())
/// ```
///
/// # Panics
/// Panics if shapes or dtypes do not match.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    if is_fused(x) {
        // SAFETY: live tensors; the result is filled on success with a tensor that nobody else owns.
        return unsafe { filled("rotate", |y| ffi::cl_rotate(pointer(x), pointer(cos), pointer(sin), y)) };
    }
    let (half, width) = (cos.size()[2], x.size()[2]);
    let (x1, x2) = (x.narrow(2, 0, half), x.narrow(2, half, half));
    let mut parts = vec![&x1 * cos - &x2 * sin, &x2 * cos + &x1 * sin];
    if 2 * half < width {
        parts.push(x.narrow(2, 2 * half, width - 2 * half));
    }
    Tensor::cat(&parts, -1)
}

fn is_fused(x: &Tensor) -> bool {
    x.device() == Device::Cpu && matches!(x.kind(), Kind::Float | Kind::BFloat16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, with_every_width};

    fn numbers(shape: &[i64], phase: f64, kind: Kind) -> Tensor {
        noise(shape, phase, Kind::Double).g_mul_scalar(6.0).to_kind(kind)
    }

    type Operator<'a> = dyn Fn(&[Tensor]) -> Tensor + 'a;

    /// Returns the output of `operator` and the gradients of its inputs.
    fn run(operator: &Operator<'_>, inputs: &[Tensor]) -> Vec<Tensor> {
        let leaves: Vec<Tensor> = inputs.iter().map(|t| t.detach().copy().set_requires_grad(true)).collect();
        let y = operator(&leaves);
        let weights = numbers(&y.size(), 0.9, Kind::Float);
        (y.to_kind(Kind::Float) * weights).sum(Kind::Float).backward();
        std::iter::once(y.detach()).chain(leaves.iter().map(Tensor::grad)).collect()
    }

    /// Largest difference from the same computation in f64, relative to the largest element.
    fn errors(ours: &Operator<'_>, theirs: &Operator<'_>, inputs: &[Tensor]) -> Vec<f64> {
        let wide: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(Kind::Double)).collect();
        let (ours, theirs) = (run(ours, inputs), run(theirs, &wide));
        let error = |(a, b): (&Tensor, &Tensor)| {
            let largest = b.abs().max().double_value(&[]);
            (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]) / largest
        };
        ours.iter().zip(&theirs).map(error).collect()
    }

    /// Checks every operator; widths are no multiple of the vector width, and there are enough rows for several
    /// threads.
    fn check(kind: Kind, limit: f64) {
        let (gate, up) = (numbers(&[70, 333], 0.1, kind), numbers(&[70, 333], 0.2, kind));
        let silu = errors(&|t| silu_mul(&t[0], &t[1]), &|t| t[0].silu() * &t[1], &[gate, up]);
        let (x, weight) = (numbers(&[70, 3, 111], 0.3, kind), numbers(&[111], 0.4, kind));
        let norm = errors(
            &|t| rms_norm(&t[0], &t[1], 1e-5),
            &|t| &t[0] * ((&t[0] * &t[0]).mean_dim(-1, true, Kind::Double) + 1e-5).rsqrt() * &t[1],
            &[x, weight],
        );
        let angle = numbers(&[70, 1, 20], 0.5, Kind::Double);
        let (cos, sin) = (angle.cos().to_kind(kind), angle.sin().to_kind(kind));
        let turned = |x: &Tensor| {
            let (cos, sin) = (cos.to_kind(x.kind()), sin.to_kind(x.kind()));
            if x.kind() == kind { rotate(x, &cos, &sin) } else { rotate_by_hand(x, &cos, &sin) }
        };
        let rotation = errors(&|t| turned(&t[0]), &|t| turned(&t[0]), &[numbers(&[70, 3, 45], 0.6, kind)]);
        for (name, errors) in [("silu_mul", silu), ("rms_norm", norm), ("rotate", rotation)] {
            eprintln!("{name} {kind:?} {errors:?}");
            assert!(errors.iter().all(|e| *e <= limit), "{name} {kind:?} {errors:?}");
        }
    }

    fn rotate_by_hand(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let (a, b, rest) = (x.narrow(2, 0, 20), x.narrow(2, 20, 20), x.narrow(2, 40, 5));
        Tensor::cat(&[&a * cos - &b * sin, &b * cos + &a * sin, rest], -1)
    }

    #[test]
    fn operators_and_their_gradients_equal_the_formulas_in_f64() {
        with_every_width(|bits| {
            eprintln!("vectors of {bits} bits");
            // A few roundings of 6e-8 each; the gradient of the weight sums over 210 rows.
            check(Kind::Float, 2e-6);
            // Two roundings of up to 2^-8 each.
            check(Kind::BFloat16, 8e-3);
        });
    }

    #[test]
    fn bf16_rounds_where_libtorchs_operators_do() {
        with_every_width(|_| check_roundings());
    }

    fn check_roundings() {
        let kind = Kind::BFloat16;
        let (gate, up) = (numbers(&[70, 333], 0.1, kind), numbers(&[70, 333], 0.2, kind));
        assert!(silu_mul(&gate, &up).equal(&(gate.silu() * &up)));
        let (x, weight) = (numbers(&[70, 111], 0.3, kind), numbers(&[111], 0.4, kind));
        for weight in [weight.to_kind(Kind::Float), weight] {
            let wide = x.to_kind(Kind::Float);
            let quotient = &wide * ((&wide * &wide).mean_dim(-1, true, Kind::Float) + 1e-5).rsqrt();
            let expected = (quotient.to_kind(weight.kind()) * &weight).to_kind(kind);
            // The mean is summed in another order, so a quotient near the midpoint of two bf16 values can round
            // differently.
            let differ = rms_norm(&x, &weight, 1e-5).ne_tensor(&expected).to_kind(Kind::Float).mean(Kind::Float);
            assert!(differ.double_value(&[]) < 1e-3, "{differ:?}");
        }
        let angle = numbers(&[70, 1, 20], 0.5, Kind::Double);
        let (x, cos, sin) = (numbers(&[70, 3, 45], 0.6, kind), angle.cos().to_kind(kind), angle.sin().to_kind(kind));
        assert!(rotate(&x, &cos, &sin).equal(&rotate_by_hand(&x, &cos, &sin)));
    }

    #[test]
    fn extreme_inputs_stay_finite_or_become_what_libtorch_gives() {
        with_every_width(|_| check_extremes());
    }

    fn check_extremes() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let gate = Tensor::from_slice(&[-1e30f32, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]).to_kind(kind);
            let up = gate.ones_like();
            assert!(silu_mul(&gate, &up).allclose(&gate.silu(), 1e-2, 1e-30, false), "{kind:?}");
            let nan = Tensor::from_slice(&[f32::NAN, 1.0]).to_kind(kind);
            assert!(silu_mul(&nan, &nan).double_value(&[0]).is_nan());
            assert!(rms_norm(&nan, &nan.ones_like(), 1e-5).double_value(&[1]).is_nan());
            let empty = Tensor::zeros([0, 4], (kind, Device::Cpu));
            assert_eq!(rms_norm(&empty, &Tensor::ones([4], (kind, Device::Cpu)), 1e-5).size(), [0, 4]);
        }
        let wrong = std::panic::catch_unwind(|| {
            silu_mul(&numbers(&[2, 3], 0.1, Kind::Float), &numbers(&[3, 2], 0.1, Kind::Float))
        });
        assert!(wrong.is_err());
    }
}
