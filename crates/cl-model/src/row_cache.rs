use cl_torch::Continuation;
use cl_torch::tch::{Device, Kind, Tensor};

use crate::attention::{AttentionRule, heads_first};
use crate::tree_attention::{Mask, Weighted};

/// Number of positions by which a cache's capacity exceeds what is needed when it grows, since growing copies the
/// cache.
pub(crate) const GROWTH: i64 = 64;

/// KV cache for libtorch's operators; see [`KvCache`](crate::kv_cache::KvCache). For each layer, it stores the common
/// prefix once, `(tokens, kv_heads, head_dim)`, and the sequences after it,
/// `(sequences, capacity, kv_heads, head_dim)`, without left padding.
pub(crate) struct RowCache {
    prefix: Vec<(Tensor, Tensor)>,
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    capacity: i64,
    slots: Tensor,            // indices of this step's tokens in the flattened (sequences · capacity)
    rows: Option<PaddedRows>, // if any sequence has a number of tokens other than 1
    masks: Vec<(Option<i64>, Option<Tensor>)>, // masks of this step, by window
}

/// Index maps between the rows of concatenated sequences and the same rows padded to `(sequences, width)`.
struct PaddedRows {
    padded: Tensor, // for each padded position, the row placed there; after a sequence's end, its last row
    places: Tensor, // for each row, its padded position
}

impl PaddedRows {
    fn new(sequences: &[Continuation], device: Device) -> PaddedRows {
        let width = sequences.iter().map(|s| s.width).max().unwrap_or(0);
        let (mut padded, mut places, mut start) = (Vec::new(), Vec::new(), 0);
        for (sequence, own) in sequences.iter().map(|s| s.width).enumerate() {
            padded.extend((0..width).map(|place| start + place.min(own - 1)));
            places.extend((0..own).map(|place| sequence as i64 * width + place));
            start += own;
        }
        let [padded, places] = [padded, places].map(|rows| Tensor::from_slice(&rows).to_device(device));
        PaddedRows { padded, places }
    }

    /// Attention of padded rows to the keys and values of their sequence. `q` is `(rows, heads, head_dim)`; the result
    /// has the layout of [`Weighted::of_each_query`].
    fn attend(&self, q: &Tensor, [k, v]: [Tensor; 2], mask: &Tensor, rule: AttentionRule) -> Weighted {
        let (sequences, kv_heads) = (k.size()[0], k.size()[1]);
        let (_, heads, head_dim) = q.size3().expect("rows of heads");
        let (groups, width) = (heads / kv_heads, self.padded.size()[0] / sequences);
        let padded = q.index_select(0, &self.padded).view([sequences, width, heads, head_dim]).transpose(1, 2);
        // The query heads of a group attend to the same keys, so they are folded into the query dimension.
        let folded = padded.reshape([sequences, kv_heads, groups * width, head_dim]);
        let mask = mask.repeat([1, 1, groups, 1]);
        let part = Weighted::new(&[folded, k, v], &Mask::Additive(&mask), rule);
        part.rows(&[sequences, heads, width], &self.places)
    }
}

impl RowCache {
    pub(crate) fn new(sequences: &[Continuation], device: Device) -> RowCache {
        let capacity = sequences.iter().map(|s| s.width).max().unwrap_or(0) + GROWTH;
        let slots = places(sequences, capacity, device);
        RowCache {
            prefix: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
            capacity,
            slots,
            rows: None,
            masks: Vec::new(),
        }
    }

    /// Adds the next layer's keys and values, `(tokens, kv_heads, head_dim)`: those of the prefix, and those of all
    /// prompts after it.
    pub(crate) fn store(
        &mut self,
        prefix: Option<(Tensor, Tensor)>,
        k: &Tensor,
        v: &Tensor,
        sequences: &[Continuation],
    ) {
        self.prefix.extend(prefix);
        let (kv_heads, head_dim, count) = (k.size()[1], k.size()[2], sequences.len() as i64);
        let place = |t: &Tensor| {
            let mut room = Tensor::zeros([count * self.capacity, kv_heads, head_dim], (t.kind(), t.device()));
            let _ = room.index_copy_(0, &self.slots, t);
            room.view([count, self.capacity, kv_heads, head_dim])
        };
        let (k, v) = (place(k), place(v));
        self.keys.push(k);
        self.values.push(v);
    }

