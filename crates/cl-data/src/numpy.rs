//! NumPy's legacy `RandomState`, bit for bit: the Mersenne Twister MT19937 and the shuffle based on it.
//!
//! Sources: Matsumoto and Nishimura, "Mersenne Twister" (1998), with the initialisation of 2002; NumPy's documentation
//! of its legacy generator, whose stream is frozen.

const N: usize = 624;
const M: usize = 397;

/// The generator of `numpy.random.RandomState(seed)`, and of Python's `random`.
#[derive(Clone)]
pub struct Mt19937 {
    state: [u32; N],
    next: usize,
}

impl Mt19937 {
    /// Seeds like `RandomState(seed)`, for a seed below 2³².
    pub fn new(seed: u32) -> Mt19937 {
        let mut state = [0u32; N];
        state[0] = seed;
        for i in 1..N {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Mt19937 { state, next: N }
    }

    /// Seeds with an array of words, like `RandomState([...])`; for the words of n, lowest first, also like Python's
    /// `Random(n)`.
    pub fn from_key(key: &[u32]) -> Mt19937 {
        let mut mt = Mt19937::new(19_650_218);
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            let before = mt.state[i - 1];
            mt.state[i] = (mt.state[i] ^ (before ^ (before >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            j += 1;
            if i >= N {
                mt.state[0] = mt.state[N - 1];
                i = 1;
            }
            if j >= key.len() {
                j = 0;
            }
        }
        for _ in 0..N - 1 {
            let before = mt.state[i - 1];
            mt.state[i] = (mt.state[i] ^ (before ^ (before >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i >= N {
                mt.state[0] = mt.state[N - 1];
                i = 1;
            }
        }
        mt.state[0] = 0x8000_0000;
        mt
    }

    /// Returns the next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// Draws a number in `0..=max` by masking and rejection, as in the legacy generator's shuffle.
    pub fn interval(&mut self, max: u64) -> u64 {
        if max == 0 {
            return 0;
        }
        let mask = u64::MAX >> max.leading_zeros();
        loop {
            let draw = if max <= u64::from(u32::MAX) {
                u64::from(self.next_u32())
            } else {
                let high = u64::from(self.next_u32());
                (high << 32) | u64::from(self.next_u32())
            };
            if draw & mask <= max {
                return draw & mask;
            }
        }
    }

    /// `RandomState.permutation(n)`.
    ///
    /// ```
    /// // numpy.random.RandomState(0).permutation(5) -> [2, 0, 1, 3, 4]
    /// assert_eq!(cl_data::numpy::Mt19937::new(0).permutation(5), [2, 0, 1, 3, 4]);
    /// ```
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        self.shuffle(&mut all);
        all
    }

    /// `RandomState.shuffle(values)`.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            let j = self.interval(i as u64) as usize;
            values.swap(i, j);
        }
    }
}

/// Creates `RandomState(seed)`; seeds above 32 bits, which NumPy rejects, are used as an array of words.
pub fn random_state(seed: u64) -> Mt19937 {
    match u32::try_from(seed) {
        Ok(small) => Mt19937::new(small),
        Err(_) => Mt19937::from_key(&[seed as u32, (seed >> 32) as u32]),
    }
}
