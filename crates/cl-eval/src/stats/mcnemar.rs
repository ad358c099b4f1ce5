//! McNemar's test, for two runs whose answers are either correct or wrong.

use serde::{Deserialize, Serialize};

/// Result of McNemar's test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct McNemar {
    /// Number of documents that only the first run answers correctly.
    pub only_a: u64,
    /// Number of documents that only the second run answers correctly.
    pub only_b: u64,
    /// Two-sided p-value of the exact binomial test.
    pub p: f64,
    /// Mid-p: counts half the probability of the observed outcome; less conservative than the exact test.
    pub mid_p: f64,
    /// p-value of the χ² test with continuity correction, if `only_a + only_b` is at least 25.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p_chi_squared: Option<f64>,
}

/// Minimum number of discordant documents for the χ² approximation.
const LARGE: u64 = 25;

/// Computes McNemar's test from the discordant counts: numbers of documents that only one of the runs answers
/// correctly.
///
/// ```text
/// X ~ Binomial(b + c, ½),  m = min(b, c)
/// p      = min(1, 2·P(X ≤ m))
/// mid_p  = min(1, 2·P(X < m) + P(X = m))
/// χ²     = max(|b − c| − 1, 0)² / (b + c),  p = P(χ²₁ ≥ χ²)
/// ```
///
/// Without discordant documents, p is 1. Sums start with their largest term, so p has at least ten correct digits for
/// ten thousand documents; p-values below the smallest f64 become 0.
///
/// Sources: McNemar, Psychometrika 12, 1947; Edwards, Psychometrika 13, 1948, for the correction; Fagerland, Lydersen
/// and Laake, BMC Medical Research Methodology 13:91, 2013, for mid-p.
///
/// ```
/// let test = cl_eval::mcnemar(2, 10);
/// assert!((test.p - 0.03857421875).abs() < 1e-15); // scipy.stats.binomtest(2, 12).pvalue
/// assert_eq!(cl_eval::mcnemar(0, 0).p, 1.0);
/// ```
pub fn mcnemar(only_a: u64, only_b: u64) -> McNemar {
    let (n, m) = (only_a + only_b, only_a.min(only_b));
    let at = probability(n, m);
    // P(X = k − 1) = P(X = k)·k / (n − k + 1), for decreasing k until terms no longer change the sum.
    let (mut below, mut term) = (0.0, at);
    for k in (1..=m).rev() {
        term *= k as f64 / (n - k + 1) as f64;
        if below + term == below {
            break;
        }
        below += term;
    }
    let p = (2.0 * (below + at)).min(1.0);
    let mid_p = (2.0 * below + at).min(1.0);
    McNemar { only_a, only_b, p, mid_p, p_chi_squared: (n >= LARGE).then(|| chi_squared(only_a, only_b)) }
}

/// P(X = k) for X ~ Binomial(n, ½).
fn probability(n: u64, k: u64) -> f64 {
    let ln_choices: f64 = (1..=k).map(|i| ((n - k + i) as f64 / i as f64).ln()).sum();
    (ln_choices - n as f64 * std::f64::consts::LN_2).exp()
}

/// With one degree of freedom P(χ² ≥ x) = erfc(√(x/2)).
fn chi_squared(b: u64, c: u64) -> f64 {
    let distance = b.abs_diff(c).saturating_sub(1) as f64;
    libm::erfc((distance * distance / (b + c) as f64 / 2.0).sqrt())
}
