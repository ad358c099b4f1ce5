//! Loops over values, compiled for several instruction sets and selected at run time.
//!
//! Every loop works element by element or in a fixed number of lanes, without fused multiply-add, so that results have
//! the same bits on every processor.

// The macro requires named lifetimes.
#![allow(clippy::needless_lifetimes)]

use pulp::Simd;

/// Bit mask of the magnitude of an f32.
const MAGNITUDE: u32 = 0x7fff_ffff;
/// Number of interleaved lanes in sums.
const LANES: usize = 16;
/// Number of partial sums in f32, which are added in f64 at the end: large, so that each sum has few elements of a
/// piece and a small rounding error.
const RUN: usize = 64;

/// Converts bf16 bytes (little-endian) to f32 and returns the bits of the largest magnitude; infinities and NaN count
/// as larger than all finite values.
#[pulp::with_simd(read_bf16 = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn read_bf16_simd<'a, S: Simd>(_simd: S, bytes: &'a [u8], out: &'a mut [f32]) -> u32 {
    let mut largest = 0;
    for (value, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        let bits = u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16;
        *value = f32::from_bits(bits);
        largest = largest.max(bits & MAGNITUDE);
    }
    largest
}

/// [`read_bf16`] minus the base's values; returns the bits of the largest magnitude of the differences.
#[pulp::with_simd(read_bf16_minus = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn read_bf16_minus_simd<'a, S: Simd>(_simd: S, bytes: &'a [u8], base: &'a [f32], out: &'a mut [f32]) -> u32 {
    let mut largest = 0;
    for ((value, pair), base) in out.iter_mut().zip(bytes.chunks_exact(2)).zip(base) {
        let bits = u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16;
        *value = f32::from_bits(bits) - base;
        largest = largest.max(value.to_bits() & MAGNITUDE);
    }
    largest
}

/// Converts f32 to bf16 bytes, rounding to nearest even. Values must be finite.
#[pulp::with_simd(f32_to_bf16 = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn f32_to_bf16_simd<'a, S: Simd>(_simd: S, values: &'a [f32], out: &'a mut [u8]) {
    for (pair, value) in out.chunks_exact_mut(2).zip(values) {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        pair.copy_from_slice(&(rounded as u16).to_le_bytes());
    }
}

/// The bits of the largest magnitude; infinities and NaN count as larger than all finite values.
#[pulp::with_simd(largest_key = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn largest_key_simd<'a, S: Simd>(_simd: S, values: &'a [f32]) -> u32 {
    // A maximum over bits, without an early exit, vectorizes.
    values.iter().fold(0, |most, v| most.max(v.to_bits() & MAGNITUDE))
}

/// The integer part of each magnitude times `scale`.
#[pulp::with_simd(buckets = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn buckets_simd<'a, S: Simd>(_simd: S, values: &'a [f32], scale: f32, out: &'a mut [u32]) {
    for (bucket, value) in out.iter_mut().zip(values) {
        *bucket = (value.abs() * scale) as u32;
    }
}

/// `x -= y`.
#[pulp::with_simd(subtract = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn subtract_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], y: &'a [f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x -= y;
    }
}

/// `sum += weight · x`.
#[pulp::with_simd(add_scaled = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn add_scaled_simd<'a, S: Simd>(_simd: S, sum: &'a mut [f32], weight: f32, x: &'a [f32]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += weight * x;
    }
}

/// `x *= factor`.
#[pulp::with_simd(scale = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn scale_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], factor: f32) {
    for x in x.iter_mut() {
        *x *= factor;
    }
}

/// `x /= divisor`.
#[pulp::with_simd(divide_by = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn divide_by_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], divisor: f32) {
    for x in x.iter_mut() {
        *x /= divisor;
    }
}

