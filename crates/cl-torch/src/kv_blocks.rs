use tch::{Device, Kind, Tensor};

use crate::TorchError;
use crate::ffi::{self, filled, pointer};

/// KV cache of several sequences on a CPU, for the attention of the tokens that continue them.
///
/// Each sequence has a slot, which holds up to [`KvBlocks::capacity`] tokens. Keys are stored in blocks of 64 tokens,
/// transposed within a block, so that the product of a query with consecutive keys reads contiguous memory.
///
/// # Example
/// ```
/// use cl_torch::tch::{Kind, Tensor};
/// use cl_torch::{Continuation, KvBlocks};
///
/// let rows = |values: &[f32]| Tensor::from_slice(values).view([-1, 1, 1]);
/// let mut stored = KvBlocks::new([1, 1, 1], 10, Kind::Float);
/// stored.append(&rows(&[1.0, 2.0]), &rows(&[1.0, 2.0]), &[Continuation { slot: 0, length: 0, width: 2 }]);
/// let next = [Continuation { slot: 0, length: 2, width: 1 }];
/// // With a scale of 0, all scores are equal: the mean of all values.
/// let y = stored.attend(&rows(&[5.0]), &rows(&[6.0]), &rows(&[6.0]), &next, None, Default::default());
/// assert_eq!(y.double_value(&[0, 0, 0]), 3.0);
/// ```
#[derive(Debug)]
pub struct KvBlocks {
    keys: Tensor,   // [slots, kv_heads, blocks, head_dim, BLOCK]
    values: Tensor, // [slots, kv_heads, blocks · BLOCK, head_dim padded to PAD]
}

/// Tokens per block; `kBlock` in csrc/kernels.h.
const BLOCK: i64 = 64;
/// Rows of values are padded to a multiple of this; `kPad` in csrc/kernels.h.
const PAD: i64 = 16;

/// New tokens that are appended to one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The sequence's slot.
    pub slot: i64,
    /// Number of cached tokens that the new ones follow; cached tokens beyond it are overwritten.
    pub length: i64,
    /// Number of new tokens.
    pub width: i64,
}

/// How attention scores are scaled, capped and masked before the softmax.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScoreRule {
    /// Factor by which scores are multiplied.
    pub scale: f64,
    /// Soft cap `c`: a score s becomes c · tanh(s / c).
    pub softcap: Option<f64>,
    /// Sliding window: number of positions that a query attends to, including its own; `None` for all earlier
    /// positions.
    pub window: Option<i64>,
}

impl KvBlocks {
    /// Creates a cache for sequences of at least `capacity` tokens. `shape` is `[slots, kv_heads, head_dim]`.
    ///
    /// # Panics
    /// Panics if `kind` is neither f32 nor bf16.
    pub fn new(shape: [i64; 3], capacity: i64, kind: Kind) -> KvBlocks {
        assert!(matches!(kind, Kind::Float | Kind::BFloat16), "expected f32 or bf16, got {kind:?}");
        let [slots, kv_heads, head_dim] = shape;
        let blocks = (capacity.max(1) + BLOCK - 1) / BLOCK;
        let width = (head_dim + PAD - 1) / PAD * PAD;
        let options = (kind, Device::Cpu);
        KvBlocks {
            keys: Tensor::zeros([slots, kv_heads, blocks, head_dim, BLOCK], options),
            values: Tensor::zeros([slots, kv_heads, blocks * BLOCK, width], options),
        }
    }

    /// Number of tokens that a slot can hold.
    pub fn capacity(&self) -> i64 {
        self.values.size()[2]
    }

    /// Number of slots.
    pub fn slots(&self) -> i64 {
        self.values.size()[0]
    }

    /// Enlarges all slots to at least `capacity` tokens.
    pub fn grow(&mut self, capacity: i64) {
        let blocks = (capacity + BLOCK - 1) / BLOCK - self.keys.size()[2];
        if blocks > 0 {
            self.keys = self.keys.constant_pad_nd([0, 0, 0, 0, 0, blocks]);
            self.values = self.values.constant_pad_nd([0, 0, 0, blocks * BLOCK]);
        }
    }

    /// Keeps only the given slots, in that order.
    pub fn keep(&mut self, slots: &[i64]) {
        let slots = Tensor::from_slice(slots);
        for t in [&mut self.keys, &mut self.values] {
            *t = t.index_select(0, &slots);
        }
    }

