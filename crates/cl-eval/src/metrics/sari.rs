//! SARI as computed by Hugging Face's metric: the paper's score for 20Minuten.
//!
//! ```text
//! SARI = (F_keep + P_delete + F_add) / 3, each the mean over n-grams of n = 1..4 of source, answer and one reference
//! ```
//!
//! Pitfalls:
//! - Texts are lower-cased and tokenized by the rules of mteval-v13a (sacrebleu's `13a`), then split at single spaces;
//!   an empty text is one empty word.
//! - For kept n-grams, precision is averaged over *distinct* n-grams, but recall over counts; deletion is scored by
//!   precision only; addition compares sets.
//! - 0/0 is 1: a text too short for an n-gram scores 1 for it, and an empty answer, which deletes everything, does not
//!   score 0.
//! - Sums run in the order in which n-grams first appear in the source, as Python's counters do, so scores are
//!   identical to the bit.
//!
//! Sources: Xu et al., "Optimizing Statistical Machine Translation for Text Simplification", TACL 2016; the `sari`
//! metric of `evaluate` for the behaviour; NIST's mteval-v13a for the tokens.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::python_split;

/// Computes SARI / 100 of an answer, in `[0, 1]`, given the text to simplify and one reference.
///
/// ```
/// use cl_eval::metrics::sari::sari;
/// assert_eq!(sari("a b c d", "a b", "a b"), 1.0);
/// ```
pub fn sari(source: &str, answer: &str, reference: &str) -> f64 {
    let [source, answer, reference] = [source, answer, reference].map(tokenize_13a);
    let [source, answer, reference] = [&source, &answer, &reference].map(|t| t.split(' ').collect::<Vec<&str>>());
    let parts: Vec<[f64; 3]> = (1..=4)
        .map(|n| one_order(&Counts::new(&source, n), &Counts::new(&answer, n), &Counts::new(&reference, n)))
        .collect();
    let mean = |part: usize| parts.iter().map(|p| p[part]).sum::<f64>() / 4.0;
    (mean(0) + mean(1) + mean(2)) / 3.0
}

/// Returns the scores for kept, deleted and added n-grams of one length.
fn one_order(source: &Counts, answer: &Counts, reference: &Counts) -> [f64; 3] {
    let (mut kept, mut kept_good, mut kept_all) = (Part::default(), 0, 0);
    let mut deleted = Part::default();
    for &(gram, in_source) in &source.grams {
        let (in_answer, in_reference) = (answer.of(gram), reference.of(gram));
        let keep = in_source.min(in_answer);
        kept.add(keep.min(in_reference), keep);
        kept_good += keep.min(in_reference);
        kept_all += in_source.min(in_reference);
        let gone = in_source.saturating_sub(in_answer);
        deleted.add(gone.saturating_sub(in_reference), gone);
    }
    let kept_recall = fraction(kept_good, kept_all);

    let new = |c: &Counts| c.grams.iter().filter(|(g, _)| source.of(g) == 0).count();
    let added_good = answer.grams.iter().filter(|(g, _)| source.of(g) == 0 && reference.of(g) > 0).count();
    let (added_precision, added_recall) = (fraction(added_good, new(answer)), fraction(added_good, new(reference)));

    [f1(kept.mean(), kept_recall), deleted.mean(), f1(added_precision, added_recall)]
}

/// Mean of good / all over distinct n-grams.
#[derive(Default)]
struct Part {
    different: usize,
    sum: f64,
}

impl Part {
    fn add(&mut self, good: usize, all: usize) {
        if all > 0 {
            self.different += 1;
            self.sum += good as f64 / all as f64;
        }
    }

    fn mean(&self) -> f64 {
        if self.different == 0 { 1.0 } else { self.sum / self.different as f64 }
    }
}

fn fraction(good: usize, all: usize) -> f64 {
    if all == 0 { 1.0 } else { good as f64 / all as f64 }
}

fn f1(precision: f64, recall: f64) -> f64 {
    if precision > 0.0 || recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 }
}

/// n-grams and their counts, in order of first occurrence.
struct Counts<'t> {
    grams: Vec<(&'t [&'t str], usize)>,
    index: HashMap<&'t [&'t str], usize>,
}

impl<'t> Counts<'t> {
    fn new(words: &'t [&'t str], n: usize) -> Counts<'t> {
        let mut counts = Counts { grams: Vec::new(), index: HashMap::new() };
        for gram in words.windows(n) {
            let next = counts.grams.len();
            let at = *counts.index.entry(gram).or_insert(next);
            if at == next {
                counts.grams.push((gram, 0));
            }
            counts.grams[at].1 += 1;
        }
        counts
    }

    fn of(&self, gram: &[&str]) -> usize {
        self.index.get(gram).map_or(0, |&at| self.grams[at].1)
    }
}

static RULES: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
    [
        (r"([\{-~\[-` -&\(-\+:-@/])", " $1 "), // separate ASCII punctuation, except ' , - .
        (r"([^0-9])([.,])", "$1 $2 "),         // separate full stop and comma, unless after a digit
        (r"([.,])([^0-9])", " $1 $2"),         // … or before one
        (r"([0-9])(-)", "$1 $2 "),             // separate a dash after a digit
    ]
    .map(|(rule, to)| (Regex::new(rule).expect("a constant pattern"), to))
});

/// Lower-cases a text, and tokenizes it as mteval-v13a does; tokens are joined by single spaces.
///
/// ```
/// use cl_eval::metrics::sari::tokenize_13a;
/// assert_eq!(tokenize_13a("It's 3.5, isn't it?"), "it's 3.5 , isn't it ?");
/// ```
pub fn tokenize_13a(text: &str) -> String {
    let mut text = text.to_lowercase().replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if text.contains('&') {
        text = text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    }
    let mut text = format!(" {text} ");
    for (rule, to) in RULES.iter() {
        text = rule.replace_all(&text, *to).into_owned();
    }
    python_split(&text).collect::<Vec<_>>().join(" ")
}
