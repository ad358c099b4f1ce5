use std::ops::Range;

use cl_adapters::Orthogonality;
use cl_data::{Encoded, RowRef};
use serde::{Deserialize, Serialize};

use crate::{TrainConfig, TrainError, Validation};

/// Training data of a round: tokenized data sets, and the order of rows in each epoch.
pub struct TrainData<'a> {
    /// Data sets: the round's own, and replayed ones.
    pub datasets: &'a [Vec<Encoded>],
    /// Returns the rows of an epoch (from 0), in order. Must be deterministic.
    pub epoch_rows: &'a dyn Fn(u64) -> Vec<RowRef>,
    /// O-LoRA's penalty against adapters of earlier rounds.
    pub orthogonality: Option<&'a Orthogonality>,
    /// Validation data and settings.
    pub validation: Option<Validation<'a>>,
}

impl TrainData<'_> {
    /// Returns the examples of the given rows.
    pub(crate) fn examples<'r>(&self, rows: impl Iterator<Item = &'r RowRef>) -> Vec<&Encoded> {
        rows.map(|r| &self.datasets[r.dataset][r.row]).collect()
    }
}

/// Division of the epochs into micro-batches and optimizer steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Number of steps per epoch (on average, with `carry`).
    pub steps_per_epoch: u64,
    /// Number of steps of the round.
    pub total_steps: u64,
    rows: usize, // per epoch
    /// Number of leading rows that an epoch repeats at its end, so that all ranks have the same number of
    /// micro-batches.
    #[serde(default, skip_serializing_if = "is_zero")]
    repeated: usize,
    micro_batch_size: usize,
    accumulation: usize,
    carry: bool,
}

/// Rows of one epoch that are processed in one forward and backward pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MicroBatch {
    /// Epoch, from 0.
    pub(crate) epoch: u64,
    /// Positions in the row order of that epoch.
    pub(crate) rows: Range<usize>,
}

impl Plan {
    /// Plans the steps for epochs of `rows` rows.
    ///
    /// Without `carry`, every epoch ends with a step, which may have fewer micro-batches: ⌈⌈rows/micro_batch⌉ /
    /// accumulation⌉ steps. With `carry`, as in Transformers' Trainer before 4.46 and therefore in the paper's code, an
    /// epoch counts as ⌊⌈rows/micro_batch⌉ / accumulation⌋ steps (at least one). Leftover micro-batches are carried
    /// over into the next epoch's first step, so the end of the last epoch is not used. An epoch of at most
    /// `accumulation` micro-batches does end with a step.
    ///
    /// # Errors
    /// Returns [`TrainError::NoData`] if there are no rows, and [`TrainError::Config`] if a batch size is 0.
    pub fn new(rows: usize, config: &TrainConfig, carry: bool) -> Result<Plan, TrainError> {
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
        let (micro_batches, accumulation) =
            (rows.div_ceil(config.micro_batch_size), config.gradient_accumulation_steps);
        let steps = if carry { (micro_batches / accumulation).max(1) } else { micro_batches.div_ceil(accumulation) };
        let steps_per_epoch = steps as u64;
        Ok(Plan {
            steps_per_epoch,
            total_steps: config.max_steps.unwrap_or(steps_per_epoch.saturating_mul(config.epochs)),
            rows,
            repeated: 0,
            micro_batch_size: config.micro_batch_size,
            accumulation,
            carry,
        })
    }

