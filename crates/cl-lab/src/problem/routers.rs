/// Why the routers of a mixture cannot be trained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RoutersProblem {
    /// The directory does not contain a mixture of adapters.
    #[error("is not a mixture of adapters; create one with `cl moe blend`")]
    NoMixture,
    /// The model has no routers.
    #[error("has no routers: use a model made by `cl moe mix`, or set `adapter` to a mixture made by `cl moe blend`")]
    NoRouters,
    /// Each token is routed to a single expert, so the gate is constant.
    #[error(
        "with one expert per token, its gate is always 1, so the loss has no gradient for the routers; build the \
         mixture with num_experts_per_tok = 2 or more or, for a mixture of adapters, with router.norm = \"sigmoid\""
    )]
    OneExpert,
    /// Router logits are computed without router weights.
    #[error("its logits are norms of updates (router.init = \"spectr\"); there is no router weight to train")]
    UpdateNorm,
}
