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
    /// A token goes through no expert, or through more than there are to select from.
    #[error("num_experts_per_tok = {chosen}: expected 1 to {key}{} = {routed}", if *shared { " less the shared one" } else { "" })]
    Chosen {
        /// Experts that a token goes through.
        chosen: i64,
        /// Key of the number of experts.
        key: &'static str,
        /// Whether one of them is not selected by the router.
        shared: bool,
        /// Number of experts to select from.
        routed: i64,
    },
    /// A shared expert together with experts that are stored as differences from the base.
    #[error("always_on = true is not supported with expert_storage = {storage}; expected false")]
    SharedDelta {
        /// How they are stored.
        storage: cl_moe::ExpertStorage,
    },
    /// MLPs as a whole and their projections are experts.
    #[error("moe_mlp and moe_mlp_fg are both true; expected one of them")]
    TwiceMlp,
    /// Experts in a layer that the model does not have.
    #[error("moe_layer_idx names layer {layer} of {layers}")]
    NoLayer {
        /// Index of the layer.
        layer: usize,
        /// Number of layers.
        layers: usize,
    },
    /// Several ways of selecting experts.
    #[error("more than one of gateless, global_router and always_on is true; expected at most one")]
    Gating,
    /// A model without routers has other weights in their place than it computes with.
    #[error("gateless = true, but tensor `{tensor}` holds {value}; expected {expected}")]
    UnequalWeights {
        /// The tensor.
        tensor: String,
        /// A weight.
        value: f64,
        /// The weight it computes with.
        expected: f64,
    },
}
