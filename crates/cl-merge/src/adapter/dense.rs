//! The leading singular triplets of a dense matrix.
//!
//! Small matrices are decomposed exactly. For others a random subspace is improved by power iterations until the energy in it
//! stands still (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithms 4.4 and 5.1), from a fixed
//! seed and on one thread, so that results have the same bits for any number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::low_rank::{Leading, LowRank, no_svd, times};
use crate::Error;
use crate::tensor::Stream;

/// Up to this many rows or columns a decomposition is exact.
const EXACT: usize = 64;
/// Directions beside those that are asked for, at least.
const OVERSAMPLING: usize = 10;
/// Power iterations at most.
const ITERATIONS: usize = 40;
/// Where they stop: the change of the captured energy, relative.
const STILL: f64 = 1e-6;
/// Rows that are turned to f64 at a time.
const BLOCK: usize = 64;

/// A matrix of f32 values, row-major.
pub(super) struct Dense<'a> {
    pub(super) values: &'a [f32],
    pub(super) shape: [usize; 2],
}

/// Bytes held for a decomposition beside the matrix, estimated from above.
pub(super) fn scratch(shape: [usize; 2], rank: usize) -> usize {
    let [rows, columns] = shape;
    let sketch = width(shape, rank);
    8 * (4 * (rows + columns) * sketch + BLOCK * columns + 8 * sketch * sketch)
}

/// Directions that are followed.
fn width(shape: [usize; 2], rank: usize) -> usize {
    let short = shape[0].min(shape[1]);
    // A rank may be any number.
    let rank = rank.min(short);
    if short <= EXACT { short } else { (rank + OVERSAMPLING.max(rank)).min(short) }
}

impl Dense<'_> {
    /// The nearest matrix of at most this rank, up to what the iteration leaves.
    ///
    /// # Errors
    /// [`Error::Undefined`] where the decomposition cannot be computed.
    pub(super) fn leading(&self, rank: usize, tensor: &str) -> Result<Leading, Error> {
        let [rows, columns] = self.shape;
        let energy: f64 = self.values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let sketch = width(self.shape, rank);
        let (left, right) = if sketch == rows.min(columns) {
            // All of it: no subspace is to be found.
            let all = Mat::from_fn(rows, columns, |i, j| f64::from(self.values[i * columns + j]));
            if rows <= columns {
                (Mat::identity(rows, rows), all.transpose().to_owned())
            } else {
                (all, Mat::identity(columns, columns))
            }
        } else {
            self.range(sketch, rank, tensor)?
        };
        let leading = LowRank { left, right }.leading(rank, tensor)?;
        let kept = leading.energy - leading.lost;
        Ok(Leading { factors: leading.factors, energy, lost: (energy - kept).max(0.0) })
    }

    /// `Q` and `Aᵀ Q`, with `Q` orthonormal and close to the leading left singular vectors: `A ≈ Q (AᵀQ)ᵀ`.
    fn range(&self, sketch: usize, rank: usize, tensor: &str) -> Result<(Mat<f64>, Mat<f64>), Error> {
        let mut words = vec![0; self.shape[1] * sketch];
        Stream::new(0, tensor, "sketch").fill(0, &mut words);
        let mut subspace =
            Mat::from_fn(self.shape[1], sketch, |i, j| f64::from(words[j * self.shape[1] + i]) / 32_768.0 - 1.0);
        let mut before = 0.0;
        for iteration in 0.. {
            let q = orthonormal(&self.times(subspace.as_ref()));
            let image = self.transpose_times(q.as_ref());
            let qr = image.qr();
            let values = qr.thin_R().singular_values().map_err(|_| no_svd(tensor))?;
            let captured: f64 = values.iter().take(rank).map(|s| s * s).sum();
            if captured - before <= STILL * captured || iteration == ITERATIONS {
                return Ok((q, image));
            }
            before = captured;
            subspace = times(&qr, &Mat::identity(sketch, sketch));
        }
        unreachable!("the iteration ends at its limit")
    }

    /// `A x`, `(rows, n)`.
    fn times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(self.shape[0], x.ncols());
        self.blocks(|start, block| {
            matmul(out.subrows_mut(start, block.nrows()), Accum::Replace, block, x, 1.0, Par::Seq);
        });
        out
    }

    /// `Aᵀ x`, `(columns, n)`.
    fn transpose_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(self.shape[1], x.ncols());
        self.blocks(|start, block| {
            let x = x.subrows(start, block.nrows());
            matmul(out.as_mut(), Accum::Add, block.transpose(), x, 1.0, Par::Seq);
        });
        out
    }

    /// Calls `f` with some rows after the other, and the number of their first.
    fn blocks(&self, mut f: impl FnMut(usize, MatRef<'_, f64>)) {
        let columns = self.shape[1];
        let mut buffer = vec![0.0f64; BLOCK * columns];
        for (i, values) in self.values.chunks(BLOCK * columns).enumerate() {
            buffer.iter_mut().zip(values).for_each(|(to, &v)| *to = f64::from(v));
            let rows = values.len() / columns;
            f(i * BLOCK, MatRef::from_row_major_slice(&buffer[..values.len()], rows, columns));
        }
    }
}

