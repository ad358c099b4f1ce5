//! The leading singular triplets of a dense matrix.
//!
//! Small matrices, and those of which many triplets are requested, are decomposed exactly through the eigenvectors of
//! their smaller Gram matrix. For others, a random subspace is improved by power iterations until its energy stops
//! changing (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithms 4.4 and 5.1), with a
//! fixed seed. Everything runs on one thread, so that results have the same bits for any number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Side};

use super::low_rank::{Leading, LowRank, no_svd, times};
use crate::Error;
use crate::tensor::Stream;

/// Matrices with at most this many rows or columns are decomposed exactly.
const EXACT: usize = 64;
/// Minimum number of directions in addition to the requested ones.
const OVERSAMPLING: usize = 10;
/// If the subspace would have more than this fraction of all dimensions, a full decomposition is cheaper.
const MANY: f64 = 0.25;
/// Maximum number of power iterations.
const ITERATIONS: usize = 40;
/// Tolerance of convergence: relative change of the captured energy.
const STILL: f64 = 1e-6;
/// Number of rows converted to f64 at a time.
const BLOCK: usize = 64;

/// A matrix of f32 values, row-major.
pub(super) struct Dense<'a> {
    pub(super) values: &'a [f32],
    pub(super) shape: [usize; 2],
}

/// Returns an upper bound on the workspace memory of [`truncated_svd`] in bytes, without the matrix.
pub fn truncated_svd_scratch(shape: [usize; 2], rank: usize) -> usize {
    scratch(shape, rank)
}

/// Returns an upper bound on the workspace memory of a decomposition in bytes, without the matrix.
pub(super) fn scratch(shape: [usize; 2], rank: usize) -> usize {
    let [rows, columns] = shape;
    let sketch = width(shape, rank);
    let gram = if is_many(shape, sketch) { 8 * rows.min(columns).pow(2) } else { 0 };
    8 * (4 * (rows + columns) * sketch + BLOCK * rows.max(columns) + 8 * sketch * sketch + gram)
}

fn is_many(shape: [usize; 2], sketch: usize) -> bool {
    let short = shape[0].min(shape[1]);
    short > EXACT && sketch as f64 > MANY * short as f64
}

/// Returns the dimension of the random subspace.
fn width(shape: [usize; 2], rank: usize) -> usize {
    let short = shape[0].min(shape[1]);
    // The given rank may exceed the dimensions.
    let rank = rank.min(short);
    if short <= EXACT { short } else { (rank + OVERSAMPLING.max(rank)).min(short) }
}

/// The nearest matrix of at most a given rank: `uᵀ·v`.
pub struct Truncated {
    /// `(rank, rows)`, row-major: left singular vectors times the square roots of their singular values.
    pub u: Vec<f32>,
    /// `(rank, columns)`, row-major: right singular vectors times the square roots.
    pub v: Vec<f32>,
    /// Squared Frobenius norm of the matrix.
    pub energy: f64,
    /// Squared Frobenius norm of the truncated part.
    pub lost: f64,
}

/// Truncates a matrix `(rows, columns)`, row-major, to its `rank` largest singular values, or fewer if it has fewer;
/// decomposed in f64. `tensor` is its name in errors.
///
/// ```
/// let matrix = [3.0, 0.0, 0.0, 0.0, 2.0, 0.0]; // singular values 3 and 2
/// let cut = cl_merge::adapter::truncated_svd(&matrix, [2, 3], 1, "w")?;
/// assert!((cut.u[0] * cut.v[0] - 3.0).abs() < 1e-6 && (cut.lost - 4.0).abs() < 1e-9);
/// # Ok::<(), cl_merge::Error>(())
/// ```
///
/// # Errors
/// Returns [`Error::ValueCount`] if the shape has another number of elements, or [`Error::Undefined`] if the
/// decomposition does not converge.
pub fn truncated_svd(values: &[f32], shape: [usize; 2], rank: usize, tensor: &str) -> Result<Truncated, Error> {
    let (found, expected) = (values.len(), shape[0].saturating_mul(shape[1]));
    if found != expected {
        return Err(Error::ValueCount { model: None, tensor: tensor.to_owned(), found, expected });
    }
    let Leading { factors, energy, lost } = Dense { values, shape }.leading(rank, tensor)?;
    let rows = |x: &Mat<f64>| (0..x.ncols()).flat_map(|k| x.col_as_slice(k)).map(|&x| x as f32).collect();
    Ok(Truncated { u: rows(&factors.left), v: rows(&factors.right), energy, lost })
}

