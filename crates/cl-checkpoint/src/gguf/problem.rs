use std::fmt::{self, Display, Formatter};

use super::GgmlType;

/// Why a GGUF header is invalid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderProblem {
    /// The number of entries exceeds the number of bytes.
    #[error("{tensors} tensors and {keys} keys do not fit into the file")]
    Counts {
        /// Number of tensors as stored.
        tensors: u64,
        /// Number of metadata keys as stored.
        keys: u64,
    },
    /// A key appears twice.
    #[error("key `{key}` appears twice")]
    KeyTwice {
        /// The key.
        key: String,
    },
    /// A tensor appears twice.
    #[error("tensor `{tensor}` appears twice")]
    TensorTwice {
        /// The tensor.
        tensor: String,
    },
    /// The file ends too early.
    #[error("{expected} bytes expected, but the file ends at {end}; it is truncated")]
    Truncated {
        /// Number of bytes that should follow.
        expected: usize,
        /// Size of the file.
        end: usize,
    },
    /// A string is not valid UTF-8.
    #[error("the text at byte {at} is not UTF-8")]
    NotUtf8 {
        /// Its offset in the file.
        at: usize,
    },
    /// There are too many values in total.
    #[error("more than {limit} values")]
    TooManyValues {
        /// The limit.
        limit: usize,
    },
    /// Lists are nested too deeply.
    #[error("lists nested too deeply at byte {at}")]
    TooDeep {
        /// Offset in the file.
        at: usize,
    },
    /// A list has more elements than the file has bytes.
    #[error("a list of {count} at byte {at}; the file is truncated")]
    List {
        /// Number of elements as stored.
        count: u64,
        /// Offset in the file.
        at: usize,
    },
    /// A value has an unknown type.
    #[error("unknown value type {kind} at byte {at}")]
    ValueType {
        /// The type as stored.
        kind: u32,
        /// Offset in the file.
        at: usize,
    },
}

/// The header entry that was being read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderItem {
    /// The value of a metadata key.
    Key(String),
    /// A tensor's description.
    Tensor(String),
}

impl Display for HeaderItem {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            HeaderItem::Key(key) => write!(f, "key `{key}`"),
            HeaderItem::Tensor(tensor) => write!(f, "tensor `{tensor}`"),
        }
    }
}

/// What is wrong with a metadata value, or why it is not supported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyProblem {
    /// The value has a different type, or is out of range.
    #[error("expected {expected}")]
    Expected {
        /// What is expected.
        expected: &'static str,
    },
    /// The value is 0 or negative.
    #[error("must be positive")]
    NotPositive,
    /// The number of heads is not divisible by the number of key-value heads.
    #[error("{kv_heads} does not divide {heads} heads")]
    Heads {
        /// Number of heads.
        heads: usize,
        /// Number of key-value heads.
        kv_heads: usize,
    },
    /// The width of a head is 0, odd, or too large.
    #[error("{head_dim} is not a valid head size")]
    HeadSize {
        /// The width.
        head_dim: usize,
    },
    /// Rotary embeddings cover only a part of a head.
    #[error("only {rotary} of {head_dim} dimensions are rotated; partial rotary embeddings are not supported")]
    PartialRotary {
        /// Rotated dimensions.
        rotary: usize,
        /// Width of a head.
        head_dim: usize,
    },
    /// The width of values differs from that of keys.
    #[error("{value_length} differs from the key length {key_length}")]
    ValueLength {
        /// Width of a value.
        value_length: usize,
        /// Width of a key.
        key_length: usize,
    },
    /// The vocabulary size differs from the number of rows of the embedding.
    #[error("is {stated}, but `{tensor}` has {rows} rows")]
    VocabSize {
        /// The stated size.
        stated: usize,
        /// The embedding.
        tensor: &'static str,
        /// Its rows.
        rows: usize,
    },
    /// Sliding windows are not supported for this architecture.
    #[error("a sliding window ({window}) is not supported for {architecture}")]
    SlidingWindow {
        /// The window in tokens.
        window: usize,
        /// The architecture.
        architecture: &'static str,
    },
    /// The value is not supported.
    #[error("{value} is not supported for {architecture}")]
    NotSupported {
        /// The value.
        value: usize,
        /// The architecture.
        architecture: &'static str,
    },
    /// The key is unknown.
    #[error("not supported for this architecture; it may change what the model computes, so nothing is imported")]
    Unknown,
    /// The model is not causal.
    #[error("only causal models are supported")]
    NotCausal,
    /// The file is only a part of a model.
    #[error("this is one of {parts} parts of a model; join them first (`llama-gguf-split --merge`)")]
    Split {
        /// Number of parts.
        parts: usize,
    },
    /// The attention scaling is not supported.
    #[error("{factor} is not supported")]
    AttentionFactor {
        /// The factor.
        factor: f64,
    },
    /// A RoPE scaling has no factor.
    #[error("`{kind}` needs `rope.scaling.factor`")]
    NoScalingFactor {
        /// Kind of the scaling.
        kind: String,
    },
    /// The factor of a RoPE scaling is below 1.
    #[error("{factor} is below 1")]
    ScalingFactor {
        /// The factor.
        factor: f64,
    },
    /// The kind of RoPE scaling is not supported.
    #[error("`{kind}` is not supported; supported: none, linear, yarn")]
    ScalingType {
        /// Kind of the scaling.
        kind: String,
    },
    /// A special token is not in the vocabulary.
    #[error("{id} is not among the {tokens} tokens")]
    TokenId {
        /// Its id.
        id: usize,
        /// Number of tokens.
        tokens: usize,
    },
    /// The vocabulary is empty.
    #[error("there are no tokens")]
    NoTokens,
    /// There are more tokens than rows of the embedding.
    #[error("{tokens} tokens, but the embedding has only {rows} rows")]
    MoreTokens {
        /// Number of tokens.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// Two tokens have the same text.
    #[error("tokens {first} and {second} are both {token:?}")]
    TokenTwice {
        /// Id of the first.
        first: usize,
        /// Id of the second.
        second: usize,
        /// Their text.
        token: String,
    },
    /// The number of token types differs from the number of tokens.
    #[error("{types} types for {tokens} tokens")]
    TypeCount {
        /// Number of types.
        types: usize,
        /// Number of tokens.
        tokens: usize,
    },
    /// A merge does not consist of two tokens.
    #[error("merge {index}, {merge:?}, is not two tokens separated by a space")]
    Merge {
        /// 0-based index of the merge.
        index: usize,
        /// The merge.
        merge: String,
    },
    /// A part or the result of a merge is not a token.
    #[error("merge {index}, {merge:?}, contains or produces something that is not a token")]
    MergeTokens {
        /// 0-based index of the merge.
        index: usize,
        /// The merge.
        merge: String,
    },
    /// The number of scores differs from the number of tokens.
    #[error("{scores} scores for {tokens} tokens")]
    ScoreCount {
        /// Number of scores.
        scores: usize,
        /// Number of tokens.
        tokens: usize,
    },
    /// A score is NaN.
    #[error("score {index} is not a number")]
    Score {
        /// 0-based index of the score.
        index: usize,
    },
}

