use super::target::{Gold, Target};
use crate::request::Response;

/// Returns `acc` and `acc_norm` of a multiple-choice answer, each 0 or 1.
pub(crate) fn accuracies(target: &Target, response: &Response) -> (f64, f64) {
    let Some((choices, gold, sums)) = answered(target, response) else { return (0.0, 0.0) };
    let right = |values: &[f64]| {
        let best = first_largest(values);
        f64::from(u8::from(best.is_some_and(|best| gold.indices().contains(&best))))
    };
    let per_character: Vec<f64> = sums.iter().zip(choices).map(|(s, c)| s / c.chars().count().max(1) as f64).collect();
    (right(sums), right(&per_character))
}

/// Returns the share of the correct choices in the sum of all choices' probabilities.
///
/// The probabilities are relative to that of the most likely choice, so that those of long choices do not all become 0,
/// for which lm-eval has no score. NaN counts as probability 0.
pub(crate) fn probability_mass(target: &Target, response: &Response) -> f64 {
    let Some((_, gold, sums)) = answered(target, response) else { return 0.0 };
    let Some(best) = first_largest(sums) else { return 0.0 };
    // Infinite sums have no difference, but are equal.
    let relative = |sum: f64| if sum == sums[best] { 1.0 } else { (sum - sums[best]).exp() };
    let probability = |sum: f64| if sum.is_nan() { 0.0 } else { relative(sum) };
    let correct = sums.iter().enumerate().filter(|(i, _)| gold.indices().contains(i));
    correct.map(|(_, &sum)| probability(sum)).sum::<f64>() / sums.iter().map(|&sum| probability(sum)).sum::<f64>()
}

/// Returns the choices, the correct ones and the log-likelihoods of an answer to all choices.
fn answered<'a>(target: &'a Target, response: &'a Response) -> Option<(&'a [String], &'a Gold, &'a [f64])> {
    match (target, response) {
        (Target::Choice { choices, gold }, Response::Loglikelihoods(sums)) if sums.len() == choices.len() => {
            Some((choices, gold, sums))
        }
        _ => None,
    }
}

/// Returns the index of the largest value, or of the first if there are several; NaN is ignored.
pub(crate) fn first_largest(values: &[f64]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, v) in values.iter().enumerate().filter(|(_, v)| !v.is_nan()) {
        if best.is_none_or(|b| *v > values[b]) {
            best = Some(i);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalising_can_change_the_winner_and_the_first_wins_ties() {
        let target = Target::Choice { choices: vec!["a".into(), "long one".into()], gold: Gold::One(1) };
        let score = |sums: Vec<f64>| accuracies(&target, &Response::Loglikelihoods(sums));
        assert_eq!(score(vec![-2.0, -4.0]), (0.0, 1.0));
        for (sums, acc) in [
            (vec![-2.0, -2.0], 0.0),
            (vec![f64::NAN, -900.0], 1.0),
            (vec![f64::NAN, f64::NAN], 0.0),
            (vec![f64::NEG_INFINITY, -1.0], 1.0),
            (vec![-2.0], 0.0),
            (vec![], 0.0),
        ] {
            assert_eq!(score(sums.clone()).0, acc, "{sums:?}");
        }
        assert_eq!(accuracies(&target, &Response::Text("b".into())), (0.0, 0.0));
        let both =
            Target::Choice { choices: vec!["a".into(), "b".into(), "c".into()], gold: Gold::Several(vec![0, 2]) };
        for (sums, acc) in [([-1.0, -2.0, -3.0], 1.0), ([-3.0, -2.0, -1.0], 1.0), ([-2.0, -1.0, -3.0], 0.0)] {
            assert_eq!(accuracies(&both, &Response::Loglikelihoods(sums.to_vec())).0, acc, "{sums:?}");
        }
    }

    #[test]
    fn mass_is_defined_for_any_sums() {
        let choices = ["a", "b", "c"].map(str::to_owned).to_vec();
        let of = |gold, sums: &[f64]| {
            let target = Target::Choice { choices: choices.clone(), gold };
            probability_mass(&target, &Response::Loglikelihoods(sums.to_vec()))
        };
        let (two, one) = (|| Gold::Several(vec![0, 2]), || Gold::One(1));
        let (ln, infinite) = (f64::ln, f64::INFINITY);
        for (sums, mass) in [
            (vec![ln(0.1), ln(0.2), ln(0.1)], 0.5),
            (vec![ln(0.1) - 2000.0, ln(0.2) - 2000.0, ln(0.1) - 2000.0], 0.5),
            (vec![-infinite, -infinite, -infinite], 2.0 / 3.0),
            (vec![infinite, -1.0, -1.0], 1.0),
            (vec![infinite, infinite, -1.0], 0.5),
            (vec![f64::NAN, -1.0, -1.0], 0.5),
        ] {
            assert!((of(two(), &sums) - mass).abs() < 1e-12, "{sums:?}: {}", of(two(), &sums));
            assert!((of(one(), &sums) - (1.0 - mass)).abs() < 1e-12, "{sums:?}");
        }
        assert_eq!(of(two(), &[f64::NAN; 3]), 0.0);
        assert_eq!(of(two(), &[-1.0, -1.0]), 0.0);
        let target = Target::Choice { choices, gold: two() };
        assert_eq!(probability_mass(&target, &Response::Text("a".into())), 0.0);
    }
}
