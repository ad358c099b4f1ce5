//! Result rows grouped by method, and their means over seeds.

use cl_eval::{Group, ScoreMatrix, mean_of_percentages, ratio_of_means};

use crate::results::{Column, ResultRow, RowKind, StudyResults};

/// A mean over seeds, with the value of each seed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Value {
    /// Mean over seeds.
    pub mean: f64,
    /// The value of each seed.
    pub by_seed: Vec<(u64, f64)>,
    /// Standard error of the mean over documents, if all parts have one.
    pub standard_error: Option<f64>,
}

impl Value {
    /// Returns the mean of `value` over the rows that have one, or `None` if none has. The standard error is that of
    /// the mean of independent values.
    fn over<'r>(
        rows: &[&'r ResultRow],
        value: impl Fn(&'r ResultRow) -> Option<f64>,
        error: impl Fn(&'r ResultRow) -> Option<f64>,
    ) -> Option<Value> {
        let with: Vec<(&ResultRow, f64)> =
            rows.iter().filter_map(|&r| Some((r, value(r)?))).filter(|(_, v)| v.is_finite()).collect();
        let errors: Option<Vec<f64>> = with.iter().map(|(r, _)| error(r)).collect();
        let by_seed: Vec<(u64, f64)> = with.iter().map(|(r, v)| (r.seed, *v)).collect();
        let n = by_seed.len() as f64;
        let mean = by_seed.iter().map(|(_, v)| v).sum::<f64>() / n;
        let standard_error = errors.map(|e| e.iter().map(|e| e * e).sum::<f64>().sqrt() / n);
        (!by_seed.is_empty()).then_some(Value { mean, by_seed, standard_error })
    }

    /// Returns the sample standard deviation over seeds, if there are two or more.
    pub fn spread(&self) -> Option<f64> {
        deviation(&self.by_seed.iter().map(|(_, v)| *v).collect::<Vec<f64>>())
    }
}

/// Returns the sample standard deviation (n − 1) of two or more values.
pub(crate) fn deviation(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    (values.len() >= 2).then(|| (squares / (n - 1.0)).sqrt())
}

/// Models that differ only in their seed.
#[derive(Clone, Debug)]
pub(crate) struct Model<'r> {
    pub kind: RowKind,
    pub method: &'r str,
    pub round: Option<usize>,
    pub members: Option<usize>,
    pub main: bool,
    pub question: Option<&'r str>,
    pub rows: Vec<&'r ResultRow>,
}

/// The columns that an average covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    Old,
    New,
    All,
}

impl Span {
    pub fn holds(self, group: Group) -> bool {
        matches!((self, group), (Span::All, _) | (Span::Old, Group::Old) | (Span::New, Group::New))
    }

    /// Returns the heading used in the paper's Table 6.
    pub fn name(self) -> &'static str {
        match self {
            Span::Old => "AVold",
            Span::New => "AVnew",
            Span::All => "AVall",
        }
    }
}

/// The two definitions of an average gain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GainOf {
    /// Mean of the columns' gains, as below the paper's Tables 1 and 2.
    Columns,
    /// Gain of the columns' mean, as below the paper's Tables 3 and 4.
    Means,
}

impl GainOf {
    /// Returns the definition used by the paper.
    pub fn paper(span: Span) -> GainOf {
        if span == Span::Old { GainOf::Columns } else { GainOf::Means }
    }
}

/// The results, with rows grouped to models.
pub(crate) struct Study<'r> {
    pub results: &'r StudyResults,
    /// The models, in order of their first row.
    pub models: Vec<Model<'r>>,
}

impl<'r> Study<'r> {
    pub fn new(results: &'r StudyResults) -> Study<'r> {
        let mut models: Vec<Model<'r>> = Vec::new();
        for row in &results.rows {
            let question = row.question.as_deref();
            let place = models.iter().position(|m| {
                (m.kind, m.method, m.round, m.members, m.main, m.question)
                    == (row.kind, row.method.as_str(), row.round, row.members, row.main, question)
            });
            match place {
                Some(place) => models[place].rows.push(row),
                None => models.push(Model {
                    kind: row.kind,
                    method: &row.method,
                    round: row.round,
                    members: row.members,
                    main: row.main,
                    question,
                    rows: vec![row],
                }),
            }
        }
        Study { results, models }
    }

    pub fn columns(&self) -> &'r [Column] {
        &self.results.columns
    }

    /// Returns the indices of the columns of a span, in order; for all columns, old ones first.
    pub fn places(&self, span: Span) -> Vec<usize> {
        let of = |group| self.columns().iter().enumerate().filter(move |(_, c)| c.group == group).map(|(i, _)| i);
        [Group::Old, Group::New].into_iter().filter(|&g| span.holds(g)).flat_map(of).collect()
    }

    /// Whether the study reproduces the paper: some rows or columns correspond to the paper's.
    pub fn has_paper(&self) -> bool {
        self.columns().iter().any(|c| c.paper.is_some()) || self.results.rows.iter().any(|r| r.paper.is_some())
    }

