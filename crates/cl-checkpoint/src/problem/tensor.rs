use safetensors::Dtype;

/// What is wrong with a tensor, or with reading it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Its entry in the header does not follow the format.
    #[error("{source}")]
    Entry {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// Its size cannot be computed.
    #[error("shape {shape:?} of {dtype:?} is not a whole number of bytes, or too large")]
    Size {
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Its bytes are outside the file.
    #[error("data_offsets {offsets:?} lie outside the file's {data} bytes of data")]
    Outside {
        /// Start and end, relative to the data.
        offsets: [usize; 2],
        /// Number of bytes of data.
        data: usize,
    },
    /// The size of its shape differs from its number of bytes.
    #[error(
        "shape {shape:?} of {dtype:?} takes {expected} bytes, but data_offsets {offsets:?} contain {}",
        offsets[1] - offsets[0]
    )]
    Length {
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Number of bytes required by dtype and shape.
        expected: usize,
        /// Start and end, relative to the data.
        offsets: [usize; 2],
    },
    /// It starts before the end of the previous tensor.
    #[error("data_offsets {offsets:?}: overlaps {}, which ends at {end}", start(before))]
    Overlaps {
        /// Start and end, relative to the data.
        offsets: [usize; 2],
        /// The previous tensor; `None` for the start of the data.
        before: Option<String>,
        /// End of the previous tensor.
        end: usize,
    },
    /// There are bytes between it and the previous tensor that belong to no tensor.
    #[error("data_offsets {offsets:?}: leaves a gap after {}, which ends at {end}", start(before))]
    Hole {
        /// Start and end, relative to the data.
        offsets: [usize; 2],
        /// The previous tensor; `None` for the start of the data.
        before: Option<String>,
        /// End of the previous tensor.
        end: usize,
    },
    /// The requested range exceeds the tensor.
    #[error("{length} bytes at offset {offset} were requested, but it has {bytes} bytes")]
    Range {
        /// Requested offset.
        offset: usize,
        /// Requested length.
        length: usize,
        /// Size of the tensor in bytes.
        bytes: usize,
    },
    /// Its dtype is not floating point, or has eight bits.
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
    /// It is computed while it is read, but was requested in one piece.
    #[error("is computed on the fly, and can be read only in parts")]
    Computed,
    /// It is computed while it is read, and the computation failed.
    #[error("{}", crate::files::with_causes(source.as_ref()))]
    NotComputed {
        /// Why.
        r#source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn start(before: &Option<String>) -> &str {
    before.as_deref().unwrap_or("the start of the data")
}
