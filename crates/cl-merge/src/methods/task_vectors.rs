use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::method::{MergeMethod, MergePieces, one_per_model, undefined};
use super::ranked::Ranking;
use super::undefined::Undefined;
use crate::Error;
use crate::flag::Flag;
use crate::tensor::kernels::{self, Chance, Voter};
use crate::tensor::select::{bits, keep, keep_largest_changes};
use crate::tensor::trim::{Trim, kept};
use crate::tensor::{Piece, Stream, TensorGroup};

/// The family of task-vector merges, with `δᵢ = θᵢ − θ₀`:
///
/// `θ = θ₀ + λ · Σᵢ mᵢ wᵢ rᵢ S(δᵢ) / d`
///
/// with a sparsification `S`, a rescaling `r`, a mask `m` from an elected sign per entry, and a divisor `d`.
/// Task arithmetic, TIES, DARE, DELLA and Model Breadcrumbs are special cases, see [`crate::methods`].
#[derive(Clone, Debug)]
pub struct TaskVectors {
    /// One weight per model.
    pub weights: Vec<f32>,
    /// λ.
    pub lambda: f32,
    /// Sparsification of each task vector.
    pub sparsify: Sparsify,
    /// Compensation for dropped entries.
    pub rescale: Rescale,
    /// Sign consensus; `None` sums all entries.
    pub consensus: Option<Consensus>,
    /// Divisor of the sum.
    pub divisor: Divisor,
    /// Seed of random masks.
    pub seed: u64,
}

/// The entries of a task vector to keep. Densities are fractions of a tensor's entries, one per model.
#[derive(Clone, Debug)]
pub enum Sparsify {
    /// All entries.
    None,
    /// The `⌊density · n⌋` entries of largest magnitude, at least one if the density is above zero (TIES, arXiv
    /// 2306.01708).
    Magnitude {
        /// Fraction to keep.
        density: Vec<f64>,
    },
    /// Every entry with probability `density`, rounded to 1/65536, independently (DARE, arXiv 2311.03099).
    Random {
        /// Fraction to keep.
        density: Vec<f64>,
    },
    /// The `⌊density · n⌋` largest entries after dropping the `⌊gamma · n⌋` of largest magnitude (Model Breadcrumbs,
    /// arXiv 2312.06795). Fewer are dropped if too few would remain.
    Outliers {
        /// Fraction to keep.
        density: Vec<f64>,
        /// Fraction of the largest entries to drop.
        gamma: Vec<f64>,
    },
    /// Every entry with a probability that increases with the rank of its magnitude in its row, from `density −
    /// epsilon` to `density + epsilon` (MagPrune of DELLA, arXiv 2406.11617).
    Ranked {
        /// Mean fraction to keep.
        density: Vec<f64>,
        /// Half of the range of probabilities.
        epsilon: Vec<f64>,
    },
}

/// Compensation for dropped entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "RescaleForm")]
pub enum Rescale {
    /// No compensation.
    None,
    /// Kept entries are divided by their probability of being kept (papers of DARE and DELLA).
    Density,
    /// The kept part is scaled to the L1 norm of the whole tensor (mergekit).
    Norm,
}

/// The serialized form: a word, or mergekit's boolean, which can also be 1 or 0.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected \"none\", \"density\", \"norm\", or mergekit's true or false")]
enum RescaleForm {
    Flag(Flag),
    Word(String),
}

impl TryFrom<RescaleForm> for Rescale {
    type Error = String;

    fn try_from(form: RescaleForm) -> Result<Rescale, String> {
        match form {
            RescaleForm::Flag(flag) => Ok(if flag.value()? { Rescale::Norm } else { Rescale::None }),
            RescaleForm::Word(word) => match word.as_str() {
                "none" => Ok(Rescale::None),
                "density" => Ok(Rescale::Density),
                "norm" => Ok(Rescale::Norm),
                _ => Err(format!("rescale is \"none\", \"density\" or \"norm\", not {word:?}")),
            },
        }
    }
}

