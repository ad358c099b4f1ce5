use super::kernels;

/// The elements of a tensor that are kept, by magnitude.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trim {
    /// Key of the smallest value that is kept. A key is the bit pattern of a magnitude.
    pub threshold: u32,
    /// Elements exactly at the threshold are kept if they are before this flat index.
    pub ties_end: usize,
}

impl Trim {
    /// Keeps everything.
    pub const ALL: Trim = Trim { threshold: 0, ties_end: usize::MAX };
    /// Keeps nothing.
    pub const NONE: Trim = Trim { threshold: u32::MAX, ties_end: 0 };

    /// Whether an element is kept.
    pub fn keeps(&self, key: u32, index: usize) -> bool {
        key > self.threshold || (key == self.threshold && index < self.ties_end)
    }

    /// Returns the bits of the smallest magnitude to keep in `x`, which starts at flat index `start`. If kept ties end
    /// within `x`, values that are not kept are set to zero instead, and the result is 0.
    pub(crate) fn least(&self, start: usize, x: &mut [f32]) -> u32 {
        if start + x.len() <= self.ties_end {
            return self.threshold;
        }
        if start < self.ties_end {
            self.apply(start, x);
            return 0;
        }
        self.threshold.saturating_add(1)
    }

    /// Sets values that are not kept to zero; `x` starts at flat index `start`.
    pub fn apply(&self, start: usize, x: &mut [f32]) {
        let end = start + x.len();
        if end <= self.ties_end {
            return kernels::keep_from(x, self.threshold);
        }
        let (with_ties, without) = x.split_at_mut(self.ties_end.saturating_sub(start));
        kernels::keep_from(with_ties, self.threshold);
        kernels::keep_from(without, self.threshold.saturating_add(1));
    }
}

/// Number of elements to keep of `n`: `⌊density · n⌋`, but at least 1 if neither is zero.
pub(crate) fn kept(density: f64, n: usize) -> usize {
    match density {
        d if d >= 1.0 => n,
        d if d <= 0.0 || n == 0 => 0,
        d => ((d * n as f64) as usize).max(1),
    }
}
