//! Problems of mixtures as structured values; a [`Problem`](crate::Problem) or an [`Error`](crate::Error) adds the
//! place.
//!
//! ```
//! use cl_moe::problem::{CountProblem, ProblemKind};
//! use cl_moe::{BlendConfig, BlendPlan, Error};
//!
//! # let folder = tempfile::tempdir()?;
//! let path = folder.path().join("blend.toml");
//! std::fs::write(&path, "base_model = \"nowhere\"\nexperts = []\n")?;
//! let Err(Error::Problems(problems)) = BlendPlan::new(&BlendConfig::read(&path)?, false) else { panic!("it was planned") };
//! let count = problems.iter().find(|problem| problem.place == "experts").expect("no experts are too few");
//! assert!(matches!(*count.kind, ProblemKind::Count(CountProblem::Experts { experts: 0, .. })));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod blend;
mod config;
mod count;
mod mix;
mod mixture;

pub use blend::BlendProblem;
pub use config::{ConfigProblem, MergekitProblem};
pub use count::CountProblem;
pub use mix::MixProblem;
pub use mixture::MixtureProblem;
pub(crate) use mixture::{MOST_EXPERTS, VERSION};

/// The kinds of problems.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemKind {
    /// Numbers of experts are out of range.
    #[error(transparent)]
    Count(#[from] CountProblem),
    /// Models cannot form a mixture.
    #[error(transparent)]
    Mix(#[from] MixProblem),
    /// Adapters cannot form a mixture.
    #[error(transparent)]
    Blend(#[from] BlendProblem),
    /// A model or an adapter cannot be opened or read, or is of an unsupported kind.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// The data from which routers are initialized cannot be read or does not match.
    #[error(transparent)]
    Router(#[from] crate::Error),
}
