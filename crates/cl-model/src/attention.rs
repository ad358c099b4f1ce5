use cl_adapters::Linear;
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{TorchError, flash_varlen, packed_attention};

use crate::norm::RmsNorm;
use crate::projection::Projection;
use crate::rope::Angles;
use crate::routing::{Gate, Pass};

/// An attention block without the attention itself: projections, norms and rotary embeddings. The caller provides the
/// attention function, which determines the keys that a query attends to.
pub(crate) struct Attention {
    pub(crate) qkv: Qkv,
    pub(crate) o_proj: Projection,
    pub(crate) q_norm: Option<RmsNorm>,
    pub(crate) k_norm: Option<RmsNorm>,
    pub(crate) norm_heads: bool, // whether q_norm and k_norm normalize each head separately
    pub(crate) head_dim: i64,
    pub(crate) uses_rope: bool,
    pub(crate) rule: AttentionRule,
}

/// The input projections of attention.
#[expect(clippy::large_enum_variant, reason = "one a layer, beside weights of megabytes")]
pub(crate) enum Qkv {
    /// Separate `q_proj`, `k_proj` and `v_proj`.
    Split(Projection, Projection, Projection),
    /// Fused `qkv_proj`: the rows of q, then those of k and of v, which are equally many.
    Fused { qkv_proj: Projection, q_width: i64 },
}

/// Scaling, soft cap and window of a layer's attention scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AttentionRule {
    /// Sliding window: number of positions that a query attends to, including its own; `None` for all earlier
    /// positions.
    pub(crate) window: Option<i64>,
    /// Factor by which scores are multiplied; `None` for 1/√head_dim.
    pub(crate) scale: Option<f64>,
    /// Soft cap `c`: a score s becomes c · tanh(s / c).
    pub(crate) softcap: Option<f64>,
}

/// The attention function of one layer. Takes q `(tokens, heads, head_dim)`, k and v `(tokens, kv_heads, head_dim)` and
/// the layer's rule, and returns `(tokens, heads, head_dim)`.
pub(crate) type Attend<'a> = dyn FnMut(Tensor, Tensor, Tensor, AttentionRule) -> Tensor + 'a;

impl AttentionRule {
    /// Computes scores in f32, before any mask, from `(…, queries, head_dim)` and `(…, keys, head_dim)`.
    pub(crate) fn scores(&self, q: &Tensor, k: &Tensor) -> Tensor {
        let scores = q.matmul(&k.transpose(-2, -1)).to_kind(Kind::Float) * self.scale(q);
        match self.softcap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        }
    }

    /// The factor by which the scores of queries `(…, head_dim)` are multiplied.
    pub(crate) fn scale(&self, q: &Tensor) -> f64 {
        self.scale.unwrap_or_else(|| 1.0 / (q.size().last().copied().unwrap_or(1) as f64).sqrt())
    }
}

impl Attention {
    /// Computes the block for `x` `(tokens, hidden)`. `attend` receives q `(tokens, heads, head_dim)`, k and v
    /// `(tokens, kv_heads, head_dim)`, with rotary embeddings applied, and the layer's rule. It returns
    /// `(tokens, heads, head_dim)` for all tokens or for some of them; the result has the same tokens.
    pub(crate) fn forward(&self, x: &Tensor, angles: &Angles, pass: Pass<'_>, attend: &mut Attend<'_>) -> Tensor {
        let [q, k, v] = self.qkv.forward(x, pass);
        let heads = |t: &Tensor| t.view([-1, t.size()[1] / self.head_dim, self.head_dim]);
        let normed = |t: Tensor, norm: &Option<RmsNorm>| match norm {
            Some(norm) if self.norm_heads => norm.forward(&heads(&t)),
            Some(norm) => heads(&norm.forward(&t)),
            None => heads(&t),
        };
        let rotated = |t: Tensor| if self.uses_rope { angles.rotate(&t, self.rule.window.is_some()) } else { t };
        let q = rotated(normed(q, &self.q_norm));
        let k = rotated(normed(k, &self.k_norm));
        let y = attend(q, k, heads(&v), self.rule);
        self.o_proj.forward(&y.flatten(1, 2), pass)
    }

    pub(crate) fn norms(&self) -> impl Iterator<Item = &RmsNorm> {
        self.q_norm.iter().chain(&self.k_norm)
    }

