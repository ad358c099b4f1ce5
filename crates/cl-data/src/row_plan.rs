use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_file, write_file};
use serde::{Deserialize, Serialize};

use crate::problem::RowPlanProblem;
use crate::{Draw, Error, HeldOut, Profile, RowRef, epoch_rows};

/// The plan of a round's training rows (`rows.json`), from which the rows of every epoch and their order can be
/// computed. Its size does not depend on the amount of data.
///
/// ```
/// use cl_data::{PlannedSet, Profile, RowPlan};
///
/// let set = PlannedSet {
///     name: "qa".into(),
///     path: "qa.jsonl".into(),
///     blake3: "0".repeat(64),
///     rows: 5,
///     rows_per_epoch: 5,
///     fixed_seed: None,
///     held_out: None,
/// };
/// let plan = RowPlan::new(vec![set], 42, Profile::Method, true, 7);
/// let used: Vec<_> = plan.used(1).collect();
/// assert_eq!(used.len(), 2); // 7 rows in all: epoch 0 whole, 2 rows of epoch 1
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowPlan {
    /// The data sets; those of the round itself come last.
    pub datasets: Vec<PlannedSet>,
    /// Random seed.
    pub seed: u64,
    /// Profile: which random number generator is used.
    #[serde(deserialize_with = "Profile::of_training")]
    pub profile: Profile,
    /// Whether rows are shuffled; otherwise they are in file order.
    pub shuffle: bool,
    /// Number of rows used by all steps; the last epoch may only be used in part.
    pub rows: u64,
    /// Hexadecimal blake3 hash of the first epoch's rows, to detect a change of the generator.
    pub first_epoch: String,
}

/// A data set of a [`RowPlan`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedSet {
    /// Name, or path if the name is not unique.
    pub name: String,
    /// Path of the file.
    pub path: PathBuf,
    /// Hexadecimal blake3 hash of the file.
    pub blake3: String,
    /// Number of rows available for training.
    pub rows: usize,
    /// Number of rows per epoch.
    pub rows_per_epoch: usize,
    /// Random seed if rows are sampled once; absent if they are sampled again for each epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_seed: Option<u64>,
    /// Rows of the file that are held out for validation, in addition to `rows`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<HeldOut>,
}

/// A row used in training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedRow {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Position in the epoch, from 0.
    pub position: usize,
    /// Name of the data set.
    pub dataset: String,
    /// Index of the row in its file, from 0.
    pub row: usize,
}

impl PlannedSet {
    /// Returns the indices in the file of the rows available for training, unless these are simply the first rows.
    fn rows_in_file(&self) -> Option<Vec<usize>> {
        self.held_out.map(|held_out| held_out.remaining(self.rows + held_out.rows))
    }
}

impl RowPlan {
    /// Creates a plan for a round whose steps use `rows` rows in total.
    pub fn new(datasets: Vec<PlannedSet>, seed: u64, profile: Profile, shuffle: bool, rows: u64) -> RowPlan {
        let mut plan = RowPlan { datasets, seed, profile, shuffle, rows, first_epoch: String::new() };
        plan.first_epoch = hash(&plan.epoch(0));
        plan
    }

    /// Returns all rows of an epoch (from 0), in order.
    pub fn epoch(&self, epoch: u64) -> Vec<RowRef> {
        let draw = |set: &PlannedSet| Draw { rows: set.rows, take: set.rows_per_epoch, fixed: set.fixed_seed };
        let draws: Vec<Draw> = self.datasets.iter().map(draw).collect();
        let mut rows = epoch_rows(&draws, epoch, self.seed, self.profile);
        if !self.shuffle {
            rows.sort_by_key(|r| (r.dataset, r.row));
        }
        rows
    }

    /// Returns the number of rows per epoch.
    pub fn rows_per_epoch(&self) -> usize {
        self.datasets.iter().map(|set| set.rows_per_epoch).sum()
    }

    /// Returns the number of epochs, including a last one that is only used in part.
    pub fn epochs(&self) -> u64 {
        self.rows.div_ceil(self.rows_per_epoch().max(1) as u64)
    }

