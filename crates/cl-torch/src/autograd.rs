use std::ffi::c_int;

use tch::Tensor;

use crate::TorchError;
use crate::ffi::{self, pointer, pointers};

/// Runs the backward pass from `outputs` with the given output `gradients` (same shapes and dtypes) and accumulates
/// into the `.grad` of every leaf that requires a gradient.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if shapes differ or the graph has been freed.
pub fn backward(outputs: &[&Tensor], gradients: &[&Tensor]) -> Result<(), TorchError> {
    assert_eq!(outputs.len(), gradients.len(), "one gradient per output");
    // SAFETY: both arrays hold live tensors and have the stated length.
    let code = unsafe { ffi::cl_backward(pointers(outputs).as_ptr(), pointers(gradients).as_ptr(), outputs.len(), 0) };
    TorchError::check("backward", code)
}

/// Computes the gradients of `outputs` (weighted by `gradients`) with respect to `inputs`. For an input that the
/// outputs do not depend on, the result is an undefined tensor. `create_graph` makes the result differentiable.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if shapes differ or an input requires no gradient.
pub fn grad(
    outputs: &[&Tensor],
    gradients: &[&Tensor],
    inputs: &[&Tensor],
    create_graph: bool,
) -> Result<Vec<Tensor>, TorchError> {
    assert_eq!(outputs.len(), gradients.len(), "one gradient per output");
    let mut result = vec![std::ptr::null_mut(); inputs.len()];
    let flag = c_int::from(create_graph);
    // SAFETY: arrays hold live tensors; `result` has room for one tensor per input and is filled on success.
    let code = unsafe {
        ffi::cl_grad(
            pointers(outputs).as_ptr(),
            pointers(gradients).as_ptr(),
            outputs.len(),
            pointers(inputs).as_ptr(),
            inputs.len(),
            result.as_mut_ptr(),
            flag,
            flag,
        )
    };
    TorchError::check("grad", code)?;
    // SAFETY: on success every slot holds a tensor that nobody else owns.
    Ok(result.into_iter().map(|p| unsafe { Tensor::from_ptr(p) }).collect())
}

/// Sets the gradient of a leaf (same shape, dtype and device), or removes it and frees its memory if `None`.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] if the gradient does not match the leaf.
pub fn set_gradient(leaf: &Tensor, gradient: Option<&Tensor>) -> Result<(), TorchError> {
    // SAFETY: live tensors, or null, which the shim allows.
    let code = unsafe { ffi::cl_set_gradient(pointer(leaf), gradient.map_or(std::ptr::null_mut(), pointer)) };
    TorchError::check("set_gradient", code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn second_derivative_of_a_cube() {
        let x = Tensor::from_slice(&[2f64, -3.]).set_requires_grad(true);
        let y = (&x * &x) * &x;
        let one = Tensor::ones([2], (Kind::Double, tch::Device::Cpu));
        let first = grad(&[&y], &[&one], &[&x], true).unwrap();
        let second = grad(&[&first[0]], &[&one], &[&x], false).unwrap();
        assert_eq!(Vec::<f64>::try_from(&second[0]).unwrap(), [12., -18.]);
    }

    #[test]
    fn a_gradient_is_set_added_to_and_taken_away() {
        let x = Tensor::from_slice(&[1f32, 2.]).set_requires_grad(true);
        set_gradient(&x, Some(&Tensor::from_slice(&[10f32, 20.]))).unwrap();
        backward(&[&(&x * 3.)], &[&Tensor::from_slice(&[1f32, 1.])]).unwrap();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [13., 23.]);
        set_gradient(&x, None).unwrap();
        assert!(!x.grad().defined());
    }

    #[test]
    fn a_wrong_gradient_shape_is_one_line_of_error() {
        let x = Tensor::from_slice(&[1f32, 2.]).set_requires_grad(true);
        let y = &x * 2.;
        let error = backward(&[&y], &[&Tensor::from_slice(&[1f32])]).unwrap_err().to_string();
        assert!(error.starts_with("backward: ") && !error.contains('\n'), "{error}");
    }
}