/// Counts the keys above `high` and those equal to each of `values`, and marks with 1 the others in `low..=high`. The
/// sign bit is ignored.
#[pulp::with_simd(tally = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn tally_simd<'a, S: Simd>(
    _simd: S,
    keys: &'a [u32],
    low: u32,
    high: u32,
    values: [u32; 4],
    marks: &'a mut [u8],
) -> (u32, [u32; 4]) {
    let (mut above, mut equal) = (0, [0; 4]);
    for (mark, key) in marks.iter_mut().zip(keys) {
        let key = key & MAGNITUDE;
        let is = values.map(|value| u32::from(key == value));
        *mark = u8::from(key >= low) & u8::from(key <= high) & u8::from(is[0] + is[1] + is[2] + is[3] == 0);
        above += u32::from(key > high);
        for (count, is) in equal.iter_mut().zip(is) {
            *count += is;
        }
    }
    (above, equal)
}

/// Sets values to zero whose magnitude is smaller than that with the bits `least`.
#[pulp::with_simd(keep_from = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn keep_from_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], least: u32) {
    for x in x.iter_mut() {
        let bits = x.to_bits();
        *x = f32::from_bits(if bits & MAGNITUDE >= least { bits } else { 0 });
    }
}

/// [`keep_from`], and adds `weight` times the remaining values to `sum`.
#[pulp::with_simd(keep_and_add = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn keep_and_add_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], least: u32, sum: &'a mut [f32], weight: f32) {
    for (x, sum) in x.iter_mut().zip(sum) {
        let bits = x.to_bits();
        *x = f32::from_bits(if bits & MAGNITUDE >= least { bits } else { 0 });
        *sum += weight * *x;
    }
}

/// Sets values to zero whose random number is not below `bound`.
#[pulp::with_simd(keep_below = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn keep_below_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], random: &'a [u16], bound: u32) {
    for (x, r) in x.iter_mut().zip(random) {
        *x = f32::from_bits(if u32::from(*r) < bound { x.to_bits() } else { 0 });
    }
}

/// Probability with which the entry of a rank is kept.
#[derive(Clone, Copy, Default)]
pub(crate) struct Chance {
    pub(crate) probability: f32,
    /// An entry is kept if its 16-bit random number is below this bound.
    pub(crate) bound: u32,
}

/// Sets values to zero whose random number is not below the bound of the element.
#[pulp::with_simd(keep_by_chance = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn keep_by_chance_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], random: &'a [u16], chances: &'a [Chance]) {
    for ((x, r), chance) in x.iter_mut().zip(random).zip(chances) {
        *x = f32::from_bits(if u32::from(*r) < chance.bound { x.to_bits() } else { 0 });
    }
}

/// [`keep_by_chance`], and divides the remaining values by their probabilities.
#[pulp::with_simd(keep_and_divide = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn keep_and_divide_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], random: &'a [u16], chances: &'a [Chance]) {
    for ((x, r), chance) in x.iter_mut().zip(random).zip(chances) {
        let divided = *x / chance.probability;
        *x = f32::from_bits(if u32::from(*r) < chance.bound { divided.to_bits() } else { 0 });
    }
}

/// Number of elements per block of a bit mask: eight times as many as a processor works on at a time.
const MARKED: usize = 8 * RUN;

/// Size in bytes of the bit mask for this number of elements.
pub(crate) const fn mark_bytes(elements: usize) -> usize {
    elements.div_ceil(MARKED) * RUN
}

