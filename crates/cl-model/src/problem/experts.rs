/// What is wrong with the experts of a model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpertsProblem {
    /// A number is out of range.
    #[error("{key} = {value}: expected 1 to {most}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// Its value.
        value: i64,
        /// The largest allowed value.
        most: i64,
    },
    /// The number of experts per token is 0, or exceeds the number of experts to select from.
    #[error("num_experts_per_tok = {chosen}: expected 1 to {key}{} = {routed}", if *shared { " less the shared one" } else { "" })]
    Chosen {
        /// Number of experts per token.
        chosen: i64,
        /// Key of the number of experts.
        key: &'static str,
        /// Whether one of the experts is shared, so that the router does not select it.
        shared: bool,
        /// Number of experts to select from.
        routed: i64,
    },
    /// A shared expert together with experts that are stored as differences from the base.
    #[error("always_on = true is not supported with expert_storage = {storage}; expected false")]
    SharedDelta {
        /// How the experts are stored.
        storage: cl_moe::ExpertStorage,
    },
    /// Both the whole MLP and its projections are declared as experts.
    #[error("moe_mlp and moe_mlp_fg are both true; expected one of them")]
    TwiceMlp,
    /// Experts are declared in a layer that does not exist.
    #[error("moe_layer_idx names layer {layer} of {layers}")]
    NoLayer {
        /// Index of the layer.
        layer: usize,
        /// Number of layers.
        layers: usize,
    },
    /// More than one way of selecting experts is enabled.
    #[error("more than one of gateless, global_router and always_on is true; expected at most one")]
    Gating,
    /// The weights stored in place of a router differ from the equal weights that a model without routers uses.
    #[error("gateless = true, but tensor `{tensor}` holds {value}; expected {expected}")]
    UnequalWeights {
        /// The tensor.
        tensor: String,
        /// A stored weight.
        value: f64,
        /// The weight that is used.
        expected: f64,
    },
}