/// What is wrong with a tensor's description or content.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Its bytes are not aligned.
    #[error("offset {offset} is not a multiple of the alignment {alignment}")]
    Alignment {
        /// Its offset in the data.
        offset: usize,
        /// The alignment.
        alignment: usize,
    },
    /// Its bytes are outside the file.
    #[error("its {bytes} bytes at offset {offset} lie outside the file of {length} bytes; the file is truncated")]
    Outside {
        /// Its size.
        bytes: usize,
        /// Its offset in the data.
        offset: usize,
        /// Size of the file.
        length: usize,
    },
    /// Its bytes overlap with those of another tensor.
    #[error("overlaps tensor `{other}`")]
    Overlaps {
        /// The other tensor.
        other: String,
    },
    /// It has no dimensions, or too many.
    #[error("{dimensions} dimensions; expected 1 to 4")]
    Dimensions {
        /// Number of dimensions.
        dimensions: u32,
    },
    /// Its element type is not supported.
    #[error("type {kind} is not supported; supported: {}", GgmlType::all_names())]
    Type {
        /// The type as stored.
        kind: u32,
    },
    /// Its rows do not consist of whole blocks.
    #[error("rows of {row} elements do not divide into blocks of {block}")]
    Blocks {
        /// Number of elements in a row.
        row: usize,
        /// Number of elements in a block.
        block: usize,
    },
    /// It is empty or too large.
    #[error("shape {shape:?} is empty or too large")]
    Size {
        /// Its shape, innermost dimension first.
        shape: Vec<usize>,
    },
    /// Its shape differs from what the metadata imply.
    #[error("expected shape {expected:?}, got {found:?}")]
    Shape {
        /// The expected shape.
        expected: Vec<usize>,
        /// Its shape.
        found: Vec<usize>,
    },
    /// RoPE scaling is specified twice, by this tensor and by a key.
    #[error("is present together with `{key}`; expected only one of them")]
    AndKey {
        /// The metadata key.
        key: String,
    },
    /// Its values are not those of a known RoPE scaling.
    #[error("{factors:?} are not the factors of a Llama 3 rope scaling")]
    NotLlama3 {
        /// The values.
        factors: Vec<f64>,
    },
    /// A factor of a RoPE scaling is out of range.
    #[error("a factor is {factor}; expected finite factors of at least 1")]
    Factor {
        /// The factor.
        factor: f32,
    },
    /// It is a bias whose quantized blocks cannot be reordered.
    #[error("a bias stored as {ggml_type} cannot be reordered")]
    Bias {
        /// Its element type.
        ggml_type: &'static str,
    },
}
