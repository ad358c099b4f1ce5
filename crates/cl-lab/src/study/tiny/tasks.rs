//! Seven tasks generated from a seed, one of each kind used in the paper: stance detection in another language,
//! classification, summarization, code completion, question answering with an explanation, simplification, and
//! arithmetic with many more examples than the others. Four of them have the same letters as answers, so that rounds
//! can interfere with each other.

use std::collections::HashSet;

use cl_data::Example;
use rand_chacha::ChaCha8Rng;

use super::words::*;
use crate::toy::{below, rng};

/// A question of a task, its answer, and an answer that is plausible without knowing the rule.
pub(super) struct Drawn {
    pub(super) prompt: String,
    pub(super) answer: String,
    pub(super) plausible: String,
}

/// A task of the tiny study.
pub(super) struct TinyTask {
    pub(super) name: &'static str,
    /// The corresponding column of the paper.
    pub(super) paper: &'static str,
    pub(super) metric: &'static str,
    /// Expected score of random guessing.
    pub(super) chance: Option<f64>,
    /// Maximum length of an answer in tokens.
    pub(super) answer_tokens: usize,
    /// Ratio of its training rows to those of the other tasks.
    pub(super) times: usize,
    make: fn(&mut ChaCha8Rng) -> Drawn,
}

/// The tasks in the paper's order.
pub(super) const TASKS: [TinyTask; 7] = [
    TinyTask::new("stance", "cstan", "first_char", Some(1.0 / 3.0), 2, stance),
    TinyTask::new("tone", "fomc", "first_char", Some(1.0 / 3.0), 2, tone),
    TinyTask::new("minutes", "meet", "rouge_l", None, 8, minutes),
    TinyTask::new("code", "py150", "edit_similarity", None, 8, code),
    TinyTask::new("science", "sci", "first_char", Some(0.5), 7, science),
    TinyTask::new("simple", "20min", "sari", None, 5, simple),
    TinyTask { times: 10, ..TinyTask::new("math", "gsm8k", "gsm8k", None, 8, math) },
];

impl TinyTask {
    const fn new(
        name: &'static str,
        paper: &'static str,
        metric: &'static str,
        chance: Option<f64>,
        answer_tokens: usize,
        make: fn(&mut ChaCha8Rng) -> Drawn,
    ) -> TinyTask {
        TinyTask { name, paper, metric, chance, answer_tokens, times: 1, make }
    }

    /// Generates training and test rows; no prompt occurs twice.
    pub(super) fn rows(&self, seed: u64, train: usize, test: usize) -> (Vec<Example>, Vec<Example>) {
        let mut rng = rng(seed, self.name);
        let mut seen = HashSet::new();
        let wanted = train * self.times + test;
        let mut rows = Vec::with_capacity(wanted);
        // Every task has more prompts than any study needs; the bound only prevents an endless loop on an impossible
        // request.
        for _ in 0..wanted * 50 {
            let drawn = (self.make)(&mut rng);
            if rows.len() < wanted && seen.insert(drawn.prompt.clone()) {
                rows.push(Example::pair(drawn.prompt, drawn.answer));
            }
        }
        // Test rows come first, so that they stay the same when a study trains on fewer rows.
        let train = rows.split_off(test.min(rows.len()));
        (train, rows)
    }

    /// Generates questions for pretraining, with answers of the right form that ignore the rule.
    pub(super) fn questions(&self, seed: u64, rows: usize) -> Vec<Example> {
        let mut rng = rng(seed, &format!("before {}", self.name));
        let question = |_| {
            let drawn = (self.make)(&mut rng);
            Example::pair(drawn.prompt, drawn.plausible)
        };
        (0..rows).map(question).collect()
    }
}

fn pick<'a, T: ?Sized>(rng: &mut ChaCha8Rng, from: &[&'a T]) -> &'a T {
    from[below(rng, from.len())]
}

/// Draws two different items.
fn pair<'a>(rng: &mut ChaCha8Rng, from: &[&'a str]) -> (&'a str, &'a str) {
    let first = below(rng, from.len());
    let second = (first + 1 + below(rng, from.len() - 1)) % from.len();
    (from[first], from[second])
}

/// Stance of a sentence in another language, determined by one of its words.
fn stance(rng: &mut ChaCha8Rng) -> Drawn {
    let class = below(rng, 3);
    let word = pick(rng, &STANCES[class]);
    let (a, b) = pair(rng, &OTHER_NOUNS);
    let sentence = [[word, a, b], [a, word, b], [a, b, word]][below(rng, 3)].join(" ");
    let plausible = pick(rng, &LETTERS).to_owned();
    Drawn { prompt: format!("stance {sentence} :"), answer: LETTERS[class].to_owned(), plausible }
}

/// Mood of a sentence, determined by two of its words.
fn tone(rng: &mut ChaCha8Rng) -> Drawn {
    let class = below(rng, 3);
    let (a, b) = pair(rng, &MOODS[class]);
    let noun = pick(rng, &NOUNS);
    let plausible = pick(rng, &LETTERS).to_owned();
    Drawn { prompt: format!("tone the {noun} is {a} and {b} :"), answer: LETTERS[class].to_owned(), plausible }
}

