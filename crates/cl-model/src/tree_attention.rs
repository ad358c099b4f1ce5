use cl_torch::TorchError;
use cl_torch::tch::{Device, Kind, Tensor};

use crate::attention::{AttentionRule, heads_first, masked_attention, packed_causal, repeated};
use crate::prefix_tree::PrefixTree;

/// Maximum number of rows of a subtree in one masked product. Larger subtrees are split at the top, because attention
/// of all descendants to the rows of an ancestor needs no mask.
const DENSE: usize = 512;

/// Attention over the rows of a [`PrefixTree`], and over a cached past common to all rows.
///
/// Every row is a query in exactly one dense block, which contains its nearest keys. The keys of its prefixes are in
/// further blocks. Each block also returns the log-sum-exp of its scores, with which the results are combined, as in
/// FlashAttention (Dao et al., arXiv:2205.14135).
pub(crate) struct TreeAttention {
    dense_blocks: Vec<DenseBlock>,
    prefix_blocks: Vec<PrefixBlock>,
    /// Boundaries of the sequences if there are no branches, in host memory and on the device: one kernel can compute
    /// all of them.
    plain: Option<(Vec<i64>, Tensor)>,
}

/// Rows that attend to each other: causally, or with a mask (0 or −∞) that is added to the scores.
struct DenseBlock {
    start: i64,
    len: i64,
    mask: Option<Tensor>,
}

/// Queries after a shared prefix, and the keys of that prefix, to all of which they attend.
struct PrefixBlock {
    queries: (i64, i64),
    keys: (i64, i64),
}

/// Keys and values of one layer that precede all rows, `(tokens, kv_heads, head_dim)`.
pub(crate) type Past<'a> = Option<(&'a Tensor, &'a Tensor)>;

impl TreeAttention {
    pub(crate) fn new(tree: &PrefixTree, kind: Kind, device: Device) -> TreeAttention {
        let mut plan = TreeAttention { dense_blocks: Vec::new(), prefix_blocks: Vec::new(), plain: None };
        for &root in &tree.roots {
            plan.add(tree, root, kind, device);
        }
        if tree.nodes.iter().all(|n| n.children.is_empty()) {
            let ends = tree.nodes.iter().map(|n| n.own_end as i64);
            let cu_seqlens: Vec<i64> = std::iter::once(0).chain(ends).collect();
            let on_device = Tensor::from_slice(&cu_seqlens).to_kind(Kind::Int).to_device(device);
            plan.plain = Some((cu_seqlens, on_device));
        }
        plan
    }

    fn add(&mut self, tree: &PrefixTree, node: usize, kind: Kind, device: Device) {
        let n = &tree.nodes[node];
        let (start, own, all) = (n.start as i64, (n.own_end - n.start) as i64, (n.end - n.start) as i64);
        if n.children.is_empty() {
            self.dense_blocks.push(DenseBlock { start, len: own, mask: None });
        } else if all <= DENSE as i64 {
            self.dense_blocks.push(DenseBlock { start, len: all, mask: Some(mask(tree, node, kind, device)) });
        } else {
            self.dense_blocks.push(DenseBlock { start, len: own, mask: None });
            for &child in &n.children {
                self.add(tree, child, kind, device);
            }
            self.prefix_blocks.push(PrefixBlock { queries: (start + own, all - own), keys: (start, own) });
        }
    }

