/// What is wrong with a sharded model's index.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexProblem {
    /// It is not the JSON of an index.
    #[error("not a valid shard index: {source}")]
    Json {
        /// The parser's error.
        source: serde_json::Error,
    },
    /// It names no tensor.
    #[error("`weight_map` names no tensor")]
    NoTensors,
    /// A shard is not a file of the directory.
    #[error("tensor `{tensor}`: `{file}` is not the name of a file in this directory")]
    FileName {
        /// The tensor.
        tensor: String,
        /// The name of its shard.
        file: String,
    },
    /// A shard has a tensor that the index does not name.
    #[error("shard `{shard}` holds tensor `{tensor}`, but the index does not name it")]
    Unnamed {
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// A shard has a tensor that the index names in another.
    #[error("shard `{shard}` holds tensor `{tensor}`, but the index puts it in `{named}`")]
    Elsewhere {
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
        /// The shard that the index names.
        named: String,
    },
    /// A shard lacks a tensor.
    #[error("tensor `{tensor}` is not in shard `{shard}`")]
    NotInShard {
        /// The tensor.
        tensor: String,
        /// The shard that the index names.
        shard: String,
    },
}
