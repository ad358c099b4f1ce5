use safetensors::Dtype;

/// What is wrong with a tensor, or with reading it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Its entry in the header is not one of the format.
    #[error("{source}")]
    Entry {
        /// The parser's error.
        source: serde_json::Error,
    },
    /// Its size cannot be computed.
    #[error("shape {shape:?} of {dtype:?} is not a whole number of bytes, or too large")]
    Size {
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Its bytes lie outside the file.
    #[error("data_offsets {offsets:?} lie outside the file's {data} bytes of data")]
    Outside {
        /// Start and end, in the data.
        offsets: [usize; 2],
        /// Bytes of data.
        data: usize,
    },
    /// Its shape takes more or fewer bytes than it has.
    #[error(
        "shape {shape:?} of {dtype:?} takes {expected} bytes, data_offsets {offsets:?} hold {}",
        offsets[1] - offsets[0]
    )]
    Length {
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes that they take.
        expected: usize,
        /// Start and end, in the data.
        offsets: [usize; 2],
    },
    /// It begins before the tensor before it ends.
    #[error("data_offsets {offsets:?}: overlaps {}, which ends at {end}", start(before))]
    Overlaps {
        /// Start and end, in the data.
        offsets: [usize; 2],
        /// The tensor before it; `None` for the start of the data.
        before: Option<String>,
        /// Where that one ends.
        end: usize,
    },
    /// Bytes between it and the tensor before it belong to no tensor.
    #[error("data_offsets {offsets:?}: leaves a hole after {}, which ends at {end}", start(before))]
    Hole {
        /// Start and end, in the data.
        offsets: [usize; 2],
        /// The tensor before it; `None` for the start of the data.
        before: Option<String>,
        /// Where that one ends.
        end: usize,
    },
    /// More was requested than it has.
    #[error("{length} bytes at offset {offset} were requested, but it has {bytes} bytes")]
    Range {
        /// Requested offset.
        offset: usize,
        /// Requested length.
        length: usize,
        /// Its bytes.
        bytes: usize,
    },
    /// It is not floating point, or of eight bits.
    #[error("dtype {dtype:?} is not f64, f32, f16 or bf16")]
    NotFloat {
        /// Its dtype.
        dtype: Dtype,
    },
    /// It has no such row.
    #[error("has no row {row}")]
    NoRow {
        /// 0-based index of the row.
        row: usize,
    },
    /// It is computed when it is read, and was requested in one piece.
    #[error("is computed, and can be read by parts only")]
    Computed,
    /// It is computed when it is read, and that failed.
    #[error("{source}")]
    NotComputed {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn start(before: &Option<String>) -> &str {
    before.as_deref().unwrap_or("the start of the data")
}
