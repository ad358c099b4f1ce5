//! Comparison of two runs: against SciPy and statsmodels (`fixtures/make_compare.py`), by properties that hold for any
//! two runs, and on files.

use std::path::Path;

use cl_eval::{
    Comparison, Error, Metric, Prediction, Resampling, Response, Target, compare, mcnemar, paired_difference,
};
use proptest::prelude::*;
use serde_json::Value;

const FEW: Resampling = Resampling { resamples: 300, seed: 1, level: 0.95 };

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/compare.json")).unwrap()
}

#[test]
fn mcnemar_has_the_packages_probabilities() {
    for row in fixture()["tests"].as_array().unwrap() {
        let (b, c) = (row[0].as_u64().unwrap(), row[1].as_u64().unwrap());
        let test = mcnemar(b, c);
        let close = |ours: f64, theirs: f64| (ours - theirs).abs() <= 1e-10 * theirs;
        assert!(close(test.p, row[2].as_f64().unwrap()), "{b} {c}: {test:?}");
        assert!(test.mid_p <= test.p && close(test.mid_p, row[4].as_f64().unwrap()), "{b} {c}: {test:?}");
        assert_eq!(test.p_chi_squared.is_some(), b + c >= 25);
        if let (Some(ours), Some(theirs)) = (test.p_chi_squared, row[3].as_f64()) {
            assert!(close(ours, theirs), "{b} {c}: {ours} {theirs}");
        }
    }
}

#[test]
fn intervals_are_scipys_within_what_drawing_leaves_open() {
    for sample in fixture()["samples"].as_array().unwrap() {
        let list = |key: &str| -> Vec<f64> { serde_json::from_value(sample[key].clone()).unwrap() };
        let number = |key: &str| sample[key].as_f64().unwrap();
        let (a, b) = (list("a"), list("b"));
        let resampling = Resampling { level: number("level"), ..Resampling::default() };
        let ours = paired_difference(&a, &b, "", resampling).unwrap();
        assert!((ours.value - number("difference")).abs() < 1e-12);
        // The standard deviation of a quantile of R draws is √(q(1 − q)/R) / density: for ours, 0.03 standard errors at
        // level 0.95 and 0.05 at 0.99; for SciPy's, a third of that. The tolerance is five of these, plus one step of
        // the lattice of possible means of 0/1 scores.
        let open =
            0.3 * number("standard_error") + 1.01 / a.len() as f64 * f64::from(a.iter().all(|v| v.fract() == 0.0));
        assert!((ours.low - number("low")).abs() < open, "{ours:?} {}", number("low"));
        assert!((ours.high - number("high")).abs() < open, "{ours:?} {}", number("high"));
    }
}

/// The mean over two tasks, read from files: documents are resampled within each task.
#[test]
fn the_overall_interval_is_numpys_within_what_drawing_leaves_open() {
    let fixture = fixture();
    let folder = tempfile::tempdir().unwrap();
    let files = ["a", "b"].map(|run| {
        let lines = |task: usize| {
            let right: Vec<f64> = serde_json::from_value(fixture["samples"][task][run].clone()).unwrap();
            let answer =
                |(i, right): (usize, f64)| line(&task.to_string(), i, "B", if right == 1.0 { "B" } else { "A" });
            right.into_iter().enumerate().map(answer).collect::<Vec<_>>()
        };
        let file = folder.path().join(run).with_extension("jsonl");
        write(&file, &[lines(0), lines(1)].concat());
        file
    });
    let ours = compare(&files[0], &files[1], Resampling::default()).unwrap().overall.difference;
    let number = |key: &str| fixture["overall"][key].as_f64().unwrap();
    assert!((ours.value - number("difference")).abs() < 1e-12);
    let open = 0.2 * number("standard_error"); // as above, without the lattice step, which is small for these means
    assert!((ours.low - number("low")).abs() < open && (ours.high - number("high")).abs() < open, "{ours:?}");
}

/// About 95 % of 95 % intervals contain the true value. With 200 documents, the percentile interval is slightly too
/// narrow, and for 400 intervals the share has a standard deviation of 1.1 %.
#[test]
fn intervals_cover_the_truth_about_as_often_as_they_say() {
    let mut random = cl_data::numpy::Mt19937::new(3);
    let mut unit = || random.interval(1_000_000) as f64 / 1e6;
    let (runs, n) = (400, 200);
    let mut covered = 0;
    for run in 0..runs {
        // The second run is correct with a probability that is 0.1 higher for every document: this is the true
        // difference.
        let hard: Vec<f64> = (0..n).map(|_| 0.9 * unit()).collect();
        let mut answers = |more: f64| -> Vec<f64> { hard.iter().map(|h| f64::from(unit() < h + more)).collect() };
        let (a, b) = (answers(0.0), answers(0.1));
        let found = paired_difference(&a, &b, &run.to_string(), Resampling { resamples: 500, ..FEW }).unwrap();
        covered += usize::from(found.low <= 0.1 && 0.1 <= found.high);
    }
    let share = covered as f64 / f64::from(runs);
    assert!((0.91..=0.98).contains(&share), "{share}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn exchanged_runs_mirror_the_difference(
        scores in prop::collection::vec((0.0..=1.0f64, 0.0..=1.0f64), 1..60), seed: u64, level in 0.5..0.999f64,
    ) {
        let (a, b): (Vec<f64>, Vec<f64>) = scores.into_iter().unzip();
        let resampling = Resampling { seed, level, ..FEW };
        let one = paired_difference(&a, &b, "t", resampling).unwrap();
        let other = paired_difference(&b, &a, "t", resampling).unwrap();
        prop_assert_eq!((one.value, one.low, one.high), (-other.value, -other.high, -other.low));
        prop_assert!(one.low <= one.high);
        let same = paired_difference(&a, &a, "t", resampling).unwrap();
        prop_assert_eq!((same.value, same.low, same.high), (0.0, 0.0, 0.0));
    }

    #[test]
    fn exchanged_counts_have_the_same_probability(b in 0u64..3000, c in 0u64..3000) {
        let (one, other) = (mcnemar(b, c), mcnemar(c, b));
        prop_assert_eq!((one.p, one.mid_p, one.p_chi_squared), (other.p, other.mid_p, other.p_chi_squared));
        prop_assert!((0.0..=1.0).contains(&one.p) && mcnemar(b, b).p == 1.0);
    }
}