    /// Whether any model of the main comparison has several seeds.
    pub fn has_seeds(&self) -> bool {
        self.models.iter().any(|m| m.main && m.rows.len() > 1)
    }

    /// Returns the base model.
    pub fn base(&self) -> Option<&Model<'r>> {
        self.models.iter().find(|m| m.kind == RowKind::Base)
    }

    /// Returns the base model of a seed, which is the same for all seeds unless there are several base models.
    pub fn base_row(&self, seed: u64) -> Option<&'r ResultRow> {
        let rows = &self.base()?.rows;
        rows.iter().find(|r| r.seed == seed).or(rows.first()).copied()
    }

    /// Returns the methods of the main comparison, in order, each with its final model: that of the last round of a
    /// sequence, or the merge of the most models.
    pub fn finals(&self) -> Vec<&Model<'r>> {
        let mut finals: Vec<&Model<'r>> = Vec::new();
        let ends = |m: &&Model| m.main && !matches!(m.kind, RowKind::Base | RowKind::OneRound);
        for model in self.models.iter().filter(ends) {
            match finals.iter_mut().find(|f| (f.kind, f.method) == (model.kind, model.method)) {
                Some(place) if (model.round, model.members) > (place.round, place.members) => *place = model,
                Some(_) => {}
                None => finals.push(model),
            }
        }
        finals
    }

    /// Like [`finals`](Study::finals), limited to one kind.
    pub fn finals_of(&self, kind: RowKind) -> Vec<&Model<'r>> {
        self.finals().into_iter().filter(|m| m.kind == kind).collect()
    }

    /// Returns the last round of a sequence by its method's name, ignoring case.
    pub fn sequence(&self, method: &str) -> Option<&Model<'r>> {
        self.finals_of(RowKind::Sequence).into_iter().find(|m| m.method.eq_ignore_ascii_case(method))
    }

    /// Returns a sequence's models after each round, in order.
    pub fn rounds_of(&self, last: &Model) -> Vec<&Model<'r>> {
        let same = |m: &&Model| {
            (m.kind, m.method, m.main, m.question) == (last.kind, last.method, last.main, last.question)
                && m.round.is_some()
        };
        let mut rounds: Vec<&Model<'r>> = self.models.iter().filter(same).collect();
        rounds.sort_by_key(|m| m.round);
        rounds
    }

    /// Returns the model that was trained on one round alone.
    pub fn one_round(&self, method: &str, round: usize) -> Option<&Model<'r>> {
        self.models.iter().find(|m| {
            m.main && m.kind == RowKind::OneRound && m.method.eq_ignore_ascii_case(method) && m.round == Some(round)
        })
    }

    /// Returns the methods of the main comparison that were trained for one round, in order.
    pub fn one_round_methods(&self) -> Vec<&'r str> {
        let mut names: Vec<&'r str> = Vec::new();
        for model in self.models.iter().filter(|m| m.main && m.kind == RowKind::OneRound) {
            if !names.contains(&model.method) {
                names.push(model.method);
            }
        }
        names
    }

    /// Returns the score of a column.
    pub fn score(&self, model: &Model<'r>, column: usize) -> Option<Value> {
        Value::over(&model.rows, |r| r.score(column), |r| r.standard_error(column))
    }

    /// Returns the mean of the columns of a span; `None` if one of them was not measured.
    pub fn average(&self, model: &Model<'r>, span: Span) -> Option<Value> {
        let places = self.places(span);
        Value::over(&model.rows, |r| mean_of(r, &places), |r| error_of_mean(r, &places))
    }

    /// Returns the relative gain of a column over the base.
    pub fn gain(&self, model: &Model<'r>, column: usize) -> Option<Value> {
        let gain = |r: &ResultRow| {
            let before = self.base_row(r.seed)?.score(column)?;
            Some(r.score(column)? / before - 1.0)
        };
        let error = |r: &ResultRow| {
            let base = self.base_row(r.seed)?;
            relative_error(
                (r.score(column)?, r.standard_error(column)?),
                (base.score(column)?, base.standard_error(column)?),
            )
        };
        Value::over(&model.rows, gain, error)
    }

    /// Returns the average relative gain of a span's columns over the base.
    pub fn average_gain(&self, model: &Model<'r>, span: Span, of: GainOf) -> Option<Value> {
        let places = self.places(span);
        let scores = |r: &ResultRow| places.iter().map(|&c| r.score(c)).collect::<Option<Vec<f64>>>();
        let gain = |r: &ResultRow| {
            let (before, after) = (scores(self.base_row(r.seed)?)?, scores(r)?);
            match of {
                GainOf::Columns => mean_of_percentages(&before, &after),
                GainOf::Means => ratio_of_means(&before, &after),
            }
        };
        Value::over(&model.rows, gain, |_| None)
    }

    /// Returns the score matrix of one seed of a sequence, starting with the base model.
    pub fn matrix(&self, last: &Model<'r>, seed: u64) -> ScoreMatrix {
        let columns = self.columns().iter().map(|c| cl_eval::Column::new(&c.name, c.group, c.round)).collect();
        let mut matrix = ScoreMatrix::new(columns);
        let nothing = vec![None; self.columns().len()];
        let scores = |row: Option<&ResultRow>| row.map_or(nothing.clone(), |r| r.scores.clone());
        let rounds = self.rounds_of(last);
        let of_round = |t: usize| {
            let model = rounds.iter().find(|m| m.round == Some(t))?;
            model.rows.iter().find(|r| r.seed == seed).copied()
        };
        matrix.push("base", scores(self.base_row(seed))).expect("checked: as many scores as columns");
        for t in 1..=last.round.unwrap_or(0) {
            matrix.push(&t.to_string(), scores(of_round(t))).expect("checked: as many scores as columns");
        }
        matrix
    }

    /// Returns a figure of each seed's score matrix, such as backward transfer.
    pub fn of_matrix(&self, last: &Model<'r>, figure: impl Fn(&ScoreMatrix) -> Option<f64>) -> Option<Value> {
        if last.kind != RowKind::Sequence {
            return None;
        }
        Value::over(&last.rows, |r| figure(&self.matrix(last, r.seed)), |_| None)
    }

    /// Returns the score of a column right after its own round in a sequence.
    pub fn acquired(&self, last: &Model<'r>, column: usize) -> Option<Value> {
        let round = self.columns()[column].round?;
        let own = self.rounds_of(last).into_iter().find(|m| m.round == Some(round))?;
        self.score(own, column)
    }

    /// Returns the seconds and bytes of a method; for a sequence, the totals over its rounds.
    pub fn cost(&self, last: &Model<'r>) -> (Option<Value>, Option<Value>) {
        let parts = if last.kind == RowKind::Sequence { self.rounds_of(last) } else { vec![last] };
        let rows_of = |seed: u64| parts.iter().map(move |m| m.rows.iter().find(|r| r.seed == seed).copied());
        // A study has the total of a sequence in its last row; finished runs have the cost of every round.
        let sum = |cost: fn(&ResultRow) -> Option<f64>| {
            let of_seed = |r: &ResultRow| {
                let all: Vec<Option<f64>> = rows_of(r.seed).map(|row| cost(row?)).collect();
                let only_last = all.iter().rev().skip(1).all(Option::is_none);
                if only_last { all.last().copied().flatten() } else { all.into_iter().sum() }
            };
            Value::over(&last.rows, of_seed, |_| None)
        };
        (sum(|r| r.seconds), sum(|r| r.bytes.map(|b| b as f64)))
    }

    /// Returns the names of the open questions, in order.
    pub fn questions(&self) -> Vec<&'r str> {
        let mut names: Vec<&'r str> = Vec::new();
        for question in self.models.iter().filter_map(|m| m.question) {
            if !names.contains(&question) {
                names.push(question);
            }
        }
        names
    }
}