/// Election of one sign per entry; only entries with that sign are merged. A sum of zero elects plus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consensus {
    /// The quantity that is summed.
    pub sign: Sign,
    /// Whether the sum is weighted.
    pub weighted: bool,
}

/// The quantity that elects the sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The sum of values (TIES: total mass).
    Sum,
    /// The sum of signs (majority).
    Count,
}

/// Divisor of the sum of task vectors; if it is zero, the sum is not divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divisor {
    /// No division.
    None,
    /// The sum of the weights that contribute to the entry (mergekit's `normalize`).
    Weight,
    /// The number of models that contribute to the entry (TIES' disjoint mean).
    Count,
}

impl MergeMethod for TaskVectors {
    fn whole_rows(&self) -> bool {
        matches!(self.sparsify, Sparsify::Ranked { .. })
    }

    fn task_vectors(&self) -> bool {
        true
    }

    fn reads_twice(&self, group: &TensorGroup<'_>) -> bool {
        match self.sparsify {
            Sparsify::Magnitude { .. } => group.model_trims.is_none(),
            Sparsify::Outliers { .. } => true,
            Sparsify::Random { .. } | Sparsify::Ranked { .. } => self.rescale == Rescale::Norm,
            Sparsify::None => false,
        }
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        if self.keeps_marks(group) { mark_bytes(group) } else { 0 }
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        self.check(group)?;
        let masks = self.masks(group)?;
        let (factors, marks) = self.factors(group, &masks)?;
        Ok(Box::new(Prepared { method: self, masks, marks, factors, columns: group.columns() }))
    }
}

/// The entries to keep of one model's task vector.
enum Mask {
    All,
    Largest(Trim),
    /// Entries that the first trim keeps and the second does not.
    Band(Trim, Trim),
    Random {
        stream: Stream,
        bound: u32,
    },
    Ranked {
        stream: Stream,
        chances: Vec<Chance>,
    },
}

/// Bit masks of the entries that random masks keep, by the start of each piece: one bit per element, for one model
/// after the other.
type Marks = BTreeMap<usize, Vec<u8>>;

struct Prepared<'t> {
    method: &'t TaskVectors,
    masks: Vec<Mask>,
    /// Bit masks from the pass over norms, if they were stored.
    marks: Option<Marks>,
    factors: Vec<f32>,
    columns: usize,
}

impl TaskVectors {
    /// Checks that there are a base and one setting of each kind per model.
    fn check(&self, group: &TensorGroup<'_>) -> Result<(), Error> {
        const NAME: &str = "task_vectors";
        if group.base.is_none() {
            return Err(undefined(group, NAME, Undefined::NoBase("merges task vectors")));
        }
        one_per_model(group, NAME, "weights", &self.weights)?;
        if let Some(trims) = &group.model_trims {
            one_per_model(group, NAME, "model_trims", trims)?;
        }
        match &self.sparsify {
            Sparsify::None => Ok(()),
            Sparsify::Magnitude { density } | Sparsify::Random { density } => {
                one_per_model(group, NAME, "density", density)
            }
            Sparsify::Outliers { density, gamma: other } | Sparsify::Ranked { density, epsilon: other } => {
                one_per_model(group, NAME, "density", density)?;
                let name = if matches!(self.sparsify, Sparsify::Ranked { .. }) { "epsilon" } else { "gamma" };
                one_per_model(group, NAME, name, other)
            }
        }
    }

