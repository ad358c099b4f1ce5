/// What is wrong with the plan of an output, or with what was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanProblem {
    /// The output has no name.
    #[error("not the name of a directory")]
    NoName,
    /// There is nothing to write.
    #[error("no tensors to write")]
    NoTensors,
    /// The name of a tensor occurs twice or is reserved.
    #[error("tensor name `{tensor}` is planned twice or reserved")]
    TensorName {
        /// The tensor.
        tensor: String,
    },
    /// A tensor is too large.
    #[error("tensor `{tensor}`: shape {shape:?} is too large")]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A header would exceed the format's limit.
    #[error("`{file}` would have a header of more than {limit} bytes")]
    Header {
        /// The file.
        file: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A tensor was not planned.
    #[error("tensor `{tensor}` was not planned")]
    NotPlanned {
        /// The tensor.
        tensor: String,
    },
    /// The size of a tensor differs from the plan.
    #[error("tensor `{tensor}`: planned {planned} bytes, got {found}")]
    Size {
        /// The tensor.
        tensor: String,
        /// Planned number of bytes.
        planned: usize,
        /// Number of bytes to write.
        found: usize,
    },
    /// A part exceeds its tensor.
    #[error("tensor `{tensor}`: {length} bytes at {offset} do not fit into the planned {planned}")]
    Beyond {
        /// The tensor.
        tensor: String,
        /// Offset of the part.
        offset: usize,
        /// Length of the part.
        length: usize,
        /// Planned number of bytes of the tensor.
        planned: usize,
    },
    /// Some bytes of a tensor were written twice.
    #[error("tensor `{tensor}`: some bytes were written twice")]
    WrittenTwice {
        /// The tensor.
        tensor: String,
    },
    /// A tensor was not written.
    #[error("tensor `{tensor}` was planned but never written")]
    NeverWritten {
        /// The tensor.
        tensor: String,
    },
    /// A tensor was not written completely.
    #[error("tensor `{tensor}` was written only in part")]
    PartlyWritten {
        /// The tensor.
        tensor: String,
    },
    /// A name is not that of a file directly in the output.
    #[error("`{name}` is not the name of a file in this directory")]
    FileName {
        /// The name.
        name: String,
    },
    /// The tensors cannot be written as safetensors.
    #[error("{source}")]
    Serialize {
        /// The error of the crate `safetensors`.
        r#source: safetensors::SafeTensorError,
    },
}
