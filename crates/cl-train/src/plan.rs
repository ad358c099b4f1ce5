use cl_data::{Encoded, RowRef};

use crate::{TrainConfig, TrainError};

/// What a round trains on: encoded data sets, and which of their rows each epoch goes through, in order.
pub struct TrainData<'a> {
    /// Data sets; the round's own and those replayed.
    pub datasets: &'a [Vec<Encoded>],
    /// Rows of an epoch (from 0). Has to give the same rows each time it is asked for the same epoch.
    pub epoch_rows: &'a dyn Fn(u64) -> Vec<RowRef>,
}

/// How the rows fall into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// [`TrainError::NoData`] when there is nothing to train on.
    pub fn new(rows: usize, config: &TrainConfig, drop_last: bool) -> Result<Plan, TrainError> {
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
            total_steps: config.max_steps.unwrap_or(steps_per_epoch * config.epochs),
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
}
