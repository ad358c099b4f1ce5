use cl_torch::tch::{Device, Kind, Tensor};

/// Keys and values of the sequences being generated: per layer `(sequences, capacity, kv_heads, head_dim)`, each sequence
/// from position 0, so that no sequence is padded on the left and positions are plain.
pub(crate) struct KvCache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    lengths: Vec<i64>,
    capacity: i64,
    slots: Tensor, // where this call's tokens go in the flattened (sequences · capacity)
}

/// Room that is added at a time; a step beyond it copies the cache once.
const GROWTH: i64 = 64;

impl KvCache {
    /// An empty cache for prompts with the given boundaries.
    pub(crate) fn for_prompts(cu_seqlens: &[i64], device: Device) -> KvCache {
        let lengths: Vec<i64> = cu_seqlens.windows(2).map(|w| w[1] - w[0]).collect();
        let capacity = lengths.iter().max().copied().unwrap_or(0) + GROWTH;
        let slots: Vec<i64> =
            lengths.iter().enumerate().flat_map(|(i, &n)| (0..n).map(move |p| i as i64 * capacity + p)).collect();
        KvCache {
            keys: Vec::new(),
            values: Vec::new(),
            lengths,
            capacity,
            slots: Tensor::from_slice(&slots).to_device(device),
        }
    }

    /// Takes the next layer's packed keys and values of all prompts, `(tokens, kv_heads, head_dim)`.
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
        Tensor::from_slice(&self.lengths).to_device(device)
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
    /// `q` is `(sequences, heads, head_dim)`; so is the result.
    pub(crate) fn attend(&mut self, index: usize, q: &Tensor, k: &Tensor, v: &Tensor, window: Option<i64>) -> Tensor {
        let longest = self.lengths.iter().max().copied().unwrap_or(0) + 1;
        let put = |cache: &Tensor, t: &Tensor| {
            let _ = cache.flatten(0, 1).index_copy_(0, &self.slots, t);
            cache.narrow(1, 0, longest).transpose(1, 2)
        };
        let (keys, values) = (put(&self.keys[index], k), put(&self.values[index], v));
        let mask = self.mask(longest, window, q.device());
        let grouped = q.size()[1] != k.size()[1];
        Tensor::scaled_dot_product_attention(&q.unsqueeze(2), &keys, &values, mask.as_ref(), 0.0, false, None, grouped)
            .squeeze_dim(2)
    }

    /// Which keys each sequence may see, `(sequences, 1, 1, longest)`; none when all may see all.
    fn mask(&self, longest: i64, window: Option<i64>, device: Device) -> Option<Tensor> {
        let window = window.filter(|&w| w < longest);
        if window.is_none() && self.lengths.iter().all(|&n| n + 1 == longest) {
            return None;
        }
        let key = Tensor::arange(longest, (Kind::Int64, device));
        let own = Tensor::from_slice(&self.lengths).to_device(device).unsqueeze(-1);
        let mut seen = key.le_tensor(&own);
        if let Some(w) = window {
            seen = seen.logical_and(&key.gt_tensor(&(own - w)));
        }
        Some(seen.unsqueeze(1).unsqueeze(1))
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
