use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{Continuation, KvBlocks, ScoreRule};

use crate::attention::AttentionRule;
use crate::row_cache::{GROWTH, RowCache};

/// Keys and values of a prefix that several sequences share: `(tokens, kv_heads, head_dim)` for each layer.
#[derive(Default)]
pub(crate) struct Prefix {
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
}

impl Prefix {
    /// Creates an empty prefix of `len` tokens, to which the layers are added.
    pub(crate) fn of_len(len: usize) -> Prefix {
        Prefix { layers: Vec::new(), len }
    }

    pub(crate) fn layer(&self, index: usize) -> Option<(&Tensor, &Tensor)> {
        self.layers.get(index).map(|(k, v)| (k, v))
    }

    /// Truncates the prefix to its first `len` tokens.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len == 0 {
            *self = Prefix::default();
        } else if len < self.len {
            self.layers.iter_mut().for_each(|(k, v)| [k, v].into_iter().for_each(|t| *t = t.narrow(0, 0, len as i64)));
            self.len = len;
        }
    }

    /// Adds the next layer's keys and values: the first tokens are taken from `past`, the remaining ones from `rows` of
    /// `k` and `v`.
    pub(crate) fn store(&mut self, past: Option<(&Tensor, &Tensor)>, rows: &Tensor, k: &Tensor, v: &Tensor) {
        self.layers.extend(Prefix::of_layer(self.len, past, rows, k, v));
    }

    /// One layer's keys and values of the first `len` tokens, taken from `past` and then from `rows` of `k` and `v`.
    /// `None` if `len` is 0.
    pub(crate) fn of_layer(
        len: usize,
        past: Option<(&Tensor, &Tensor)>,
        rows: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Option<(Tensor, Tensor)> {
        let kept = len as i64 - rows.size()[0];
        let place = |past: Option<&Tensor>, t: &Tensor| {
            let own = t.index_select(0, rows);
            past.map_or_else(|| own.shallow_clone(), |p| Tensor::cat(&[p.narrow(0, 0, kept), own.shallow_clone()], 0))
        };
        (len > 0).then(|| (place(past.map(|p| p.0), k), place(past.map(|p| p.1), v)))
    }
}

/// KV cache of sequences that are generated together. Keys and values of a common prefix are stored once, those after
/// it for each sequence.
pub(crate) struct KvCache {
    prefix: i64,
    /// The slot of each sequence, its number of tokens after the prefix, and its number of tokens in the current step.
    sequences: Vec<Continuation>,
    layers: Layers,
}

enum Layers {
    /// On a CPU in f32 and bf16, for each layer: the prefix, if there is one, and the sequences.
    Blocks(Vec<(Option<KvBlocks>, KvBlocks)>),
    /// Otherwise, storage for libtorch's operators.
    Rows(RowCache),
}

