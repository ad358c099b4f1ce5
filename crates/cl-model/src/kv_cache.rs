use cl_torch::tch::{Device, Kind, Tensor};

use crate::attention::{AttentionRule, heads_first};
use crate::tree_attention::{Mask, Weighted};

/// Keys and values of tokens that sequences begin with: per layer `(tokens, kv_heads, head_dim)`.
#[derive(Default)]
pub(crate) struct Prefix {
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
}

impl Prefix {
    /// One that layers are still to be put into.
    pub(crate) fn of_len(len: usize) -> Prefix {
        Prefix { layers: Vec::new(), len }
    }

    pub(crate) fn layer(&self, index: usize) -> Option<(&Tensor, &Tensor)> {
        self.layers.get(index).map(|(k, v)| (k, v))
    }

    /// Keeps the first `len` tokens.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len == 0 {
            *self = Prefix::default();
        } else if len < self.len {
            self.layers.iter_mut().for_each(|(k, v)| [k, v].into_iter().for_each(|t| *t = t.narrow(0, 0, len as i64)));
            self.len = len;
        }
    }

    /// Takes the next layer's keys and values: the first ones of `past`, then those of `rows`.
    pub(crate) fn store(&mut self, past: Option<(&Tensor, &Tensor)>, rows: &Tensor, k: &Tensor, v: &Tensor) {
        if self.len == 0 {
            return;
        }
        let kept = self.len as i64 - rows.size()[0];
        let place = |past: Option<&Tensor>, t: &Tensor| {
            let own = t.index_select(0, rows);
            past.map_or_else(|| own.shallow_clone(), |p| Tensor::cat(&[p.narrow(0, 0, kept), own.shallow_clone()], 0))
        };
        self.layers.push((place(past.map(|p| p.0), k), place(past.map(|p| p.1), v)));
    }
}

/// Keys and values of the sequences being generated: what all begin with once, and behind it, per layer
/// `(sequences, capacity, kv_heads, head_dim)`, each sequence's own from its beginning, so that none is padded on the left.
pub(crate) struct KvCache {
    prefix: Prefix,
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    lengths: Vec<i64>, // of each sequence, behind the prefix
    capacity: i64,
    slots: Tensor, // where this call's tokens go in the flattened (sequences · capacity)
}

/// Room that is added at a time; a step beyond it copies the cache once.
const GROWTH: i64 = 64;

impl KvCache {
    /// An empty cache for prompts that begin with `prefix` tokens in common, and have so many tokens of their own.
    pub(crate) fn for_prompts(prefix: usize, lengths: Vec<i64>, device: Device) -> KvCache {
        let capacity = lengths.iter().max().copied().unwrap_or(0) + GROWTH;
        let slots: Vec<i64> =
            lengths.iter().enumerate().flat_map(|(i, &n)| (0..n).map(move |p| i as i64 * capacity + p)).collect();
        KvCache {
            prefix: Prefix::of_len(prefix),
            keys: Vec::new(),
            values: Vec::new(),
            lengths,
            capacity,
            slots: Tensor::from_slice(&slots).to_device(device),
        }
    }

    /// What all sequences begin with.
    pub(crate) fn prefix(&mut self) -> &mut Prefix {
        &mut self.prefix
    }

    /// Takes the next layer's keys and values of all prompts behind the prefix, end to end, `(tokens, kv_heads, head_dim)`.
    pub(crate) fn store_prompt(&mut self, k: &Tensor, v: &Tensor) {
        let size = k.size();
        let shape = [self.lengths.len() as i64 * self.capacity, size[1], size[2]];
        let place = |t: &Tensor| {
            let mut room = Tensor::zeros(shape, (t.kind(), t.device()));
            let _ = room.index_copy_(0, &self.slots, t);
            room.view([self.lengths.len() as i64, self.capacity, size[1], size[2]])
        };
        let (k, v) = (place(k), place(v));
        self.keys.push(k);
        self.values.push(v);
    }

    /// Position of the token that comes next in every sequence: `(sequences)`, int64.
    pub(crate) fn next_positions(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.lengths).to_device(device) + self.prefix.len as i64
    }

    /// Makes room for one more token in every sequence.
    pub(crate) fn begin_step(&mut self) {
        if self.lengths.contains(&self.capacity) {
            for t in self.keys.iter_mut().chain(self.values.iter_mut()) {
                *t = t.constant_pad_nd([0, 0, 0, 0, 0, GROWTH]);
            }
            self.capacity += GROWTH;
        }
        let slots: Vec<i64> = self.lengths.iter().enumerate().map(|(i, &n)| i as i64 * self.capacity + n).collect();
        self.slots = Tensor::from_slice(&slots).to_device(self.slots.device());
    }

    /// Stores this step's key and value of layer `index` and attends to everything before and them.
    /// `q` is `(sequences, heads, head_dim)`; so is the result. With a prefix there is no window.
    pub(crate) fn attend(&mut self, index: usize, q: &Tensor, k: &Tensor, v: &Tensor, rule: AttentionRule) -> Tensor {
        let longest = self.lengths.iter().max().copied().unwrap_or(0) + 1;
        let put = |cache: &Tensor, t: &Tensor| {
            let _ = cache.flatten(0, 1).index_copy_(0, &self.slots, t);
            cache.narrow(1, 0, longest).transpose(1, 2)
        };
        let (keys, values) = (put(&self.keys[index], k), put(&self.values[index], v));
        let mask = self.mask(longest, rule.window, q.kind(), q.device());
        let own =
            Weighted::new(&[q.unsqueeze(2), keys, values], &mask.as_ref().map_or(Mask::None, Mask::Additive), rule);
        if let Some((k, v)) = self.prefix.layer(index) {
            // All sequences are queries to the same keys.
            let part = Weighted::new(&[heads_first(q), heads_first(k), heads_first(v)], &Mask::None, rule);
            own.add(&part.of_each_query());
        }
        own.mean.squeeze_dim(2)
    }

    /// 0 where a sequence sees a key, −∞ elsewhere, `(sequences, 1, 1, longest)`; none when all see all.
    fn mask(&self, longest: i64, window: Option<i64>, kind: Kind, device: Device) -> Option<Tensor> {
        let window = window.filter(|&w| w < longest);
        if window.is_none() && self.lengths.iter().all(|&n| n + 1 == longest) {
            return None;
        }
        let key = Tensor::arange(longest, (Kind::Int64, device));
        let own = Tensor::from_slice(&self.lengths).to_device(device).unsqueeze(-1);
        let mut hidden = key.gt_tensor(&own);
        if let Some(w) = window {
            hidden = hidden.logical_or(&key.le_tensor(&(own - w)));
        }
        let mask = Tensor::zeros(hidden.size(), (kind, device)).masked_fill(&hidden, f64::NEG_INFINITY);
        Some(mask.unsqueeze(1).unsqueeze(1))
    }

    /// Counts the tokens of this step.
    pub(crate) fn end_step(&mut self) {
        self.lengths.iter_mut().for_each(|n| *n += 1);
    }

    /// Keeps only the named sequences, in that order.
    pub(crate) fn keep(&mut self, sequences: &[i64]) {
        let index = Tensor::from_slice(sequences).to_device(self.slots.device());
        for t in self.keys.iter_mut().chain(self.values.iter_mut()) {
            *t = t.index_select(0, &index);
        }
        self.lengths = sequences.iter().map(|&i| self.lengths[i as usize]).collect();
    }
}
