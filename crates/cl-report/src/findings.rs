//! The paper's claims, tested as paired differences with confidence intervals.
//!
//! Each claim states that a difference `d` is positive. If both sides have two or more seeds in common, `d` is computed
//! for each seed, and the interval is Student's t over seeds,
//!
//! ```text
//! mean(d) ± t(0.975, n − 1) · sd(d) / √n
//! ```
//!
//! because a percentile bootstrap of two or three values is far too narrow: it never leaves their range. With one seed,
//! the interval is mean ± 1.96 · standard error, from the standard errors of the scores over documents, which are
//! assumed to be independent. Both sides answer the same documents, so this is wider than a paired interval; it does
//! not include the variation between seeds.

use serde::Serialize;

use crate::methods::{Family, family, is_of_task_vectors, is_olora, is_replay, is_ties_or_dare, is_trained, weight};
use crate::paper::Paper;
use crate::results::{ResultRow, RowKind, StudyResults};
use crate::study::{Model, Span, Study, deviation, error_of_mean, mean, mean_of};

/// Verdict of the results on a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval supports the claim.
    Holds,
    /// The whole interval contradicts the claim.
    DoesNotHold,
    /// The interval contains zero, or there is none.
    Inconclusive,
    /// A model needed to test the claim is missing.
    NotRun,
}

impl Verdict {
    /// Returns the verdict in words.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Holds => "holds",
            Verdict::DoesNotHold => "does not hold",
            Verdict::Inconclusive => "inconclusive",
            Verdict::NotRun => "not run",
        }
    }
}

/// A claim of the paper, tested on the results.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// The claim.
    pub claim: String,
    /// The difference, which is positive if the claim holds.
    pub measure: String,
    /// Mean of the difference, in units of the score.
    pub estimate: Option<f64>,
    /// Its 95% interval.
    pub interval: Option<(f64, f64)>,
    /// How the interval was computed.
    pub method: String,
    /// Number of seeds that both sides have in common.
    pub seeds: usize,
    /// The verdict.
    pub verdict: Verdict,
    /// The same difference computed from the paper's tables, if they contain it.
    pub paper: Option<f64>,
}

/// Tests the paper's claims on the results. Rows are looked up by method and kind in the main comparison.
pub fn findings(results: &StudyResults) -> Vec<Finding> {
    let study = Study::new(results);
    let claims = Claims { study: &study, paper: &Paper::new() };
    let mut all = vec![claims.lora_forgets_less()];
    all.extend(claims.replay_restores());
    all.extend(claims.orthogonality());
    all.push(claims.mixing_beats_merging());
    all.extend(claims.joint_is_not_better());
    all.extend(claims.factors_lose());
    all
}

/// A figure of a row that a difference is computed from, with its standard error.
type Figure<'f> = &'f dyn Fn(&ResultRow) -> (Option<f64>, Option<f64>);

struct Claims<'s, 'r> {
    study: &'s Study<'r>,
    paper: &'s Paper,
}