    pub(crate) fn norms_mut(&mut self) -> impl Iterator<Item = &mut RmsNorm> {
        self.q_norm.iter_mut().chain(&mut self.k_norm)
    }

    pub(crate) fn linears(&self) -> Vec<&Linear> {
        self.projections().into_iter().flat_map(Projection::linears).collect()
    }

    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        self.projections_mut().into_iter().flat_map(Projection::linears_mut).collect()
    }

    pub(crate) fn gates(&self) -> Vec<&Gate> {
        self.projections().into_iter().filter_map(Projection::gate).collect()
    }

    pub(crate) fn gates_mut(&mut self) -> Vec<&mut Gate> {
        self.projections_mut().into_iter().filter_map(Projection::gate_mut).collect()
    }

    fn projections(&self) -> Vec<&Projection> {
        match &self.qkv {
            Qkv::Split(q, k, v) => vec![q, k, v, &self.o_proj],
            Qkv::Fused { qkv_proj, .. } => vec![qkv_proj, &self.o_proj],
        }
    }

    fn projections_mut(&mut self) -> Vec<&mut Projection> {
        match &mut self.qkv {
            Qkv::Split(q, k, v) => vec![q, k, v, &mut self.o_proj],
            Qkv::Fused { qkv_proj, .. } => vec![qkv_proj, &mut self.o_proj],
        }
    }

    pub(crate) fn shallow_clone(&self) -> Attention {
        Attention {
            qkv: self.qkv.shallow_clone(),
            o_proj: self.o_proj.shallow_clone(),
            q_norm: self.q_norm.as_ref().map(RmsNorm::shallow_clone),
            k_norm: self.k_norm.as_ref().map(RmsNorm::shallow_clone),
            ..*self
        }
    }
}

impl Qkv {
    fn forward(&self, x: &Tensor, pass: Pass<'_>) -> [Tensor; 3] {
        match self {
            Qkv::Split(q, k, v) => Projection::forward_all([q, k, v], x, pass),
            Qkv::Fused { qkv_proj, q_width } => {
                let all = qkv_proj.forward(x, pass);
                let kv_width = (all.size()[1] - q_width) / 2;
                let part = |start, width| all.narrow(1, start, width).contiguous();
                [part(0, *q_width), part(*q_width, kv_width), part(q_width + kv_width, kv_width)]
            }
        }
    }

    fn shallow_clone(&self) -> Qkv {
        match self {
            Qkv::Split(q, k, v) => Qkv::Split(q.shallow_clone(), k.shallow_clone(), v.shallow_clone()),
            Qkv::Fused { qkv_proj, q_width } => Qkv::Fused { qkv_proj: qkv_proj.shallow_clone(), q_width: *q_width },
        }
    }
}

/// Causal attention within each packed sequence.
///
/// On CUDA in half precision, one variable-length kernel computes all sequences. On a CPU in f32 or bf16, one autograd
/// node does, unless there is a window or a soft cap. Otherwise, libtorch's attention is called for each sequence. A
/// T×T mask over the whole pack is never created.
pub(crate) fn packed_causal(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i64],
    cu_tensor: &Tensor,
    rule: AttentionRule,
) -> Result<Tensor, TorchError> {
    let longest = cu_seqlens.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let rule = AttentionRule { window: rule.window.filter(|&w| w < longest), ..rule };
    let half = matches!(q.kind(), Kind::Half | Kind::BFloat16);
    let head_dim = q.size()[2];
    // What libtorch's kernel supports.
    let supported = head_dim % 8 == 0 && head_dim <= 256;
    if matches!(q.device(), Device::Cuda(_)) && half && supported && rule.softcap.is_none() {
        // The kernel's window excludes the query's own position.
        return flash_varlen(q, k, v, cu_tensor, longest, rule.scale(q), rule.window.map(|w| w - 1));
    }
    let fused = q.device() == Device::Cpu && matches!(q.kind(), Kind::Float | Kind::BFloat16);
    if fused && rule.window.is_none() && rule.softcap.is_none() {
        return Ok(packed_attention(q, k, v, cu_seqlens, rule.scale(q)));
    }
    let lengths: Vec<i64> = cu_seqlens.windows(2).map(|w| w[1] - w[0]).collect();
    // The derivative of one split is one concatenation. The derivative of a slice per sequence would fill and add
    // tensors of the size of the whole pack.
    let cut = |t: &Tensor| heads_first(t).split_with_sizes(&lengths, 2);
    let (q, k, v) = (cut(q), cut(k), cut(v));
    let parts: Vec<Tensor> = (0..lengths.len()).map(|i| causal(&q[i], &k[i], &v[i], rule)).collect();
    let y = if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::cat(&parts, 2) };
    Ok(y.squeeze_dim(0).transpose(0, 1))
}

