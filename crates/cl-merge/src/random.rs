//! Random numbers by position: Philox4x32-7 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, which
//! finds seven rounds to pass all tests of BigCrush).
//!
//! A mask is a function of the seed, the tensor's name, the model's name and the flat index of the element, so it does not
//! depend on threads, shards, pieces or the order of models.

use pulp::Simd;

/// The random numbers of one tensor of one model.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: [u32; 2],
}

/// Counters worked on side by side.
const WIDTH: usize = 16;
/// Numbers that these give: two of 16 bits from each of four words.
const GROUP: usize = 8 * WIDTH;
const ROUNDS: usize = 7;

impl Stream {
    /// The stream of a tensor of a model.
    ///
    /// ```
    /// use cl_merge::Stream;
    /// let stream = Stream::new(42, "model.norm.weight", "first");
    /// let (mut all, mut part) = ([0; 100], [0; 10]);
    /// stream.fill(0, &mut all);
    /// stream.fill(37, &mut part);
    /// assert_eq!(all[37..47], part);
    /// ```
    pub fn new(seed: u64, tensor: &str, model: &str) -> Stream {
        let mut hasher = blake3::Hasher::new();
        // Lengths keep ("ab", "c") apart from ("a", "bc").
        hasher.update(&seed.to_le_bytes()).update(&(tensor.len() as u64).to_le_bytes());
        hasher.update(tensor.as_bytes()).update(model.as_bytes());
        let hash = hasher.finalize();
        let word = |i: usize| u32::from_le_bytes(hash.as_bytes()[4 * i..4 * i + 4].try_into().expect("four bytes"));
        Stream { key: [word(0), word(1)] }
    }

    /// The numbers of the elements from flat index `start` on, uniform over all of u16.
    ///
    /// Element `128 g + 32 w + j` takes the lower half of word `w` of the block with counter `16 g + j`, for `j` below 16, and
    /// the upper half of that with counter `16 g + j − 16` above.
    pub fn fill(&self, start: usize, out: &mut [u16]) {
        let mut group = (start / GROUP) as u64;
        let skip = start % GROUP;
        let mut words = [0; GROUP];
        let (head, body) = out.split_at_mut(if skip == 0 { 0 } else { (GROUP - skip).min(out.len()) });
        if !head.is_empty() {
            fill_groups(self.key, group, &mut words);
            head.copy_from_slice(&words[skip..skip + head.len()]);
            group += 1;
        }
        let whole = body.len() / GROUP * GROUP;
        let (body, tail) = body.split_at_mut(whole);
        fill_groups(self.key, group, body);
        if !tail.is_empty() {
            fill_groups(self.key, group + (whole / GROUP) as u64, &mut words);
            tail.copy_from_slice(&words[..tail.len()]);
        }
    }
}

/// Fills `out`, a multiple of [`GROUP`] numbers, from a group on.
#[pulp::with_simd(fill_groups = pulp::Arch::new())]
#[inline(always)]
// The macro needs its lifetimes named, and over plain indices all lanes become one instruction.
#[allow(clippy::needless_lifetimes, clippy::needless_range_loop)]
fn fill_groups_simd<'a, S: Simd>(_simd: S, key: [u32; 2], group: u64, out: &'a mut [u16]) {
    const M0: u64 = 0xd251_1f53;
    const M1: u64 = 0xcd9e_8d57;
    for (i, words) in out.chunks_exact_mut(GROUP).enumerate() {
        let first = (group + i as u64) * WIDTH as u64;
        let mut c = [[0u32; WIDTH]; 4];
        for j in 0..WIDTH {
            // WIDTH divides 2³², so that the lower half does not overflow within a group.
            c[0][j] = first as u32 + j as u32;
            c[1][j] = (first >> 32) as u32;
        }
        let [mut k0, mut k1] = key;
        for _ in 0..ROUNDS {
            for j in 0..WIDTH {
                let (p0, p1) = (M0 * u64::from(c[0][j]), M1 * u64::from(c[2][j]));
                c[0][j] = (p1 >> 32) as u32 ^ c[1][j] ^ k0;
                c[1][j] = p1 as u32;
                c[2][j] = (p0 >> 32) as u32 ^ c[3][j] ^ k1;
                c[3][j] = p0 as u32;
            }
            (k0, k1) = (k0.wrapping_add(0x9e37_79b9), k1.wrapping_add(0xbb67_ae85));
        }
        for (halves, c) in words.chunks_exact_mut(2 * WIDTH).zip(&c) {
            for j in 0..WIDTH {
                halves[j] = c[j] as u16;
                halves[WIDTH + j] = (c[j] >> 16) as u16;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answer of seven rounds for a counter and a key of zeros, from the Random123 library's `kat_vectors`.
    #[test]
    fn known_answer() {
        let mut out = [0; GROUP];
        fill_groups([0, 0], 0, &mut out);
        let word = |w: usize| u32::from(out[2 * w * WIDTH + WIDTH]) << 16 | u32::from(out[2 * w * WIDTH]);
        assert_eq!([0, 1, 2, 3].map(word), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
    }

    #[test]
    fn any_part_is_the_same_as_the_whole() {
        let stream = Stream::new(7, "w", "m");
        let mut all = vec![0; 500];
        stream.fill(0, &mut all);
        for (start, len) in [
            (0, 1),
            (1, 2),
            (3, 1),
            (3, 200),
            (130, 64),
            (64, 64),
            (128, 128),
            (128, 300),
            (120, 150),
            (499, 1),
            (5, 0),
        ] {
            let mut part = vec![0; len];
            stream.fill(start, &mut part);
            assert_eq!(part, all[start..start + len], "{start} {len}");
        }
    }

    #[test]
    fn streams_differ_and_are_uniform() {
        let mean = |stream: Stream| {
            let mut out = vec![0u16; 1 << 16];
            stream.fill(0, &mut out);
            out.iter().map(|&v| f64::from(v)).sum::<f64>() / f64::from(u16::MAX) / 65536.0
        };
        let streams =
            [(1, "a", "b"), (2, "a", "b"), (1, "ab", ""), (1, "a", "c")].map(|(s, t, m)| Stream::new(s, t, m));
        let means = streams.map(mean);
        for (i, m) in means.iter().enumerate() {
            // The mean of 65,536 uniform numbers has a standard deviation of 0.0011.
            assert!((m - 0.5).abs() < 0.006, "{means:?}");
            assert!(means[..i].iter().all(|other| other != m));
        }
    }
}
