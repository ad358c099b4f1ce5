/// What is wrong with the keys of the rotary position embeddings.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RopeProblem {
    /// The width of a head is odd.
    #[error("head_dim = {head_dim}: rotary positions need an even number")]
    OddHead {
        /// Width of one head.
        head_dim: i64,
    },
    /// The rotated fraction of each head is out of range.
    #[error("partial_rotary_factor = {factor}: expected a number above 0, at most 1")]
    PartialRange {
        /// The fraction.
        factor: f64,
    },
    /// Only a part of each head is rotated, which is not supported for this architecture.
    #[error("partial_rotary_factor = {factor} is not supported; expected 1")]
    Partial {
        /// The rotated fraction.
        factor: f64,
    },
    /// The rotated part of a head is empty or has an odd width.
    #[error(
        "partial_rotary_factor leaves {rotary_dim} of {head_dim} entries of a head; expected an even number, 2 to {head_dim}"
    )]
    RotaryWidth {
        /// Number of rotated entries.
        rotary_dim: i64,
        /// Width of one head.
        head_dim: i64,
    },
    /// The type of scaling is not supported.
    #[error("rope scaling `{name}` is not supported; expected default, linear or llama3")]
    ScalingType {
        /// Its name.
        name: String,
    },
    /// A number of the scaling is missing.
    #[error("rope scaling needs a number `{key}`")]
    NoNumber {
        /// Its key.
        key: &'static str,
    },
    /// A number of the scaling is not positive, or not finite.
    #[error("rope scaling: {key} = {value}: expected a positive number")]
    NotPositive {
        /// Its key.
        key: &'static str,
        /// The number.
        value: f64,
    },
    /// LongRoPE has no factors for short contexts.
    #[error("rope scaling needs a list `short_factor`")]
    NoShortFactor,
    /// LongRoPE's factors for short contexts are not one positive number per frequency.
    #[error("rope scaling: short_factor: expected {frequencies} positive numbers")]
    ShortFactor {
        /// Number of frequencies.
        frequencies: usize,
    },
}
