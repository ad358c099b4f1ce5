//! SARI as Hugging Face's metric computes it: the paper's score for 20Minuten. Xu et al., "Optimizing Statistical Machine
//! Translation for Text Simplification", TACL 2016.
//!
//! Traps: texts are lower-cased and tokenized by mteval-v13a's rules; words are split at single spaces; the keep part
//! averages precision over *different* n-grams but recall over counts; the delete part is a precision only; a part with
//! nothing to count scores 1, so short sentences score well.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use regex::Regex;

use super::python_split;

/// SARI / 100 of an answer, in `[0, 1]`, given the sentence that was to be simplified and one reference.
///
/// ```
/// use cl_eval::metrics::sari::sari;
/// assert_eq!(sari("a b c d", "a b", "a b"), 1.0);
/// ```
pub fn sari(source: &str, answer: &str, reference: &str) -> f64 {
    let [source, answer, reference] = [source, answer, reference].map(normal);
    let [source, answer, reference] = [&source, &answer, &reference].map(|t| t.split(' ').collect::<Vec<&str>>());
    let parts: Vec<[f64; 3]> = (1..=4)
        .map(|n| one_order(&ngrams(&source, n), &ngrams(&answer, n), &ngrams(&reference, n)))
        .collect();
    let mean = |part: usize| parts.iter().map(|p| p[part]).sum::<f64>() / 4.0;
    (mean(0) + mean(1) + mean(2)) / 3.0
}

type Counts = HashMap<String, usize>;

/// Scores of what was kept, deleted and added, for n-grams of one length.
fn one_order(source: &Counts, answer: &Counts, reference: &Counts) -> [f64; 3] {
    let count = |c: &Counts, g: &str| c.get(g).copied().unwrap_or(0);

    let mut kept = (0usize, 0.0, 0.0); // different n-grams, Σ good/kept, Σ good
    let mut keepable = 0usize;
    for (gram, &s) in source {
        let keep = s.min(count(answer, gram));
        let good = keep.min(count(reference, gram));
        keepable += s.min(count(reference, gram));
        if keep > 0 {
            kept.0 += 1;
            kept.1 += good as f64 / keep as f64;
            kept.2 += good as f64;
        }
    }
    let keep_precision = if kept.0 > 0 { kept.1 / kept.0 as f64 } else { 1.0 };
    let keep_recall = if keepable > 0 { kept.2 / keepable as f64 } else { 1.0 };

    let mut deleted = (0usize, 0.0);
    for (gram, &s) in source {
        let gone = s.saturating_sub(count(answer, gram));
        if gone > 0 {
            deleted.0 += 1;
            deleted.1 += gone.saturating_sub(count(reference, gram)) as f64 / gone as f64;
        }
    }
    let delete_precision = if deleted.0 > 0 { deleted.1 / deleted.0 as f64 } else { 1.0 };

    let new = |c: &Counts| -> HashSet<String> { c.keys().filter(|g| !source.contains_key(*g)).cloned().collect() };
    let (added, addable) = (new(answer), new(reference));
    let good = added.intersection(&addable).count() as f64;
    let add_precision = if added.is_empty() { 1.0 } else { good / added.len() as f64 };
    let add_recall = if addable.is_empty() { 1.0 } else { good / addable.len() as f64 };

    [f1(keep_precision, keep_recall), delete_precision, f1(add_precision, add_recall)]
}

fn f1(precision: f64, recall: f64) -> f64 {
    if precision > 0.0 || recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 }
}

fn ngrams(words: &[&str], n: usize) -> Counts {
    let mut counts = Counts::new();
    for gram in words.windows(n) {
        *counts.entry(gram.join(" ")).or_insert(0) += 1;
    }
    counts
}

static RULES: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
    [
        (r"([\{-~\[-` -&\(-\+:-@/])", " $1 "),   // punctuation apart
        (r"([^0-9])([.,])", "$1 $2 "),            // full stop and comma, unless after a digit
        (r"([.,])([^0-9])", " $1 $2"),            // … or before one
        (r"([0-9])(-)", "$1 $2 "),                // a dash after a digit
    ]
    .map(|(rule, to)| (Regex::new(rule).expect("a constant pattern"), to))
});

/// Lower case, then mteval-v13a's tokenization, joined by single spaces.
fn normal(text: &str) -> String {
    let mut text = python_lower(text).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if text.contains('&') {
        text = text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    }
    let mut text = format!(" {text} ");
    for (rule, to) in RULES.iter() {
        text = rule.replace_all(&text, *to).into_owned();
    }
    python_split(&text).collect::<Vec<_>>().join(" ")
}

fn python_lower(text: &str) -> String {
    text.to_lowercase()
}
