//! `fuzz.ratio`, the paper's score for Py150, and TRACE's replacement of masked literals that precedes it.
//!
//! ```text
//! fuzz.ratio = round(100 · 2·M / (|a| + |b|))     M: matched characters; half to even; an integer for every item
//! ```
//!
//! Pitfalls:
//! - With python-Levenshtein installed, M is the length of the longest common subsequence ([`fuzz_ratio`]); without it,
//!   the number of characters in difflib's matching blocks ([`fuzz_ratio_difflib`]). Which one the paper used is not
//!   known.
//! - If the second text has 200 characters or more, difflib ignores "popular" characters, those that make up more than
//!   1 % of it, when it searches for blocks (they can still extend a block). So its ratio is not symmetric, and long
//!   texts with few different characters can score 0 without being equal.
//! - rapidfuzz's own `fuzz.ratio` computes 1 − distance/length, which may round differently at a half: one unit of 100
//!   in about one of ten thousand pairs.
//! - Equal texts score 100, which is checked first and also applies to two empty texts; a single empty text scores 0.
//! - Lengths are in code points, as in Python.
//!
//! Sources: fuzzywuzzy's `fuzz.ratio`; Python's documentation of `difflib.SequenceMatcher` (Ratcliff and Metzener,
//! "Pattern Matching: The Gestalt Approach", 1988); TRACE (arXiv:2310.06762) for the replacement of masks.

use std::collections::HashMap;
use std::sync::LazyLock;

use rapidfuzz::distance::lcs_seq;
use regex::Regex;

static LITERAL: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?s)<(?:STR|NUM|CHAR)_LIT:(.*?)>").expect("a constant pattern"));

/// Replaces Py150's masks: `<NUM_LIT>` by `0`, `<STR_LIT>` and `<CHAR_LIT>` by nothing, then each `<KIND_LIT:v>` by
/// `v`.
///
/// As in the reference, masks with a value are collected first and then replaced one after another. The difference
/// matters only if a replacement creates a new mask.
///
/// ```
/// use cl_eval::metrics::edit::clean_py150;
/// assert_eq!(clean_py150("x = <NUM_LIT:3> + <STR_LIT>"), "x = 3 + ");
/// ```
pub fn clean_py150(code: &str) -> String {
    let plain = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "");
    let mut cleaned = plain.clone();
    for literal in LITERAL.captures_iter(&plain) {
        if cleaned.contains(&literal[0]) {
            cleaned = cleaned.replace(&literal[0], &literal[1]);
        }
    }
    cleaned
}

/// Computes `fuzz.ratio` with python-Levenshtein: an integer from 0 to 100; 0 if one text is empty, 100 if both are.
///
/// ```
/// use cl_eval::metrics::edit::fuzz_ratio;
/// assert_eq!(fuzz_ratio("abcd", "abxd"), 75.0);
/// assert_eq!(fuzz_ratio("", "x"), 0.0);
/// assert_eq!(fuzz_ratio("", ""), 100.0);
/// assert_eq!(fuzz_ratio("x", "x"), 100.0);
/// ```
pub fn fuzz_ratio(a: &str, b: &str) -> f64 {
    rounded(a, b, |a, b| lcs_seq::similarity(a.iter().copied(), b.iter().copied()))
}

/// Computes `fuzz.ratio` without python-Levenshtein: an integer from 0 to 100; 0 if one text is empty, 100 if both are.
/// The order of the texts matters.
pub fn fuzz_ratio_difflib(a: &str, b: &str) -> f64 {
    rounded(a, b, |a, b| Blocks::new(b).matching_characters(a))
}

fn rounded(a: &str, b: &str, matches: impl Fn(&[char], &[char]) -> usize) -> f64 {
    if a == b {
        return 100.0; // checked first, as in fuzzywuzzy: two empty texts are equal
    }
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let ratio = 2.0 * matches(&a, &b) as f64 / (a.len() + b.len()) as f64;
    (100.0 * ratio).round_ties_even()
}

/// State of difflib's search for matching blocks.
struct Blocks<'t> {
    b: &'t [char],
    /// Ascending positions of each character that is not popular.
    places: HashMap<char, Vec<usize>>,
    /// `length[j + 1]`: length of the block that ends at position j, valid for row `row[j + 1]`.
    length: Vec<usize>,
    row: Vec<u64>,
    rows: u64,
}

