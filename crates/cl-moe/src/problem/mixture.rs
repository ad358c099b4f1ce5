use cl_checkpoint::Dtype;

/// Version of the format that is written and read.
pub(crate) const VERSION: u32 = 1;
/// Maximum number of experts of one mixture.
pub(crate) const MOST_EXPERTS: usize = 1024;

/// Problems of a mixture of adapters, or of routers for one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MixtureProblem {
    /// The configuration does not parse.
    #[error("mixture_config.json: {source}")]
    Config {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// The configuration has an unsupported version of the format.
    #[error("mixture_config.json: format_version is {found}; this program reads {}", VERSION)]
    Version {
        /// The version.
        found: u32,
    },
    /// The numbers of experts are out of range.
    #[error(
        "mixture_config.json: num_experts_per_tok is {chosen}, with {experts} experts; expected 1 to {} experts, of \
         which each token uses 1 to all",
        MOST_EXPERTS
    )]
    Experts {
        /// Experts per token.
        chosen: usize,
        /// Number of experts.
        experts: usize,
    },
    /// There are no modules.
    #[error("mixture_config.json: no modules")]
    NoModules,
    /// A module does not have a rank and a finite scaling for each expert.
    #[error("mixture_config.json: module `{module}`: expected a rank and a finite scaling per expert")]
    Module {
        /// The module.
        module: String,
    },
    /// A tensor is missing.
    #[error("mixture_model.safetensors: tensor `{tensor}` is missing")]
    NoTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration implies, or is not floating-point.
    #[error("mixture_model.safetensors: tensor `{tensor}` is {dtype:?} {shape:?}; expected floats {expected:?}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A router is not in f32.
    #[error("mixture_model.safetensors: tensor `{tensor}` is {dtype:?}; expected F32")]
    RouterDtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// There are more or fewer tensors than the configuration implies.
    #[error("mixture_model.safetensors: {found} tensors; mixture_config.json implies {expected}")]
    TensorCount {
        /// Number of tensors.
        found: usize,
        /// Number that the configuration implies.
        expected: usize,
    },
    /// A given router is not one of the mixture.
    #[error("router `{router}`: there is no such tensor")]
    NoRouter {
        /// The router.
        router: String,
    },
    /// A given router has another size than the one that it replaces.
    #[error("router `{router}`: {values} values for a tensor of {shape:?}")]
    RouterSize {
        /// The router.
        router: String,
        /// Number of given values.
        values: usize,
        /// Shape of the tensor.
        shape: Vec<usize>,
    },
    /// A router cannot be stored in the dtype of the one that it replaces.
    #[error("router `{router}`: cannot be stored as {dtype:?}")]
    NotStorable {
        /// The router.
        router: String,
        /// The dtype.
        dtype: Dtype,
    },
    /// A router is not finite in the dtype of the one that it replaces.
    #[error("router `{router}`: element {index} is {value} in {dtype:?}")]
    NotFinite {
        /// The router.
        router: String,
        /// Flat index, row-major.
        index: usize,
        /// NaN or an infinity.
        value: f32,
        /// The dtype.
        dtype: Dtype,
    },
    /// The update of an adapter cannot be decomposed.
    #[error("module `{module}`: the singular value decomposition does not converge")]
    Decomposition {
        /// The module.
        module: String,
    },
}
