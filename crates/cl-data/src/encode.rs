use rayon::prelude::*;

use crate::{Error, Example, Profile, Tokenizer};

/// Tokens of one example: source, then target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// All tokens.
    pub input_ids: Vec<u32>,
    /// How many of them are the source's.
    pub source_len: usize,
}

impl Encoded {
    /// What is learned: −100 on the source, the tokens themselves on the target.
    pub fn labels(&self) -> Vec<i64> {
        let target = self.input_ids[self.source_len..].iter().map(|&id| i64::from(id));
        std::iter::repeat_n(-100, self.source_len).chain(target).collect()
    }
}

/// Tokenizes an example: the prompt with the tokenizer's special tokens, the answer and the EOS text apart without them, so
/// that there is always a token boundary between the two; then cuts to `max_length` tokens in the middle.
///
/// # Errors
/// [`Error::NoEos`], [`Error::Encode`].
pub fn encode_example(
    tokenizer: &Tokenizer,
    example: &Example,
    max_length: Option<usize>,
    profile: Profile,
) -> Result<Encoded, Error> {
    let source = tokenizer.encode(&example.prompt, true)?;
    let target = tokenizer.encode(&format!("{}{}", example.answer, tokenizer.require_eos()?), false)?;
    let (source, target) = match max_length {
        Some(max) => truncate(source, target, max, profile),
        None => (source, target),
    };
    let source_len = source.len();
    Ok(Encoded { input_ids: [source, target].concat(), source_len })
}

/// [`encode_example`] for all, on all cores, order kept.
///
/// # Errors
/// The first one by index.
pub fn encode_dataset(
    tokenizer: &Tokenizer,
    examples: &[Example],
    max_length: Option<usize>,
    profile: Profile,
) -> Result<Vec<Encoded>, Error> {
    examples.par_iter().map(|e| encode_example(tokenizer, e, max_length, profile)).collect()
}

/// The paper's truncation "middle". With L and T tokens and room for M: a target longer than ⌊M/2⌋ shares the room in
/// proportion, n₁ = ⌊L/(L+T)·M⌋ for the source, and loses its end (EOS too); a shorter one is kept whole and n₁ = M − T.
/// The source keeps its first ⌊n₁/2⌋ and its last n₁ − ⌊n₁/2⌋ tokens.
///
/// Where n₁ = 0 the paper's code keeps the whole source (Python's `[-0:]`) and so exceeds M; the profile `method` keeps
/// none of it.
fn truncate(source: Vec<u32>, target: Vec<u32>, max: usize, profile: Profile) -> (Vec<u32>, Vec<u32>) {
    let (l, t) = (source.len(), target.len());
    if l + t <= max {
        return (source, target);
    }
    let (n1, target) = if t > max / 2 {
        // As Python computes it, in f64.
        let n1 = (l as f64 / (l + t) as f64 * max as f64).floor() as usize;
        (n1, target[..(max - n1).min(t)].to_vec())
    } else {
        (max - t, target)
    };
    let head = n1 / 2;
    let tail = n1 - head;
    let source = match (tail, profile) {
        (0, Profile::Paper) => source,
        _ if n1 >= l => source,
        _ => [&source[..head], &source[l - tail..]].concat(),
    };
    (source, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(l: u32, t: u32, max: usize, profile: Profile) -> (Vec<u32>, Vec<u32>) {
        truncate((0..l).collect(), (100..100 + t).collect(), max, profile)
    }

    #[test]
    fn truncation_in_the_middle() {
        assert_eq!(cut(10, 3, 8, Profile::Paper), (vec![0, 1, 7, 8, 9], vec![100, 101, 102]));
        assert_eq!(cut(6, 6, 8, Profile::Paper), (vec![0, 1, 4, 5], vec![100, 101, 102, 103]));
        assert_eq!(cut(4, 4, 8, Profile::Method), ((0..4).collect(), (100..104).collect()));
    }

    #[test]
    fn a_source_without_room_follows_the_profile() {
        // n1 = ⌊1/21·8⌋ = 0
        assert_eq!(cut(1, 20, 8, Profile::Paper).0, [0]);
        assert!(cut(1, 20, 8, Profile::Method).0.is_empty());
        assert_eq!(cut(1, 20, 8, Profile::Method).1.len(), 8);
    }

    #[test]
    fn never_longer_than_allowed() {
        for l in 0..30 {
            for t in 1..30 {
                for max in 2..20 {
                    let (source, target) = cut(l, t, max, Profile::Method);
                    let all = (l + t) as usize;
                    assert_eq!(source.len() + target.len(), all.min(max), "{l} {t} {max}");
                    assert!(!target.is_empty());
                }
            }
        }
    }
}
