use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::ModelError;

/// Decoding settings, with the names and in the order of Transformers: `repetition_penalty`, then `temperature`,
/// `top_k` and `top_p`, then sampling.
///
/// The default is greedy decoding.
///
/// # Example
/// ```
/// use cl_model::{Decoding, Sampling};
///
/// let decoding = Decoding { sampling: Some(Sampling { top_k: Some(2), ..Sampling::default() }), ..Decoding::default() };
/// let mut scores = [1.0, 3.0, 2.0];
/// decoding.process(&[], &mut scores);
/// assert_eq!(scores, [f32::NEG_INFINITY, 3.0, 2.0]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decoding {
    /// Repetition penalty: positive logits of tokens in the prompt or output are divided by it, negative ones
    /// multiplied; 1 has no effect. Also applies to greedy decoding.
    pub repetition_penalty: f32,
    /// Sampling settings; `None` for greedy decoding.
    pub sampling: Option<Sampling>,
}

impl Default for Decoding {
    fn default() -> Self {
        Decoding { repetition_penalty: 1.0, sampling: None }
    }
}

/// Sampling settings.
///
/// A sample depends only on the logits, the seed, the index of the prompt and the position in the output, not on the
/// rest of the batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits.
    pub temperature: f32,
    /// Number of largest logits to keep; logits equal to the smallest of them are kept too.
    pub top_k: Option<usize>,
    /// Nucleus sampling: keeps the most probable tokens until their probabilities sum to this value; at least one.
    pub top_p: f64,
    /// Random seed.
    pub seed: u64,
}

impl Default for Sampling {
    /// Sampling from the model's distribution, with seed 0.
    fn default() -> Self {
        Sampling { temperature: 1.0, top_k: None, top_p: 1.0, seed: 0 }
    }
}

impl Decoding {
    /// Checks that all values are within their ranges.
    ///
    /// # Errors
    /// Returns [`ModelError::Setting`] with the value and its range.
    pub fn validate(&self) -> Result<(), ModelError> {
        let check = |name, valid, got: String, expected| match valid {
            true => Ok(()),
            false => Err(ModelError::Setting { name, got, expected }),
        };
        let positive = |x: f32| x > 0.0 && x.is_finite();
        let penalty = self.repetition_penalty;
        check("repetition_penalty", positive(penalty), penalty.to_string(), "a number above 0; 1 changes nothing")?;
        let Some(Sampling { temperature, top_k, top_p, .. }) = self.sampling else { return Ok(()) };
        let expected = "a number above 0; for greedy decoding leave the sampling options out";
        check("temperature", positive(temperature), temperature.to_string(), expected)?;
        check("top_k", top_k != Some(0), "0".to_owned(), "1 or more; without it all tokens are kept")?;
        check("top_p", top_p > 0.0 && top_p <= 1.0, top_p.to_string(), "above 0 and at most 1; 1 keeps all tokens")
    }

    /// Whether decoding always chooses the token with the largest unmodified logit.
    pub(crate) fn is_plain(&self) -> bool {
        self.sampling.is_none() && self.repetition_penalty == 1.0
    }

    /// Applies all settings to `scores`, the logits of one position, of length `vocab`; logits of excluded tokens
    /// become −∞. `history` contains the tokens of prompt and output.
    pub fn process(&self, history: &[u32], scores: &mut [f32]) {
        penalize(self.repetition_penalty, history, scores);
        if let Some(sampling) = &self.sampling {
            sampling.process(scores);
        }
    }

    /// Chooses the next token for the prompt with the index `prompt`, at a position of the output.
    ///
    /// # Errors
    /// [`ModelError::NotANumber`].
    pub(crate) fn choose(
        &self,
        history: &[u32],
        scores: &mut [f32],
        prompt: u64,
        position: usize,
    ) -> Result<u32, ModelError> {
        if scores.iter().any(|s| s.is_nan() || *s == f32::INFINITY) {
            return Err(ModelError::NotANumber);
        }
        self.process(history, scores);
        Ok(match &self.sampling {
            None => largest(scores),
            Some(sampling) => draw(scores, uniform(sampling.seed, prompt, position)),
        })
    }
}

