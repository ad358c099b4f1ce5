use serde::{Deserialize, Serialize};

use crate::Error;

/// What a column is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Known before the first round; no round teaches it.
    Old,
    /// Taught in a round.
    New,
}

/// A scored task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name.
    pub name: String,
    /// Old or new knowledge.
    pub group: Group,
    /// The round (from 1) that teaches it. Two columns may share one, as GSM8K's two forms do.
    pub round: Option<usize>,
}

impl Column {
    /// A column.
    pub fn new(name: &str, group: Group, round: Option<usize>) -> Column {
        Column { name: name.to_owned(), group, round }
    }
}

/// Scores before the first round (row 0) and after every round (row t), one column a task.
///
/// In the formulas R[t][c] is the score of column c after round t, R[0] the base's, T the last round that has a row, and
/// r(c) the round that teaches column c. A value is `None` where its definition does not apply or divides by zero.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreMatrix {
    /// The tasks.
    pub columns: Vec<Column>,
    /// Names of the rows.
    pub rows: Vec<String>,
    /// Scores by row and column; `None` where nothing was measured.
    pub scores: Vec<Vec<Option<f64>>>,
}

impl ScoreMatrix {
    /// A matrix without rows.
    pub fn new(columns: Vec<Column>) -> ScoreMatrix {
        ScoreMatrix { columns, rows: Vec::new(), scores: Vec::new() }
    }

    /// Adds the base's row (first) or that of the next round.
    ///
    /// # Errors
    /// [`Error::Row`] when there is not one score a column.
    pub fn push(&mut self, row: &str, scores: Vec<Option<f64>>) -> Result<(), Error> {
        let (expected, got) = (self.columns.len(), scores.len());
        if expected != got {
            return Err(Error::Row { row: row.to_owned(), expected, got });
        }
        self.rows.push(row.to_owned());
        self.scores.push(scores);
        Ok(())
    }

    /// R[t][c].
    pub fn at(&self, row: usize, column: usize) -> Option<f64> {
        *self.scores.get(row)?.get(column)?
    }

    fn last(&self, column: usize) -> Option<f64> {
        self.at(self.scores.len().checked_sub(1)?, column)
    }

    /// The row right after the column's own round, when rounds followed it.
    fn diagonal(&self, column: usize) -> Option<f64> {
        let round = self.columns[column].round?;
        if round + 1 < self.scores.len() { self.at(round, column) } else { None }
    }

    /// Gain over the base, relative: R[T][c] / R[0][c] − 1 (the paper's "gain base").
    pub fn gain(&self, column: usize) -> Option<f64> {
        ratio(self.last(column)?, self.at(0, column)?)
    }

    /// Backward transfer as the paper prints it, relative: R[T][c] / R[r(c)][c] − 1; none for the last round's tasks.
    pub fn relative_bwt(&self, column: usize) -> Option<f64> {
        ratio(self.last(column)?, self.diagonal(column)?)
    }

    /// Backward transfer as the literature defines it: R[T][c] − R[r(c)][c] (Lopez-Paz and Ranzato, arXiv:1706.08840).
    pub fn absolute_bwt(&self, column: usize) -> Option<f64> {
        Some(self.last(column)? - self.diagonal(column)?)
    }

    /// Forgetting: max over r(c) ≤ t < T of R[t][c], less R[T][c] (Chaudhry et al., arXiv:1801.10112).
    pub fn forgetting(&self, column: usize) -> Option<f64> {
        self.diagonal(column)?;
        let round = self.columns[column].round?;
        let best = (round..self.scores.len() - 1).filter_map(|t| self.at(t, column)).fold(f64::NEG_INFINITY, f64::max);
        Some(best - self.last(column)?)
    }

    /// Forward transfer: R[r(c) − 1][c] − R[0][c], what earlier rounds did for a task before its own; none for the first
    /// round's tasks.
    pub fn forward_transfer(&self, column: usize) -> Option<f64> {
        let round = self.columns[column].round.filter(|&r| r >= 2)?;
        Some(self.at(round - 1, column)? - self.at(0, column)?)
    }

    /// Mean of a row over the columns of a group; `None` when one of them was not measured.
    pub fn mean(&self, row: usize, group: Group) -> Option<f64> {
        let columns = self.columns.iter().enumerate().filter(|(_, c)| c.group == group);
        let values: Option<Vec<f64>> = columns.map(|(i, _)| self.at(row, i)).collect();
        mean(&values?)
    }

    /// Mean of a per-column figure over all columns that have it.
    pub fn mean_of(&self, figure: impl Fn(&ScoreMatrix, usize) -> Option<f64>) -> Option<f64> {
        let values: Vec<f64> = (0..self.columns.len()).filter_map(|c| figure(self, c)).collect();
        mean(&values)
    }
}

/// Mean over columns of after/before − 1: what the paper prints under Tables 1 and 2.
pub fn mean_of_percentages(before: &[f64], after: &[f64]) -> Option<f64> {
    let ratios: Option<Vec<f64>> = before.iter().zip(after).map(|(b, a)| ratio(*a, *b)).collect();
    mean(&ratios?)
}

/// Mean of after / mean of before − 1: what the paper prints under Tables 3 and 4.
pub fn ratio_of_means(before: &[f64], after: &[f64]) -> Option<f64> {
    ratio(mean(after)?, mean(before)?)
}

fn ratio(after: f64, before: f64) -> Option<f64> {
    Some(after / before - 1.0).filter(|r| r.is_finite())
}

fn mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() { None } else { Some(values.iter().sum::<f64>() / values.len() as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> ScoreMatrix {
        let mut m = ScoreMatrix::new(vec![
            Column::new("old", Group::Old, None),
            Column::new("a", Group::New, Some(1)),
            Column::new("b", Group::New, Some(2)),
            Column::new("c", Group::New, Some(3)),
        ]);
        m.push("base", vec![Some(0.5), Some(0.0), Some(0.2), Some(0.4)]).unwrap();
        m.push("1", vec![Some(0.4), Some(0.8), Some(0.1), Some(0.4)]).unwrap();
        m.push("1,2", vec![Some(0.4), Some(0.9), Some(0.6), Some(0.5)]).unwrap();
        m.push("1-3", vec![Some(0.3), Some(0.6), Some(0.3), Some(1.0)]).unwrap();
        m
    }

    fn close(a: Option<f64>, b: f64) {
        assert!(a.is_some_and(|a| (a - b).abs() < 1e-12), "{a:?} against {b}");
    }

    #[test]
    fn definitions() {
        let m = matrix();
        close(m.gain(0), -0.4);
        assert_eq!(m.gain(1), None, "a base of 0 has no relative gain");
        close(m.relative_bwt(1), -0.25);
        close(m.absolute_bwt(2), -0.3);
        assert_eq!(m.relative_bwt(3), None, "the last task has not been followed by any");
        assert_eq!(m.relative_bwt(0), None, "old knowledge has no round");
        close(m.forgetting(1), 0.3);
        close(m.forward_transfer(2), -0.1);
        close(m.forward_transfer(3), 0.1);
        assert_eq!(m.forward_transfer(1), None);
        close(m.mean(3, Group::New), 1.9 / 3.0);
        close(m.mean_of(ScoreMatrix::absolute_bwt), -0.25);
    }

    #[test]
    fn a_row_has_one_score_a_column() {
        assert!(matches!(matrix().push("x", vec![]), Err(Error::Row { expected: 4, got: 0, .. })));
    }
}