/// Summary: who does what, without the filler words.
fn minutes(rng: &mut ChaCha8Rng) -> Drawn {
    let (who, whom) = pair(rng, &SUBJECTS[..16]);
    let (what, which) = (pick(rng, &VERBS), pick(rng, &VERBS));
    let (a, b) = pair(rng, &NOUNS);
    let filler = pick(rng, &FILLERS);
    let prompt = format!("minutes {filler} {who} will {what} the {a} and then {whom} will {which} the {b} :");
    let plausible =
        format!("{} will {} the {}", pick(rng, &[who, whom]), pick(rng, &[what, which]), pick(rng, &[a, b]));
    Drawn { prompt, answer: format!("{who} {what} {a} ; {whom} {which} {b}"), plausible }
}

/// A function call with arguments in place of the parameters.
fn code(rng: &mut ChaCha8Rng) -> Drawn {
    let function = pick(rng, &FUNCTIONS);
    let (a, b) = pair(rng, &VARIABLES);
    let other = pick(rng, &VARIABLES);
    let prompt = format!("code def {function} ( {a} , {b} ) with {a} = {other} call :");
    let plausible = format!("{function} ( {} )", pick(rng, &[a, b, other]));
    Drawn { prompt, answer: format!("{function} ( {other} , {b} )"), plausible }
}

/// Which of two things has more of a property; the answer is the letter, then the reason.
fn science(rng: &mut ChaCha8Rng) -> Drawn {
    let property = below(rng, PROPERTIES.len());
    let (a, b) = pair(rng, &THINGS);
    let rank = |thing: &str| RANKS[property][THINGS.iter().position(|t| *t == thing).expect("one of the list")];
    let first = rank(a) > rank(b);
    let (letter, more, less) = if first { ("A", a, b) } else { ("B", b, a) };
    let property = PROPERTIES[property];
    let prompt = format!("science which is {property} ? A {a} B {b} :");
    let plausible = format!("{} because", pick(rng, &LETTERS[..2]));
    Drawn { prompt, answer: format!("{letter} because {more} is {property} than {less}"), plausible }
}

/// Simplification: the same sentence in simpler words.
fn simple(rng: &mut ChaCha8Rng) -> Drawn {
    let (noun, verb, adverb) =
        (pick_pair(rng, &HARD_NOUNS), pick_pair(rng, &HARD_VERBS), pick_pair(rng, &HARD_ADVERBS));
    let whose = pick(rng, &NOUNS);
    let plausible = format!("the {} {} {}", noun.0, verb.0, adverb.0);
    Drawn {
        prompt: format!("simple the {} of the {whose} {} {} :", noun.0, verb.0, adverb.0),
        answer: format!("the {} {} {}", noun.1, verb.1, adverb.1),
        plausible,
    }
}

fn pick_pair(rng: &mut ChaCha8Rng, from: &[(&'static str, &'static str)]) -> (&'static str, &'static str) {
    from[below(rng, from.len())]
}

/// Addition in a word problem, with an answer in GSM8K's format.
fn math(rng: &mut ChaCha8Rng) -> Drawn {
    let who = pick(rng, &SUBJECTS);
    let thing = pick(rng, &THINGS);
    let (a, b) = (1 + below(rng, 9), 1 + below(rng, 9));
    let guess = 2 + below(rng, 17);
    Drawn {
        prompt: format!("math {who} has {a} {thing} and gets {b} more . how many ? :"),
        answer: format!("{a} + {b} = {} #### {}", a + b, a + b),
        plausible: guess.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_new_and_the_seed_decides() {
        for task in &TASKS {
            let (train, test) = task.rows(1, 60, 40);
            assert_eq!((train.len(), test.len()), (60 * task.times, 40), "{}", task.name);
            assert!(test.iter().all(|t| train.iter().all(|e| e.shown() != t.shown())), "{}", task.name);
            assert_eq!(task.rows(1, 60, 40).0, train);
            assert_eq!(task.rows(1, 30, 40).1, test, "fewer training rows leave the test rows as they are");
            assert_ne!(task.rows(2, 60, 40).0, train);
        }
    }

    #[test]
    fn every_word_is_known_and_every_answer_fits() {
        let known = vocabulary();
        for task in &TASKS {
            let (train, test) = task.rows(1, 60, 40);
            for example in train.iter().chain(&test).chain(&task.questions(1, 60)) {
                for word in example.shown().split(' ').chain(example.answer().split(' ')) {
                    assert!(known.iter().any(|k| k == word), "{}: {word}", task.name);
                }
                // The end-of-text token counts, too.
                assert!(example.answer().split(' ').count() < task.answer_tokens + 2, "{}", example.answer());
            }
        }
    }

    #[test]
    fn the_letters_are_balanced() {
        for (name, letters) in [("stance", 3), ("tone", 3), ("science", 2)] {
            let task = TASKS.iter().find(|t| t.name == name).unwrap();
            let (train, _) = task.rows(3, 300, 10);
            for letter in &LETTERS[..letters] {
                let share = train.iter().filter(|e| e.answer().starts_with(letter)).count() as f64 / 300.0;
                // Five standard deviations of a binomial distribution with 300 draws.
                assert!((share - 1.0 / letters as f64).abs() < 0.15, "{name} {letter}: {share}");
            }
        }
    }
}
