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
        "one expert for each token always has a gate of 1, regardless of its router, so the loss cannot train routers; make the \
         mixture with num_experts_per_tok = 2 or more, or with router.norm = \"sigmoid\" where it is one of adapters"
    )]
    OneExpert,
    /// Router logits are computed without router weights.
    #[error("its logits are norms of updates (router.init = \"spectr\"); there is no router weight to train")]
    UpdateNorm,
}
