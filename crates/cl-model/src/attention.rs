use cl_adapters::{Linear, Mode};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{TorchError, flash_varlen};

use crate::norm::RmsNorm;
use crate::rope::Angles;

/// The projections around attention; which keys a query sees is decided by who calls.
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    pub(crate) q_norm: Option<RmsNorm>,
    pub(crate) k_norm: Option<RmsNorm>,
    pub(crate) head_dim: i64,
    pub(crate) uses_rope: bool,
    pub(crate) window: Option<i64>,
}

impl Attention {
    /// `x` is `(tokens, hidden)`; `attend` gets q `(tokens, heads, head_dim)`, k and v `(tokens, kv_heads, head_dim)`,
    /// already rotated, and the layer's window, and returns `(tokens, heads, head_dim)`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        mode: Mode,
        attend: &mut dyn FnMut(Tensor, Tensor, Tensor, Option<i64>) -> Tensor,
    ) -> Tensor {
        let heads = |t: Tensor| t.view([-1, t.size()[1] / self.head_dim, self.head_dim]);
        let normed =
            |t: Tensor, norm: &Option<RmsNorm>| norm.as_ref().map_or_else(|| t.shallow_clone(), |n| n.forward(&t));
        let rotated = |t: Tensor| if self.uses_rope { angles.rotate(&t) } else { t };
        let q = rotated(normed(heads(self.q_proj.forward(x, mode)), &self.q_norm));
        let k = rotated(normed(heads(self.k_proj.forward(x, mode)), &self.k_norm));
        let v = heads(self.v_proj.forward(x, mode));
        let y = attend(q, k, v, self.window);
        self.o_proj.forward(&y.flatten(1, 2), mode)
    }

    pub(crate) fn shallow_clone(&self) -> Attention {
        Attention {
            q_proj: self.q_proj.shallow_clone(),
            k_proj: self.k_proj.shallow_clone(),
            v_proj: self.v_proj.shallow_clone(),
            o_proj: self.o_proj.shallow_clone(),
            q_norm: self.q_norm.as_ref().map(RmsNorm::shallow_clone),
            k_norm: self.k_norm.as_ref().map(RmsNorm::shallow_clone),
            ..*self
        }
    }
}

/// Causal attention inside each packed sequence.
///
/// On CUDA in half precision one variable-length kernel does all. Elsewhere each sequence is one call of libtorch's own
/// attention, which needs no mask: the T×T mask over a whole pack never exists.
pub(crate) fn packed_causal(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i64],
    cu_tensor: &Tensor,
    window: Option<i64>,
) -> Result<Tensor, TorchError> {
    let scale = 1.0 / (q.size()[2] as f64).sqrt();
    let longest = cu_seqlens.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let window = window.filter(|&w| w < longest);
    if matches!(q.device(), Device::Cuda(_)) && matches!(q.kind(), Kind::Half | Kind::BFloat16) {
        // The kernel counts the earlier positions a query sees, without itself.
        return flash_varlen(q, k, v, cu_tensor, longest, scale, window.map(|w| w - 1));
    }
    let (q, k, v) = (heads_first(q), heads_first(k), heads_first(v));
    let parts: Vec<Tensor> = cu_seqlens
        .windows(2)
        .map(|w| {
            let cut = |t: &Tensor| t.narrow(2, w[0], w[1] - w[0]);
            causal(&cut(&q), &cut(&k), &cut(&v), window)
        })
        .collect();
    let y = if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::cat(&parts, 2) };
    Ok(y.squeeze_dim(0).transpose(0, 1))
}

/// `(tokens, heads, head_dim)` to `(1, heads, tokens, head_dim)`.
pub(crate) fn heads_first(t: &Tensor) -> Tensor {
    t.transpose(0, 1).unsqueeze(0)
}

fn causal(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<i64>) -> Tensor {
    let len = q.size()[2];
    let grouped = q.size()[1] != k.size()[1];
    match window.filter(|&w| w < len) {
        None => Tensor::scaled_dot_product_attention::<&Tensor>(q, k, v, None, 0.0, true, None, grouped),
        Some(w) => {
            let all = Tensor::ones([len, len], (Kind::Bool, q.device()));
            let mask = all.tril(0).logical_and(&all.triu(1 - w));
            Tensor::scaled_dot_product_attention(q, k, v, Some(&mask), 0.0, false, None, grouped)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(shape: [i64; 3], phase: f64) -> Tensor {
        let n: i64 = shape.iter().product();
        let t = ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + phase).sin() * 43758.5453).frac();
        t.to_kind(Kind::Float).reshape(shape).set_requires_grad(true)
    }

    /// Softmax over one dense matrix with everything masked that lies in another sequence, ahead, or behind the window.
    fn dense(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[i64], window: Option<i64>) -> Tensor {
        let (tokens, heads, d) = q.size3().unwrap();
        let repeat = heads / k.size()[1];
        let (k, v) = (k.repeat_interleave_self_int(repeat, 1, None), v.repeat_interleave_self_int(repeat, 1, None));
        let mut seen = vec![false; (tokens * tokens) as usize];
        for w in cu_seqlens.windows(2) {
            for i in w[0]..w[1] {
                for j in w[0]..=i {
                    seen[(i * tokens + j) as usize] = window.is_none_or(|w| i - j < w);
                }
            }
        }
        let hidden = Tensor::from_slice(&seen).reshape([tokens, tokens]).logical_not();
        let scores = Tensor::einsum("qhd,khd->hqk", &[q, &k], None::<&[i64]>) / (d as f64).sqrt();
        let p = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float);
        Tensor::einsum("hqk,khd->qhd", &[&p, &v], None::<&[i64]>)
    }

    #[test]
    fn packed_attention_and_its_gradients_equal_a_dense_block_diagonal_mask() {
        cl_torch::tch::set_num_threads(1); // products this small are quicker on one
        let cu_seqlens = [0, 1, 8, 20, 22];
        let cu_tensor = Tensor::from_slice(&cu_seqlens).to_kind(Kind::Int);
        let mut largest = 0f64;
        for kv_heads in [4, 2, 1] {
            for window in [None, Some(1), Some(3), Some(7), Some(12), Some(100)] {
                let run = |packed: bool| {
                    let (q, k, v) =
                        (noise([22, 4, 6], 0.1), noise([22, kv_heads, 6], 0.2), noise([22, kv_heads, 6], 0.3));
                    let y = if packed {
                        packed_causal(&q, &k, &v, &cu_seqlens, &cu_tensor, window).unwrap()
                    } else {
                        dense(&q, &k, &v, &cu_seqlens, window)
                    };
                    // Any weights that differ from element to element.
                    (&y * noise([22, 4, 6], 0.4).detach()).sum(Kind::Float).backward();
                    [y.detach(), q.grad(), k.grad(), v.grad()]
                };
                for (a, b) in run(true).iter().zip(&run(false)) {
                    largest = largest.max((a - b).abs().max().double_value(&[]));
                }
            }
        }
        eprintln!("largest difference {largest:.2e}");
        // Means of up to twelve f32 values below 1, in another order of sums.
        assert!(largest < 2e-6, "{largest}");
    }
}