/// Sums of all magnitudes and of those whose random number is below `bound`; the latter are marked in the bit mask
/// `marks` for [`keep_marked`]. The precision is that of [`sum_of_magnitudes`].
#[pulp::with_simd(mark_and_sum_below = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn mark_and_sum_below_simd<'a, S: Simd>(
    _simd: S,
    x: &'a [f32],
    random: &'a [u16],
    bound: u32,
    marks: &'a mut [u8],
) -> (f64, f64) {
    let (mut all, mut kept) = ([0.0f32; RUN], [0.0f32; RUN]);
    let ((xs, x_rest), (randoms, random_rest)) = (x.as_chunks(), random.as_chunks());
    let mut marks = marks.as_chunks_mut().0.iter_mut();
    for ((x, random), marks) in xs.iter().zip(randoms).zip(&mut marks) {
        *marks = mark_and_sum(x, random, bound, &mut all, &mut kept);
    }
    if let Some(marks) = marks.next() {
        let (mut x, mut random) = ([0.0; MARKED], [0; MARKED]);
        x[..x_rest.len()].copy_from_slice(x_rest);
        random[..random_rest.len()].copy_from_slice(random_rest);
        *marks = mark_and_sum(&x, &random, bound, &mut all, &mut kept);
    }
    let sum = |sums: &[f32]| sums.iter().map(|&x| f64::from(x)).sum::<f64>();
    (sum(&all), sum(&kept))
}

/// One block of [`mark_and_sum_below`]: bit `b` of byte `j` marks element `64 b + j`.
#[inline(always)]
// With plain indices, all lanes stay in registers.
#[allow(clippy::needless_range_loop)]
fn mark_and_sum(
    x: &[f32; MARKED],
    random: &[u16; MARKED],
    bound: u32,
    all: &mut [f32; RUN],
    kept: &mut [f32; RUN],
) -> [u8; RUN] {
    let mut marks = [0; RUN];
    for bit in 0..8 {
        for j in 0..RUN {
            let magnitude = x[bit * RUN + j].abs();
            let below = u32::from(random[bit * RUN + j]) < bound;
            all[j] += magnitude;
            kept[j] += if below { magnitude } else { 0.0 };
            marks[j] |= if below { 1u8 << bit } else { 0 };
        }
    }
    marks
}

/// Returns a bit mask of the nonzero values, for [`keep_marked`].
#[pulp::with_simd(mark_nonzero = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn mark_nonzero_simd<'a, S: Simd>(_simd: S, x: &'a [f32]) -> Vec<u8> {
    let mut marks = vec![0; mark_bytes(x.len())];
    for (x, marks) in x.chunks(MARKED).zip(marks.as_chunks_mut::<RUN>().0) {
        for (bit, x) in x.chunks(RUN).enumerate() {
            marks.iter_mut().zip(x).for_each(|(marks, x)| *marks |= u8::from(*x != 0.0) << bit);
        }
    }
    marks
}

/// Sets values to zero that are not marked in a bit mask.
#[pulp::with_simd(keep_marked = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn keep_marked_simd<'a, S: Simd>(_simd: S, x: &'a mut [f32], marks: &'a [u8]) {
    let (xs, rest) = x.as_chunks_mut();
    let mut marks = marks.as_chunks().0.iter();
    for (x, marks) in xs.iter_mut().zip(&mut marks) {
        keep_block(x, marks);
    }
    if let Some(marks) = marks.next() {
        let mut x = [0.0; MARKED];
        x[..rest.len()].copy_from_slice(rest);
        keep_block(&mut x, marks);
        rest.copy_from_slice(&x[..rest.len()]);
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn keep_block(x: &mut [f32; MARKED], marks: &[u8; RUN]) {
    for bit in 0..8 {
        for j in 0..RUN {
            let x = &mut x[bit * RUN + j];
            *x = f32::from_bits(if marks[j] & 1 << bit != 0 { x.to_bits() } else { 0 });
        }
    }
}

/// Weights of a model's task vector in a sign election.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Voter {
    /// Bits of the smallest magnitude that counts; smaller values are treated as zero.
    pub(crate) least: u32,
    /// Factor in the sum that elects the sign.
    pub(crate) vote: f32,
    /// Factor in the sum of values with the elected sign.
    pub(crate) weight: f32,
    /// Contribution of a value with the elected sign to the divisor of the sum.
    pub(crate) share: f32,
}

