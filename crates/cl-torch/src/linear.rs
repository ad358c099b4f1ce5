use tch::Tensor;

use crate::ffi::{self, pointer};
use crate::{TorchError, ffi::T};

/// `x·Wᵀ + b`: `x` is `[rows, in]`, `weight` `[out, in]`, `bias` `[out]`.
///
/// libtorch's `linear`, except that f32 on a CPU uses oneDNN if no gradient is needed. libtorch uses MKL there, which
/// takes at least half as much time again on processors of other vendors than Intel (docs/benchmarks.md). Both
/// accumulate in f32; results differ in the last bits.
///
/// ```
/// use cl_torch::tch::Tensor;
/// let (x, w) = (Tensor::from_slice(&[1f32, 2.0]).view([1, 2]), Tensor::from_slice(&[3f32, 4.0]).view([1, 2]));
/// assert_eq!(cl_torch::linear(&x, &w, None).double_value(&[0, 0]), 11.0);
/// ```
///
/// # Panics
/// Panics if shapes or dtypes do not fit, like [`Tensor::linear`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let mut out: T = std::ptr::null_mut();
    // SAFETY: live tensors, a null pointer for no bias; `out` is filled on success with a tensor that nobody else owns.
    unsafe {
        let bias = bias.map_or(std::ptr::null_mut(), pointer);
        let code = ffi::cl_linear(pointer(x), pointer(weight), bias, &mut out);
        TorchError::check("linear", code).unwrap_or_else(|e| panic!("{e}"));
        Tensor::from_ptr(out)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn equals_libtorchs_and_has_its_gradient() {
        let noise = |shape: &[i64], phase: f64| {
            let n: i64 = shape.iter().product();
            let t = ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + phase).sin() * 43758.5453).frac();
            t.to_kind(Kind::Float).reshape(shape)
        };
        let (w, b) = (noise(&[40, 24], 0.1), noise(&[40], 0.2));
        for rows in [0, 1, 3, 130] {
            let wide = noise(&[rows, 48], 0.3);
            for x in [noise(&[rows, 24], 0.4), wide.narrow(1, 3, 24)] {
                for bias in [None, Some(&b)] {
                    let y = linear(&x, &w, bias);
                    assert_eq!((y.size(), y.kind()), (vec![rows, 40], Kind::Float));
                    // 24 products of numbers below 1, added up in another order.
                    assert!(y.allclose(&x.linear(&w, bias), 1e-6, 1e-5, false), "{rows}");
                }
            }
            let half = noise(&[rows, 24], 0.4).to_kind(Kind::BFloat16);
            let w = w.to_kind(Kind::BFloat16);
            assert!(linear(&half, &w, None).equal(&half.linear::<&Tensor>(&w, None)));
        }
        let learned = w.detach().copy().set_requires_grad(true);
        linear(&noise(&[5, 24], 0.5), &learned, Some(&b)).sum(Kind::Float).backward();
        assert_eq!(learned.grad().size(), [40, 24]);
        let wrong = std::panic::catch_unwind(|| linear(&noise(&[5, 23], 0.5), &noise(&[40, 24], 0.1), None));
        assert!(wrong.is_err());
    }
}
