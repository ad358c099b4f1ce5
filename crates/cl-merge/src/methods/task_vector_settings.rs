//! Settings shared by all task-vector merges, with the definitions of papers and tools.

use cl_checkpoint::Profile;
use serde::{Deserialize, Serialize};

use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::task_vectors::{Consensus, Divisor, Rescale, Sign, Sparsify, TaskVectors};

/// The quantity that elects the sign of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Election {
    /// The sum of task vectors.
    Unweighted,
    /// The sum of weighted task vectors.
    Weighted,
    /// The sum of their signs.
    Count,
}

impl From<Election> for Consensus {
    fn from(election: Election) -> Consensus {
        match election {
            Election::Unweighted => Consensus { sign: Sign::Sum, weighted: false },
            Election::Weighted => Consensus { sign: Sign::Sum, weighted: true },
            Election::Count => Consensus { sign: Sign::Count, weighted: false },
        }
    }
}

#[derive(Deserialize)]
struct Settings {
    weight: Vec<f32>,
    lambda: f32,
    rescale: Option<Rescale>,
    election: Option<Election>,
    divisor: Divisor,
}

/// The densities of a method that keeps a fraction of each task vector.
#[derive(Deserialize)]
pub(super) struct Densities {
    pub(super) density: Vec<f64>,
}

/// Constructs the merge with this sparsification.
pub(super) fn task_vectors(settings: &TensorSettings<'_>, sparsify: Sparsify) -> Result<TaskVectors, SettingsError> {
    let Settings { weight, lambda, rescale, election, divisor } = settings.read()?;
    Ok(TaskVectors {
        weights: weight,
        lambda,
        sparsify,
        rescale: rescale.unwrap_or(Rescale::None),
        consensus: election.map(Consensus::from),
        divisor,
        seed: settings.seed,
    })
}

/// Defaults for a sum of task vectors.
pub(super) fn summed(_: Profile) -> Defaults {
    Defaults::new().with("weight", 1.0).with("lambda", 1.0).with("divisor", Divisor::None)
}

/// Defaults for a sum with sign election; `mergekits` is the divisor that mergekit uses.
pub(super) fn elected(profile: Profile, mergekits: Divisor) -> Defaults {
    let (election, divisor) = match profile {
        Profile::Mergekit => (Election::Weighted, mergekits),
        Profile::Method | Profile::Paper => (Election::Unweighted, Divisor::Count),
    };
    summed(profile).with("election", election).with("divisor", divisor)
}

/// The default density of TIES and DARE; 0.2 is used in the paper and in PEFT's documentation.
pub(super) fn density(profile: Profile) -> f64 {
    if profile == Profile::Paper { 0.2 } else { 1.0 }
}

/// The default compensation for entries that are dropped at random.
pub(super) fn rescale_of_random(profile: Profile) -> Rescale {
    match profile {
        Profile::Method => Rescale::Density,
        Profile::Mergekit => Rescale::Norm,
        Profile::Paper => Rescale::None,
    }
}