/// `(tokens, heads, head_dim)` to `(1, heads, tokens, head_dim)`.
pub(crate) fn heads_first(t: &Tensor) -> Tensor {
    t.transpose(0, 1).unsqueeze(0)
}

fn causal(q: &Tensor, k: &Tensor, v: &Tensor, rule: AttentionRule) -> Tensor {
    let len = q.size()[2];
    let window = rule.window.filter(|&w| w < len);
    if window.is_none() && rule.softcap.is_none() {
        let grouped = q.size()[1] != k.size()[1];
        return Tensor::scaled_dot_product_attention::<&Tensor>(q, k, v, None, 0.0, true, rule.scale, grouped);
    }
    let all = Tensor::ones([len, len], (Kind::Bool, q.device()));
    let seen = all.tril(0);
    let seen = window.map_or(seen.shallow_clone(), |w| seen.logical_and(&all.triu(1 - w)));
    masked_attention(q, k, v, &seen, rule)
}

/// Attention restricted to the positions where `seen` is true, a boolean that broadcasts to
/// `(sequences, heads, queries, keys)`.
pub(crate) fn masked_attention(q: &Tensor, k: &Tensor, v: &Tensor, seen: &Tensor, rule: AttentionRule) -> Tensor {
    let groups = q.size()[1] / k.size()[1];
    if rule.softcap.is_none() {
        return Tensor::scaled_dot_product_attention(q, k, v, Some(seen), 0.0, false, rule.scale, groups > 1);
    }
    // libtorch has no attention kernel with a soft cap.
    let scores = rule.scores(q, &repeated(k, groups)).masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
    scores.softmax(-1, Kind::Float).to_kind(v.kind()).matmul(&repeated(v, groups))
}

/// Repeats every key or value head for all query heads that share it.
pub(crate) fn repeated(t: &Tensor, groups: i64) -> Tensor {
    if groups > 1 { t.repeat_interleave_self_int(groups, 1, None) } else { t.shallow_clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(shape: [i64; 3], phase: f64) -> Tensor {
        let n: i64 = shape.iter().product();
        let t = ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + phase).sin() * 43758.5453).frac();
        t.to_kind(Kind::Float).reshape(shape).set_requires_grad(true)
    }

    /// Attention as one dense softmax, with a mask for other sequences, later positions and positions outside the
    /// window.
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
        cl_torch::tch::set_num_threads(1); // products this small are faster on one thread
        let cu_seqlens = [0, 1, 8, 20, 22];
        let cu_tensor = Tensor::from_slice(&cu_seqlens).to_kind(Kind::Int);
        let mut largest = 0f64;
        for kv_heads in [4, 2, 1] {
            for window in [None, Some(1), Some(3), Some(7), Some(12), Some(100)] {
                let run = |packed: bool| {
                    let (q, k, v) =
                        (noise([22, 4, 6], 0.1), noise([22, kv_heads, 6], 0.2), noise([22, kv_heads, 6], 0.3));
                    let y = if packed {
                        let rule = AttentionRule { window, scale: None, softcap: None };
                        packed_causal(&q, &k, &v, &cu_seqlens, &cu_tensor, rule).unwrap()
                    } else {
                        dense(&q, &k, &v, &cu_seqlens, window)
                    };
                    // Arbitrary weights that differ between elements.
                    (&y * noise([22, 4, 6], 0.4).detach()).sum(Kind::Float).backward();
                    [y.detach(), q.grad(), k.grad(), v.grad()]
                };
                for (a, b) in run(true).iter().zip(&run(false)) {
                    largest = largest.max((a - b).abs().max().double_value(&[]));
                }
            }
        }
        eprintln!("largest difference {largest:.2e}");
        // Means of up to twelve f32 values below 1, summed in another order.
        assert!(largest < 2e-6, "{largest}");
    }
}
