/// What is wrong with an output's plan, or with what was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanProblem {
    /// The output has no name.
    #[error("not the name of a directory")]
    NoName,
    /// There is nothing to write.
    #[error("no tensors to write")]
    NoTensors,
    /// A name occurs twice or is reserved.
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
    /// A header would exceed the limit of the format.
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
    /// A tensor has another size than planned.
    #[error("tensor `{tensor}`: planned {planned} bytes, got {found}")]
    Size {
        /// The tensor.
        tensor: String,
        /// Bytes as planned.
        planned: usize,
        /// Bytes to write.
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
        /// Bytes as planned.
        planned: usize,
    },
    /// Bytes of a tensor were written twice.
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
    /// A name is not that of a file in the output.
    #[error("`{name}` is not the name of a file in this directory")]
    FileName {
        /// The name.
        name: String,
    },
    /// The tensors cannot be written as safetensors.
    #[error("{source}")]
    Serialize {
        /// The error of the library `safetensors`.
        source: safetensors::SafeTensorError,
    },
}
