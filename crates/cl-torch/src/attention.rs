use tch::Tensor;

use crate::TorchError;
use crate::ffi::{self, pointer};

/// Causal attention over packed sequences with the variable-length flash kernel (CUDA, f16 or bf16), differentiable.
///
/// `q` is `[tokens, heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]`, `cu_seqlens` is an i32 tensor
/// `[sequences + 1]` of boundaries, `max_len` the longest sequence, `window` the number of earlier positions a query
/// may see (all when `None`). Returns `[tokens, heads, head_dim]`. Source: Dao, "FlashAttention-2", arXiv:2307.08691.
///
/// # Errors
/// Returns [`TorchError::Libtorch`] on a device without the kernel, such as the CPU, and for other dtypes.
pub fn flash_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &Tensor,
    max_len: i64,
    scale: f64,
    window: Option<i64>,
) -> Result<Tensor, TorchError> {
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors; `out` is filled on success with a tensor that nobody else owns.
    unsafe {
        let code = ffi::cl_flash_varlen(
            pointer(q),
            pointer(k),
            pointer(v),
            pointer(cu_seqlens),
            pointer(cu_seqlens),
            max_len,
            max_len,
            1,
            scale,
            window.unwrap_or(-1),
            &mut out,
        );
        TorchError::check("flash_varlen", code)?;
        Ok(Tensor::from_ptr(out))
    }
}

/// Causal attention over packed sequences on a CPU, as one node of the graph.
///
/// Each query attends to the positions of its own sequence up to its own, with scores multiplied by `scale` before the softmax.
/// `q` is `[tokens, heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]` of the same dtype with `heads` a multiple
/// of `kv_heads`; `cu_seqlens` holds the number of tokens before each sequence and, at the end, of all. Returns
/// `[tokens, heads, head_dim]`. There is no second derivative.
///
/// The arithmetic is that of libtorch's flash attention for one sequence after the other; several threads take whole sequences
/// where that divides the work evenly. Results do not depend on the number of threads.
///
/// ```
/// use cl_torch::tch::{Kind, Tensor};
/// let t = Tensor::from_slice(&[1f32, 2.0, 4.0]).view([3, 1, 1]);
/// // With a scale of 0, all scores are equal: means over one's own sequence so far.
/// let y = cl_torch::packed_attention(&t, &t, &t, &[0, 2, 3], 0.0);
/// assert_eq!(Vec::<f32>::try_from(y.view([3]))?, [1.0, 1.5, 4.0]);
/// # Ok::<(), cl_torch::tch::TchError>(())
/// ```
///
/// # Panics
/// Panics if shapes, dtypes or boundaries do not fit.
pub fn packed_attention(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors and a slice with its length; `out` is filled on success with a tensor that nobody else owns.
    unsafe {
        let code = ffi::cl_packed_attention(
            pointer(q),
            pointer(k),
            pointer(v),
            cu_seqlens.as_ptr(),
            cu_seqlens.len(),
            scale,
            &mut out,
        );
        TorchError::check("attention", code).unwrap_or_else(|e| panic!("{e}"));
        Tensor::from_ptr(out)
    }
}