    /// Grows the cache if needed for this step's tokens.
    pub(crate) fn begin_step(&mut self, sequences: &[Continuation]) {
        let longest = longest(sequences);
        if longest > self.capacity {
            let more = (longest - self.capacity).max(GROWTH);
            for t in self.keys.iter_mut().chain(self.values.iter_mut()) {
                *t = t.constant_pad_nd([0, 0, 0, 0, 0, more]);
            }
            self.capacity += more;
        }
        self.masks.clear();
        let device = self.slots.device();
        self.slots = places(sequences, self.capacity, device);
        self.rows = sequences.iter().any(|s| s.width != 1).then(|| PaddedRows::new(sequences, device));
    }

    /// See [`KvCache::attend`](crate::kv_cache::KvCache::attend).
    pub(crate) fn attend(
        &mut self,
        index: usize,
        [q, k, v]: [&Tensor; 3],
        rule: AttentionRule,
        sequences: &[Continuation],
    ) -> Tensor {
        let longest = longest(sequences);
        let put = |cache: &Tensor, t: &Tensor| {
            let _ = cache.flatten(0, 1).index_copy_(0, &self.slots, t);
            cache.narrow(1, 0, longest).transpose(1, 2)
        };
        let (keys, values) = (put(&self.keys[index], k), put(&self.values[index], v));
        let place = self.masks.iter().position(|(window, _)| *window == rule.window).unwrap_or_else(|| {
            self.masks.push((rule.window, mask(sequences, rule.window, q.kind(), q.device())));
            self.masks.len() - 1
        });
        let mask = self.masks[place].1.as_ref();
        let own = match (&self.rows, mask) {
            (Some(rows), Some(mask)) => rows.attend(q, [keys, values], mask, rule),
            _ => {
                let mask = mask.map_or(Mask::None, Mask::Additive);
                Weighted::new(&[q.unsqueeze(2), keys, values], &mask, rule)
            }
        };
        if let Some((k, v)) = self.prefix.get(index) {
            // The queries of all sequences attend to the same keys.
            let part = Weighted::new(&[heads_first(q), heads_first(k), heads_first(v)], &Mask::None, rule);
            own.add(&part.of_each_query());
        }
        own.mean.squeeze_dim(2)
    }

    /// Keeps only the given sequences, in that order.
    pub(crate) fn keep(&mut self, sequences: &[i64]) {
        let index = Tensor::from_slice(sequences).to_device(self.slots.device());
        for t in self.keys.iter_mut().chain(self.values.iter_mut()) {
            *t = t.index_select(0, &index);
        }
    }
}

fn longest(sequences: &[Continuation]) -> i64 {
    sequences.iter().map(|s| s.length + s.width).max().unwrap_or(0)
}

/// Indices of the new tokens in the flattened (sequences · capacity).
fn places(sequences: &[Continuation], capacity: i64, device: Device) -> Tensor {
    let of_each = sequences.iter().flat_map(|s| (s.length..s.length + s.width).map(|place| place + s.slot * capacity));
    Tensor::from_slice(&of_each.collect::<Vec<i64>>()).to_device(device)
}

/// Additive mask `(sequences, 1, width, longest)`: 0 where a token attends to a key, −∞ elsewhere. `None` if nothing is
/// masked.
fn mask(sequences: &[Continuation], window: Option<i64>, kind: Kind, device: Device) -> Option<Tensor> {
    let longest = longest(sequences);
    let window = window.filter(|&w| w < longest);
    let width = sequences.iter().map(|s| s.width).max().unwrap_or(0);
    if width == 1 && window.is_none() && sequences.iter().all(|s| s.length + 1 == longest) {
        return None;
    }
    let key = Tensor::arange(longest, (Kind::Int64, device));
    let lengths: Vec<i64> = sequences.iter().map(|s| s.length).collect();
    let first = Tensor::from_slice(&lengths).to_device(device).view([-1, 1, 1]);
    let own = first + Tensor::arange(width, (Kind::Int64, device)).view([1, -1, 1]);
    let mut hidden = key.gt_tensor(&own);
    if let Some(w) = window {
        hidden = hidden.logical_or(&key.le_tensor(&(own - w)));
    }
    let mask = Tensor::zeros(hidden.size(), (kind, device)).masked_fill(&hidden, f64::NEG_INFINITY);
    Some(mask.unsqueeze(1))
}