/// Number of elements whose sums stay in registers during the loop over all models.
const ELECTED: usize = 32;

/// `base + lambda · Σ weight · x / Σ share` over the models for which `vote · x` has the sign of the sum of votes, or,
/// with `count`, of the sum of their signs. A sum of zero counts as positive, a divisor of zero as 1.
#[pulp::with_simd(elect = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn elect_simd<'a, S: Simd>(
    _simd: S,
    out: &'a mut [f32],
    base: &'a [f32],
    models: &'a [Vec<f32>],
    voters: &'a [Voter],
    count: bool,
    lambda: f32,
) {
    let (outs, rest) = out.as_chunks_mut();
    let whole = outs.len() * ELECTED;
    for (i, (out, base)) in outs.iter_mut().zip(base.as_chunks().0).enumerate() {
        let votes = models.iter().zip(voters).map(|(x, voter)| (&x.as_chunks().0[i], *voter));
        *out = elected(base, votes, count, lambda);
    }
    if !rest.is_empty() {
        let padded = |x: &[f32]| {
            let mut chunk = [0.0; ELECTED];
            chunk[..rest.len()].copy_from_slice(&x[whole..]);
            chunk
        };
        let ends: Vec<_> = models.iter().map(|x| padded(x)).collect();
        let merged = elected(&padded(base), ends.iter().zip(voters.iter().copied()), count, lambda);
        rest.copy_from_slice(&merged[..rest.len()]);
    }
}

#[inline(always)]
// With plain indices, all lanes stay in registers.
#[allow(clippy::needless_range_loop)]
fn elected<'x>(
    base: &[f32; ELECTED],
    models: impl Iterator<Item = (&'x [f32; ELECTED], Voter)> + Clone,
    count: bool,
    lambda: f32,
) -> [f32; ELECTED] {
    let kept = |x: f32, least: u32| f32::from_bits(if x.to_bits() & MAGNITUDE >= least { x.to_bits() } else { 0 });
    let mut signs = [0.0; ELECTED];
    for (x, voter) in models.clone() {
        for l in 0..ELECTED {
            let v = voter.vote * kept(x[l], voter.least);
            let sign = if v > 0.0 { 1.0 } else { 0.0 } - if v < 0.0 { 1.0 } else { 0.0 };
            signs[l] += if count { sign } else { v };
        }
    }
    let (mut sum, mut divisor) = ([0.0; ELECTED], [0.0; ELECTED]);
    for (x, voter) in models {
        for l in 0..ELECTED {
            let x = kept(x[l], voter.least);
            let v = voter.vote * x;
            let agrees = if signs[l] >= 0.0 { v > 0.0 } else { v < 0.0 };
            sum[l] += if agrees { voter.weight * x } else { 0.0 };
            divisor[l] += if agrees { voter.share } else { 0.0 };
        }
    }
    for l in 0..ELECTED {
        let d = if divisor[l] == 0.0 { 1.0 } else { divisor[l] };
        sum[l] = base[l] + sum[l] / d * lambda;
    }
    sum
}

/// Adds `weight · x` where the sign of `x` is the elected one (zero counts as positive), and `weight` to the divisor.
#[pulp::with_simd(add_elected = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn add_elected_simd<'a, S: Simd>(
    _simd: S,
    sum: &'a mut [f32],
    divisor: &'a mut [f32],
    elected: &'a [f32],
    x: &'a [f32],
    weight: f32,
) {
    for (((sum, divisor), elected), &x) in sum.iter_mut().zip(divisor.iter_mut()).zip(elected).zip(x) {
        let agrees = if *elected >= 0.0 { x > 0.0 } else { x < 0.0 };
        *sum += if agrees { weight * x } else { 0.0 };
        *divisor += if agrees { weight } else { 0.0 };
    }
}