fn line(task: &str, document: usize, reference: &str, answer: &str) -> Prediction {
    let target = Target::Reference { reference: reference.to_owned(), source: None };
    let response = Response::Text(answer.to_owned());
    let scores = Metric::FirstChar.scores(&target, &response);
    let (task, request) = (task.to_owned(), format!("{task} {reference} {}", document / 2 * 2)); // requests occur twice
    Prediction {
        document,
        task,
        metric: Metric::FirstChar,
        request,
        model: None,
        response,
        target,
        scores,
        unscored: false,
    }
}

fn write(path: &Path, lines: &[Prediction]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let text: String = lines.iter().map(|l| serde_json::to_string(l).unwrap() + "\n").collect();
    std::fs::write(path, text).unwrap();
}

/// Answers of which those in the range `right` are correct.
fn answers(task: &str, n: usize, right: std::ops::Range<usize>) -> Vec<Prediction> {
    (0..n).map(|i| line(task, i, "B", if right.contains(&i) { "B" } else { "A" })).collect()
}

fn compared(a: &Path, b: &Path) -> Result<Comparison, Error> {
    compare(a, b, FEW)
}

#[test]
fn runs_are_paired_by_what_was_asked() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    write(&a.join("FOMC.jsonl"), &answers("FOMC", 10, 0..4));
    write(&a.join("other.jsonl"), &answers("other", 4, 0..1));
    write(&a.join("only.jsonl"), &answers("only", 2, 0..1));
    let mut longer = answers("FOMC", 12, 2..9);
    longer.reverse(); // the order of the lines does not matter
    write(&b.join("FOMC.jsonl"), &longer);
    write(&b.join("other.jsonl"), &answers("other", 4, 0..4));
    let comparison = compared(&a, &b).unwrap();
    assert_eq!((comparison.only_a.as_slice(), comparison.only_b.len()), (["only".to_owned()].as_slice(), 0));
    let task = &comparison.tasks[0];
    assert_eq!((task.task.as_str(), task.documents, task.only_a, task.only_b), ("FOMC", 10, 0, 2));
    let main = task.metrics["first_char"];
    assert_eq!((main.means.a, main.means.b), (0.4, 0.7));
    let test = main.mcnemar.unwrap();
    assert_eq!((test.only_a, test.only_b, test.p), (2, 5, mcnemar(2, 5).p));
    assert_eq!((comparison.overall.a, comparison.overall.b), (0.325, 0.85));
    let overall = comparison.overall.difference;
    assert!(overall.low < overall.value && overall.value < overall.high, "{overall:?}");
    // A task has the same interval alone and among others; the same command gives the same bytes.
    let alone = compared(&a.join("FOMC.jsonl"), &b.join("FOMC.jsonl")).unwrap();
    assert_eq!(alone.tasks[0], comparison.tasks[0]);
    assert_eq!(alone.overall, main.means);
    let back = compared(&b, &a).unwrap();
    assert_eq!(back.overall.difference.low, -overall.high);
    let same = compared(&a, &a).unwrap();
    assert!(same.tasks.iter().all(|t| t.metrics.values().all(|m| m.mcnemar.unwrap().p == 1.0)));
    assert_eq!(same.overall.difference.high, 0.0);
    let json = serde_json::to_string(&comparison).unwrap();
    assert_eq!(serde_json::from_str::<Comparison>(&json).unwrap(), comparison);
}

#[test]
fn runs_that_cannot_be_compared() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a.jsonl"), folder.path().join("b.jsonl"));
    write(&a, &answers("FOMC", 4, 0..2));
    let mut other = answers("FOMC", 4, 0..2);
    other[3].target = Target::Reference { reference: "C".to_owned(), source: None };
    write(&b, &other);
    assert!(matches!(compared(&a, &b), Err(Error::OtherTarget { document: 3, .. })));
    let mut other = answers("FOMC", 4, 0..2);
    other.iter_mut().for_each(|l| l.metric = Metric::ExactMatch);
    write(&b, &other);
    assert!(matches!(compared(&a, &b), Err(Error::OtherMetric { .. })));
    write(&b, &answers("else", 4, 0..2));
    assert!(matches!(compared(&a, &b), Err(Error::NothingInCommon { .. })));
    assert!(matches!(compare(&a, &a, Resampling { resamples: 0, ..FEW }), Err(Error::Resampling { .. })));
    assert!(matches!(compare(&a, &a, Resampling { level: f64::NAN, ..FEW }), Err(Error::Resampling { .. })));
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(matches!(compared(&a, &empty), Err(Error::NoPredictions { .. })));
    assert!(matches!(compared(&a, &empty.join("missing")), Err(Error::File(_))));
}
