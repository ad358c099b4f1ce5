use cl_adapters::RouterLog;
use cl_model::router_losses;
use cl_torch::tch::Tensor;
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// Training of a mixture's routers: coefficients of the auxiliary losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterTraining {
    /// Coefficient of the load-balancing loss; 0.001 for Mixtral in Transformers, 0.01 in Switch Transformers.
    pub load_balancing: f64,
    /// Coefficient of the router z-loss; 0.001 in ST-MoE.
    pub z_loss: f64,
}

impl RouterTraining {
    /// Whether router logits are needed in addition to the model's output.
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

/// Values of a step's auxiliary losses before their coefficients, means over its micro-batches.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AuxiliaryLosses {
    pub(crate) load_balancing: f64,
    pub(crate) z_loss: f64,
}

/// The auxiliary losses of one micro-batch, with the weights of their gradients.
pub(crate) struct WeightedLosses(Vec<(Tensor, f64)>);

impl WeightedLosses {
    /// Computes the losses of the router decisions since the last call and adds their values to `sums`. The mean of a
    /// step is over `in_mean` micro-batches.
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