    /// Computes attention for `q` `(rows, heads, head_dim)`, `k` and `v` `(rows, kv_heads, head_dim)`; the result has
    /// the shape of `q`. Windows are supported only for trees without branches and without a past.
    ///
    /// # Errors
    /// Returns the errors of the kernel for packed sequences.
    pub(crate) fn forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        past: Past<'_>,
        rule: AttentionRule,
    ) -> Result<Tensor, TorchError> {
        if let (Some((cu_seqlens, on_device)), None) = (&self.plain, past) {
            return packed_causal(q, k, v, cu_seqlens, on_device, rule);
        }
        let (q, k, v) = (heads_first(q), heads_first(k), heads_first(v));
        let cut = |t: &Tensor, (start, len): (i64, i64)| t.narrow(2, start, len);
        let rows = |block: &DenseBlock| [&q, &k, &v].map(|t| cut(t, (block.start, block.len)));
        if self.prefix_blocks.is_empty() && past.is_none() {
            let parts: Vec<Tensor> =
                self.dense_blocks.iter().map(|b| masked(&rows(b), b.mask.as_ref(), rule)).collect();
            return Ok(joined(&parts).squeeze_dim(0).transpose(0, 1));
        }
        let parts: Vec<Weighted> = self.dense_blocks.iter().map(|b| Weighted::new(&rows(b), &b.mask(), rule)).collect();
        let all = Weighted::cat(&parts);
        for block in &self.prefix_blocks {
            let part =
                Weighted::new(&[cut(&q, block.queries), cut(&k, block.keys), cut(&v, block.keys)], &Mask::None, rule);
            all.narrow(block.queries).add(&part);
        }
        if let Some((k, v)) = past {
            all.add(&Weighted::new(&[q.shallow_clone(), heads_first(k), heads_first(v)], &Mask::None, rule));
        }
        Ok(all.mean.squeeze_dim(0).transpose(0, 1))
    }
}

impl DenseBlock {
    fn mask(&self) -> Mask<'_> {
        self.mask.as_ref().map_or(Mask::Causal, Mask::Additive)
    }
}

/// The keys that a query attends to.
pub(crate) enum Mask<'a> {
    /// All keys.
    None,
    /// Keys up to its own position.
    Causal,
    /// Keys whose mask entry is 0, not −∞; broadcasts to `(sequences, heads, queries, keys)`.
    Additive(&'a Tensor),
}

/// Attention to a subset of the keys: the weighted mean of the values, and the log-sum-exp of the scores.
pub(crate) struct Weighted {
    pub(crate) mean: Tensor, // (sequences, heads, queries, head_dim)
    log_sum: Tensor,         // (sequences, heads, queries), f32
}

impl Weighted {
    /// Computes attention of `q` `(sequences, heads, queries, head_dim)` to `k` and `v`
    /// `(sequences, kv_heads, keys, head_dim)`.
    pub(crate) fn new([q, k, v]: &[Tensor; 3], mask: &Mask<'_>, rule: AttentionRule) -> Weighted {
        let (heads, kv_heads) = (q.size()[1], k.size()[1]);
        let groups = heads / kv_heads;
        let alike = matches!(mask, Mask::None) || (matches!(mask, Mask::Additive(_)) && q.size()[2] == 1);
        if groups > 1 && alike {
            // All queries attend to the same keys, so the query heads of a group are folded into the query dimension.
            let size = q.size();
            let folded = q.reshape([size[0], kv_heads, groups * size[2], size[3]]);
            let part = Weighted::of_equal_heads(&folded, k, v, mask, rule);
            return Weighted {
                mean: part.mean.reshape(&size),
                log_sum: part.log_sum.reshape([size[0], heads, size[2]]),
            };
        }
        Weighted::of_equal_heads(q, &repeated(k, groups), &repeated(v, groups), mask, rule)
    }

