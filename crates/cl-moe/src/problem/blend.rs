use cl_checkpoint::{BesideKind, Dtype};

/// Why adapters cannot form a mixture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlendProblem {
    /// An expert is neither an adapter nor a model with a rank.
    #[error("expected `adapter`, or `model` with `rank`")]
    Source,
    /// A model cannot be approximated by an adapter.
    #[error(transparent)]
    Extract(cl_merge::Error),
    /// A temperature is not positive.
    #[error("{temperature}; expected a positive number")]
    Temperature {
        /// The temperature.
        temperature: f64,
    },
    /// A temperature is set, but the routers do not use one.
    #[error("is used only with init = \"arrow\"; set init = \"arrow\", or remove it")]
    UnusedTemperature,
    /// An embedding is adapted.
    #[error(
        "`{module}` is an embedding; adapters on embeddings cannot be mixed, because a router needs the input of a \
         linear layer"
    )]
    Embedding {
        /// The module.
        module: String,
    },
    /// The output head is adapted.
    #[error("`{module}` is the output head; only linear layers of the decoder's layers are mixed")]
    Head {
        /// The module.
        module: String,
    },
    /// A scaling is NaN or infinite.
    #[error("module `{module}`: its scaling is {scaling}")]
    Scaling {
        /// The module.
        module: String,
        /// Its scaling.
        scaling: f64,
    },
    /// A factor has a dtype that cannot be mixed.
    #[error("tensor `{tensor}` is {dtype:?}; expected f64, f32, f16 or bf16")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// The adapter is a DoRA adapter.
    #[error("DoRA rescales the whole weight, so its update is not a sum; train it without use_dora, or fold it")]
    Dora,
    /// The adapter has a tensor that is not a factor.
    #[error("tensor `{tensor}` is {}; a mixture can contain only low-rank updates of linear layers", words(kind))]
    Beside {
        /// The tensor.
        tensor: String,
        /// Kind of the tensor.
        kind: BesideKind,
    },
    /// The base does not have a module.
    #[error("the base has no module `{module}`")]
    NoModule {
        /// The module.
        module: String,
    },
    /// The weight of a module has another shape in the base.
    #[error("module `{module}` is for a weight of shape {shape:?}, but the weight of the base has shape {base:?}")]
    Shape {
        /// The module.
        module: String,
        /// Rows and columns of the weight that the adapter was made for.
        shape: [usize; 2],
        /// Shape in the base.
        base: Vec<usize>,
    },
    /// The adapter was made for another base, by the hash in its manifest.
    #[error(
        "according to its manifest, it was made for another base ({}…) than this one ({}…); --ignore-base accepts it",
        short(adapter),
        short(base)
    )]
    OtherBase {
        /// Hash of the adapter's base.
        adapter: String,
        /// Hash of this base.
        base: String,
    },
}

fn words(kind: &BesideKind) -> &'static str {
    match kind {
        BesideKind::Saved => "a module trained in full (modules_to_save)",
        BesideKind::Bias => "a trained bias (bias)",
        BesideKind::UpdateBias { .. } => "an update's own bias (lora_bias)",
        BesideKind::Rows(_) => "trained rows of tokens (trainable_token_indices)",
        BesideKind::Untrained => "neither a LoRA factor nor a copy of the base's tensor",
    }
}

/// Shortens a hash; the result is long enough to tell two hashes apart. A manifest may contain any text instead of a
/// hash.
fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}
