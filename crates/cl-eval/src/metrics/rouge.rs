//! ROUGE-L as computed by the Python package `rouge` (not Google's `rouge_score`): the paper's score for MeetingBank.
//!
//! ```text
//! hits = |⋃ words(LCS(r, h))| over all pairs of a reference's sentence r and an answer's sentence h
//! R = hits / distinct words of the reference,  P = hits / distinct words of the answer,  F = 2PR / (P + R + 1e-8)
//! ```
//!
//! Pitfalls:
//! - Every "." ends a sentence, so "3.5" is two sentences; a piece of only white space is a sentence of one empty word.
//! - Words are case-sensitive, not stemmed, and separated by white space; all counts are of *distinct* words.
//! - If there are several longest common subsequences, the result is the one found by walking back from the ends: along
//!   matches first, then along the reference where the table is strictly larger there, else along the answer. So
//!   swapping the two texts can change the hits.
//! - The package raises an error if a side has no sentence (because it is empty or consists of dots); the paper scores
//!   this as 0, and so do we.
//! - The package also fails (its traceback is recursive) on sentences of about a thousand words or more, which the
//!   paper's script would score as 0. Here, such sentences are scored.
//!
//! Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, for the definition; `rouge` 1.0.1 for
//! the behaviour.

use std::collections::{HashMap, HashSet};

use super::python_split;

/// Recall, precision, and the F-scores of two versions of the package.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RougeL {
    /// Hits divided by the number of distinct words of the reference.
    pub recall: f64,
    /// Hits divided by the number of distinct words of the answer.
    pub precision: f64,
    /// F-score since version 1.0: 2PR / (P + R + 1e-8).
    pub f: f64,
    /// F-score of older versions: (1 + β²)RP / (R + β²P + 1e-12) with β = P / (R + 1e-12).
    pub f_beta: f64,
}

/// Scores an answer (the package's hypothesis) against a reference. All values are 0 where the package raises an error.
///
/// ```
/// use cl_eval::metrics::rouge::rouge_l;
/// // rouge.Rouge().get_scores("the cat sat. on it", "the cat. sat on it")[0]["rouge-l"]["f"] -> 0.999999995
/// assert_eq!(rouge_l("the cat sat. on it", "the cat. sat on it").f, 0.999_999_995);
/// assert_eq!(rouge_l("...", "the cat").f, 0.0);
/// ```
pub fn rouge_l(answer: &str, reference: &str) -> RougeL {
    let mut ids = HashMap::new();
    let (answer, n) = sentences(answer, &mut ids);
    let (reference, m) = sentences(reference, &mut ids);
    if answer.is_empty() || reference.is_empty() {
        return RougeL::default();
    }
    let hits = hits(&reference, &answer) as f64;
    let (recall, precision) = (hits / m as f64, hits / n as f64);
    let f = 2.0 * ((precision * recall) / (precision + recall + 1e-8));
    let beta = precision / (recall + 1e-12);
    let f_beta = (1.0 + beta * beta) * recall * precision / (recall + beta * beta * precision + 1e-12);
    RougeL { recall, precision, f, f_beta }
}

/// Returns the distinct sentences as lists of word indices, and the number of distinct words.
///
/// The result only depends on sets of words, so repeated sentences can be dropped.
fn sentences<'t>(text: &'t str, ids: &mut HashMap<&'t str, u32>) -> (Vec<Vec<u32>>, usize) {
    let (mut all, mut seen, mut words) = (Vec::new(), HashSet::new(), HashSet::new());
    for piece in text.split('.').filter(|p| !p.is_empty()) {
        let mut sentence: Vec<u32> = Vec::new();
        for word in python_split(piece).chain(piece.chars().all(super::python_space).then_some("")) {
            let next = ids.len() as u32;
            sentence.push(*ids.entry(word).or_insert(next));
        }
        words.extend(sentence.iter().copied());
        if seen.insert(sentence.clone()) {
            all.push(sentence);
        }
    }
    (all, words.len())
}

/// Returns the number of words in the union of the common subsequences of all pairs of sentences.
fn hits(reference: &[Vec<u32>], answer: &[Vec<u32>]) -> usize {
    let answer: Vec<Sentence> = answer.iter().map(|s| Sentence::new(s)).collect();
    let mut union: HashSet<u32> = HashSet::new();
    for words in reference {
        let sentence = Sentence::new(words);
        for other in &answer {
            if sentence.places.keys().all(|w| union.contains(w)) {
                break; // all words of this sentence are already counted
            }
            common_subsequence(&sentence, other, &mut union);
        }
    }
    union.len()
}

/// A sentence's words, and the ascending positions of each.
struct Sentence<'t> {
    words: &'t [u32],
    places: HashMap<u32, Vec<usize>>,
}