/// Divides the sum, multiplies by `lambda` and adds the base.
#[pulp::with_simd(finish = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn finish_simd<'a, S: Simd>(_simd: S, sum: &'a mut [f32], divisor: f32, lambda: f32, base: &'a [f32]) {
    for (sum, base) in sum.iter_mut().zip(base) {
        *sum = base + *sum / divisor * lambda;
    }
}

/// Sum of the magnitudes of at most one piece, in many partial sums in f32, so that the error is that of a few
/// additions.
#[pulp::with_simd(sum_of_magnitudes = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn sum_of_magnitudes_simd<'a, S: Simd>(_simd: S, x: &'a [f32]) -> f64 {
    let mut sums = [0.0f32; RUN];
    for x in x.chunks(RUN) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x.abs();
        }
    }
    sums.iter().map(|&x| f64::from(x)).sum()
}

/// Inner product, in f64.
#[pulp::with_simd(dot = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn dot_simd<'a, S: Simd>(_simd: S, x: &'a [f32], y: &'a [f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    for (x, y) in xs.zip(ys) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += f64::from(*x) * f64::from(*y);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

/// `Σ coefficientᵢ · xᵢ`, summed in f64 and rounded once, so that a combination of equal vectors with coefficients that
/// sum to 1 is that vector.
#[pulp::with_simd(weighted_sum = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn weighted_sum_simd<'a, S: Simd>(
    _simd: S,
    out: &'a mut [f32],
    coefficients: &'a [f64],
    inputs: &'a [&'a [f32]],
) {
    let whole = out.len() / LANES * LANES;
    let (chunks, rest) = out.split_at_mut(whole);
    for (i, chunk) in chunks.chunks_exact_mut(LANES).enumerate() {
        // Adding a value to -0.0 returns it unchanged, including the sign of a zero.
        let mut lanes = [-0.0f64; LANES];
        for (c, x) in coefficients.iter().zip(inputs) {
            for (lane, x) in lanes.iter_mut().zip(&x[i * LANES..(i + 1) * LANES]) {
                *lane += c * f64::from(*x);
            }
        }
        for (out, lane) in chunk.iter_mut().zip(lanes) {
            *out = lane as f32;
        }
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = coefficients.iter().zip(inputs).map(|(c, x)| c * f64::from(x[whole + i])).sum::<f64>() as f32;
    }
}

/// Population variances over the inputs for each entry, as integers in the same order; 0 if all inputs are equal.
#[pulp::with_simd(variance_keys = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn variance_keys_simd<'a, S: Simd>(_simd: S, inputs: &'a [&'a [f32]], keys: &'a mut [u32]) {
    // In f64 a sum of equal f32 values is exact, and so is their mean.
    let n = inputs.len().max(1) as f64;
    for (i, keys) in keys.chunks_mut(LANES).enumerate() {
        let range = i * LANES..i * LANES + keys.len();
        let (mut means, mut squares) = ([0.0f64; LANES], [0.0f64; LANES]);
        for x in inputs {
            for (mean, x) in means.iter_mut().zip(&x[range.clone()]) {
                *mean += f64::from(*x);
            }
        }
        for mean in &mut means {
            *mean /= n;
        }
        for x in inputs {
            for ((square, mean), x) in squares.iter_mut().zip(&means).zip(&x[range.clone()]) {
                let d = f64::from(*x) - mean;
                *square += d * d;
            }
        }
        for (key, square) in keys.iter_mut().zip(squares) {
            *key = ((square / n) as f32).to_bits();
        }
    }
}

