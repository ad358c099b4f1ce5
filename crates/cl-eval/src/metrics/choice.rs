use super::target::Target;
use crate::request::Response;

/// Returns `acc` and `acc_norm` of a multiple-choice answer, each 0 or 1.
pub(crate) fn accuracies(target: &Target, response: &Response) -> (f64, f64) {
    let (Target::Choice { choices, gold }, Response::Loglikelihoods(sums)) = (target, response) else {
        return (0.0, 0.0);
    };
    if sums.len() != choices.len() {
        return (0.0, 0.0);
    }
    let right = |values: &[f64]| f64::from(u8::from(first_largest(values) == Some(*gold)));
    let per_character: Vec<f64> = sums.iter().zip(choices).map(|(s, c)| s / c.chars().count().max(1) as f64).collect();
    (right(sums), right(&per_character))
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
        let target = Target::Choice { choices: vec!["a".into(), "long one".into()], gold: 1 };
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
    }
}