    fn of_equal_heads(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask<'_>, rule: AttentionRule) -> Weighted {
        let (causal, mask) = match mask {
            Mask::Additive(mask) => (false, Some(*mask)),
            Mask::Causal => (true, None),
            Mask::None => (false, None),
        };
        if q.device() == Device::Cpu && rule.softcap.is_none() {
            let (mean, log_sum) =
                Tensor::internal_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, mask, rule.scale);
            return Weighted { mean, log_sum };
        }
        let scores = rule.scores(q, k);
        let scores = match (mask, causal) {
            (Some(mask), _) => scores + mask,
            (None, true) => {
                let size = scores.size();
                let ahead = Tensor::ones([size[2], size[3]], (Kind::Bool, q.device())).triu(1);
                scores.masked_fill(&ahead, f64::NEG_INFINITY)
            }
            (None, false) => scores,
        };
        let log_sum = scores.logsumexp([-1i64], false);
        let weights = (scores - log_sum.unsqueeze(-1)).exp().to_kind(v.kind());
        Weighted { mean: weights.matmul(v), log_sum }
    }

    fn cat(parts: &[Weighted]) -> Weighted {
        let of = |f: fn(&Weighted) -> &Tensor| joined(&parts.iter().map(|p| f(p).shallow_clone()).collect::<Vec<_>>());
        Weighted { mean: of(|p| &p.mean), log_sum: of(|p| &p.log_sum) }
    }

    fn narrow(&self, (start, len): (i64, i64)) -> Weighted {
        Weighted { mean: self.mean.narrow(2, start, len), log_sum: self.log_sum.narrow(2, start, len) }
    }

    /// Rearranges `(1, heads, sequences, head_dim)` to `(sequences, heads, 1, head_dim)`.
    pub(crate) fn of_each_query(&self) -> Weighted {
        Weighted {
            mean: self.mean.squeeze_dim(0).transpose(0, 1).unsqueeze(2),
            log_sum: self.log_sum.squeeze_dim(0).transpose(0, 1).unsqueeze(2),
        }
    }

    /// Selects queries from a result for `shape` = `(sequences, heads, width)`, whose leading dimensions may be
    /// arranged differently: those at `places` in the flattened (sequences · width). Returns
    /// `(places, heads, 1, head_dim)`.
    pub(crate) fn rows(&self, shape: &[i64; 3], places: &Tensor) -> Weighted {
        let [sequences, heads, width] = *shape;
        let of = |t: &Tensor| {
            let rows = t.reshape([sequences, heads, width, -1]).transpose(1, 2).reshape([sequences * width, heads, -1]);
            rows.index_select(0, places)
        };
        Weighted { mean: of(&self.mean).unsqueeze(2), log_sum: of(&self.log_sum) }
    }

    /// Combines this result in place with the attention of the same queries to other keys.
    pub(crate) fn add(&self, other: &Weighted) {
        let total = self.log_sum.logaddexp(&other.log_sum);
        let weight = |of: &Weighted| (&of.log_sum - &total).exp().unsqueeze(-1).to_kind(self.mean.kind());
        let mean = &self.mean * weight(self) + &other.mean * weight(other);
        self.mean.shallow_clone().copy_(&mean);
        self.log_sum.shallow_clone().copy_(&total);
    }
}

fn joined(parts: &[Tensor]) -> Tensor {
    if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::cat(parts, 2) }
}

fn masked([q, k, v]: &[Tensor; 3], mask: Option<&Tensor>, rule: AttentionRule) -> Tensor {
    if rule.softcap.is_some() {
        let len = q.size()[2];
        let before = || Tensor::ones([len, len], (Kind::Bool, q.device())).tril(0);
        return masked_attention(q, k, v, &mask.map_or_else(before, |m| m.eq(0.0)), rule);
    }
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, mask.is_none(), rule.scale, grouped)
}

/// Additive mask of a subtree, `(rows, rows)`: 0 where a row attends to another, −∞ elsewhere.
fn mask(tree: &PrefixTree, node: usize, kind: Kind, device: Device) -> Tensor {
    let (first, end) = (tree.nodes[node].start, tree.nodes[node].end);
    let rows = end - first;
    let mut seen = vec![f32::NEG_INFINITY; rows * rows];
    let mut open = vec![node];
    while let Some(index) = open.pop() {
        let n = &tree.nodes[index];
        open.extend(&n.children);
        for row in n.start..n.own_end {
            let line = &mut seen[(row - first) * rows..][..rows];
            line[n.start - first..=row - first].fill(0.0);
            let mut above = n.parent.filter(|_| index != node);
            while let Some(parent) = above {
                let p = &tree.nodes[parent];
                line[p.start - first..p.own_end - first].fill(0.0);
                above = p.parent.filter(|_| parent != node);
            }
        }
    }
    Tensor::from_slice(&seen).reshape([rows as i64, rows as i64]).to_kind(kind).to_device(device)
}
