//! `fuzz.ratio`, the paper's score for Py150, and TRACE's clean-up of masked literals in front of it.
//!
//! Trap: with python-Levenshtein installed the ratio is 2·LCS/(|a|+|b|); without, difflib's matching blocks, with its rule
//! that characters filling more than 1 % of a text of 200 or more are "popular" and start no block. Which one the paper had
//! is not known, so both are here. The result is rounded to an integer per item, halves to even.

use std::collections::HashMap;
use std::sync::LazyLock;

use rapidfuzz::distance::lcs_seq;
use regex::Regex;

static VALUES: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?s)<(?:NUM|STR|CHAR)_LIT:(.*?)>").expect("a constant pattern"));

/// Replaces Py150's masks: `<NUM_LIT>` by `0`, `<STR_LIT>` and `<CHAR_LIT>` by nothing, then `<KIND_LIT:v>` by `v`.
///
/// ```
/// use cl_eval::metrics::edit::clean_py150;
/// assert_eq!(clean_py150("x = <NUM_LIT:3> + <STR_LIT>"), "x = 3 + ");
/// ```
pub fn clean_py150(code: &str) -> String {
    let plain = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "");
    VALUES.replace_all(&plain, "$1").into_owned()
}

/// `fuzz.ratio` with python-Levenshtein: 0 to 100, a whole number.
///
/// ```
/// use cl_eval::metrics::edit::fuzz_ratio;
/// assert_eq!(fuzz_ratio("abcd", "abxd"), 75.0);
/// assert_eq!(fuzz_ratio("", "x"), 0.0);
/// assert_eq!(fuzz_ratio("x", "x"), 100.0);
/// ```
pub fn fuzz_ratio(a: &str, b: &str) -> f64 {
    rounded(a, b, |a, b| lcs_seq::similarity(a.iter().copied(), b.iter().copied()))
}

/// `fuzz.ratio` without python-Levenshtein.
pub fn fuzz_ratio_difflib(a: &str, b: &str) -> f64 {
    rounded(a, b, matching_characters)
}

fn rounded(a: &str, b: &str, matches: impl Fn(&[char], &[char]) -> usize) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    if a == b {
        return 100.0;
    }
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let ratio = 2.0 * matches(&a, &b) as f64 / (a.len() + b.len()) as f64;
    (100.0 * ratio).round_ties_even()
}

/// Characters in matching blocks as difflib's `SequenceMatcher` finds them (Ratcliff and Obershelp, 1988).
fn matching_characters(a: &[char], b: &[char]) -> usize {
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    for (j, c) in b.iter().enumerate() {
        places.entry(*c).or_default().push(j);
    }
    if b.len() >= 200 {
        let most = b.len() / 100 + 1;
        places.retain(|_, at| at.len() <= most);
    }
    let mut queue = vec![(0, a.len(), 0, b.len())];
    let mut total = 0;
    while let Some((a_low, a_high, b_low, b_high)) = queue.pop() {
        let (i, j, k) = longest_match(a, b, &places, (a_low, a_high), (b_low, b_high));
        if k > 0 {
            total += k;
            queue.push((a_low, i, b_low, j));
            queue.push((i + k, a_high, j + k, b_high));
        }
    }
    total
}

/// The longest block that starts earliest in `a`, then in `b`; found among characters that are not popular, then grown over
/// any that match.
fn longest_match(
    a: &[char],
    b: &[char],
    places: &HashMap<char, Vec<usize>>,
    (a_low, a_high): (usize, usize),
    (b_low, b_high): (usize, usize),
) -> (usize, usize, usize) {
    let (mut i_best, mut j_best, mut best) = (a_low, b_low, 0);
    let mut ending: HashMap<usize, usize> = HashMap::new(); // length of the block that ends at each place of b
    for (i, c) in a.iter().enumerate().take(a_high).skip(a_low) {
        let mut now = HashMap::new();
        for &j in places.get(c).map_or(&[][..], Vec::as_slice) {
            if j < b_low {
                continue;
            }
            if j >= b_high {
                break;
            }
            let k = if j == 0 { 0 } else { ending.get(&(j - 1)).copied().unwrap_or(0) } + 1;
            now.insert(j, k);
            if k > best {
                (i_best, j_best, best) = (i + 1 - k, j + 1 - k, k);
            }
        }
        ending = now;
    }
    while i_best > a_low && j_best > b_low && a[i_best - 1] == b[j_best - 1] {
        (i_best, j_best, best) = (i_best - 1, j_best - 1, best + 1);
    }
    while i_best + best < a_high && j_best + best < b_high && a[i_best + best] == b[j_best + best] {
        best += 1;
    }
    (i_best, j_best, best)
}
