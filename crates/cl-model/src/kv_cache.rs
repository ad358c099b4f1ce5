use cl_torch::tch::{Device, Kind, Tensor};

use crate::attention::{AttentionRule, heads_first};
use crate::tree_attention::{Mask, Weighted};

/// Keys and values of a common prefix of sequences: per layer `(tokens, kv_heads, head_dim)`.
#[derive(Default)]
pub(crate) struct Prefix {
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
}

impl Prefix {
    /// Creates an empty prefix, to which layers are added.
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

    /// Adds the next layer's keys and values: the first ones from `past`, then those of `rows`.
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

/// KV cache of the sequences being generated: the common prefix once, and after it, per layer `(sequences, capacity,
/// kv_heads, head_dim)`, each sequence from its start, without left padding.
pub(crate) struct KvCache {
    prefix: Prefix,
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    lengths: Vec<i64>, // of each sequence, behind the prefix
    capacity: i64,
    slots: Tensor,            // where this call's tokens go in the flattened (sequences · capacity)
    widths: Vec<i64>,         // this step's tokens of each sequence
    rows: Option<PaddedRows>, // where they are not all 1
}

/// Rows of concatenated sequences, and the same padded to `(sequences, width)`.
struct PaddedRows {
    padded: Tensor, // for each place the row that is put there, the sequence's last one behind its end
    places: Tensor, // for each row its place
}

impl PaddedRows {
    fn new(widths: &[i64], device: Device) -> PaddedRows {
        let width = widths.iter().max().copied().unwrap_or(0);
        let (mut padded, mut places, mut start) = (Vec::new(), Vec::new(), 0);
        for (sequence, &own) in widths.iter().enumerate() {
            padded.extend((0..width).map(|place| start + place.min(own - 1)));
            places.extend((0..own).map(|place| sequence as i64 * width + place));
            start += own;
        }
        let [padded, places] = [padded, places].map(|rows| Tensor::from_slice(&rows).to_device(device));
        PaddedRows { padded, places }
    }