    /// Appends keys and values of shape `[tokens, kv_heads, head_dim]`, ordered by sequence.
    ///
    /// # Panics
    /// Panics if shapes or dtypes do not match, if a slot occurs twice, or if a slot's capacity is exceeded.
    pub fn append(&mut self, k: &Tensor, v: &Tensor, sequences: &[Continuation]) {
        let spans = Spans::new(sequences);
        // SAFETY: live tensors and slices of one length; the function checks shapes and bounds.
        let code = unsafe {
            let (slots, lengths, widths) = spans.pointers();
            let (keys, values) = (pointer(&self.keys), pointer(&self.values));
            ffi::cl_append_stored(pointer(k), pointer(v), keys, values, slots, lengths, widths, sequences.len())
        };
        TorchError::check("attention", code).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Appends keys and values of shape `[tokens, kv_heads, head_dim]` and returns the attention output of the queries
    /// `q`, both of shape `[tokens, heads, head_dim]`.
    ///
    /// Each token attends to the shared `prefix` (a cache with a single slot, and the number of tokens in it), to all
    /// earlier tokens of its sequence, and to itself. Scores and softmax weights are f32. Results do not depend on the
    /// number of threads or on the other sequences.
    ///
    /// # Panics
    /// Panics in the same cases as [`KvBlocks::append`], and if there is both a prefix and a window.
    pub fn attend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        sequences: &[Continuation],
        prefix: Option<(&KvBlocks, i64)>,
        rule: ScoreRule,
    ) -> Tensor {
        let spans = Spans::new(sequences);
        let none = std::ptr::null_mut();
        let (prefix_keys, prefix_values, length) =
            prefix.map_or((none, none, 0), |(p, length)| (pointer(&p.keys), pointer(&p.values), length));
        let (slots, lengths, widths) = spans.pointers();
        // SAFETY: live tensors, or null for none, and slices of one length; the function checks shapes and bounds, and
        // on success fills the result with a tensor that nobody else owns.
        unsafe {
            filled("attention", |y| {
                ffi::cl_attend_stored(
                    pointer(q),
                    pointer(k),
                    pointer(v),
                    pointer(&self.keys),
                    pointer(&self.values),
                    prefix_keys,
                    prefix_values,
                    length,
                    slots,
                    lengths,
                    widths,
                    sequences.len(),
                    rule.scale,
                    rule.softcap.unwrap_or(0.0),
                    rule.window.unwrap_or(0),
                    y,
                )
            })
        }
    }
}

/// The fields of several [`Continuation`]s as the three arrays that the shim takes.
struct Spans {
    slots: Vec<i64>,
    lengths: Vec<i64>,
    widths: Vec<i64>,
}

impl Spans {
    fn new(sequences: &[Continuation]) -> Spans {
        let of = |f: fn(&Continuation) -> i64| sequences.iter().map(f).collect();
        Spans { slots: of(|s| s.slot), lengths: of(|s| s.length), widths: of(|s| s.width) }
    }

    fn pointers(&self) -> (*const i64, *const i64, *const i64) {
        (self.slots.as_ptr(), self.lengths.as_ptr(), self.widths.as_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, with_every_width};

    const HEADS: i64 = 6;

    /// A sequence after the prefix: keys and values of all its tokens, and queries of the new ones.
    struct Sequence {
        length: i64,
        width: i64,
        qkv: [Tensor; 3], // [tokens, heads, head_dim]
    }

    /// Returns a number of tokens of a sequence.
    type Count = fn(&Sequence) -> i64;

    fn sequences(kv_heads: i64, d: i64, kind: Kind) -> Vec<Sequence> {
        // No cached tokens, one, sequences that end inside and at a block, several blocks; one to five new tokens.
        let sizes = [(0, 1), (1, 3), (63, 1), (64, 5), (60, 4), (150, 1), (128, 2)];
        let one = |(i, (length, width)): (usize, (i64, i64))| {
            let numbers = |heads: i64, phase: f64| {
                (noise(&[length + width, heads, d], phase + i as f64, Kind::Double) * 2.0).to_kind(kind)
            };
            Sequence { length, width, qkv: [numbers(HEADS, 0.1), numbers(kv_heads, 0.2), numbers(kv_heads, 0.3)] }
        };
        sizes.into_iter().enumerate().map(one).collect()
    }

    /// Masked softmax attention in f64, for the new tokens only.
    fn reference(s: &Sequence, prefix: Option<&[Tensor; 2]>, rule: ScoreRule) -> Tensor {
        let [q, k, v] = s.qkv.each_ref().map(|t| t.to_kind(Kind::Double));
        let groups = HEADS / k.size()[1];
        let behind = |t: Tensor, i: usize| match prefix {
            Some(p) => Tensor::cat(&[p[i].to_kind(Kind::Double), t], 0),
            None => t,
        };
        let heads = |t: Tensor| t.repeat_interleave_self_int(groups, 1, None).transpose(0, 1);
        let (k, v) = (heads(behind(k, 0)), heads(behind(v, 1)));
        let scores = q.narrow(0, s.length, s.width).transpose(0, 1).matmul(&k.transpose(1, 2)) * rule.scale;
        let scores = rule.softcap.map_or(scores.shallow_clone(), |c| (&scores / c).tanh() * c);
        let keys = k.size()[1];
        let distance = Tensor::arange_start(keys - s.width, keys, (Kind::Int64, Device::Cpu)).view([-1, 1])
            - Tensor::arange(keys, (Kind::Int64, Device::Cpu));
        let hidden = distance.lt(0).logical_or(&distance.ge(rule.window.unwrap_or(keys)));
        scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&v).transpose(0, 1)
    }