impl Dense<'_> {
    /// Returns the nearest matrix of at most the given rank, up to the error of the iteration.
    ///
    /// # Errors
    /// Returns [`Error::Undefined`] if the decomposition cannot be computed.
    pub(super) fn leading(&self, rank: usize, tensor: &str) -> Result<Leading, Error> {
        let [rows, columns] = self.shape;
        let energy: f64 = self.values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let sketch = width(self.shape, rank);
        if is_many(self.shape, sketch) {
            return self.leading_of_all(rank, energy, tensor);
        }
        let (left, right) = if sketch == rows.min(columns) {
            // The full rank is requested, so no subspace is needed.
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

    /// Decomposes through all eigenvectors of the smaller Gram matrix. Squaring loses singular values below 1e-8 of the
    /// largest, but these are below the precision of f32 values anyway.
    fn leading_of_all(&self, rank: usize, energy: f64, tensor: &str) -> Result<Leading, Error> {
        let [rows, columns] = self.shape;
        let short = rows.min(columns);
        let eigen = self.gram().self_adjoint_eigen(Side::Lower).map_err(|_| no_svd(tensor))?;
        let rank = rank.min(short);
        // Eigenvalues are in increasing order.
        let vectors = Mat::from_fn(short, rank, |i, k| eigen.U()[(i, short - 1 - k)]);
        let is_wide = rows <= columns;
        let image = if is_wide { self.transpose_times(vectors.as_ref()) } else { self.times(vectors.as_ref()) };
        let values: Vec<f64> = (0..rank).map(|k| image.col(k).norm_l2()).collect();
        let root = |k: usize| values[k].sqrt();
        let vectors = Mat::from_fn(short, rank, |i, k| vectors[(i, k)] * root(k));
        let inverse = |k: usize| if values[k] > 0.0 { 1.0 / root(k) } else { 0.0 };
        let image = Mat::from_fn(rows.max(columns), rank, |i, k| image[(i, k)] * inverse(k));
        let (left, right) = if is_wide { (vectors, image) } else { (image, vectors) };
        let kept: f64 = values.iter().map(|s| s * s).sum();
        Ok(Leading { factors: LowRank { left, right }, energy, lost: (energy - kept).max(0.0) })
    }

    /// Computes `A Aᵀ`, or `Aᵀ A` if that is smaller.
    fn gram(&self) -> Mat<f64> {
        let [rows, columns] = self.shape;
        let (short, long) = (rows.min(columns), rows.max(columns));
        let mut out = Mat::zeros(short, short);
        for start in (0..long).step_by(BLOCK) {
            let at = |i: usize, j: usize| if rows <= columns { i * columns + j } else { j * columns + i };
            let block = Mat::from_fn(short, BLOCK.min(long - start), |i, j| f64::from(self.values[at(i, start + j)]));
            matmul(out.as_mut(), Accum::Add, block.as_ref(), block.transpose(), 1.0, Par::Seq);
        }
        out
    }

    /// Computes `Q` and `Aᵀ Q`, with `Q` orthonormal and close to the leading left singular vectors: `A ≈ Q (AᵀQ)ᵀ`.
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

    /// Computes `A x`, of shape `(rows, n)`.
    fn times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(self.shape[0], x.ncols());
        self.blocks(|start, block| {
            matmul(out.subrows_mut(start, block.nrows()), Accum::Replace, block, x, 1.0, Par::Seq);
        });
        out
    }

    /// Computes `Aᵀ x`, of shape `(columns, n)`.
    fn transpose_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(self.shape[1], x.ncols());
        self.blocks(|start, block| {
            let x = x.subrows(start, block.nrows());
            matmul(out.as_mut(), Accum::Add, block.transpose(), x, 1.0, Par::Seq);
        });
        out
    }

    /// Calls `f` for consecutive blocks of rows, with the index of each block's first row.
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

    /// Generates uniform values plus a few dominant directions.
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

    /// The result is also accurate if no direction stands out from the noise, so that there is no spectral gap.
    #[test]
    fn the_random_subspace_keeps_as_much_as_an_exact_decomposition() {
        for (shape, strength) in
            [([200, 150], 2.0), ([150, 200], 0.0), ([300, 70], 0.2), ([40, 90], 0.0), ([80, 65], 0.0), ([70, 90], 0.5)]
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
        let cut = Dense { values: &[0.0; 100 * 80], shape: [100, 80] }.leading(40, "w").unwrap();
        assert!(cut.lost == 0.0 && cut.factors.left.norm_l2() == 0.0 && cut.factors.right.norm_l2() == 0.0);
        let thin: Vec<f32> = (0..100 * 80).map(|n| ((n / 80) as f32).sin() * ((n % 80) as f32).cos()).collect();
        let cut = Dense { values: &thin, shape: [100, 80] }.leading(4, "w").unwrap();
        assert!(cut.lost < 1e-12 * cut.energy, "{} {}", cut.lost, cut.energy);
    }
}