impl<'t> Sentence<'t> {
    fn new(words: &'t [u32]) -> Sentence<'t> {
        let mut places: HashMap<u32, Vec<usize>> = HashMap::new();
        for (place, word) in words.iter().enumerate() {
            places.entry(*word).or_default().push(place);
        }
        Sentence { words, places }
    }
}

/// Adds the words of the common subsequence that the package's traceback finds.
///
/// Let t[i][j] be the length of the longest common subsequence of the first i words of the reference's sentence and the
/// first j of the answer's. At (i, j), if the words differ, the traceback goes up if t[i − 1][j] > t[i][j − 1], which
/// is equivalent to t[i][j] > t[i][j − 1], and left otherwise. Rows whose word is not in the answer repeat the row
/// above; they are not computed, and in them the traceback goes left as well.
fn common_subsequence(reference: &Sentence<'_>, answer: &Sentence<'_>, union: &mut HashSet<u32>) {
    let mut rows: Vec<usize> =
        answer.places.keys().filter_map(|w| reference.places.get(w)).flatten().copied().collect();
    rows.sort_unstable();
    let mut table = Table::new(reference.words, &rows, answer);
    let (mut i, mut j) = (rows.len(), answer.words.len());
    let mut above = reference.words.len();
    while i > 0 && j > 0 {
        let row = rows[i - 1];
        if above - row > 1 {
            while j > 0 && !table.grows(i, j) {
                j -= 1;
            }
        }
        while j > 0 && reference.words[row] != answer.words[j - 1] && !table.grows(i, j) {
            j -= 1;
        }
        if j > 0 && reference.words[row] == answer.words[j - 1] {
            union.insert(reference.words[row]);
            j -= 1;
        }
        (i, above) = (i - 1, row);
    }
}

/// Number of rows between two saved states of the table; the traceback recomputes the rows between them in blocks.
const BLOCK: usize = 256;

/// The table as bits, one for each horizontal step, 64 columns per word (Crochemore et al., "A fast and practical
/// bit-vector algorithm for the longest common subsequence problem", 2001). Only every [`BLOCK`]th row is stored: two
/// texts of 50,000 words need a few MB instead of 10 GB.
struct Table<'t> {
    words: &'t [u32],
    rows: &'t [usize],
    columns: &'t Sentence<'t>,
    width: usize,
    kept: Vec<Vec<u64>>,
    block: usize,
    states: Vec<u64>,
    matches: Vec<u64>,
}

impl<'t> Table<'t> {
    fn new(words: &'t [u32], rows: &'t [usize], columns: &'t Sentence<'t>) -> Table<'t> {
        let width = columns.words.len().div_ceil(64);
        let (kept, states, matches) = (Vec::new(), Vec::new(), vec![0; width]);
        let mut table = Table { words, rows, columns, width, kept, block: usize::MAX, states, matches };
        // A bit is 0 where the table increases by one from the previous column; in the row above the first, it never
        // does.
        let mut state = vec![u64::MAX; width];
        for i in 0..rows.len() {
            if i % BLOCK == 0 {
                table.kept.push(state.clone());
            }
            table.advance(&mut state, i);
        }
        table
    }

    /// Whether t[i][j] > t[i][j − 1], for i and j from 1.
    fn grows(&mut self, i: usize, j: usize) -> bool {
        let (block, row) = ((i - 1) / BLOCK, (i - 1) % BLOCK);
        if self.block != block {
            self.recompute(block);
        }
        self.states[row * self.width + (j - 1) / 64] >> ((j - 1) % 64) & 1 == 0
    }

    fn recompute(&mut self, block: usize) {
        let mut state = self.kept[block].clone();
        self.states.clear();
        for i in block * BLOCK..self.rows.len().min((block + 1) * BLOCK) {
            self.advance(&mut state, i);
            self.states.extend_from_slice(&state);
        }
        self.block = block;
    }

    /// Computes the state of the next row: V ← (V + (V ∧ M)) ∨ (V ∧ ¬M), where M are the columns with the row's word.
    fn advance(&mut self, state: &mut [u64], i: usize) {
        let Some(places) = self.columns.places.get(&self.words[self.rows[i]]) else {
            return;
        };
        for &j in places {
            self.matches[j / 64] |= 1 << (j % 64);
        }
        let mut carry = false;
        for (v, m) in state.iter_mut().zip(&self.matches) {
            let (sum, over) = v.overflowing_add(*v & m);
            let (sum, carried_over) = sum.overflowing_add(u64::from(carry));
            carry = over || carried_over;
            *v = sum | (*v & !m);
        }
        for &j in places {
            self.matches[j / 64] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computes the same from the full table, to check the bit vectors.
    fn by_table(reference: &[u32], answer: &[u32]) -> HashSet<u32> {
        let (m, n) = (reference.len(), answer.len());
        let mut t = vec![vec![0u32; n + 1]; m + 1];
        for i in 1..=m {
            for j in 1..=n {
                t[i][j] =
                    if reference[i - 1] == answer[j - 1] { t[i - 1][j - 1] + 1 } else { t[i - 1][j].max(t[i][j - 1]) };
            }
        }
        let (mut i, mut j, mut words) = (m, n, HashSet::new());
        while i > 0 && j > 0 {
            if reference[i - 1] == answer[j - 1] {
                words.insert(reference[i - 1]);
                (i, j) = (i - 1, j - 1);
            } else if t[i - 1][j] > t[i][j - 1] {
                i -= 1;
            } else {
                j -= 1;
            }
        }
        words
    }

    #[test]
    fn bits_walk_as_the_table_does() {
        let mut random = cl_data::numpy::Mt19937::new(7);
        for case in 0..600 {
            let most = [3, 70, 200, 600][case % 4];
            let alphabet = [2, 5, 40, 900][case / 4 % 4]; // a larger alphabet gives more rows without a match
            let mut sentence = || -> Vec<u32> {
                let length = 1 + random.interval(most);
                (0..length).map(|_| random.interval(alphabet) as u32).collect()
            };
            let (reference, answer) = (sentence(), sentence());
            let mut words = HashSet::new();
            common_subsequence(&Sentence::new(&reference), &Sentence::new(&answer), &mut words);
            assert_eq!(words, by_table(&reference, &answer), "{reference:?} {answer:?}");
        }
    }
}
