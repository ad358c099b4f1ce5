//! ROUGE-L as the Python package `rouge` computes it (not Google's `rouge_score`): the paper's score for MeetingBank.
//!
//! Traps: sentences end at every "."; words are case-sensitive and unstemmed; counts are of *different* words; the union of
//! common subsequences runs on over all reference sentences, and a word counts once. Lin, "ROUGE", 2004.

use std::collections::HashSet;

use super::python_split;

/// Recall, precision and both F values that versions of the package have had.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RougeL {
    /// Hits over different words of the reference.
    pub recall: f64,
    /// Hits over different words of the answer.
    pub precision: f64,
    /// Current: 2PR / (P + R + 1e-8).
    pub f: f64,
    /// Older: (1 + β²)RP / (R + β²P + 1e-12) with β = P / (R + 1e-12).
    pub f_beta: f64,
}

/// Scores an answer against a reference; all zero where the package raises an error (nothing but dots on a side).
pub fn rouge_l(answer: &str, reference: &str) -> RougeL {
    let (answer, reference) = (sentences(answer), sentences(reference));
    if answer.is_empty() || reference.is_empty() {
        return RougeL::default();
    }
    let different = |s: &[Vec<String>]| s.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let (m, n) = (different(&reference), different(&answer));
    let mut union: HashSet<&str> = HashSet::new();
    for sentence in &reference {
        for other in &answer {
            union.extend(common_subsequence(sentence, other));
        }
    }
    let hits = union.len() as f64;
    let (recall, precision) = (hits / m, hits / n);
    let f = 2.0 * (precision * recall / (precision + recall + 1e-8));
    let beta = precision / (recall + 1e-12);
    let f_beta = (1.0 + beta * beta) * recall * precision / (recall + beta * beta * precision + 1e-12);
    RougeL { recall, precision, f, f_beta }
}

/// Pieces between dots, words between spaces; a piece of white space only is one empty word.
fn sentences(text: &str) -> Vec<Vec<String>> {
    text.split('.')
        .filter(|s| !s.is_empty())
        .map(|s| {
            let words: Vec<String> = python_split(s).map(str::to_owned).collect();
            if words.is_empty() { vec![String::new()] } else { words }
        })
        .collect()
}

/// Words of one longest common subsequence: of several, the one found by walking back from the ends, a match first, then
/// along the reference when the table is strictly larger there, else along the answer.
fn common_subsequence<'t>(reference: &'t [String], answer: &[String]) -> Vec<&'t str> {
    let width = answer.len() + 1;
    let mut table = vec![0u32; (reference.len() + 1) * width];
    for i in 1..=reference.len() {
        for j in 1..=answer.len() {
            table[i * width + j] = if reference[i - 1] == answer[j - 1] {
                table[(i - 1) * width + j - 1] + 1
            } else {
                table[(i - 1) * width + j].max(table[i * width + j - 1])
            };
        }
    }
    let (mut i, mut j) = (reference.len(), answer.len());
    let mut words = Vec::new();
    while i > 0 && j > 0 {
        if reference[i - 1] == answer[j - 1] {
            words.push(reference[i - 1].as_str());
            (i, j) = (i - 1, j - 1);
        } else if table[(i - 1) * width + j] > table[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    words
}