    /// Returns the rows of an epoch that are used.
    pub fn used(&self, epoch: u64) -> impl Iterator<Item = UsedRow> {
        let before = epoch.saturating_mul(self.rows_per_epoch() as u64);
        let left = usize::try_from(self.rows.saturating_sub(before)).unwrap_or(usize::MAX);
        let rows = if left == 0 { Vec::new() } else { self.epoch(epoch) };
        let in_file: Vec<Option<Vec<usize>>> = self.datasets.iter().map(PlannedSet::rows_in_file).collect();
        rows.into_iter().take(left).enumerate().map(move |(position, r)| UsedRow {
            epoch,
            position,
            dataset: self.datasets[r.dataset].name.clone(),
            row: in_file[r.dataset].as_ref().map_or(r.row, |rows| rows[r.row]),
        })
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// Returns [`Error::File`] if the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let mut json = serde_json::to_vec_pretty(self).expect("numbers and text are JSON");
        json.push(b'\n');
        Ok(write_file(path, &json)?)
    }

    /// Reads the file, and checks that the first epoch still yields the same rows.
    ///
    /// # Errors
    /// Returns [`Error::File`] if the file cannot be read, and [`Error::RowPlan`] if it is damaged, or was written by a
    /// version with a different generator.
    pub fn read(path: &Path) -> Result<RowPlan, Error> {
        let wrong = |problem| Error::RowPlan { path: path.to_owned(), problem };
        let plan: RowPlan = serde_json::from_slice(&read_file(path, MAX_CONFIG)?)
            .map_err(|source| wrong(RowPlanProblem::Json { source }))?;
        // No round is this large; a damaged number would exhaust memory.
        let limit = 1 << 32;
        let largest = |set: &PlannedSet| set.rows.max(set.rows_per_epoch).max(set.held_out.map_or(0, |h| h.rows));
        if plan.datasets.iter().any(|set| largest(set) > limit) {
            return Err(wrong(RowPlanProblem::TooManyRows { limit }));
        }
        if hash(&plan.epoch(0)) != plan.first_epoch {
            return Err(wrong(RowPlanProblem::OtherRows));
        }
        Ok(plan)
    }
}

fn hash(rows: &[RowRef]) -> String {
    let mut hasher = blake3::Hasher::new();
    for number in rows.iter().flat_map(|r| [r.dataset, r.row]) {
        hasher.update(&(number as u64).to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rows: u64) -> RowPlan {
        let set = |name: &str, rows, rows_per_epoch| PlannedSet {
            name: name.to_owned(),
            path: name.into(),
            blake3: String::new(),
            rows,
            rows_per_epoch,
            fixed_seed: None,
            held_out: None,
        };
        RowPlan::new(vec![set("old", 10, 2), set("new", 6, 6)], 7, Profile::Method, true, rows)
    }

    #[test]
    fn a_plan_reads_back_and_a_changed_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.json");
        let plan = plan(20);
        plan.write(&path).unwrap();
        assert_eq!(RowPlan::read(&path).unwrap(), plan);
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [("\"seed\": 7", "\"seed\": 8"), ("\"rows\": 10", "\"rows\": 99999999999999"), ("{", "[")] {
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let message = RowPlan::read(&path).unwrap_err().to_string();
            assert!(message.contains("rows.json"), "{message}");
        }
    }

    #[test]
    fn used_rows_are_those_of_the_file_and_none_that_is_held_out() {
        let mut plan = plan(16);
        let held_out = HeldOut { rows: 3, seed: 5 };
        plan.datasets[1].held_out = Some(held_out); // 6 of 9 rows are trained on
        let mut rows: Vec<usize> = plan.used(1).filter(|r| r.dataset == "new").map(|r| r.row).collect();
        rows.extend(held_out.indices(9));
        rows.sort_unstable();
        assert_eq!(rows, (0..9).collect::<Vec<_>>());
        assert_eq!(plan.first_epoch, hash(&plan.epoch(0)));
    }

    #[test]
    fn used_rows_end_where_steps_end() {
        let plan = plan(20);
        let counts: Vec<usize> = (0..4).map(|epoch| plan.used(epoch).count()).collect();
        assert_eq!((plan.epochs(), counts), (3, vec![8, 8, 4, 0]));
        assert_eq!(plan.used(0).filter(|r| r.dataset == "old").count(), 2);
        let (first, second): (Vec<_>, Vec<_>) = (plan.epoch(0), plan.epoch(1));
        assert_ne!(first, second, "drawn anew each epoch");
    }
}