fn orthonormal(x: &Mat<f64>) -> Mat<f64> {
    times(&x.qr(), &Mat::identity(x.ncols(), x.ncols()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that are uniform, plus a few directions that stand out.
    fn matrix(shape: [usize; 2], strength: f32) -> Vec<f32> {
        let random = |n: usize, key: &str| {
            let mut words = vec![0; n];
            Stream::new(3, "w", key).fill(0, &mut words);
            words.iter().map(|&w| f32::from(w) / 65_536.0 - 0.5).collect::<Vec<f32>>()
        };
        let (noise, u, v) = (random(shape[0] * shape[1], "n"), random(shape[0] * 3, "u"), random(shape[1] * 3, "v"));
        let entry = |i: usize, j: usize| (0..3).map(|k| u[3 * i + k] * v[3 * j + k]).sum::<f32>();
        (0..noise.len()).map(|n| noise[n] + strength * entry(n / shape[1], n % shape[1])).collect()
    }

    /// Also where nothing stands out of the noise, so that no gap helps.
    #[test]
    fn the_random_subspace_keeps_as_much_as_an_exact_decomposition() {
        for (shape, strength) in
            [([200, 150], 2.0), ([150, 200], 0.0), ([300, 70], 0.2), ([40, 90], 0.0), ([80, 65], 0.0)]
        {
            let values = matrix(shape, strength);
            let exact = Mat::from_fn(shape[0], shape[1], |i, j| f64::from(values[i * shape[1] + j]));
            let singular = exact.singular_values().unwrap();
            for rank in [1, 4, 16] {
                let cut = Dense { values: &values, shape }.leading(rank, "w").unwrap();
                let kept: f64 = singular.iter().take(rank).map(|s| s * s).sum();
                let relative = ((cut.energy - cut.lost) - kept) / kept;
                assert!(relative < 1e-9 && relative > -1e-5, "{shape:?} {rank}: {relative:e}");
                let error = (&exact - &cut.factors.left * cut.factors.right.transpose()).norm_l2();
                assert!((error - cut.lost.sqrt()).abs() < 1e-6 * error, "{shape:?} {rank}");
            }
        }
    }

    #[test]
    fn zeros_have_no_energy_and_small_ranks_are_found_whole() {
        let cut = Dense { values: &[0.0; 100 * 80], shape: [100, 80] }.leading(4, "w").unwrap();
        assert_eq!((cut.energy, cut.lost), (0.0, 0.0));
        assert!(cut.factors.left.norm_l2() == 0.0);
        let thin: Vec<f32> = (0..100 * 80).map(|n| ((n / 80) as f32).sin() * ((n % 80) as f32).cos()).collect();
        let cut = Dense { values: &thin, shape: [100, 80] }.leading(4, "w").unwrap();
        assert!(cut.lost < 1e-12 * cut.energy, "{} {}", cut.lost, cut.energy);
    }
}
