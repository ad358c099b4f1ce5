/// What is wrong with the index of a sharded model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexProblem {
    /// It is not a valid JSON index.
    #[error("not a valid shard index: {source}")]
    Json {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// It lists no tensors.
    #[error("`weight_map` lists no tensors")]
    NoTensors,
    /// A shard is not a file in the directory.
    #[error("tensor `{tensor}`: `{file}` is not the name of a file in this directory")]
    FileName {
        /// The tensor.
        tensor: String,
        /// The name of its shard.
        file: String,
    },
    /// A shard contains a tensor that the index does not list.
    #[error("shard `{shard}` contains tensor `{tensor}`, but the index does not list it")]
    Unnamed {
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// A shard contains a tensor that the index assigns to another shard.
    #[error("shard `{shard}` contains tensor `{tensor}`, but the index puts it in `{named}`")]
    Elsewhere {
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
        /// The shard according to the index.
        named: String,
    },
    /// A tensor is missing from its shard.
    #[error("tensor `{tensor}` is not in shard `{shard}`")]
    NotInShard {
        /// The tensor.
        tensor: String,
        /// The shard according to the index.
        shard: String,
    },
}