/// Replaces values by those of `x` that are larger in magnitude.
#[pulp::with_simd(take_greater = pulp::Arch::new())]
#[inline(always)]
pub(crate) fn take_greater_simd<'a, S: Simd>(_simd: S, greatest: &'a mut [f32], x: &'a [f32]) {
    for (greatest, x) in greatest.iter_mut().zip(x) {
        *greatest = if x.abs() > greatest.abs() { *x } else { *greatest };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even_and_reads_back() {
        let values = [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.0, f32::MAX];
        let mut bytes = [0; 10];
        f32_to_bf16(&values, &mut bytes);
        let mut back = [0.0; 5];
        let largest = read_bf16(&bytes, &mut back);
        assert_eq!(largest, f32::INFINITY.to_bits());
        let mut differences = [0.0; 5];
        read_bf16_minus(&bytes, &[1.0; 5], &mut differences);
        assert_eq!(differences[..4], [0.0, 0.0, 2.0 / 128.0, -1.0]);
        assert_eq!(back, [1.0, 1.0, 1.0 + 2.0 / 128.0, -0.0, f32::INFINITY]);
        assert_eq!(largest_key(&back), f32::INFINITY.to_bits());
        assert!(
            largest_key(&back[..4]) < f32::INFINITY.to_bits() && largest_key(&[f32::NAN]) > f32::INFINITY.to_bits()
        );
    }

    #[test]
    fn sums_hold_every_element_whatever_the_length() {
        for n in [0, 1, 15, 16, 17, 1000] {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            let magnitudes: f64 = x.iter().map(|v| f64::from(v.abs())).sum();
            assert_eq!(sum_of_magnitudes(&x), magnitudes);
            assert_eq!(dot(&x, &x), x.iter().map(|v| f64::from(v * v)).sum::<f64>());
        }
    }

    #[test]
    fn marks_keep_what_was_below_whatever_the_length() {
        for n in [0, 1, 63, 64, 65, 511, 512, 513, 1600] {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            let random: Vec<u16> = (0..n).map(|i| (i * 7919 % 1000) as u16).collect();
            let kept: Vec<f32> = x.iter().zip(&random).map(|(x, r)| if *r < 300 { *x } else { 0.0 }).collect();
            let magnitudes = |x: &[f32]| x.iter().map(|v| f64::from(v.abs())).sum::<f64>();
            let mut marks = vec![0xff; mark_bytes(n)];
            assert_eq!(mark_and_sum_below(&x, &random, 300, &mut marks), (magnitudes(&x), magnitudes(&kept)));
            let mut masked = x;
            keep_marked(&mut masked, &marks);
            assert_eq!(masked, kept);
        }
    }

    #[test]
    fn elections_are_held_over_every_element() {
        let voters = [0.5, 1.0, 2.0].map(|weight| Voter { least: 2.0f32.to_bits(), vote: 1.0, weight, share: 1.0 });
        for n in [0, 1, 31, 32, 33, 100] {
            let of = |values: [f32; 2]| (0..n).map(|i| values[i % 2]).collect::<Vec<f32>>();
            let models = [of([6.0, 1.0]), of([-2.0, -3.0]), of([-3.0, 3.0])];
            let mut out = vec![0.0; n];
            elect(&mut out, &vec![1.0; n], &models, &voters, false, 10.0);
            assert_eq!(out, of([31.0, 61.0]), "by sum: 6 of model 1; 3 of model 3, since 1 is too small");
            elect(&mut out, &vec![1.0; n], &models, &voters, true, 10.0);
            assert_eq!(out, of([-39.0, 61.0]), "by count: -2 and -6, halved");
        }
    }

    #[test]
    fn weighted_sums_and_variances_reach_every_element() {
        for n in [0, 1, 15, 16, 17, 50] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let y: Vec<f32> = (0..n).map(|i| 3.0 * i as f32).collect();
            let mut out = vec![f32::NAN; n];
            weighted_sum(&mut out, &[2.0, -0.5], &[&x, &y]);
            let expected: Vec<f32> = (0..n).map(|i| 0.5 * i as f32).collect();
            assert_eq!(out, expected);
            let mut keys = vec![7; n];
            variance_keys(&[&x, &y], &mut keys);
            let expected: Vec<u32> = (0..n).map(|i| ((i * i) as f32).to_bits()).collect();
            assert_eq!(keys, expected);
        }
    }
}