    /// Attention of padded rows to the keys and values of their sequence: `q` is `(rows, heads, head_dim)`; the result
    /// has the layout of [`Weighted::of_each_query`].
    fn attend(&self, q: &Tensor, [k, v]: [Tensor; 2], mask: &Tensor, rule: AttentionRule) -> Weighted {
        let (sequences, kv_heads) = (k.size()[0], k.size()[1]);
        let (_, heads, head_dim) = q.size3().expect("rows of heads");
        let (groups, width) = (heads / kv_heads, self.padded.size()[0] / sequences);
        let padded = q.index_select(0, &self.padded).view([sequences, width, heads, head_dim]).transpose(1, 2);
        // Queries that see the same keys: the heads of a group are more of them.
        let folded = padded.reshape([sequences, kv_heads, groups * width, head_dim]);
        let mask = mask.repeat([1, 1, groups, 1]);
        let part = Weighted::new(&[folded, k, v], &Mask::Additive(&mask), rule);
        part.rows(&[sequences, heads, width], &self.places)
    }
}

/// Number of positions by which the capacity grows; growing copies the cache once.
const GROWTH: i64 = 64;

impl KvCache {
    /// Creates an empty cache for prompts with `prefix` common tokens and the given numbers of other tokens.
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
            widths: Vec::new(),
            rows: None,
        }
    }

    /// The common prefix of all sequences.
    pub(crate) fn prefix(&mut self) -> &mut Prefix {
        &mut self.prefix
    }

    /// Adds the next layer's keys and values of all prompts after the prefix, concatenated, `(tokens, kv_heads,
    /// head_dim)`.
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

    /// Makes room for more tokens in every sequence, at least one each.
    pub(crate) fn begin_step(&mut self, widths: &[i64]) {
        let longest = self.lengths.iter().zip(widths).map(|(n, w)| n + w).max().unwrap_or(0);
        if longest > self.capacity {
            let more = (longest - self.capacity).max(GROWTH);
            for t in self.keys.iter_mut().chain(self.values.iter_mut()) {
                *t = t.constant_pad_nd([0, 0, 0, 0, 0, more]);
            }
            self.capacity += more;
        }
        widths.clone_into(&mut self.widths);
        let device = self.slots.device();
        self.slots = self.each_token(|sequence, place| sequence as i64 * self.capacity + place).to_device(device);
        self.rows = widths.iter().any(|&w| w != 1).then(|| PaddedRows::new(widths, device));
    }

    /// Positions of this step's tokens: `(tokens)`, int64.
    pub(crate) fn positions(&self, device: Device) -> Tensor {
        self.each_token(|_, place| place).to_device(device) + self.prefix.len as i64
    }

    /// A number for each token of this step, computed from its sequence and position.
    fn each_token(&self, number: impl Fn(usize, i64) -> i64) -> Tensor {
        let sequences = self.lengths.iter().zip(&self.widths).enumerate();
        let numbers = sequences.flat_map(|(i, (&n, &w))| (n..n + w).map(move |place| (i, place)));
        Tensor::from_slice(&numbers.map(|(i, place)| number(i, place)).collect::<Vec<i64>>())
    }

    /// Stores this step's keys and values of layer `index`; every token attends to all earlier ones and to itself. `q`
    /// is `(tokens, heads, head_dim)`; so is the result. With a prefix, there is no window.
    pub(crate) fn attend(&mut self, index: usize, q: &Tensor, k: &Tensor, v: &Tensor, rule: AttentionRule) -> Tensor {
        let longest = self.lengths.iter().zip(&self.widths).map(|(n, w)| n + w).max().unwrap_or(0);
        let put = |cache: &Tensor, t: &Tensor| {
            let _ = cache.flatten(0, 1).index_copy_(0, &self.slots, t);
            cache.narrow(1, 0, longest).transpose(1, 2)
        };
        let (keys, values) = (put(&self.keys[index], k), put(&self.values[index], v));
        let mask = self.mask(longest, rule.window, q.kind(), q.device());
        let own = match (&self.rows, &mask) {
            (Some(rows), Some(mask)) => rows.attend(q, [keys, values], mask, rule),
            _ => {
                let mask = mask.as_ref().map_or(Mask::None, Mask::Additive);
                Weighted::new(&[q.unsqueeze(2), keys, values], &mask, rule)
            }
        };
        if let Some((k, v)) = self.prefix.layer(index) {
            // All sequences are queries to the same keys.
            let part = Weighted::new(&[heads_first(q), heads_first(k), heads_first(v)], &Mask::None, rule);
            own.add(&part.of_each_query());
        }
        own.mean.squeeze_dim(2)
    }

    /// The mask: 0 where a token attends to a key, −∞ elsewhere, `(sequences, 1, width, longest)`; `None` if nothing is
    /// masked.
    fn mask(&self, longest: i64, window: Option<i64>, kind: Kind, device: Device) -> Option<Tensor> {
        let window = window.filter(|&w| w < longest);
        let width = self.widths.iter().max().copied().unwrap_or(0);
        if width == 1 && window.is_none() && self.lengths.iter().all(|&n| n + 1 == longest) {
            return None;
        }
        let key = Tensor::arange(longest, (Kind::Int64, device));
        let first = Tensor::from_slice(&self.lengths).to_device(device).view([-1, 1, 1]);
        let own = first + Tensor::arange(width, (Kind::Int64, device)).view([1, -1, 1]);
        let mut hidden = key.gt_tensor(&own);
        if let Some(w) = window {
            hidden = hidden.logical_or(&key.le_tensor(&(own - w)));
        }
        let mask = Tensor::zeros(hidden.size(), (kind, device)).masked_fill(&hidden, f64::NEG_INFINITY);
        Some(mask.unsqueeze(1))
    }

    /// Keeps the first of this step's tokens in each sequence, as many as given.
    pub(crate) fn end_step(&mut self, kept: &[i64]) {
        self.lengths.iter_mut().zip(kept).for_each(|(n, kept)| *n += kept);
    }

    /// Keeps only the given sequences, in that order.
    pub(crate) fn keep(&mut self, sequences: &[i64]) {
        let index = Tensor::from_slice(sequences).to_device(self.slots.device());
        for t in self.keys.iter_mut().chain(self.values.iter_mut()) {
            *t = t.index_select(0, &index);
        }
        self.lengths = sequences.iter().map(|&i| self.lengths[i as usize]).collect();
    }
}
