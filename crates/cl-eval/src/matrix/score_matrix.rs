use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Whether a column is old or new knowledge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Old knowledge, which no round trains on.
    Old,
    /// New knowledge, which a round trains on.
    New,
}

/// A scored task or group of tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name of the task.
    pub name: String,
    /// Old or new knowledge.
    pub group: Group,
    /// The round (1-based) that trains on it. Several columns may share a round, such as the two variants of GSM8K.
    pub round: Option<usize>,
}

impl Column {
    /// Creates a column.
    pub fn new(name: &str, group: Group, round: Option<usize>) -> Column {
        Column { name: name.to_owned(), group, round }
    }
}

/// Scores before the first round (row 0) and after each round t (row t), with one column per task.
///
/// In the formulas, `R[t][c]` is the score of column c after round t, `R[0]` that of the base model, T the last round
/// that has a row, and r(c) the round that trains on column c.
///
/// | figure | formula | defined for columns |
/// | --- | --- | --- |
/// | [`gain`](ScoreMatrix::gain) over base | `R[T][c] / R[0][c] − 1` | all |
/// | [`relative_bwt`](ScoreMatrix::relative_bwt), the paper's | `R[T][c] / R[r(c)][c] − 1` | trained before T |
/// | [`absolute_bwt`](ScoreMatrix::absolute_bwt), the literature's | `R[T][c] − R[r(c)][c]` | trained before T |
/// | [`forgetting`](ScoreMatrix::forgetting) | max over r(c) ≤ t < T of `R[t][c]`, minus `R[T][c]` | trained before T |
/// | [`forward_transfer`](ScoreMatrix::forward_transfer) | `R[r(c) − 1][c] − R[0][c]` | trained after round 1 |
///
/// A figure is `None` if its definition does not apply, if a score that it needs was not measured or is not finite, or
/// if its denominator is 0; tables show "–".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreMatrix {
    /// The tasks.
    pub columns: Vec<Column>,
    /// Names of the rows.
    pub rows: Vec<String>,
    /// Scores by row and column; `None` if not measured.
    pub scores: Vec<Vec<Option<f64>>>,
}

impl ScoreMatrix {
    /// Creates a matrix without rows.
    pub fn new(columns: Vec<Column>) -> ScoreMatrix {
        ScoreMatrix { columns, rows: Vec::new(), scores: Vec::new() }
    }

    /// Appends the row of the base model, which comes first, or of the next round.
    ///
    /// # Errors
    /// Returns [`Error::Row`] if the number of scores differs from the number of columns.
    pub fn push(&mut self, row: &str, scores: Vec<Option<f64>>) -> Result<(), Error> {
        let (expected, got) = (self.columns.len(), scores.len());
        if expected != got {
            return Err(Error::Row { row: row.to_owned(), expected, got });
        }
        self.rows.push(row.to_owned());
        self.scores.push(scores);
        Ok(())
    }

    /// Returns `R[row][column]`; `None` if it was not measured, is not finite, or is outside the matrix.
    pub fn at(&self, row: usize, column: usize) -> Option<f64> {
        (*self.scores.get(row)?.get(column)?).filter(|v| v.is_finite())
    }

    fn last(&self, column: usize) -> Option<f64> {
        self.at(self.scores.len().checked_sub(1)?, column)
    }

    /// Returns the score after the column's own round, if that is not the last one.
    fn diagonal(&self, column: usize) -> Option<f64> {
        let round = self.round(column)?;
        if round + 1 < self.scores.len() { self.at(round, column) } else { None }
    }

    fn round(&self, column: usize) -> Option<usize> {
        self.columns.get(column)?.round.filter(|&r| r >= 1)
    }

    /// Relative gain over the base: `R[T][c] / R[0][c] − 1` (the paper's "gain base").
    pub fn gain(&self, column: usize) -> Option<f64> {
        ratio(self.last(column)?, self.at(0, column)?)
    }

    /// Relative backward transfer, as printed in the paper: `R[T][c] / R[r(c)][c] − 1`; `None` for tasks of the last
    /// round.
    pub fn relative_bwt(&self, column: usize) -> Option<f64> {
        ratio(self.last(column)?, self.diagonal(column)?)
    }

    /// Absolute backward transfer, as defined in the literature: `R[T][c] − R[r(c)][c]` (Lopez-Paz and Ranzato,
    /// arXiv:1706.08840).
    pub fn absolute_bwt(&self, column: usize) -> Option<f64> {
        Some(self.last(column)? - self.diagonal(column)?)
    }

    /// Forgetting: max over r(c) ≤ t < T of `R[t][c]`, minus `R[T][c]` (Chaudhry et al., arXiv:1801.10112).
    pub fn forgetting(&self, column: usize) -> Option<f64> {
        self.diagonal(column)?;
        let round = self.round(column)?;
        let best = (round..self.scores.len() - 1).filter_map(|t| self.at(t, column)).fold(f64::NEG_INFINITY, f64::max);
        Some(best - self.last(column)?)
    }

    /// Forward transfer: `R[r(c) − 1][c] − R[0][c]`, the effect of earlier rounds on a task before its own round;
    /// `None` for tasks of the first round.
    pub fn forward_transfer(&self, column: usize) -> Option<f64> {
        let round = self.round(column).filter(|&r| r >= 2)?;
        Some(self.at(round - 1, column)? - self.at(0, column)?)
    }

