use tch::Tensor;

use crate::TorchError;
use crate::ffi::{self, filled, pointer};

/// Causal attention over packed sequences with the variable-length flash kernel (CUDA, f16 or bf16), differentiable.
///
/// `q` is `[tokens, heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]`, `cu_seqlens` is an i32 tensor
/// `[sequences + 1]` of sequence boundaries, `max_len` is the length of the longest sequence, and `window` is the
/// number of earlier positions that a query attends to (all if `None`). Returns `[tokens, heads, head_dim]`. Source:
/// Dao, "FlashAttention-2", arXiv:2307.08691.
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

/// Causal attention over packed sequences on a CPU, as one autograd node.
///
/// Each query attends to the positions of its own sequence up to and including its own; scores are multiplied by
/// `scale` before the softmax. `q` is `[tokens, heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]` of
/// the same dtype, and `heads` is a multiple of `kv_heads`. `cu_seqlens` holds the number of tokens before each
/// sequence, followed by the total number of tokens. Returns `[tokens, heads, head_dim]`. There is no second
/// derivative.
///
/// As in flash attention, queries are computed in blocks, and the backward pass recomputes the softmax weights. Each
/// unit of work is one head of one sequence; units are distributed over the threads by their cost. Results do not
/// depend on the number of threads.
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
/// Panics if shapes, dtypes or boundaries do not match.
pub fn packed_attention(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64) -> Tensor {
    let (starts, n) = (cu_seqlens.as_ptr(), cu_seqlens.len());
    // SAFETY: live tensors and a slice with its length; the result is filled on success with a tensor that nobody else
    // owns.
    unsafe {
        filled("attention", |y| ffi::cl_packed_attention(pointer(q), pointer(k), pointer(v), starts, n, scale, y))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::testing::{noise, with_every_width};

    fn numbers(shape: &[i64], phase: f64, kind: Kind) -> Tensor {
        noise(shape, phase, Kind::Double).g_mul_scalar(2.0).to_kind(kind)
    }

    /// Masked softmax attention in f64, one sequence at a time.
    fn reference(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], scale: f64) -> Tensor {
        let groups = q.size()[1] / k.size()[1];
        let repeat = |t: &Tensor| t.repeat_interleave_self_int(groups, 1, None);
        let (k, v) = (repeat(k), repeat(v));
        let parts: Vec<Tensor> = cu_seqlens
            .windows(2)
            .map(|w| {
                let cut = |t: &Tensor| t.narrow(0, w[0], w[1] - w[0]).transpose(0, 1);
                let scores = cut(q).matmul(&cut(&k).transpose(1, 2)) * scale;
                let later = Tensor::ones([w[1] - w[0]; 2], (Kind::Bool, Device::Cpu)).triu(1);
                scores.masked_fill(&later, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&cut(&v)).transpose(0, 1)
            })
            .collect();
        Tensor::cat(&parts, 0)
    }

    type Operator<'a> = dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor + 'a;

    fn run(operator: &Operator<'_>, inputs: &[Tensor]) -> Vec<Tensor> {
        let t: Vec<Tensor> = inputs.iter().map(|t| t.detach().copy().set_requires_grad(true)).collect();
        let y = operator(&t[0], &t[1], &t[2]);
        (y.to_kind(Kind::Double) * numbers(&y.size(), 0.4, Kind::Double)).sum(Kind::Double).backward();
        vec![y.detach(), t[0].grad(), t[1].grad(), t[2].grad()]
    }

    #[test]
    fn output_and_gradients_equal_a_masked_softmax_in_f64() {
        with_every_width(check);
    }

    fn check(bits: i32) {
        // Empty and single-token sequences, sequences that end inside and at a block of queries, and one of several
        // blocks.
        let cu_seqlens = [0, 0, 1, 33, 97, 97, 170];
        // Sums of up to 170 f32 terms; in bf16, the inputs of the sums and the result are rounded, by 2^-8 each.
        for (kind, limit) in [(Kind::Float, 3e-6), (Kind::BFloat16, 1e-2)] {
            for (heads, kv_heads, d) in [(4, 4, 16), (6, 2, 20), (3, 1, 64)] {
                let (q, k) = (numbers(&[170, heads, d], 0.1, kind), numbers(&[170, kv_heads, d], 0.2, kind));
                let inputs = [q, k, numbers(&[170, kv_heads, d], 0.3, kind)];
                let wide: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(Kind::Double)).collect();
                let ours = run(&|q, k, v| packed_attention(q, k, v, &cu_seqlens, 0.3), &inputs);
                let theirs = run(&|q, k, v| reference(q, k, v, &cu_seqlens, 0.3), &wide);
                for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                    let error = (a.to_kind(Kind::Double) - b).abs().max() / b.abs().max();
                    let error = error.double_value(&[]);
                    eprintln!("{bits} bits {kind:?} {heads}/{kv_heads} {d} {i}: {error:.1e}");
                    assert!(error <= limit, "{kind:?} {heads}/{kv_heads} {d} {i}: {error}");
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        with_every_width(check_threads);
    }

    fn check_threads(bits: i32) {
        let cu_seqlens = [0, 40, 140, 170];
        let inputs = [0.1, 0.2, 0.3].map(|phase| numbers(&[170, 4, 32], phase, Kind::Float));
        let before = tch::get_num_threads();
        let mut runs = [1, 2, 3].map(|threads| {
            tch::set_num_threads(threads);
            run(&|q, k, v| packed_attention(q, k, v, &cu_seqlens, 0.2), &inputs)
        });
        tch::set_num_threads(before);
        let first = std::mem::take(&mut runs[0]);
        for run in &runs[1..] {
            assert!(first.iter().zip(run).all(|(a, b)| a.equal(b)), "{bits} bits");
        }
    }

    #[test]
    fn what_does_not_fit_panics() {
        let t = numbers(&[4, 2, 8], 0.1, Kind::Float);
        for wrong in [&[0, 3][..], &[1, 4], &[0, 3, 2, 4], &[]] {
            assert!(std::panic::catch_unwind(|| packed_attention(&t, &t, &t, wrong, 1.0)).is_err(), "{wrong:?}");
        }
        let three_heads = numbers(&[4, 3, 8], 0.1, Kind::Float);
        assert!(std::panic::catch_unwind(|| packed_attention(&three_heads, &t, &t, &[0, 4], 1.0)).is_err());
    }
}