    /// Adapts the plan to several ranks, to which the micro-batches of a step are assigned in turn.
    ///
    /// The plan changes only with `carry`: every epoch then repeats its first rows until all ranks have the same number
    /// of full micro-batches, as accelerate does for Transformers' Trainer ([`cl_data::shard`]).
    ///
    /// # Errors
    /// Returns [`TrainError::Config`] if a step has fewer micro-batches than there are ranks, or with `carry` if their
    /// number is not a multiple of the number of ranks.
    pub fn for_ranks(self, config: &TrainConfig, ranks: usize) -> Result<Plan, TrainError> {
        let wrong = |expected| {
            let value = format!("{} with {ranks} ranks", self.accumulation);
            Err(TrainError::Config { key: "gradient_accumulation_steps", value, expected })
        };
        if self.accumulation < ranks {
            return wrong("at least the number of ranks, which share the micro-batches of a step");
        }
        if !self.carry || ranks == 1 {
            return Ok(self);
        }
        if !self.accumulation.is_multiple_of(ranks) {
            return wrong("a multiple of the number of ranks with the profile `paper`");
        }
        let filled = self.rows.next_multiple_of(ranks * self.micro_batch_size);
        let steps_per_epoch = (filled / self.micro_batch_size / self.accumulation).max(1) as u64;
        let total_steps = config.max_steps.unwrap_or(steps_per_epoch.saturating_mul(config.epochs));
        Ok(Plan { repeated: filled - self.rows, steps_per_epoch, total_steps, ..self })
    }

    /// Number of rows in an epoch, including repeated ones.
    fn length(&self) -> usize {
        self.rows + self.repeated
    }

