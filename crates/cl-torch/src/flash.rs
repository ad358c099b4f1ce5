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