impl KvCache {
    /// Creates an empty cache for prompts with `prefix` common tokens, followed by `lengths` other tokens each.
    pub(crate) fn for_prompts(prefix: usize, lengths: &[i64], kind: Kind, device: Device) -> KvCache {
        let blocks = device == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16);
        KvCache::of_kind(blocks, prefix, lengths, device)
    }

    fn of_kind(blocks: bool, prefix: usize, lengths: &[i64], device: Device) -> KvCache {
        let sequence = |(slot, &width): (usize, &i64)| Continuation { slot: slot as i64, length: 0, width };
        let sequences: Vec<Continuation> = lengths.iter().enumerate().map(sequence).collect();
        let layers = if blocks { Layers::Blocks(Vec::new()) } else { Layers::Rows(RowCache::new(&sequences, device)) };
        KvCache { prefix: prefix as i64, sequences, layers }
    }

    /// Adds the next layer's keys and values, `(tokens, kv_heads, head_dim)`: those of the prefix, and those of all
    /// prompts after it. [`KvCache::end_step`] must be called after the last layer.
    pub(crate) fn store(&mut self, prefix: Option<(Tensor, Tensor)>, k: &Tensor, v: &Tensor) {
        match &mut self.layers {
            Layers::Blocks(layers) => {
                let (kv_heads, head_dim) = (k.size()[1], k.size()[2]);
                let stored = |slots: usize, capacity, k: &Tensor, v: &Tensor, sequences: &[Continuation]| {
                    let mut blocks = KvBlocks::new([slots as i64, kv_heads, head_dim], capacity, k.kind());
                    blocks.append(k, v, sequences);
                    blocks
                };
                let prefix = prefix.map(|(k, v)| {
                    let all = Continuation { slot: 0, length: 0, width: self.prefix };
                    stored(1, self.prefix, &k, &v, &[all])
                });
                let longest = self.sequences.iter().map(|s| s.width).max().unwrap_or(0);
                layers.push((prefix, stored(self.sequences.len(), longest + GROWTH, k, v, &self.sequences)));
            }
            Layers::Rows(rows) => rows.store(prefix, k, v, &self.sequences),
        }
    }

    /// Begins a step that adds the given number of tokens, at least one, to every sequence.
    pub(crate) fn begin_step(&mut self, widths: &[i64]) {
        self.sequences.iter_mut().zip(widths).for_each(|(s, width)| s.width = *width);
        match &mut self.layers {
            Layers::Blocks(layers) => {
                let longest = self.sequences.iter().map(|s| s.length + s.width).max().unwrap_or(0);
                if layers.first().is_some_and(|(_, own)| longest > own.capacity()) {
                    layers.iter_mut().for_each(|(_, own)| own.grow(longest + GROWTH));
                }
            }
            Layers::Rows(rows) => rows.begin_step(&self.sequences),
        }
    }

    /// Number of tokens in the current step.
    pub(crate) fn tokens(&self) -> i64 {
        self.sequences.iter().map(|s| s.width).sum()
    }

    /// Positions of the current step's tokens.
    pub(crate) fn positions(&self) -> impl Iterator<Item = i64> {
        self.sequences.iter().flat_map(|s| s.length..s.length + s.width).map(|place| place + self.prefix)
    }

    /// Stores the current step's keys and values of layer `index` and computes attention of every token to all earlier
    /// tokens and itself. `q` and the result are `(tokens, heads, head_dim)`. With a prefix, no window may be shorter
    /// than the sequences.
    pub(crate) fn attend(&mut self, index: usize, q: &Tensor, k: &Tensor, v: &Tensor, rule: AttentionRule) -> Tensor {
        match &mut self.layers {
            Layers::Blocks(layers) => {
                let (prefix, own) = &mut layers[index];
                let prefix = prefix.as_ref().map(|blocks| (blocks, self.prefix));
                let window = rule.window.filter(|_| prefix.is_none());
                let rule = ScoreRule { scale: rule.scale(q), softcap: rule.softcap, window };
                own.attend(q, k, v, &self.sequences, prefix, rule)
            }
            Layers::Rows(rows) => rows.attend(index, [q, k, v], rule, &self.sequences),
        }
    }

    /// Ends the step, keeping only the first `kept` of its tokens in each sequence.
    pub(crate) fn end_step(&mut self, kept: impl IntoIterator<Item = i64>) {
        self.sequences.iter_mut().zip(kept).for_each(|(s, kept)| s.length += kept);
    }

    /// Keeps only the given sequences, in that order.
    pub(crate) fn keep(&mut self, sequences: &[usize]) {
        self.sequences = sequences.iter().map(|&i| self.sequences[i]).collect();
        let slots: Vec<i64> = self.sequences.iter().map(|s| s.slot).collect();
        match &mut self.layers {
            // Slots of completed sequences are freed once they are half of all slots, because freeing copies the cache.
            Layers::Blocks(layers) if layers.first().is_some_and(|(_, own)| 2 * slots.len() as i64 > own.slots()) => {
                return;
            }
            Layers::Blocks(layers) => layers.iter_mut().for_each(|(_, own)| own.keep(&slots)),
            Layers::Rows(rows) => rows.keep(&slots),
        }
        self.sequences.iter_mut().enumerate().for_each(|(slot, s)| s.slot = slot as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KV_HEADS: i64 = 2;
    const HEADS: i64 = 6;
    const HEAD_DIM: i64 = 20;

    fn noise(rows: i64, heads: i64, phase: f64) -> Tensor {
        let numbers = Tensor::arange(rows * heads * HEAD_DIM, (Kind::Double, Device::Cpu));
        ((numbers * 12.9898 + phase).sin() * 43758.5453).frac().to_kind(Kind::Float).view([rows, heads, HEAD_DIM])
    }

    /// Runs several steps in which some tokens are not kept and some sequences end; returns the attention results.
    fn run(blocks: bool, prefix: usize, rules: [AttentionRule; 2]) -> Vec<Tensor> {
        let lengths = [3, 70, 1, 20];
        let mut cache = KvCache::of_kind(blocks, prefix, &lengths, Device::Cpu);
        for layer in 0..2 {
            let phase = f64::from(layer);
            let rows = |heads, phase| noise(lengths.iter().sum(), heads, phase);
            let before = (prefix > 0)
                .then(|| (noise(prefix as i64, KV_HEADS, phase + 0.1), noise(prefix as i64, KV_HEADS, phase + 0.2)));
            cache.store(before, &rows(KV_HEADS, phase + 0.3), &rows(KV_HEADS, phase + 0.4));
        }
        cache.end_step(lengths);
        let steps: [(&[i64], &[i64], &[usize]); 4] = [
            (&[1, 1, 1, 1], &[1, 1, 1, 1], &[0, 1, 2, 3]),
            (&[4, 1, 3, 2], &[1, 1, 3, 2], &[0, 1, 3]),
            (&[1, 66, 2], &[1, 60, 2], &[2]), // exceeds the capacity; then most slots are freed
            (&[3], &[3], &[0]),
        ];
        let mut all = Vec::new();
        for (step, (widths, kept, going)) in steps.into_iter().enumerate() {
            cache.begin_step(widths);
            let positions: Vec<i64> = cache.positions().collect();
            assert_eq!(positions.len() as i64, cache.tokens());
            assert!(positions.iter().all(|&p| p >= prefix as i64));
            for (layer, rule) in rules.into_iter().enumerate() {
                let phase = 3.0 * step as f64 + layer as f64;
                let of = |heads, phase| noise(cache.tokens(), heads, phase);
                let (q, k, v) = (of(HEADS, phase + 0.5), of(KV_HEADS, phase + 0.6), of(KV_HEADS, phase + 0.7));
                all.push(cache.attend(layer, &q, &k, &v, rule));
            }
            cache.end_step(kept.iter().copied());
            cache.keep(going);
        }
        all
    }

    #[test]
    fn both_kinds_of_storage_agree() {
        let plain = AttentionRule { window: None, scale: Some(0.4), softcap: None };
        let windows = |window| AttentionRule { window: Some(window), ..plain };
        let capped = AttentionRule { softcap: Some(1.5), ..plain };
        for (prefix, rules) in [
            (0, [plain, plain]),
            (30, [plain, capped]),
            (0, [windows(7), plain]),
            (30, [windows(1000), plain]), // a window longer than all sequences masks nothing
        ] {
            let (ours, other) = (run(true, prefix, rules), run(false, prefix, rules));
            for (step, (a, b)) in ours.iter().zip(&other).enumerate() {
                let error = (a - b).abs().max().double_value(&[]);
                // Means of up to 170 f32 values below 1, summed in another order.
                assert!(error < 2e-6, "{prefix} {rules:?} {step}: {error}");
            }
        }
    }
}
