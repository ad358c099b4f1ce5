//! Random numbers by position: Philox4x32-7 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011,
//! according to which seven rounds pass all tests of BigCrush).
//!
//! A mask is a function of the seed, the tensor's name, the model's name and the flat index of the element, so it does
//! not depend on threads, shards, pieces or the order of models.

use pulp::Simd;

/// The random number stream of one tensor of one model.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: [u32; 2],
}

/// Number of counters that are processed together.
const WIDTH: usize = 16;
/// Number of even and of odd counters among them.
const LANES: usize = WIDTH / 2;
/// Number of random numbers from these counters: two of 16 bits from each of four words.
const GROUP: usize = 8 * WIDTH;
const ROUNDS: usize = 7;
const M0: u64 = 0xd251_1f53;
const M1: u64 = 0xcd9e_8d57;
/// Bit mask of the lower half of 64 bits.
const LOW: u64 = 0xffff_ffff;

impl Stream {
    /// The random number stream of a tensor of a model.
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
        // The length distinguishes ("ab", "c") from ("a", "bc").
        hasher.update(&seed.to_le_bytes()).update(&(tensor.len() as u64).to_le_bytes());
        hasher.update(tensor.as_bytes()).update(model.as_bytes());
        let hash = hasher.finalize();
        let word = |i: usize| u32::from_le_bytes(hash.as_bytes()[4 * i..4 * i + 4].try_into().expect("four bytes"));
        Stream { key: [word(0), word(1)] }
    }

    /// Fills `out` with the random numbers of the elements starting at flat index `start`, uniform over u16.
    ///
    /// Element `128 g + 32 w + 2 j + h` is half `h` (the lower half is 0) of word `w` of the block with counter
    /// `16 g + j`.
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

/// Fills `out`, whose length is a multiple of [`GROUP`], starting with group `group`.
///
/// Words of even and of odd counters are stored separately, each in the lower half of 64 bits, so that products need no
/// shuffling. Upper halves are masked only where they would affect the result.
#[pulp::with_simd(fill_groups = pulp::Arch::new())]
#[inline(always)]
// The macro requires named lifetimes; with plain indices, all lanes are compiled to one instruction.
#[allow(clippy::needless_lifetimes, clippy::needless_range_loop)]
fn fill_groups_simd<'a, S: Simd>(_simd: S, key: [u32; 2], group: u64, out: &'a mut [u16]) {
    for (i, words) in out.chunks_exact_mut(GROUP).enumerate() {
        let first = (group + i as u64) * WIDTH as u64;
        let even = blocks(first, key);
        let odd = blocks(first + 1, key);
        for w in 0..4 {
            let words = &mut words[2 * WIDTH * w..2 * WIDTH * (w + 1)];
            for l in 0..LANES {
                let pair = (even[w][l] & LOW) | odd[w][l] << 32;
                words[4 * l] = pair as u16;
                words[4 * l + 1] = (pair >> 16) as u16;
                words[4 * l + 2] = (pair >> 32) as u16;
                words[4 * l + 3] = (pair >> 48) as u16;
            }
        }
    }
}

/// The blocks of every second counter, starting at `first`. Only the lower halves of the words are valid.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn blocks(first: u64, key: [u32; 2]) -> [[u64; LANES]; 4] {
    let mut c = [[0u64; LANES]; 4];
    for l in 0..LANES {
        // WIDTH divides 2³², so that the lower half does not overflow within a group.
        c[0][l] = first + 2 * l as u64;
        c[1][l] = first >> 32;
    }
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        for l in 0..LANES {
            let (p0, p1) = (M0 * (c[0][l] & LOW), M1 * (c[2][l] & LOW));
            c[0][l] = p1 >> 32 ^ c[1][l] ^ u64::from(k0);
            c[1][l] = p1;
            c[2][l] = p0 >> 32 ^ c[3][l] ^ u64::from(k1);
            c[3][l] = p0;
        }
        (k0, k1) = (k0.wrapping_add(0x9e37_79b9), k1.wrapping_add(0xbb67_ae85));
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known result of seven rounds for a counter and a key of zeros, from the Random123 library's `kat_vectors`.
    #[test]
    fn known_answer() {
        let mut out = [0; GROUP];
        fill_groups([0, 0], 0, &mut out);
        let word = |w: usize| u32::from(out[2 * w * WIDTH + 1]) << 16 | u32::from(out[2 * w * WIDTH]);
        assert_eq!([0, 1, 2, 3].map(word), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
    }

    /// Compares with the definition, one counter at a time.
    #[test]
    fn every_element_has_its_half_of_a_word() {
        let key = [0x243f_6a88, 0x85a3_08d3];
        let block = |counter: u64| {
            let mut c = [counter as u32, (counter >> 32) as u32, 0, 0];
            let mut k = key;
            for _ in 0..ROUNDS {
                let (p0, p1) = (M0 * u64::from(c[0]), M1 * u64::from(c[2]));
                c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
                k = [k[0].wrapping_add(0x9e37_79b9), k[1].wrapping_add(0xbb67_ae85)];
            }
            c
        };
        for group in [0, 1, (1 << 28) - 1, 1 << 28] {
            let mut out = [0; GROUP];
            fill_groups(key, group, &mut out);
            for (i, number) in out.into_iter().enumerate() {
                let (w, j, h) = (i / 32, i % 32 / 2, i % 2);
                let word = block(16 * group + j as u64)[w];
                assert_eq!(number, (word >> (16 * h)) as u16, "{group} {i}");
            }
        }
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
