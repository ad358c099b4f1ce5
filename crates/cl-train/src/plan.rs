use cl_adapters::Orthogonality;
use cl_data::{Encoded, RowRef};
use serde::{Deserialize, Serialize};

use crate::{TrainConfig, TrainError};

/// What a round trains on: encoded data sets, and which of their rows each epoch goes through, in order.
pub struct TrainData<'a> {
    /// Data sets; the round's own and those replayed.
    pub datasets: &'a [Vec<Encoded>],
    /// Rows of an epoch (from 0). Has to give the same rows each time it is asked for the same epoch.
    pub epoch_rows: &'a dyn Fn(u64) -> Vec<RowRef>,
    /// What keeps the adapter away from those of earlier rounds.
    pub orthogonality: Option<&'a Orthogonality>,
}

/// How the rows fall into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Steps of one epoch.
    pub steps_per_epoch: u64,
    /// Steps of the round.
    pub total_steps: u64,
    rows_per_step: usize,
    drop_last: bool,
}

impl Plan {
    /// Counts steps for epochs of `rows` rows. With `drop_last` (the paper's trainer) micro-batches that fill no whole
    /// step are left out: ⌊⌈rows/micro_batch⌉ / accumulation⌋ steps; otherwise the last step of an epoch is smaller.
    ///
    /// # Errors
    /// [`TrainError::NoData`] when there is nothing to train on, [`TrainError::Config`] for batches of nothing.
    pub fn new(rows: usize, config: &TrainConfig, drop_last: bool) -> Result<Plan, TrainError> {
        let sizes = [
            ("micro_batch_size", config.micro_batch_size),
            ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        ];
        if let Some((key, size)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(TrainError::Config { key, value: size.to_string(), expected: "at least 1" });
        }
        if rows == 0 {
            return Err(TrainError::NoData { examples: 0 });
        }
        let micro_batches = rows.div_ceil(config.micro_batch_size);
        let accumulation = config.gradient_accumulation_steps;
        // Fewer micro-batches than one step's worth still make a step.
        let drop_last = drop_last && micro_batches >= accumulation;
        let steps = if drop_last { micro_batches / accumulation } else { micro_batches.div_ceil(accumulation) };
        let steps_per_epoch = steps as u64;
        Ok(Plan {
            steps_per_epoch,
            total_steps: config.max_steps.unwrap_or(steps_per_epoch.saturating_mul(config.epochs)),
            rows_per_step: config.micro_batch_size * accumulation,
            drop_last,
        })
    }

    /// The rows of a step of an epoch.
    pub(crate) fn rows<'r>(&self, epoch_rows: &'r [RowRef], step_in_epoch: u64) -> &'r [RowRef] {
        let start = (step_in_epoch as usize * self.rows_per_step).min(epoch_rows.len());
        let end = (start + self.rows_per_step).min(epoch_rows.len());
        debug_assert!(!self.drop_last || end > start);
        &epoch_rows[start..end]
    }

    /// Goes through the rows of all steps before the first one is taken: each has to have something to learn from.
    /// Returns a hash of everything the steps will see.
    ///
    /// # Errors
    /// [`TrainError::NoData`], [`TrainError::NoTarget`].
    pub(crate) fn check(&self, data: &TrainData<'_>) -> Result<String, TrainError> {
        let examples: usize = data.datasets.iter().map(Vec::len).sum();
        if data.datasets.iter().flatten().all(|e| targets(e) == 0) {
            return Err(TrainError::NoData { examples });
        }
        let mut hasher = blake3::Hasher::new();
        for example in data.datasets.iter().flatten() {
            for number in [example.input_ids.len(), example.source_len] {
                hasher.update(&(number as u64).to_le_bytes());
            }
            let ids: Vec<u8> = example.input_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            hasher.update(&ids);
        }
        let mut epoch = Vec::new();
        for step in 0..self.total_steps {
            let in_epoch = step % self.steps_per_epoch;
            if in_epoch == 0 {
                epoch = (data.epoch_rows)(step / self.steps_per_epoch);
            }
            let rows = self.rows(&epoch, in_epoch);
            if rows.iter().all(|r| targets(&data.datasets[r.dataset][r.row]) == 0) {
                return Err(TrainError::NoTarget { step: step + 1, rows: rows.len() });
            }
            for number in rows.iter().flat_map(|r| [r.dataset, r.row]) {
                hasher.update(&(number as u64).to_le_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// How many tokens of an example are learned: those of the target, but not a first token, which has nothing before it.
fn targets(example: &Encoded) -> usize {
    example.input_ids.len().saturating_sub(example.source_len.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rows: usize, micro: usize, accumulation: usize, drop_last: bool) -> u64 {
        let config =
            TrainConfig { micro_batch_size: micro, gradient_accumulation_steps: accumulation, ..Default::default() };
        Plan::new(rows, &config, drop_last).unwrap().steps_per_epoch
    }

    #[test]
    fn steps_of_the_paper() {
        // 5,000 rows over 8 ranks, 4×4 and 2×8; MetaMathQA; joint with upsampling.
        assert_eq!(plan(5_000 / 8, 4, 4, true), 39);
        assert_eq!(plan(5_000 / 8, 2, 8, true), 39);
        assert_eq!(plan(395_000 / 8, 4, 4, true), 3_086);
        assert_eq!(plan(2_765_000 / 8, 2, 8, true), 21_601);
    }

    #[test]
    fn nothing_is_dropped_otherwise() {
        assert_eq!(plan(17, 2, 4, false), 3);
        assert_eq!(plan(3, 2, 4, true), 1, "less than one step's worth is one step");
    }

    #[test]
    fn each_row_comes_up_once_an_epoch_and_the_last_step_is_smaller() {
        let config = TrainConfig { micro_batch_size: 2, gradient_accumulation_steps: 2, ..Default::default() };
        let all: Vec<RowRef> = (0..7).map(|row| RowRef { dataset: 0, row }).collect();
        for drop_last in [false, true] {
            let plan = Plan::new(7, &config, drop_last).unwrap();
            let steps: Vec<usize> = (0..plan.steps_per_epoch).map(|s| plan.rows(&all, s).len()).collect();
            // Four micro-batches, the last with one row, make two whole steps either way.
            assert_eq!(steps, [4, 3], "drop_last {drop_last}");
        }
        let plan = Plan::new(5, &config, true).unwrap();
        assert_eq!((plan.steps_per_epoch, plan.rows(&all[..5], 0).len()), (1, 4), "the third micro-batch is left out");
    }

    #[test]
    fn batches_of_nothing_are_an_error() {
        let config = TrainConfig { micro_batch_size: 0, ..Default::default() };
        let message = Plan::new(3, &config, false).unwrap_err().to_string();
        assert_eq!(message, "micro_batch_size = 0: expected at least 1");
    }
}