    fn masks(&self, group: &TensorGroup<'_>) -> Result<Vec<Mask>, Error> {
        let n = group.elements();
        let stream = |model: usize| Stream::new(self.seed, group.name, group.models[model].model());
        match &self.sparsify {
            Sparsify::None => Ok(group.models.iter().map(|_| Mask::All).collect()),
            Sparsify::Magnitude { .. } if group.model_trims.is_some() => {
                Ok(group.model_trims.iter().flatten().map(|trim| Mask::Largest(*trim)).collect())
            }
            Sparsify::Magnitude { density } => {
                let k: Vec<usize> = density.iter().map(|&d| kept(d, n)).collect();
                let trims = keep_largest_changes(group, &k)?;
                Ok(trims.into_iter().map(Mask::Largest).collect())
            }
            Sparsify::Outliers { density, gamma } => {
                let mut k = Vec::new();
                for (&density, &gamma) in density.iter().zip(gamma) {
                    let keep = if density >= 1.0 { n } else { (density.max(0.0) * n as f64) as usize };
                    // Drops at most as many of the largest entries as leaves enough entries to keep.
                    let top = ((gamma.max(0.0) * n as f64) as usize).min(n - keep);
                    k.extend([top + keep, top]);
                }
                let trims = keep(group, false, true, &k, |piece, request, f| f(bits(&piece.models[request / 2])))?;
                Ok(trims.chunks_exact(2).map(|pair| Mask::Band(pair[0], pair[1])).collect())
            }
            Sparsify::Random { density } => {
                let mask = |(model, &density): (usize, &f64)| match density {
                    d if d >= 1.0 => Mask::All,
                    d => Mask::Random { stream: stream(model), bound: bound(d) },
                };
                Ok(density.iter().enumerate().map(mask).collect())
            }
            Sparsify::Ranked { density, epsilon } => {
                let mask = |(model, (&density, &epsilon)): (usize, (&f64, &f64))| match density {
                    d if d >= 1.0 => Mask::All,
                    d if d <= 0.0 => Mask::Largest(Trim::NONE),
                    density => {
                        Mask::Ranked { stream: stream(model), chances: chances(group.columns(), density, epsilon) }
                    }
                };
                Ok(density.iter().zip(epsilon).enumerate().map(mask).collect())
            }
        }
    }

    /// Whether random masks are stored between the pass over norms and the merge instead of being drawn again.
    fn keeps_marks(&self, group: &TensorGroup<'_>) -> bool {
        self.rescale == Rescale::Norm
            && matches!(self.sparsify, Sparsify::Random { .. } | Sparsify::Ranked { .. })
            && mark_bytes(group) <= MOST_MARKS
    }

    /// The factor for the kept entries of each model, and the bit masks of random masks if they are stored.
    fn factors(&self, group: &TensorGroup<'_>, masks: &[Mask]) -> Result<(Vec<f32>, Option<Marks>), Error> {
        let density = match &self.sparsify {
            Sparsify::None => return Ok((vec![1.0; masks.len()], None)),
            Sparsify::Magnitude { density }
            | Sparsify::Random { density }
            | Sparsify::Outliers { density, .. }
            | Sparsify::Ranked { density, .. } => density,
        };
        let factors = match self.rescale {
            Rescale::None => vec![1.0; masks.len()],
            // Ranked masks divide entry by entry, because every rank has its own probability.
            Rescale::Density if matches!(self.sparsify, Sparsify::Ranked { .. }) => vec![1.0; masks.len()],
            Rescale::Density => {
                let factor = |(mask, &density): (&Mask, &f64)| match mask {
                    // The rounded probability that the mask uses.
                    Mask::Random { bound, .. } if *bound > 0 => (65_536.0 / f64::from(*bound)) as f32,
                    _ if density > 0.0 => (1.0 / density.min(1.0)) as f32,
                    _ => 1.0,
                };
                masks.iter().zip(density).map(factor).collect()
            }
            Rescale::Norm => return self.factors_to_the_norm(group, masks),
        };
        Ok((factors, None))
    }