impl<'t> Blocks<'t> {
    fn new(b: &'t [char]) -> Blocks<'t> {
        let mut places: HashMap<char, Vec<usize>> = HashMap::new();
        for (j, c) in b.iter().enumerate() {
            places.entry(*c).or_default().push(j);
        }
        if b.len() >= 200 {
            let most = b.len() / 100 + 1;
            places.retain(|_, at| at.len() <= most);
        }
        Blocks { b, places, length: vec![0; b.len() + 1], row: vec![0; b.len() + 1], rows: 1 }
    }

    /// Returns the number of characters in blocks: the longest block, then recursively to its left and right.
    fn matching_characters(&mut self, a: &[char]) -> usize {
        // A work list instead of recursion, so that thousands of blocks cannot overflow the stack.
        let mut queue = vec![(0, a.len(), 0, self.b.len())];
        let mut total = 0;
        while let Some((a_low, a_high, b_low, b_high)) = queue.pop() {
            if a_low == a_high || b_low == b_high {
                continue;
            }
            let (i, j, k) = self.longest_match(a, (a_low, a_high), (b_low, b_high));
            if k > 0 {
                total += k;
                queue.push((a_low, i, b_low, j));
                queue.push((i + k, a_high, j + k, b_high));
            }
        }
        total
    }

    /// Finds the longest block of characters that are not popular (the earliest in `a`, then in `b`), and extends it on
    /// both sides by any matching characters.
    fn longest_match(
        &mut self,
        a: &[char],
        (a_low, a_high): (usize, usize),
        (b_low, b_high): (usize, usize),
    ) -> (usize, usize, usize) {
        let b = self.b;
        let (mut i_best, mut j_best, mut best) = (a_low, b_low, 0);
        self.rows += 1; // skips a row number, so that no earlier search counts as the previous row
        for (i, c) in a.iter().enumerate().take(a_high).skip(a_low) {
            self.rows += 1;
            let Some(places) = self.places.get(c) else {
                continue;
            };
            let from = places.partition_point(|&j| j < b_low);
            let to = places.partition_point(|&j| j < b_high);
            let mut best_of_row = false;
            // In reverse order, so that the previous row's value at j is still available for j + 1.
            for &j in places[from..to].iter().rev() {
                let before = if j > b_low && self.row[j] == self.rows - 1 { self.length[j] } else { 0 };
                let k = before + 1;
                (self.length[j + 1], self.row[j + 1]) = (k, self.rows);
                if k > best || (k == best && best_of_row) {
                    (i_best, j_best, best) = (i + 1 - k, j + 1 - k, k);
                    best_of_row = true;
                }
            }
        }
        while i_best > a_low && j_best > b_low && a[i_best - 1] == b[j_best - 1] {
            (i_best, j_best, best) = (i_best - 1, j_best - 1, best + 1);
        }
        while i_best + best < a_high && j_best + best < b_high && a[i_best + best] == b[j_best + best] {
            best += 1;
        }
        (i_best, j_best, best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_replaced_in_the_reference_s_order() {
        // The reference is Python's loop of str.replace over the matches of re.findall.
        assert_eq!(clean_py150("<STR_LIT:<NUM_LIT:3>> <NUM_LIT:3>"), "3 3");
        assert_eq!(clean_py150("<STR_LIT:a\nb><CHAR_LIT:><NUM_LIT>"), "a\nb0");
        assert_eq!(clean_py150("<STR_LIT:open"), "<STR_LIT:open");
    }

    #[test]
    fn popular_characters_start_no_block() {
        // In 200 × "a", the character is popular; with one fewer, it is not.
        let long = "a".repeat(200);
        assert_eq!(fuzz_ratio_difflib("xa", &long), 0.0);
        assert_eq!(fuzz_ratio_difflib(&long[1..], &format!("{}b", &long[2..])), 99.0);
        assert_eq!(fuzz_ratio("xa", &long), 1.0);
    }

    #[test]
    fn halves_go_to_the_even_number() {
        assert_eq!(fuzz_ratio("a", "abbbbbbbbbbbbbb"), 12.0); // 12.5
        assert_eq!(fuzz_ratio("abc", "abcdefghijklm"), 38.0); // 37.5
    }
}
