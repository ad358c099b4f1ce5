use cl_adapters::RouterLog;
use cl_model::router_losses;
use cl_torch::tch::Tensor;
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// Settings for training a mixture's routers: coefficients of the auxiliary losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterTraining {
    /// Coefficient of the load-balancing loss. Mixtral in Transformers uses 0.001, Switch Transformers 0.01.
    pub load_balancing: f64,
    /// Coefficient of the router z-loss. ST-MoE uses 0.001.
    pub z_loss: f64,
}

impl RouterTraining {
    /// Whether any auxiliary loss is used, so that router logits have to be recorded.
    pub(crate) fn has_losses(&self) -> bool {
        self.load_balancing > 0.0 || self.z_loss > 0.0
    }

    /// Checks the coefficients.
    pub(crate) fn validate(&self) -> Result<(), TrainError> {
        for (key, value) in [("load_balancing", self.load_balancing), ("z_loss", self.z_loss)] {
            if !(0.0..=1e6).contains(&value) {
                return Err(TrainError::Config { key, value: value.to_string(), expected: "0 (off) to 1,000,000" });
            }
        }
        Ok(())
    }
}

/// Auxiliary losses of a step, before they are multiplied by their coefficients; means over its micro-batches.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AuxiliaryLosses {
    pub(crate) load_balancing: f64,
    pub(crate) z_loss: f64,
}

/// The auxiliary losses of one micro-batch, with the weights of their gradients.
pub(crate) struct WeightedLosses(Vec<(Tensor, f64)>);

impl WeightedLosses {
    /// Computes the losses of the router decisions that were recorded since the last call and adds their values to
    /// `sums`. The mean of a step is over `in_mean` micro-batches.
    pub(crate) fn of(log: &RouterLog, config: RouterTraining, in_mean: usize, sums: &mut AuxiliaryLosses) -> Self {
        let Some(losses) = router_losses(&log.take()) else { return WeightedLosses(Vec::new()) };
        let share = 1.0 / in_mean as f64;
        sums.load_balancing += losses.load_balancing.double_value(&[]) * share;
        sums.z_loss += losses.z_loss.double_value(&[]) * share;
        let terms = [(losses.load_balancing, config.load_balancing * share), (losses.z_loss, config.z_loss * share)];
        WeightedLosses(terms.into_iter().filter(|(_, weight)| *weight > 0.0).collect())
    }

    pub(crate) fn terms(&self) -> Vec<(&Tensor, f64)> {
        self.0.iter().map(|(loss, weight)| (loss, *weight)).collect()
    }
}