    fn factors_to_the_norm(&self, group: &TensorGroup<'_>, masks: &[Mask]) -> Result<(Vec<f32>, Option<Marks>), Error> {
        let (pieces, columns, remember) = (group.pieces(self.whole_rows()), group.columns(), self.keeps_marks(group));
        let measured = group.map_task_vectors(&pieces, |piece| sums(piece, masks, columns, remember))?;
        let (sums, marks): (Vec<_>, Vec<_>) = measured.into_iter().unzip();
        let factor = |model: usize| {
            let before: f64 = sums.iter().map(|piece| piece[model].0).sum();
            let after: f64 = sums.iter().map(|piece| piece[model].1).sum();
            if before < 1e-7 || after < 1e-7 { 1.0 } else { (before / after) as f32 }
        };
        let marks = pieces.iter().map(|piece| piece.start).zip(marks).collect();
        Ok(((0..masks.len()).map(factor).collect(), remember.then_some(marks)))
    }
}

/// Maximum size of stored bit masks in bytes.
const MOST_MARKS: usize = 32 << 20;

/// Size of the bit masks of all models in bytes.
fn mark_bytes(group: &TensorGroup<'_>) -> usize {
    group.models.len() * kernels::mark_bytes(group.elements())
}

/// The bound that a 16-bit random number is below with this probability; it is zero only if the probability is.
fn bound(probability: f64) -> u32 {
    let bound = (probability.max(0.0) * 65_536.0).round() as u32;
    if probability > 0.0 { bound.max(1) } else { bound }
}

/// Sums of magnitudes before and after masking, per model, and with `remember` the bit masks, one model after the
/// other.
fn sums(piece: &mut Piece, masks: &[Mask], columns: usize, remember: bool) -> (Vec<(f64, f64)>, Vec<u8>) {
    if masks.iter().all(|mask| matches!(mask, Mask::Random { .. })) {
        let of_model = kernels::mark_bytes(piece.len());
        let mut marks = vec![0; of_model * masks.len()];
        let mut random = std::mem::take(&mut piece.random);
        random.resize(piece.len(), 0);
        let sums = piece.models.iter().zip(masks).zip(marks.chunks_mut(of_model.max(1))).map(|((x, mask), marks)| {
            let Mask::Random { stream, bound } = mask else { unreachable!("all are random") };
            stream.fill(piece.start, &mut random);
            kernels::mark_and_sum_below(x, &random, *bound, marks)
        });
        let sums = sums.collect();
        piece.random = random;
        return (sums, if remember { marks } else { Vec::new() });
    }
    let before: Vec<f64> = piece.models.iter().map(|x| kernels::sum_of_magnitudes(x)).collect();
    sparsify(piece, masks, columns, false);
    let after = piece.models.iter().map(|x| kernels::sum_of_magnitudes(x));
    let marks =
        if remember { piece.models.iter().flat_map(|x| kernels::mark_nonzero(x)).collect() } else { Vec::new() };
    (before.into_iter().zip(after).collect(), marks)
}

/// Applies the masks to task vectors.
fn sparsify(piece: &mut Piece, masks: &[Mask], columns: usize, divide: bool) {
    let (start, len) = (piece.start, piece.len());
    let mut ranking = Ranking::default();
    for (x, mask) in piece.models.iter_mut().zip(masks) {
        match mask {
            Mask::All => {}
            Mask::Largest(trim) => trim.apply(start, x),
            Mask::Band(outer, inner) => {
                for (i, x) in x.iter_mut().enumerate() {
                    let key = x.to_bits() & 0x7fff_ffff;
                    if !outer.keeps(key, start + i) || inner.keeps(key, start + i) {
                        *x = 0.0;
                    }
                }
            }
            Mask::Random { stream, bound } => {
                piece.random.resize(len, 0);
                stream.fill(start, &mut piece.random);
                kernels::keep_below(x, &piece.random, *bound);
            }
            Mask::Ranked { stream, chances } => {
                piece.random.resize(len, 0);
                stream.fill(start, &mut piece.random);
                for (row, random) in x.chunks_mut(columns).zip(piece.random.chunks(columns)) {
                    ranking.keep(row, random, chances, divide);
                }
            }
        }
    }
}

