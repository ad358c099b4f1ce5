//! Writes small GGUF files, both valid and invalid.

use serde_json::Value as Json;

#[derive(Clone)]
pub enum Value {
    U8(u8),
    U32(u32),
    I32(i32),
    F32(f32),
    U64(u64),
    Bool(bool),
    Text(String),
    Strings(Vec<String>),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
    /// Type id and bytes, written unchanged.
    Raw(u32, Vec<u8>),
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub kind: u32,
    /// Shape, outermost dimension first.
    pub shape: Vec<u64>,
    pub data: Vec<u8>,
    /// Offset to declare, if it should differ from the actual one.
    pub offset: Option<u64>,
}

/// Content of a file, in order; fields are public so that tests can damage them.
#[derive(Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub pair_count: Option<u64>,
    pub pairs: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

impl Gguf {
    pub fn set(&mut self, key: &str, value: Value) {
        match self.pairs.iter_mut().find(|p| p.0 == key) {
            Some(pair) => pair.1 = value,
            None => self.pairs.push((key.to_owned(), value)),
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.pairs.retain(|p| p.0 != key);
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    pub fn remove_tensor(&mut self, name: &str) {
        self.tensors.retain(|t| t.name != name);
    }

    /// Adds a tensor of f32 values.
    pub fn add(&mut self, name: &str, shape: &[u64], values: impl Iterator<Item = f32>) {
        let count = shape.iter().product::<u64>() as usize;
        let data: Vec<u8> = values.take(count).flat_map(f32::to_le_bytes).collect();
        assert_eq!(data.len(), count * 4);
        self.tensors.push(Tensor { name: name.to_owned(), kind: 0, shape: shape.to_vec(), data, offset: None });
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            text(&mut out, key);
            let (kind, bytes) = encode(value);
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += tensor.data.len().next_multiple_of(32) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.data);
        }
        out
    }

    /// A llama model with one layer, two heads of width 4 and a vocabulary of `tokens`; all weights are F32 and follow
    /// a simple sequence.
    pub fn llama(tokenizer: &[(&str, Value)], tokens: u64) -> Gguf {
        let mut file = Gguf {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            pair_count: None,
            pairs: vec![("general.architecture".to_owned(), Value::Text("llama".to_owned()))],
            tensors: Vec::new(),
        };
        let sizes = [("context_length", 32), ("block_count", 1), ("embedding_length", 8), ("feed_forward_length", 6)];
        for (key, value) in sizes.into_iter().chain([("attention.head_count", 2), ("attention.head_count_kv", 1)]) {
            file.set(&format!("llama.{key}"), Value::U32(value));
        }
        file.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        for (key, value) in tokenizer {
            file.set(&format!("tokenizer.ggml.{key}"), value.clone());
        }
        let shapes: [(&str, &[u64]); 12] = [
            ("token_embd.weight", &[tokens, 8]),
            ("blk.0.attn_norm.weight", &[8]),
            ("blk.0.ffn_norm.weight", &[8]),
            ("blk.0.attn_q.weight", &[8, 8]),
            ("blk.0.attn_k.weight", &[4, 8]),
            ("blk.0.attn_v.weight", &[4, 8]),
            ("blk.0.attn_output.weight", &[8, 8]),
            ("blk.0.ffn_gate.weight", &[6, 8]),
            ("blk.0.ffn_up.weight", &[6, 8]),
            ("blk.0.ffn_down.weight", &[8, 6]),
            ("output_norm.weight", &[8]),
            ("output.weight", &[tokens, 8]),
        ];
        for (name, shape) in shapes {
            file.add(name, shape, (0..).map(|i| i as f32 / 8.0));
        }
        file
    }

    /// A llama model with the smallest byte-level vocabulary that has a merge.
    pub fn tiny() -> Gguf {
        let tokens: Vec<String> = ["a", "b", "ab", "<eos>"].map(str::to_owned).to_vec();
        let tokenizer = [
            ("model", Value::Text("gpt2".to_owned())),
            ("pre", Value::Text("smollm".to_owned())),
            ("tokens", Value::Strings(tokens)),
            ("merges", Value::Strings(vec!["a b".to_owned()])),
            ("token_type", Value::Ints(vec![1, 1, 1, 3])),
            ("eos_token_id", Value::U32(3)),
        ];
        Gguf::llama(&tokenizer, 4)
    }
}

pub fn strings(json: &Json) -> Value {
    Value::Strings(serde_json::from_value(json.clone()).unwrap())
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn list<T>(kind: u32, items: &[T], write: impl Fn(&mut Vec<u8>, &T)) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend((items.len() as u64).to_le_bytes());
    items.iter().for_each(|item| write(&mut out, item));
    out
}

fn encode(value: &Value) -> (u32, Vec<u8>) {
    match value {
        Value::U8(n) => (0, vec![*n]),
        Value::U32(n) => (4, n.to_le_bytes().to_vec()),
        Value::I32(n) => (5, n.to_le_bytes().to_vec()),
        Value::F32(x) => (6, x.to_le_bytes().to_vec()),
        Value::Bool(b) => (7, vec![u8::from(*b)]),
        Value::Text(t) => {
            let mut out = Vec::new();
            text(&mut out, t);
            (8, out)
        }
        Value::Strings(items) => (9, list(8, items, |out, item| text(out, item))),
        Value::Ints(items) => (9, list(5, items, |out, item| out.extend(item.to_le_bytes()))),
        Value::Floats(items) => (9, list(6, items, |out, item| out.extend(item.to_le_bytes()))),
        Value::U64(n) => (10, n.to_le_bytes().to_vec()),
        Value::Raw(kind, bytes) => (*kind, bytes.clone()),
    }
}