    /// Returns the rows of a micro-batch from the row order of its epoch.
    pub(crate) fn rows_of<'r>(&self, part: &MicroBatch, order: &'r [RowRef]) -> impl Iterator<Item = &'r RowRef> {
        part.rows.clone().map(|place| &order[place % order.len()])
    }

    /// Returns the micro-batches of a step (from 0).
    pub(crate) fn micro_batches(&self, step: u64) -> Vec<MicroBatch> {
        let in_epoch = self.length().div_ceil(self.micro_batch_size) as u64;
        // Micro-batches are numbered consecutively across epochs.
        let (first, end) = if self.carry {
            (self.boundary(step), self.boundary(step.saturating_add(1)))
        } else {
            let first = (step / self.steps_per_epoch).saturating_mul(in_epoch);
            let start = first + step % self.steps_per_epoch * self.accumulation as u64;
            (start, (start + self.accumulation as u64).min(first + in_epoch))
        };
        let micro_batch = |number: u64| {
            let start = (number % in_epoch) as usize * self.micro_batch_size;
            MicroBatch { epoch: number / in_epoch, rows: start..(start + self.micro_batch_size).min(self.length()) }
        };
        (first..end).map(micro_batch).collect()
    }

    /// Number of micro-batches in the first `steps` steps with `carry`: a step ends at every multiple of the
    /// accumulation, and at the end of an epoch that has at most that many micro-batches.
    fn boundary(&self, steps: u64) -> u64 {
        let (in_epoch, accumulation) = (self.length().div_ceil(self.micro_batch_size) as u64, self.accumulation as u64);
        if in_epoch > accumulation {
            return steps.saturating_mul(accumulation);
        }
        let both = (in_epoch / gcd(in_epoch, accumulation)).saturating_mul(accumulation);
        let ended = |micro_batches: u64| micro_batches / accumulation + micro_batches / in_epoch - micro_batches / both;
        // `ended` grows by at most one per micro-batch, and by at least one per epoch.
        let (mut low, mut high) = (0, steps.saturating_mul(in_epoch));
        while low < high {
            let middle = low + (high - low) / 2;
            if ended(middle) >= steps { high = middle } else { low = middle + 1 }
        }
        low
    }

    /// Divisor of the mean over a step's micro-batches. Transformers' Trainer always divides by the accumulation.
    pub(crate) fn micro_batches_in_mean(&self, count: usize) -> usize {
        if self.carry { self.accumulation } else { count }
    }

    /// Checks that each step of the first epoch has a supervised token. Later epochs are checked step by step, so that
    /// startup time does not grow with the number of epochs. Returns a hash of the data and the first epoch's rows.
    ///
    /// # Errors
    /// Returns [`TrainError::NoData`] or [`TrainError::NoTarget`] if the data or a step has no supervised token.
    pub(crate) fn check(&self, data: &TrainData<'_>) -> Result<String, TrainError> {
        let examples: usize = data.datasets.iter().map(Vec::len).sum();
        if data.datasets.iter().flatten().all(|e| e.targets() == 0) {
            return Err(TrainError::NoData { examples });
        }
        let mut hasher = blake3::Hasher::new();
        hash_examples(&mut hasher, data.datasets.iter().flatten());
        let first = (data.epoch_rows)(0);
        for number in first.iter().flat_map(|r| [r.dataset, r.row]) {
            hasher.update(&(number as u64).to_le_bytes());
        }
        if data.datasets.iter().flatten().any(|e| e.targets() == 0) {
            for step in 0..self.steps_per_epoch.min(self.total_steps) {
                let parts = self.micro_batches(step);
                let of_first = parts.iter().filter(|part| part.epoch == 0);
                let examples = of_first.map(|part| data.examples(self.rows_of(part, &first))).collect::<Vec<_>>();
                Plan::check_step(step, &examples)?;
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Number of rows that all steps use together.
    pub fn rows_in_all(&self) -> u64 {
        self.rows_in(self.total_steps)
    }

    /// Number of rows that the first `steps` steps use.
    pub fn rows_in(&self, steps: u64) -> u64 {
        let last = steps.checked_sub(1).and_then(|step| self.micro_batches(step).pop());
        last.map_or(0, |part| {
            part.epoch.saturating_mul(self.rows as u64).saturating_add(part.rows.end.min(self.rows) as u64)
        })
    }

    /// Checks that a step has a supervised token.
    ///
    /// # Errors
    /// Returns [`TrainError::NoTarget`] if it has none.
    pub(crate) fn check_step(step: u64, examples: &[Vec<&Encoded>]) -> Result<(), TrainError> {
        let rows = examples.iter().map(Vec::len).sum();
        if examples.iter().flatten().all(|e| e.targets() == 0) {
            return Err(TrainError::NoTarget { step: step + 1, rows });
        }
        Ok(())
    }
}

/// Adds the tokens and labels of examples to a hash.
pub(crate) fn hash_examples<'e>(hasher: &mut blake3::Hasher, examples: impl Iterator<Item = &'e Encoded>) {
    for example in examples {
        let length = example.input_ids.len();
        hasher.update(&(length as u64).to_le_bytes());
        // If the answer is at the end, only its start is hashed, for compatibility with older checkpoints.
        let plain = example.learned.len() <= 1 && example.learned.iter().all(|range| range.end == length);
        match example.learned.first() {
            _ if !plain => {
                for place in example.learned.iter().flat_map(|range| [range.start, range.end]) {
                    hasher.update(&(place as u64).to_le_bytes());
                }
            }
            range => {
                hasher.update(&(range.map_or(length, |r| r.start) as u64).to_le_bytes());
            }
        }
        let ids: Vec<u8> = example.input_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        hasher.update(&ids);
    }
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
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
        // 5,000 rows over 8 ranks, 4×4 and 2×8; MetaMathQA; joint training with upsampling.
        assert_eq!(plan(5_000 / 8, 4, 4, true), 39);
        assert_eq!(plan(5_000 / 8, 2, 8, true), 39);
        assert_eq!(plan(395_000 / 8, 4, 4, true), 3_086);
        assert_eq!(plan(2_765_000 / 8, 2, 8, true), 21_601);
    }

    #[test]
    fn an_epoch_ends_with_a_step_unless_micro_batches_are_carried_on() {
        assert_eq!(plan(17, 2, 4, false), 3);
        assert_eq!(plan(3, 2, 4, true), 1, "less than one step's worth is one step");
        let config = TrainConfig { micro_batch_size: 2, gradient_accumulation_steps: 2, ..Default::default() };
        let rows = |carry: bool| -> Vec<Vec<(u64, Range<usize>)>> {
            let plan = Plan::new(5, &config, carry).unwrap();
            let of = |step| plan.micro_batches(step).into_iter().map(|m| (m.epoch, m.rows)).collect();
            (0..3).map(of).collect()
        };
        assert_eq!(rows(false), [vec![(0, 0..2), (0, 2..4)], vec![(0, 4..5)], vec![(1, 0..2), (1, 2..4)]]);
        assert_eq!(rows(true), [vec![(0, 0..2), (0, 2..4)], vec![(0, 4..5), (1, 0..2)], vec![(1, 2..4), (1, 4..5)]]);
    }

    #[derive(serde::Deserialize)]
    struct Case {
        rows: usize,
        micro_batch_size: usize,
        gradient_accumulation_steps: usize,
        epochs: u64,
        global_step: u64,
        steps: Vec<std::collections::BTreeMap<usize, f64>>,
    }

    /// Weights of rows in each step of Transformers' Trainer, recorded by `tests/fixtures/make_trainer_steps.py`.
    #[test]
    fn carried_micro_batches_are_those_of_transformers_trainer() {
        #[derive(serde::Deserialize)]
        struct Fixture {
            cases: Vec<Case>,
        }
        let fixture: Fixture = serde_json::from_str(include_str!("../tests/fixtures/trainer_steps.json")).unwrap();
        assert_eq!(fixture.cases.len(), 10);
        for case in fixture.cases {
            let config = TrainConfig {
                micro_batch_size: case.micro_batch_size,
                gradient_accumulation_steps: case.gradient_accumulation_steps,
                epochs: case.epochs,
                ..Default::default()
            };
            let plan = Plan::new(case.rows, &config, true).unwrap();
            assert_eq!(plan.total_steps, case.global_step);
            for (step, expected) in case.steps.iter().enumerate() {
                let parts = plan.micro_batches(step as u64);
                let scale = plan.micro_batches_in_mean(parts.len()) as f64 / case.gradient_accumulation_steps as f64;
                let mut counts = std::collections::BTreeMap::new();
                for part in parts {
                    let share = 1.0 / part.rows.len() as f64 * scale;
                    part.rows.for_each(|row| *counts.entry(row).or_insert(0.0) += share);
                }
                assert_eq!(counts.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "step {step}");
                // The fixture has six digits.
                assert!(counts.iter().all(|(row, count)| (count - expected[row]).abs() < 1e-6), "step {step}");
            }
        }
    }

    #[test]
    fn ranks_share_micro_batches_and_the_paper_fills_epochs_up_as_accelerate_does() {
        let config = |accumulation| TrainConfig {
            micro_batch_size: 2,
            gradient_accumulation_steps: accumulation,
            epochs: 3,
            ..Default::default()
        };
        let plan = Plan::new(7, &config(4), false).unwrap();
        assert_eq!(plan.for_ranks(&config(4), 4).unwrap(), plan);
        assert_eq!(plan.for_ranks(&config(4), 3).unwrap(), plan);
        let message = plan.for_ranks(&config(4), 5).unwrap_err().to_string();
        assert!(message.starts_with("gradient_accumulation_steps = 4 with 5 ranks: expected at least"), "{message}");

        let rows: Vec<RowRef> = (0..7).map(|row| RowRef { dataset: 0, row }).collect();
        for (ranks, accumulation) in [(2, 2), (2, 4), (4, 4), (3, 3)] {
            let config = config(accumulation);
            let plan = Plan::new(7, &config, true).unwrap().for_ranks(&config, ranks).unwrap();
            let shards: Vec<Vec<RowRef>> = (0..ranks).map(|rank| cl_data::shard(&rows, rank, ranks, 2)).collect();
            let mut dealt = vec![Vec::new(); ranks];
            for step in 0..plan.total_steps {
                for (i, part) in plan.micro_batches(step).iter().enumerate() {
                    dealt[i % ranks].extend(plan.rows_of(part, &rows).copied());
                }
            }
            for (rank, dealt) in dealt.into_iter().enumerate() {
                let expected: Vec<RowRef> = shards[rank].iter().cycle().take(dealt.len()).copied().collect();
                assert_eq!(dealt, expected, "rank {rank} of {ranks}, accumulation {accumulation}");
            }
        }
        let message = Plan::new(7, &config(4), true).unwrap().for_ranks(&config(4), 3).unwrap_err().to_string();
        assert!(message.contains("a multiple of the number of ranks"), "{message}");
    }

    #[test]
    fn batches_of_nothing_are_an_error() {
        let config = TrainConfig { micro_batch_size: 0, ..Default::default() };
        let message = Plan::new(3, &config, false).unwrap_err().to_string();
        assert_eq!(message, "micro_batch_size = 0: expected at least 1");
    }
}