/// The probabilities of keeping each rank of a row, starting with the smallest magnitude.
fn chances(columns: usize, density: f64, epsilon: f64) -> Vec<Chance> {
    let last = (columns.max(2) - 1) as f64;
    let chance = |rank: usize| {
        let probability = density - epsilon + 2.0 * epsilon * rank as f64 / last;
        Chance { probability: probability as f32, bound: bound(probability) }
    };
    (0..columns).map(chance).collect()
}

impl MergePieces for Prepared<'_> {
    fn merge(&self, piece: &mut Piece, out: &mut [f32]) {
        let least = self.mask(piece);
        let TaskVectors { weights, lambda, consensus, divisor, .. } = self.method;
        let share = |weight: f32| match divisor {
            Divisor::None => 0.0,
            Divisor::Weight => weight,
            Divisor::Count => 1.0,
        };
        let members = weights.iter().zip(&self.factors).zip(least);
        if let Some(Consensus { sign, weighted }) = consensus {
            let voter = |((&weight, &factor), least): ((&f32, &f32), u32)| {
                let vote = if *weighted { weight * factor } else { factor };
                Voter { least, vote, weight: weight * factor, share: share(weight) }
            };
            let voters: Vec<Voter> = members.map(voter).collect();
            kernels::elect(out, &piece.base, &piece.models, &voters, *sign == Sign::Count, *lambda);
        } else {
            for (((weight, factor), least), x) in members.zip(&mut piece.models) {
                kernels::keep_and_add(x, least, out, weight * factor);
            }
            let total: f32 = weights.iter().map(|&w| share(w)).sum();
            kernels::finish(out, if total.abs() < 1e-8 { 1.0 } else { total }, *lambda, &piece.base);
        }
    }
}