    /// Runs [`KvBlocks`] on all sequences at once: the cached tokens are appended in two parts, then the new ones.
    fn run(all: &[Sequence], prefix: Option<&[Tensor; 2]>, rule: ScoreRule) -> Vec<Tensor> {
        let [_, k, _] = &all[0].qkv;
        let (kv_heads, d, kind) = (k.size()[1], k.size()[2], k.kind());
        let n = all.len() as i64;
        let mut stored = KvBlocks::new([n, kv_heads, d], 100, kind);
        stored.grow(160);
        let before = prefix.map(|[k, v]| {
            let length = k.size()[0];
            let mut blocks = KvBlocks::new([1, kv_heads, d], length, kind);
            blocks.append(k, v, &[Continuation { slot: 0, length: 0, width: length }]);
            (blocks, length)
        });
        // Sequence i has slot n - 1 - i.
        let parts = |from: Count, to: Count| {
            let spans = all.iter().enumerate();
            spans
                .map(|(i, s)| Continuation { slot: n - 1 - i as i64, length: from(s), width: to(s) - from(s) })
                .collect::<Vec<_>>()
        };
        let rows = |which: usize, from: Count, to: Count| {
            Tensor::cat(&all.iter().map(|s| s.qkv[which].narrow(0, from(s), to(s) - from(s))).collect::<Vec<_>>(), 0)
        };
        let [zero, half, whole, end]: [Count; 4] = [|_| 0, |s| s.length / 2, |s| s.length, |s| s.length + s.width];
        for (from, to) in [(zero, half), (half, whole)] {
            stored.append(&rows(1, from, to), &rows(2, from, to), &parts(from, to));
        }
        let [q, k, v] = [0, 1, 2].map(|which| rows(which, whole, end));
        let y = stored.attend(&q, &k, &v, &parts(whole, end), before.as_ref().map(|(b, n)| (b, *n)), rule);
        y.split_with_sizes(all.iter().map(|s| s.width).collect::<Vec<_>>(), 0)
    }

    #[test]
    fn attention_to_stored_tokens_equals_a_masked_softmax_in_f64() {
        with_every_width(|bits| {
            // Sums of up to 250 f32 terms; in bf16, the result is rounded.
            for (kind, limit) in [(Kind::Float, 3e-6), (Kind::BFloat16, 6e-3)] {
                for (kv_heads, d) in [(6, 16), (2, 20), (1, 64)] {
                    let all = sequences(kv_heads, d, kind);
                    let prefix = [0.6, 0.7].map(|p| noise(&[90, kv_heads, d], p, Kind::Double).to_kind(kind));
                    let plain = ScoreRule { scale: 0.3, ..ScoreRule::default() };
                    let capped = ScoreRule { softcap: Some(2.0), ..plain };
                    let cases = [
                        (plain, None),
                        (plain, Some(&prefix)),
                        (capped, Some(&prefix)),
                        (ScoreRule { window: Some(7), ..plain }, None),
                        (ScoreRule { window: Some(1), ..capped }, None),
                    ];
                    for (rule, prefix) in cases {
                        for (s, y) in all.iter().zip(run(&all, prefix, rule)) {
                            let expected = reference(s, prefix, rule);
                            let error = (y.to_kind(Kind::Double) - &expected).abs().max() / expected.abs().max();
                            let error = error.double_value(&[]);
                            assert!(
                                error <= limit,
                                "{bits} bits {kind:?} {kv_heads} {d} {rule:?} {}: {error}",
                                s.length
                            );
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn results_depend_neither_on_the_number_of_threads_nor_on_other_sequences() {
        with_every_width(|bits| {
            let all = sequences(2, 32, Kind::Float);
            let prefix = [0.6, 0.7].map(|p| noise(&[40, 2, 32], p, Kind::Float));
            let rule = ScoreRule { scale: 0.2, ..ScoreRule::default() };
            let before = tch::get_num_threads();
            let runs = [1, 2, 3].map(|threads| {
                tch::set_num_threads(threads);
                run(&all, Some(&prefix), rule)
            });
            tch::set_num_threads(before);
            for (i, s) in all.iter().enumerate() {
                let alone = run(std::slice::from_ref(s), Some(&prefix), rule);
                assert!(runs.iter().all(|r| r[i].equal(&alone[0])), "{bits} bits, sequence {i}");
            }
        });
    }

    #[test]
    fn what_does_not_fit_panics() {
        let t = noise(&[2, 1, 8], 0.1, Kind::Float);
        let tokens = |slot, length, width| Continuation { slot, length, width };
        let attempt = |spans: &[Continuation]| {
            let mut stored = KvBlocks::new([2, 1, 8], 64, Kind::Float);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stored.append(&t, &t, spans))).is_err()
        };
        assert!(!attempt(&[tokens(1, 62, 2)]));
        for wrong in [
            vec![tokens(2, 0, 2)],
            vec![tokens(-1, 0, 2)],
            vec![tokens(0, 63, 2)],
            vec![tokens(0, 0, 1)],
            vec![tokens(0, 0, 1), tokens(0, 1, 1)],
        ] {
            assert!(attempt(&wrong), "{wrong:?}");
        }
    }
}