impl<'r> Claims<'_, 'r> {
    fn lora_forgets_less(&self) -> Finding {
        let finding = blank(
            "LoRA forgets old knowledge less than full fine-tuning.",
            "AVold of sequential LoRA − AVold of sequential FFT",
        );
        let models = (self.study.sequence("LoRA"), self.study.sequence("FFT"));
        let paper = self.printed("LoRA", "FFT", Span::Old);
        self.compare(finding, &[models.0], &[models.1], &self.average(Span::Old), paper)
    }

    fn replay_restores(&self) -> Vec<Finding> {
        let one = |name: &str| {
            let replay = self.sequence(|m| is_replay(m) && family(m) == family(name));
            let measure =
                format!("mean score on tasks taught before the last round, sequential {name} with replay − without");
            let finding = blank(&format!("Replay restores what sequential {name} forgot."), &measure);
            let earlier = self.earlier();
            let figure = move |r: &ResultRow| (mean_of(r, &earlier), error_of_mean(r, &earlier));
            let paper = self.paper_earlier(&format!("{name}-Rep"), name);
            self.compare(finding, &[replay], &[self.study.sequence(name)], &figure, paper)
        };
        ["LoRA", "FFT"].map(one).into()
    }

    /// Tests o-lora with the largest λ against LoRA, right after each round and over the rounds.
    fn orthogonality(&self) -> Vec<Finding> {
        let orthogonal = self.study.finals_of(RowKind::Sequence).into_iter().filter(|m| is_olora(m.method));
        let heavy =
            orthogonal.max_by(|a, b| weight(a.method).unwrap_or(0.0).total_cmp(&weight(b.method).unwrap_or(0.0)));
        let lora = self.study.sequence("LoRA");
        let name = heavy.map_or("o-lora", |m| m.method);
        let taught: Vec<usize> =
            self.study.places(Span::New).into_iter().filter(|&c| self.study.columns()[c].round.is_some()).collect();
        let study = self.study;
        // The model of the row is looked up again, because the figure requires the rounds before the last one.
        let matrix = |r: &ResultRow| {
            let model = study.models.iter().find(|m| m.rows.iter().any(|o| std::ptr::eq(*o, r)))?;
            Some(study.matrix(model, r.seed))
        };
        let acquired = |r: &ResultRow| {
            let scores = matrix(r).and_then(|m| {
                let scores =
                    taught.iter().map(|&c| m.at(study.columns()[c].round?, c)).collect::<Option<Vec<f64>>>()?;
                mean(&scores)
            });
            (scores, None)
        };
        let kept = |r: &ResultRow| (matrix(r).and_then(|m| m.mean_of(cl_eval::ScoreMatrix::absolute_bwt)), None);
        let costs = blank(
            "A large λ of o-lora costs acquisition.",
            &format!("mean score right after each task's own round, LoRA − {name}"),
        );
        let saves = blank("A large λ of o-lora saves retention.", &format!("mean absolute BWT, {name} − LoRA"));
        vec![
            self.compare(costs, &[lora], &[heavy], &acquired, None),
            self.compare(saves, &[heavy], &[lora], &kept, None),
        ]
    }

    fn mixing_beats_merging(&self) -> Finding {
        // Trained routers have seen all data, unlike both sides of the paper's comparison.
        let untrained = |m: &&Model<'r>| !is_trained(m.method);
        let some = |kind| self.study.finals_of(kind).into_iter().filter(untrained).map(Some).collect::<Vec<_>>();
        let (mixtures, merges) = (some(RowKind::MixtureOfExperts), some(RowKind::Merge));
        let measure = format!(
            "AVall, mean over {} − mean over {}",
            counted(mixtures.len(), "mixture"),
            counted(merges.len(), "merge")
        );
        let finding = blank("Mixtures of experts beat merges.", &measure);
        self.compare(finding, &or_none(mixtures), &or_none(merges), &self.average(Span::All), None)
    }

    fn joint_is_not_better(&self) -> Vec<Finding> {
        let one = |name: &str| {
            let replay = self.sequence(|m| is_replay(m) && family(m) == family(name));
            let of_family = |m: &&Model<'r>| family(m.method) == family(name);
            let joint = self.study.finals_of(RowKind::Joint).into_iter().find(of_family);
            let claim = format!("Joint {name} training is not better than sequential {name} with replay.");
            let finding = blank(&claim, &format!("AVall of sequential {name} with replay − AVall of joint {name}"));
            let paper = self.printed(&format!("{name}-Rep"), &format!("Joint-{name}"), Span::All);
            self.compare(finding, &[replay], &[joint], &self.average(Span::All), paper)
        };
        ["LoRA", "FFT"].map(one).into()
    }

    /// Tests TIES and DARE against the average of the adapters; if there are several averages, that of LoRA.
    fn factors_lose(&self) -> Vec<Finding> {
        let merges = self.study.finals_of(RowKind::Merge);
        let plain = |m: &&&Model<'r>| !is_ties_or_dare(m.method);
        let average = merges
            .iter()
            .filter(plain)
            .find(|m| family(m.method) == Family::Lora)
            .or(merges.iter().find(plain))
            .copied();
        let name = average.map_or("an average", |m| m.method);
        let one = |method: &str, of: Option<&Model<'r>>| {
            let finding = blank(
                &format!("{method} on the factors of adapters loses against an average."),
                &format!("AVnew of {name} − AVnew of {method}"),
            );
            self.compare(finding, &[average], &[of], &self.average(Span::New), None)
        };
        let on_factors = |m: &&Model<'r>| is_ties_or_dare(m.method) && !is_of_task_vectors(m.method);
        let losers: Vec<&Model<'r>> = merges.iter().copied().filter(on_factors).collect();
        if losers.is_empty() {
            return vec![one("TIES or DARE", None)];
        }
        losers.into_iter().map(|m| one(m.method, Some(m))).collect()
    }

    fn sequence(&self, wanted: impl Fn(&str) -> bool) -> Option<&Model<'r>> {
        self.study.finals_of(RowKind::Sequence).into_iter().find(|m| wanted(m.method))
    }

    fn average(&self, span: Span) -> impl Fn(&ResultRow) -> (Option<f64>, Option<f64>) + use<> {
        let places = self.study.places(span);
        move |r| (mean_of(r, &places), error_of_mean(r, &places))
    }

    /// Returns the columns that are trained before the last round.
    fn earlier(&self) -> Vec<usize> {
        let last = self.study.results.rounds.len();
        let taught = |c: &usize| self.study.columns()[*c].round.is_some_and(|r| r < last);
        self.study.places(Span::New).into_iter().filter(taught).collect()
    }

    fn printed(&self, a: &str, b: &str, span: Span) -> Option<f64> {
        let cell = |label| self.paper.cell(label, span.name()).map(|p| p.value);
        Some(cell(a)? - cell(b)?)
    }

    /// Returns the difference on the paper's six columns before its last round.
    fn paper_earlier(&self, a: &str, b: &str) -> Option<f64> {
        let average = |label: &str| {
            let columns = self.paper.columns(Span::New);
            let cells: Option<Vec<f64>> = columns[..6].iter().map(|c| Some(self.paper.cell(label, c)?.value)).collect();
            mean(&cells?)
        };
        Some(average(a)? - average(b)?)
    }

    /// Compares the mean over the models of side a with the mean over those of side b, paired by seed.
    fn compare(
        &self,
        finding: Finding,
        a: &[Option<&Model<'r>>],
        b: &[Option<&Model<'r>>],
        figure: Figure,
        paper: Option<f64>,
    ) -> Finding {
        let (Some(a), Some(b)) = (all(a), all(b)) else { return Finding { paper, ..finding } };
        let seeds = a[0].rows.iter().map(|r| r.seed);
        let pairs: Vec<(f64, Option<f64>)> =
            seeds.filter_map(|seed| difference(side(&a, seed, figure)?, side(&b, seed, figure)?)).collect();
        judged(Finding { paper, ..finding }, &pairs)
    }
}

fn all<'m, 'r>(models: &[Option<&'m Model<'r>>]) -> Option<Vec<&'m Model<'r>>> {
    models.iter().copied().collect::<Option<Vec<_>>>().filter(|m| !m.is_empty())
}

fn or_none<T>(models: Vec<Option<T>>) -> Vec<Option<T>> {
    if models.is_empty() { vec![None] } else { models }
}

fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn blank(claim: &str, measure: &str) -> Finding {
    Finding {
        claim: claim.to_owned(),
        measure: measure.to_owned(),
        estimate: None,
        interval: None,
        method: "not run".to_owned(),
        seeds: 0,
        verdict: Verdict::NotRun,
        paper: None,
    }
}

/// Returns the mean of the models' figure for a seed; `None` if a model lacks it.
fn side(models: &[&Model], seed: u64, figure: Figure) -> Option<(f64, Option<f64>)> {
    let figures: Option<Vec<(f64, Option<f64>)>> = models
        .iter()
        .map(|m| {
            let (value, error) = figure(m.rows.iter().find(|r| r.seed == seed)?);
            Some((value?, error))
        })
        .collect();
    let figures = figures?;
    let value = mean(&figures.iter().map(|f| f.0).collect::<Vec<f64>>())?;
    let squares: Option<Vec<f64>> = figures.iter().map(|f| f.1.map(|e| e * e)).collect();
    Some((value, squares.map(|s| s.iter().sum::<f64>().sqrt() / figures.len() as f64)))
}

fn difference(a: (f64, Option<f64>), b: (f64, Option<f64>)) -> Option<(f64, Option<f64>)> {
    let error = a.1.zip(b.1).map(|(a, b)| a.hypot(b));
    Some((a.0 - b.0, error))
}

/// Computes estimate, interval and verdict from differences by seed.
fn judged(finding: Finding, pairs: &[(f64, Option<f64>)]) -> Finding {
    let differences: Vec<f64> = pairs.iter().map(|p| p.0).collect();
    let n = differences.len();
    let Some(estimate) = mean(&differences) else {
        let method = "both sides were run, but have no seed in common with all scores measured".to_owned();
        return Finding { method, verdict: Verdict::Inconclusive, ..finding };
    };
    let documents = pairs.iter().map(|p| p.1).sum::<Option<f64>>().map(|sum| sum / n as f64);
    let (half, method) = match (deviation(&differences), documents) {
        // Seeds that happen to agree say nothing about how much they vary.
        (Some(0.0), error) => (
            error.filter(|error| *error > 0.0).map(|error| 1.96 * error),
            format!("{n} seeds with equal differences: ±1.96 standard errors over documents"),
        ),
        (Some(deviation), _) => {
            let half = t_quantile(n - 1) * deviation / (n as f64).sqrt();
            (Some(half), format!("Student's t over {n} seeds, paired"))
        }
        (None, Some(error)) => (Some(1.96 * error), "one seed: ±1.96 standard errors over documents".to_owned()),
        (None, None) => (None, "one seed and no standard errors: no interval".to_owned()),
    };
    let interval = half.map(|half| (estimate - half, estimate + half));
    let verdict = match interval {
        Some((low, _)) if low > 0.0 => Verdict::Holds,
        Some((_, high)) if high < 0.0 => Verdict::DoesNotHold,
        _ => Verdict::Inconclusive,
    };
    Finding { estimate: Some(estimate), interval, method, seeds: n, verdict, ..finding }
}

/// Returns the 0.975 quantile of Student's t distribution with `degrees` degrees of freedom (at least 1).
///
/// Up to nine degrees, the values are tabulated; beyond that, they are computed by the Cornish-Fisher expansion, which
/// is then accurate to three decimals (Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5).
fn t_quantile(degrees: usize) -> f64 {
    const FEW: [f64; 9] = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622];
    if let Some(tabulated) = FEW.get(degrees.saturating_sub(1)) {
        return *tabulated;
    }
    let (z, n) = (1.959_964f64, degrees as f64);
    let terms = [
        (z.powi(3) + z) / 4.0,
        (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
        (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
    ];
    z + terms[0] / n + terms[1] / n.powi(2) + terms[2] / n.powi(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_t() {
        // scipy.stats.t.ppf(0.975, [1, 2, 5, 10, 30])
        for (degrees, expected) in [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423)] {
            let got = t_quantile(degrees);
            assert!((got - expected).abs() < 5e-4, "{degrees}: {got} against {expected}");
        }
    }

    #[test]
    fn an_interval_over_seeds_decides() {
        let of = |values: &[f64]| judged(blank("c", "m"), &values.iter().map(|v| (*v, Some(9.0))).collect::<Vec<_>>());
        let clear = of(&[0.10, 0.11, 0.12]);
        // 0.11 ± 4.3027 · 0.01 / √3
        let (low, high) = clear.interval.unwrap();
        assert!((low - 0.085_158).abs() < 1e-5 && (high - 0.134_842).abs() < 1e-5, "{low} {high}");
        assert_eq!((clear.verdict, clear.seeds), (Verdict::Holds, 3));
        assert_eq!(of(&[-0.10, -0.11, -0.12]).verdict, Verdict::DoesNotHold);
        assert_eq!(of(&[0.10, -0.11, 0.12]).verdict, Verdict::Inconclusive);
        assert_eq!(of(&[0.10, 0.12]).verdict, Verdict::Inconclusive, "two seeds are few: t is 12.7");
    }

    #[test]
    fn one_seed_needs_standard_errors() {
        let one = |error| judged(blank("c", "m"), &[(0.1, error)]);
        assert_eq!(one(Some(0.02)).verdict, Verdict::Holds);
        assert_eq!(one(Some(0.06)).verdict, Verdict::Inconclusive);
        assert_eq!((one(None).verdict, one(None).estimate), (Verdict::Inconclusive, Some(0.1)));
        assert_eq!(judged(blank("c", "m"), &[]).verdict, Verdict::Inconclusive);
    }
}