impl Prepared<'_> {
    /// Applies the masks to task vectors, except for thresholds of magnitudes, which are applied when values are
    /// summed. Returns the bits of the smallest magnitude to keep for each model.
    fn mask(&self, piece: &mut Piece) -> Vec<u32> {
        let drawn = self.marks.is_none();
        if drawn && self.masks.iter().any(|mask| matches!(mask, Mask::Band(..) | Mask::Ranked { .. })) {
            sparsify(piece, &self.masks, self.columns, self.method.rescale == Rescale::Density);
            return vec![0; self.masks.len()];
        }
        let (start, len) = (piece.start, piece.len());
        let marks = self.marks.as_ref().map(|marks| &marks[&start]);
        let mut marks = marks.map(|marks| marks.chunks(kernels::mark_bytes(len)));
        piece.random.resize(len, 0);
        let random = &mut piece.random;
        let masked = self.masks.iter().zip(&mut piece.models).map(|(mask, x)| {
            match (mask, marks.as_mut().and_then(Iterator::next)) {
                (Mask::Largest(trim), _) => return trim.least(start, x),
                (_, Some(marks)) => kernels::keep_marked(x, marks),
                (Mask::Random { stream, bound }, None) => {
                    stream.fill(start, random);
                    kernels::keep_below(x, random, *bound);
                }
                (Mask::All | Mask::Band(..) | Mask::Ranked { .. }, None) => {}
            }
            0
        });
        masked.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    const ROWS: [&[f32]; 2] = [&[4.0, -1.0, 0.5, 2.0], &[-3.0, 2.0, 0.1, 1.0]];

    fn ties(weights: [f32; 2], weighted: bool, divisor: Divisor) -> TaskVectors {
        TaskVectors {
            weights: weights.to_vec(),
            lambda: 1.0,
            sparsify: Sparsify::Magnitude { density: vec![0.5; 2] },
            rescale: Rescale::None,
            consensus: Some(Consensus { sign: Sign::Sum, weighted }),
            divisor,
            seed: 42,
        }
    }

    fn on_zero(method: &TaskVectors) -> Vec<f32> {
        merged(method, &[4], Some(&[0.0; 4]), &ROWS).unwrap()
    }

    /// Computed by hand: trimmed to half, the rows are 4, 0, 0, 2 and −3, 2, 0, 0.
    #[test]
    fn ties_of_four_entries_as_in_peft_and_in_mergekit() {
        // With equal weights every definition elects plus everywhere.
        assert_eq!(on_zero(&ties([1.0, 1.0], false, Divisor::Count)), [4.0, 2.0, 0.0, 2.0]);
        assert_eq!(on_zero(&ties([1.0, 1.0], true, Divisor::Weight)), [4.0, 2.0, 0.0, 2.0]);
        // PEFT elects without weights and divides by the count, …
        assert_eq!(on_zero(&ties([0.2, 0.9], false, Divisor::Count)), [0.8, 1.8, 0.0, 0.4]);
        // … mergekit elects minus in the first entry, 0.2 · 4 − 0.9 · 3, and divides by the weights.
        let close = |out: Vec<f32>, expected: [f32; 4]| out.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6);
        assert!(close(on_zero(&ties([0.2, 0.9], true, Divisor::Weight)), [-3.0, 2.0, 0.0, 2.0]));
    }

    #[test]
    fn a_majority_of_signs_can_differ_from_the_sum() {
        let rows: [&[f32]; 3] = [&[5.0], &[-1.0], &[-1.0]];
        let method = |sign| TaskVectors {
            weights: vec![1.0; 3],
            sparsify: Sparsify::None,
            consensus: Some(Consensus { sign, weighted: false }),
            ..ties([1.0; 2], false, Divisor::Count)
        };
        assert_eq!(merged(&method(Sign::Sum), &[1], Some(&[0.0]), &rows).unwrap(), [5.0]);
        assert_eq!(merged(&method(Sign::Count), &[1], Some(&[0.0]), &rows).unwrap(), [-1.0]);
    }

    /// If no entry is kept, the divisor is zero: the result must be zeros, not NaN.
    #[test]
    fn density_zero_leaves_the_base_whatever_the_rescale() {
        for rescale in [Rescale::None, Rescale::Density, Rescale::Norm] {
            for density in [0.0, 1e-9] {
                let sparsify = Sparsify::Random { density: vec![density; 2] };
                let method = TaskVectors { sparsify, rescale, ..ties([1.0; 2], false, Divisor::Count) };
                assert!(on_zero(&method).iter().all(|x| x.is_finite()));
                assert!(density > 0.0 || on_zero(&method) == [0.0; 4]);
            }
        }
    }

    /// Kept entries are scaled so that the expectation or the norm of the task vector is preserved.
    #[test]
    fn rescales_make_up_for_what_was_dropped() {
        let n = 200_000;
        let x: Vec<f32> = (0..n).map(|i| 1.0 + (i % 7) as f32).collect();
        let total: f64 = x.iter().map(|v| f64::from(*v)).sum();
        let sum = |density: f64, rescale, sparsify: fn(Vec<f64>) -> Sparsify| {
            let method = TaskVectors {
                weights: vec![1.0],
                lambda: 1.0,
                sparsify: sparsify(vec![density]),
                rescale,
                consensus: None,
                divisor: Divisor::None,
                seed: 7,
            };
            let out = merged(&method, &[400, 500], Some(&vec![0.0; n]), &[&x]).unwrap();
            out.iter().map(|v| f64::from(*v)).sum::<f64>() / total
        };
        let random = |density| Sparsify::Random { density };
        let ranked = |density| Sparsify::Ranked { density, epsilon: vec![0.1] };
        // With this many entries, the kept fraction varies by about a third of a percent.
        assert!((sum(0.2, Rescale::Density, random) - 1.0).abs() < 0.02);
        assert!((sum(0.3, Rescale::Density, ranked) - 1.0).abs() < 0.02);
        assert!((sum(0.2, Rescale::Norm, random) - 1.0).abs() < 1e-5);
        assert!((sum(0.3, Rescale::Norm, ranked) - 1.0).abs() < 1e-5);
        assert!((sum(0.2, Rescale::None, random) - 0.2).abs() < 0.005);
        // Larger entries are kept more often, so more than the kept fraction of the sum remains.
        assert!(sum(0.3, Rescale::None, ranked) > 0.31);
    }
}