    /// Returns the scores of a row in the columns of a group; `None` if one of them was not measured.
    pub fn row(&self, row: usize, group: Group) -> Option<Vec<f64>> {
        let columns = self.columns.iter().enumerate().filter(|(_, c)| c.group == group);
        columns.map(|(i, _)| self.at(row, i)).collect()
    }

    /// Returns the mean of a row over the columns of a group; `None` if one of them was not measured, or there are
    /// none.
    pub fn mean(&self, row: usize, group: Group) -> Option<f64> {
        mean(&self.row(row, group)?)
    }

    /// Returns the average gain of a group's columns, as the mean of their gains (the paper's Tables 1 and 2) and as
    /// the gain of their mean (Tables 3 and 4). The first is dominated by columns that start near zero.
    pub fn average_gains(&self, group: Group) -> (Option<f64>, Option<f64>) {
        let last = self.scores.len().saturating_sub(1);
        let (Some(before), Some(after)) = (self.row(0, group), self.row(last, group)) else {
            return (None, None);
        };
        (mean_of_percentages(&before, &after), ratio_of_means(&before, &after))
    }

    /// Returns the mean of a per-column figure over all columns for which it is defined.
    pub fn mean_of(&self, figure: impl Fn(&ScoreMatrix, usize) -> Option<f64>) -> Option<f64> {
        let values: Vec<f64> = (0..self.columns.len()).filter_map(|c| figure(self, c)).collect();
        mean(&values)
    }
}

/// Mean over columns of after/before − 1, as printed below Tables 1 and 2 of the paper.
///
/// ```
/// use cl_eval::{mean_of_percentages, ratio_of_means};
/// let (before, after) = ([0.5, 0.1], [0.5, 0.2]);
/// assert_eq!(mean_of_percentages(&before, &after), Some(0.5));
/// assert_eq!(ratio_of_means(&before, &after).map(|x| (x * 1e6).round() / 1e6), Some(0.166_667));
/// assert_eq!(mean_of_percentages(&[0.0], &[0.5]), None);
/// ```
pub fn mean_of_percentages(before: &[f64], after: &[f64]) -> Option<f64> {
    if before.len() != after.len() {
        return None;
    }
    let ratios: Option<Vec<f64>> = before.iter().zip(after).map(|(b, a)| ratio(*a, *b)).collect();
    mean(&ratios?)
}

/// Mean of after, divided by the mean of before, − 1, as printed below Tables 3 and 4 of the paper.
pub fn ratio_of_means(before: &[f64], after: &[f64]) -> Option<f64> {
    if before.len() != after.len() { None } else { ratio(mean(after)?, mean(before)?) }
}

fn ratio(after: f64, before: f64) -> Option<f64> {
    Some(after / before - 1.0).filter(|r| r.is_finite())
}

pub(super) fn mean(values: &[f64]) -> Option<f64> {
    let mean = values.iter().sum::<f64>() / values.len() as f64; // NaN (0/0) if there are no values
    Some(mean).filter(|m| m.is_finite())
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
    fn two_columns_may_share_a_round_and_a_round_may_teach_none() {
        let mut m = ScoreMatrix::new(vec![
            Column::new("gsm8k", Group::New, Some(2)),
            Column::new("gsm8k_cot", Group::New, Some(2)),
            Column::new("not taught", Group::New, None),
            Column::new("no such round", Group::New, Some(0)),
        ]);
        for (row, value) in [("base", 0.1), ("1", 0.2), ("1,2", 0.4), ("1-3", 0.3)] {
            m.push(row, vec![Some(value), Some(2.0 * value), Some(value), Some(value)]).unwrap();
        }
        close(m.relative_bwt(0), -0.25);
        close(m.relative_bwt(1), -0.25);
        close(m.absolute_bwt(1), -0.2);
        close(m.forward_transfer(0), 0.1);
        for column in [2, 3, 99] {
            assert_eq!((m.relative_bwt(column), m.absolute_bwt(column)), (None, None));
            assert_eq!((m.forgetting(column), m.forward_transfer(column)), (None, None));
        }
        close(m.gain(2), 2.0);
        assert_eq!(m.gain(99), None);
    }

    #[test]
    fn what_was_not_measured_has_no_figures() {
        for hole in [None, Some(f64::NAN), Some(f64::INFINITY)] {
            let mut m = matrix();
            m.scores[3][1] = hole;
            assert_eq!((m.gain(1), m.relative_bwt(1), m.absolute_bwt(1), m.forgetting(1)), (None, None, None, None));
            assert_eq!((m.mean(3, Group::New), m.average_gains(Group::New)), (None, (None, None)));
            close(m.mean_of(ScoreMatrix::absolute_bwt), -0.3);
        }
        let empty = ScoreMatrix::new(vec![Column::new("a", Group::New, Some(1))]);
        assert_eq!((empty.gain(0), empty.forgetting(0), empty.mean(0, Group::New)), (None, None, None));
        assert_eq!(empty.average_gains(Group::New), (None, None));
        assert_eq!((mean_of_percentages(&[], &[]), ratio_of_means(&[1.0], &[])), (None, None));
    }

    #[test]
    fn comes_back_from_json() {
        let mut m = matrix();
        m.scores[1][2] = None;
        let json = serde_json::to_string(&m).unwrap();
        assert!(json.contains(r#""group":"old","round":null"#), "{json}");
        assert_eq!(serde_json::from_str::<ScoreMatrix>(&json).unwrap(), m);
    }

    #[test]
    fn a_row_has_one_score_a_column() {
        assert!(matches!(matrix().push("x", vec![]), Err(Error::Row { expected: 4, got: 0, .. })));
    }
}
