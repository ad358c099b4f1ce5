//! Metadata of an architecture: the keys below its name.

use super::{Error, GgufFile, KeyProblem};

/// Supported keys below `{architecture}.`; any other key might change what the model computes.
const KEYS: [&str; 23] = [
    "vocab_size",
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
];

/// The metadata keys with one prefix.
pub(super) struct Keys<'f> {
    pub(super) file: &'f GgufFile,
    pub(super) prefix: &'static str,
}

impl Keys<'_> {
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    pub(super) fn optional(&self, key: &str) -> Result<Option<usize>, Error> {
        self.file.uint(&self.full(key))
    }

    pub(super) fn error(&self, key: &str, problem: KeyProblem) -> Error {
        self.file.key_error(&self.full(key), problem)
    }

    pub(super) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| missing(self.file, self.full(key)))
    }

    pub(super) fn positive(&self, key: &str) -> Result<usize, Error> {
        match self.required(key, self.optional(key)?)? {
            0 => Err(self.error(key, KeyProblem::NotPositive)),
            value => Ok(value),
        }
    }

    pub(super) fn positive_or(&self, key: &str, default: usize) -> Result<usize, Error> {
        if self.optional(key)?.is_none() { Ok(default) } else { self.positive(key) }
    }

    pub(super) fn refuse_other_than(&self, key: &str, neutral: usize) -> Result<(), Error> {
        match self.optional(key)? {
            Some(value) if value != neutral => {
                Err(self.error(key, KeyProblem::NotSupported { value, architecture: self.prefix }))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn refuse_unknown(&self) -> Result<(), Error> {
        for key in self.file.metadata().keys() {
            let Some(rest) = key.strip_prefix(self.prefix).and_then(|k| k.strip_prefix('.')) else { continue };
            if !KEYS.contains(&rest) {
                return Err(self.error(rest, KeyProblem::Unknown));
            }
        }
        let causal = self.file.boolean(&self.full("attention.causal"))?;
        if causal == Some(false) {
            return Err(self.error("attention.causal", KeyProblem::NotCausal));
        }
        Ok(())
    }
}

pub(super) fn missing(file: &GgufFile, key: String) -> Error {
    Error::MissingKey { path: file.path().to_owned(), key }
}
