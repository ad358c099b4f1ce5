use tch::Tensor;

use crate::TorchError;
use crate::ffi::{self, pointer, pointers};

/// Hyperparameters of one AdamW step, with PyTorch's names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Runs one step of AdamW on all tensors at once, in place, with libtorch's fused kernel (CPU and CUDA).
///
/// Parameters, gradients and both moments have the same shape and dtype; `steps` are f32 scalars with the number of
/// this step, counted from 1. Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if dtypes or shapes differ.
pub fn fused_adamw(
    params: &[&Tensor],
    grads: &[&Tensor],
    exp_avg: &[&Tensor],
    exp_avg_sq: &[&Tensor],
    steps: &[&Tensor],
    settings: AdamW,
) -> Result<(), TorchError> {
    let n = params.len();
    assert!([grads.len(), exp_avg.len(), exp_avg_sq.len(), steps.len()].iter().all(|&l| l == n));
    // SAFETY: five arrays of `n` live tensors.
    let code = unsafe {
        ffi::cl_fused_adamw(
            pointers(params).as_ptr(),
            pointers(grads).as_ptr(),
            pointers(exp_avg).as_ptr(),
            pointers(exp_avg_sq).as_ptr(),
            pointers(steps).as_ptr(),
            n,
            settings.lr,
            settings.beta1,
            settings.beta2,
            settings.weight_decay,
            settings.eps,
        )
    };
    TorchError::check("fused_adamw", code)
}

/// Returns the L2 norm over all elements of all tensors as an f32 scalar on their device, without a copy to the host.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if the list is empty or devices differ.
pub fn global_norm(tensors: &[&Tensor]) -> Result<Tensor, TorchError> {
    let mut result = std::ptr::null_mut();
    // SAFETY: live tensors; `result` is filled on success with a tensor that nobody else owns.
    unsafe {
        TorchError::check("global_norm", ffi::cl_global_norm(pointers(tensors).as_ptr(), tensors.len(), &mut result))?;
        Ok(Tensor::from_ptr(result))
    }
}

/// Multiplies every tensor in place by a scalar tensor on the same device.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if devices differ.
pub fn foreach_mul_(tensors: &[&Tensor], factor: &Tensor) -> Result<(), TorchError> {
    // SAFETY: live tensors.
    let code = unsafe { ffi::cl_foreach_mul_(pointers(tensors).as_ptr(), tensors.len(), pointer(factor)) };
    TorchError::check("foreach_mul_", code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn adamw_matches_torch_optim() {
        // p = torch.tensor([1., -2., 3.]); o = torch.optim.AdamW([p], lr=0.1, weight_decay=0.01)
        // for g in ([1., 2., -3.], [0.5, -1., 0.]): p.grad = torch.tensor(g); o.step()
        // p -> [0.8049, -2.1225, 3.1609]  (rounded to 4 digits; torch 2.11.0)
        let p = Tensor::from_slice(&[1f32, -2., 3.]);
        let (m, v) = (p.zeros_like(), p.zeros_like());
        let mut step = Tensor::zeros([], (Kind::Float, Device::Cpu));
        let settings = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
        for g in [[1f32, 2., -3.], [0.5, -1., 0.]] {
            let _ = step.g_add_scalar_(1.);
            fused_adamw(&[&p], &[&Tensor::from_slice(&g)], &[&m], &[&v], &[&step], settings).unwrap();
        }
        for (a, b) in Vec::<f32>::try_from(&p).unwrap().iter().zip([0.8049, -2.1225, 3.1609]) {
            assert!((a - b).abs() < 1e-4, "{a} against {b}");
        }
    }

    #[test]
    fn global_norm_spans_tensors() {
        let (a, b) = (Tensor::from_slice(&[3f32]), Tensor::from_slice(&[0f32, 4.]));
        assert_eq!(f32::try_from(global_norm(&[&a, &b]).unwrap()).unwrap(), 5.);
        foreach_mul_(&[&a, &b], &Tensor::from(0.5f32)).unwrap();
        assert_eq!(Vec::<f32>::try_from(&b).unwrap(), [0., 2.]);
    }
}