/// Applies the repetition penalty; a token that occurs several times is penalized once.
fn penalize(penalty: f32, history: &[u32], scores: &mut [f32]) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = vec![false; scores.len()];
    for &id in history {
        let id = id as usize;
        // The prompt may contain ids beyond the logits, if the embedding has more rows than the output head.
        if id < scores.len() && !std::mem::replace(&mut seen[id], true) {
            let score = &mut scores[id];
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
    }
}

impl Sampling {
    fn process(&self, scores: &mut [f32]) {
        if self.temperature != 1.0 {
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // Only differences between scores matter; with the largest at zero, a low temperature cannot overflow.
            let shift = if (most / self.temperature).is_finite() { 0.0 } else { most };
            scores.iter_mut().for_each(|s| *s = (*s - shift) / self.temperature);
        }
        if let Some(k) = self.top_k.filter(|&k| k < scores.len()) {
            keep_top_k(k, scores);
        }
        if self.top_p < 1.0 {
            keep_top_p(self.top_p, scores);
        }
    }
}

fn keep_top_k(k: usize, scores: &mut [f32]) {
    let mut sorted = scores.to_vec();
    let (_, smallest, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let smallest = *smallest;
    scores.iter_mut().filter(|s| **s < smallest).for_each(|s| *s = f32::NEG_INFINITY);
}

/// Removes a token if the tokens before it already sum to `top_p`; of equally probable tokens, the lowest id comes
/// first.
fn keep_top_p(top_p: f64, scores: &mut [f32]) {
    let mut order: Vec<usize> = (0..scores.len()).filter(|&i| scores[i] > f32::NEG_INFINITY).collect();
    order.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let Some(&first) = order.first() else { return };
    let largest = scores[first];
    let weight = |score: f32| f64::from(score - largest).exp();
    let total: f64 = order.iter().map(|&i| weight(scores[i])).sum();
    let mut before = 0.0;
    for i in order {
        let own = weight(scores[i]);
        if before >= top_p * total {
            scores[i] = f32::NEG_INFINITY;
        }
        before += own;
    }
}

/// Returns the lowest id among the largest scores.
fn largest(scores: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
    (0..scores.len()).fold(0, better) as u32
}

/// Returns the token at which the cumulative probability exceeds `unit`, a number in `[0, 1)`.
fn draw(scores: &[f32], unit: f64) -> u32 {
    let best = largest(scores);
    let weight = |score: f32| f64::from(score - scores[best as usize]).exp();
    let total: f64 = scores.iter().map(|&s| weight(s)).sum();
    let mut left = unit * total;
    for (id, &score) in scores.iter().enumerate() {
        left -= weight(score);
        if left < 0.0 {
            return id as u32;
        }
    }
    // Reached only because of rounding.
    best
}

/// A random number in `[0, 1)` keyed by seed, prompt and position: ChaCha8 can seek to any word of any stream.
fn uniform(seed: u64, prompt: u64, position: usize) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(prompt);
    rng.set_word_pos(2 * position as u128);
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.5, 2.0, -1.0, 2.0, 1.0, -3.0];

    fn sampling(temperature: f32, top_k: Option<usize>, top_p: f64) -> Decoding {
        let sampling = Sampling { temperature, top_k, top_p, seed: 7 };
        Decoding { sampling: Some(sampling), ..Decoding::default() }
    }

    fn kept(decoding: &Decoding) -> Vec<usize> {
        let mut scores = LOGITS;
        decoding.process(&[], &mut scores);
        (0..6).filter(|&i| scores[i] > f32::NEG_INFINITY).collect()
    }

    #[test]
    fn top_k_keeps_ties_and_top_p_at_least_one() {
        assert_eq!(kept(&sampling(1.0, Some(1), 1.0)), [1, 3]);
        assert_eq!(kept(&sampling(1.0, Some(3), 1.0)), [1, 3, 4]);
        assert_eq!(kept(&sampling(1.0, Some(100), 1.0)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(kept(&sampling(1.0, None, 1e-9)), [1]);
        // top_p applies to what top_k keeps: two tokens with probability 1/2 each.
        assert_eq!(kept(&sampling(1.0, Some(2), 0.5)), [1]);
        assert_eq!(kept(&sampling(1.0, Some(2), 0.51)), [1, 3]);
        // The lower the temperature, the fewer tokens are needed.
        assert_eq!(kept(&sampling(0.1, None, 0.9)), [1, 3]);
        assert_eq!(kept(&sampling(5.0, None, 0.9)), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_temperature_near_zero_does_not_overflow() {
        for temperature in [1e-30, 3e-39, 1e-40, f32::from_bits(1)] {
            for offset in [0.0, -10.0] {
                let mut scores = LOGITS.map(|x| x + offset);
                sampling(temperature, None, 1.0).process(&[], &mut scores);
                assert_eq!(scores[1], scores[3]);
                assert!(scores[1].is_finite() && scores[4] - scores[1] < -1e20, "{temperature} {scores:?}");
            }
        }
    }

    #[test]
    fn the_penalty_counts_a_token_once_and_lowers_it_on_both_sides_of_zero() {
        let decoding = Decoding { repetition_penalty: 2.0, ..Decoding::default() };
        let mut scores = LOGITS;
        decoding.process(&[1, 1, 2, 900, 1], &mut scores);
        assert_eq!(scores, [0.5, 1.0, -2.0, 2.0, 1.0, -3.0]);
        assert_eq!(decoding.choose(&[1], &mut LOGITS.clone(), 0, 0).unwrap(), 3);
        assert_eq!(Decoding::default().choose(&[1], &mut LOGITS.clone(), 0, 0).unwrap(), 1);
    }

    #[test]
    fn draws_have_the_probabilities_of_the_softmax() {
        const DRAWS: usize = 20_000;
        let decoding = sampling(1.0, None, 1.0);
        let mut counts = [0usize; 6];
        for position in 0..DRAWS {
            counts[decoding.choose(&[], &mut LOGITS.clone(), 3, position).unwrap() as usize] += 1;
        }
        let total: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        for (count, logit) in counts.iter().zip(LOGITS) {
            let p = f64::from(logit).exp() / total;
            // Five standard deviations of a binomial proportion.
            let bound = 5.0 * (p * (1.0 - p) / DRAWS as f64).sqrt();
            assert!((*count as f64 / DRAWS as f64 - p).abs() < bound, "{counts:?}");
        }
    }

    #[test]
    fn a_draw_depends_on_seed_prompt_and_position() {
        let first = uniform(1, 2, 3);
        assert_eq!(first, uniform(1, 2, 3));
        for other in [uniform(2, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4), uniform(1, u64::MAX, 3)] {
            assert!(other != first && (0.0..1.0).contains(&other));
        }
        assert_eq!(draw(&LOGITS, 0.0), 0);
        assert_eq!(draw(&LOGITS, 1.0 - 1e-16), 5);
    }

    #[test]
    fn values_outside_their_range_are_named() {
        let rows = [
            (sampling(0.0, None, 1.0), "temperature is 0; expected a number above 0; for greedy decoding"),
            (sampling(f32::NAN, None, 1.0), "temperature is NaN"),
            (sampling(1.0, Some(0), 1.0), "top_k is 0; expected 1 or more"),
            (sampling(1.0, None, 0.0), "top_p is 0; expected above 0"),
            (sampling(1.0, None, 1.5), "top_p is 1.5"),
            (Decoding { repetition_penalty: -1.0, sampling: None }, "repetition_penalty is -1; expected"),
        ];
        for (decoding, part) in rows {
            let message = decoding.validate().unwrap_err().to_string();
            assert!(message.starts_with(part), "{message}");
        }
        sampling(0.7, Some(50), 0.9).validate().unwrap();
        let mut scores = [0.0, f32::NAN];
        assert!(matches!(Decoding::default().choose(&[], &mut scores, 0, 0), Err(ModelError::NotANumber)));
    }
}