/// Returns the mean of a row's scores in these columns; `None` if one was not measured.
pub(crate) fn mean_of(row: &ResultRow, places: &[usize]) -> Option<f64> {
    let scores: Option<Vec<f64>> = places.iter().map(|&c| row.score(c)).collect();
    mean(&scores?)
}

/// Returns the standard error of that mean, assuming that the columns' documents are independent.
pub(crate) fn error_of_mean(row: &ResultRow, places: &[usize]) -> Option<f64> {
    let squares: Option<Vec<f64>> = places.iter().map(|&c| row.standard_error(c).map(|e| e * e)).collect();
    Some(squares?.iter().sum::<f64>().sqrt() / places.len() as f64).filter(|e| e.is_finite())
}

pub(crate) fn mean(values: &[f64]) -> Option<f64> {
    Some(values.iter().sum::<f64>() / values.len() as f64).filter(|m| m.is_finite())
}

/// Returns the standard error of a ratio of independent scores, by the delta method.
fn relative_error((after, error): (f64, f64), (before, base_error): (f64, f64)) -> Option<f64> {
    let ratio = after / before;
    Some(((error / before).powi(2) + (ratio * base_error / before).powi(2)).sqrt()).filter(|e| e.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_the_sample_standard_deviation() {
        // statistics.stdev([0.5, 0.7, 0.6]) == 0.1
        assert!((deviation(&[0.5, 0.7, 0.6]).unwrap() - 0.1).abs() < 1e-12);
        assert_eq!(deviation(&[0.5]), None);
    }

    #[test]
    fn the_error_of_a_ratio() {
        // 0.5 ± 0.03 over 0.4 ± 0.02: 1.25 · √((0.03/0.5)² + (0.02/0.4)²)
        let expected = 1.25 * (0.06f64.powi(2) + 0.05f64.powi(2)).sqrt();
        assert!((relative_error((0.5, 0.03), (0.4, 0.02)).unwrap() - expected).abs() < 1e-12);
    }
}
