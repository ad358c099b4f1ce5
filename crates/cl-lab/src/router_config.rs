use std::path::{Path, PathBuf};

use cl_checkpoint::HubSnapshot;
use cl_data::{Mixture, Profile};
use cl_train::{RouterTraining, TrainConfig};
use serde::{Deserialize, Serialize};

use crate::config::{auto, seed};
use crate::problem::ConfigProblem;
use crate::read_config::{check_data, read};
use crate::{DataConfig, LabError, MixtureConfig, TrainRun};

/// Configuration of `cl moe train-router`. Paths are relative to the current directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterRun {
    /// Model directory: a mixture of experts, or the base of a mixture of adapters.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Directory of a mixture of adapters for the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Random seed.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Profile: which set of definitions applies.
    #[serde(default, deserialize_with = "Profile::of_training")]
    pub profile: Profile,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// Training data.
    pub data: DataConfig,
    /// Training settings, without tables of other training methods.
    #[serde(default)]
    pub train: TrainConfig,
    /// Auxiliary losses.
    #[serde(default)]
    pub router: RouterTraining,
    /// How several data sets are combined.
    #[serde(default, skip_serializing_if = "MixtureConfig::is_default")]
    pub mixture: MixtureConfig,
}

impl RouterRun {
    /// Returns the equivalent configuration of a training round.
    pub(crate) fn round(&self) -> TrainRun {
        TrainRun {
            validation: None,
            model: self.model.clone(),
            seed: self.seed,
            profile: self.profile,
            device: self.device.clone(),
            data: self.data.clone(),
            train: TrainConfig { router: Some(self.router), ..self.train.clone() },
            mixture: self.mixture.clone(),
            replay: None,
        }
    }

    /// Returns how several data sets are combined.
    pub(crate) fn mixture(&self) -> Mixture {
        Mixture { joint: self.mixture.joint.clone(), replay: None }
    }
}

/// Reads the configuration of router training. `set` holds overrides such as `router.z_loss=1e-3`, applied in order.
///
/// # Errors
/// Returns [`LabError::Config`] with line and column if the configuration is invalid, and [`LabError::Set`] if an
/// override is.
pub fn read_router(path: &Path, text: &str, set: &[String]) -> Result<RouterRun, LabError> {
    let config: RouterRun = read(path, text, set)?;
    if config.train.router.is_some() {
        return Err(LabError::config(path, ConfigProblem::RouterInTrain));
    }
    let round = config.round();
    round.train.validate().map_err(|e| LabError::config(path, ConfigProblem::Router(Box::new(e))))?;
    if !config.data.earlier.is_empty() {
        return Err(LabError::config(path, ConfigProblem::Earlier));
    }
    check_data(path, &round)?;
    Ok(config)
}
