/// Numbers of experts that are out of range.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CountProblem {
    /// The number of experts is out of range.
    #[error("{experts} experts; a mixture has 1 to {most}")]
    Experts {
        /// Number of experts.
        experts: usize,
        /// The largest allowed number.
        most: usize,
    },
    /// The number of experts per token is out of range.
    #[error("{chosen}; expected 1 to the number of experts, {experts}")]
    Chosen {
        /// Experts per token.
        chosen: usize,
        /// Number of experts.
        experts: usize,
    },
    /// The number of experts per token is set, although there is no router to select them.
    #[error("{chosen}; without a router, every token uses all {experts} experts; remove this key")]
    ChosenWithoutRouter {
        /// Experts per token.
        chosen: usize,
        /// Number of experts.
        experts: usize,
    },
}
