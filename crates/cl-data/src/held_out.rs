use std::collections::HashSet;

use cl_checkpoint::seed::{fnv1a, splitmix64};
use serde::{Deserialize, Serialize};

use crate::{Dataset, shuffled};

/// Rows of a data set that are held out from training for validation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldOut {
    /// Number of rows.
    pub rows: usize,
    /// Random seed with which they are drawn.
    pub seed: u64,
}

impl HeldOut {
    /// Returns the indices of the held-out rows among all `total` rows, ascending.
    pub fn indices(self, total: usize) -> Vec<usize> {
        let mut rows = shuffled(total, 0, fnv1a(splitmix64(self.seed), "validation"));
        rows.truncate(self.rows);
        rows.sort_unstable();
        rows
    }

    /// Returns the indices of the remaining rows, ascending.
    pub(crate) fn remaining(self, total: usize) -> Vec<usize> {
        let held: HashSet<usize> = self.indices(total).into_iter().collect();
        (0..total).filter(|row| !held.contains(row)).collect()
    }
}

impl Dataset {
    /// Moves a random `fraction` of the rows, at least one, to a separate data set. At least one row remains, so
    /// nothing is held out from a single row. Both data sets keep the order of the file.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("sums.jsonl");
    /// # std::fs::write(&path, "{\"prompt\": \"1\", \"answer\": \"2\"}\n".repeat(40))?;
    /// let mut data = cl_data::load(&path, cl_data::Format::Auto)?; // 40 rows
    /// let validation = data.hold_out(0.1, 42);
    /// assert_eq!((data.examples.len(), validation.examples.len()), (36, 4));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn hold_out(&mut self, fraction: f64, seed: u64) -> Dataset {
        let total = self.examples.len();
        let rows = ((fraction * total as f64).round() as usize).clamp(1, (total.saturating_sub(1)).max(1));
        let rows = if total > 1 { rows } else { 0 };
        let held_out = HeldOut { rows, seed };
        let chosen: HashSet<usize> = held_out.indices(total).into_iter().collect();
        let (mut held, mut kept) = (Vec::with_capacity(rows), Vec::with_capacity(total - rows));
        for (row, example) in std::mem::take(&mut self.examples).into_iter().enumerate() {
            if chosen.contains(&row) { held.push(example) } else { kept.push(example) }
        }
        self.examples = kept;
        self.held_out = Some(held_out);
        Dataset {
            name: self.name.clone(),
            examples: held,
            path: self.path.clone(),
            hash: self.hash.clone(),
            held_out: None,
            ignored_tools: self.ignored_tools.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Example, Found};

    #[test]
    fn held_out_rows_follow_from_the_seed_and_are_not_trained_on() {
        let examples: Vec<Example> = (0..50).map(|i| Example::pair(i.to_string(), "a")).collect();
        let set = Dataset {
            name: "a".into(),
            examples,
            path: "a".into(),
            hash: String::new(),
            held_out: None,
            ignored_tools: Found::default(),
        };
        let split = |fraction, seed| {
            let mut train = set.clone();
            let held = train.hold_out(fraction, seed);
            (train, held)
        };
        let (train, held) = split(0.2, 7);
        let info = train.held_out.unwrap();
        assert_eq!((train.examples.len(), held.examples.len(), info.rows), (40, 10, 10));
        let of = |rows: Vec<usize>| rows.into_iter().map(|i| set.examples[i].clone()).collect::<Vec<_>>();
        assert_eq!(of(info.indices(50)), held.examples);
        assert_eq!(of(info.remaining(50)), train.examples);
        assert_eq!(split(0.2, 7).1, held);
        assert_ne!(split(0.2, 8).1, held);
        assert_eq!((split(0.999, 7).0.examples.len(), split(0.001, 7).1.examples.len()), (1, 1));
        let mut single = Dataset { examples: set.examples[..1].to_vec(), ..set.clone() };
        assert_eq!((single.hold_out(0.5, 7).examples.len(), single.examples.len()), (0, 1));
    }
}
