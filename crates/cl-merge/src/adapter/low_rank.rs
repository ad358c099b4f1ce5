//! Decomposition of products of two thin matrices, without forming the product.
//!
//! With `L = Q₁R₁` and `R = Q₂R₂` (Householder, in f64), the product `L·Rᵀ` has the singular values of the small core
//! matrix `R₁·R₂ᵀ`, whose dimensions are at most the ranks; `Q₁` and `Q₂` map the core's singular vectors to those of
//! the product.

use cl_checkpoint::{Dtype, LayerKind, convert};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply,
};
use faer::linalg::solvers::Qr;
use faer::{Conj, Mat, MatRef, Par};

use super::update::Update;
use crate::Error;
use crate::methods::Undefined;

/// A low-rank matrix `ΔW = left · rightᵀ`.
pub(super) struct LowRank {
    /// Shape `(rows, rank)`.
    pub(super) left: Mat<f64>,
    /// Shape `(columns, rank)`.
    pub(super) right: Mat<f64>,
}

/// A truncated matrix, with the energy of the whole matrix and of the truncated part.
pub(super) struct Leading {
    /// `U√Σ` and `V√Σ`, so that both factors have the same scale.
    pub(super) factors: LowRank,
    /// Squared Frobenius norm of the whole matrix.
    pub(super) energy: f64,
    /// Squared Frobenius norm of the truncated part.
    pub(super) lost: f64,
}

impl LowRank {
    /// Returns `Σ factor · ΔW` by concatenating the factors; no entry of the sum is computed.
    pub(super) fn sum(shape: [usize; 2], parts: &[(f64, &Update)]) -> LowRank {
        let rank = parts.iter().map(|(_, update)| update.rank).sum();
        let (mut left, mut right) = (Mat::zeros(shape[0], rank), Mat::zeros(shape[1], rank));
        let mut column = 0;
        for (factor, update) in parts {
            for k in 0..update.rank {
                let rows = update.left.iter().skip(k).step_by(update.rank);
                left.col_as_slice_mut(column).iter_mut().zip(rows).for_each(|(to, x)| *to = factor * f64::from(*x));
                let columns = &update.right[k * shape[1]..(k + 1) * shape[1]];
                right.col_as_slice_mut(column).iter_mut().zip(columns).for_each(|(to, x)| *to = f64::from(*x));
                column += 1;
            }
        }
        LowRank { left, right }
    }

    /// Returns the update of one adapter, multiplied by `factor`.
    pub(super) fn of(factor: f64, update: &Update) -> LowRank {
        LowRank::sum(update.shape, &[(factor, update)])
    }

    /// Returns an upper bound on the rank: the number of columns of the factors.
    pub(super) fn rank(&self) -> usize {
        self.left.ncols()
    }

    /// Returns the squared Frobenius norm. Where large terms cancel, the result is accurate to 1e-16 relative to these
    /// terms.
    pub(super) fn energy(&self) -> f64 {
        self.inner(self).max(0.0)
    }

    /// Returns the inner product `⟨ΔW, ΔW'⟩`, the sum over products of entries.
    pub(super) fn inner(&self, other: &LowRank) -> f64 {
        let left = self.left.transpose() * &other.left;
        let right = self.right.transpose() * &other.right;
        (0..left.ncols()).map(|j| (0..left.nrows()).map(|i| left[(i, j)] * right[(i, j)]).sum::<f64>()).sum()
    }

    /// Returns `self − other`.
    pub(super) fn minus(&self, other: &LowRank) -> LowRank {
        let left = beside(self.left.as_ref(), (-1.0 * &other.left).as_ref());
        LowRank { left, right: beside(self.right.as_ref(), other.right.as_ref()) }
    }

    /// Returns the singular values in decreasing order.
    ///
    /// # Errors
    /// Returns [`Error::Undefined`] if they cannot be computed.
    pub(super) fn singular_values(&self, tensor: &str) -> Result<Vec<f64>, Error> {
        let core = self.left.qr().thin_R() * self.right.qr().thin_R().transpose();
        core.singular_values().map_err(|_| no_svd(tensor))
    }

    /// Returns the nearest matrix of at most the given rank (Eckart and Young 1936).
    ///
    /// # Errors
    /// Returns [`Error::Undefined`] if the decomposition cannot be computed.
    pub(super) fn leading(&self, rank: usize, tensor: &str) -> Result<Leading, Error> {
        let (left, right) = (self.left.qr(), self.right.qr());
        let core = left.thin_R() * right.thin_R().transpose();
        let svd = core.thin_svd().map_err(|_| no_svd(tensor))?;
        let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
        let rank = rank.min(values.len());
        let balanced = |q: &Qr<f64>, vectors: MatRef<'_, f64>| {
            let scaled = Mat::from_fn(vectors.nrows(), rank, |i, j| vectors[(i, j)] * values[j].sqrt());
            times(q, &scaled)
        };
        let factors = LowRank { left: balanced(&left, svd.U()), right: balanced(&right, svd.V()) };
        let squares = |values: &[f64]| values.iter().map(|s| s * s).sum::<f64>();
        Ok(Leading { factors, energy: squares(&values), lost: squares(&values[rank..]) })
    }

    /// Returns an orthonormal basis of the column space of `x`. Directions below 1e-6 of the largest are treated as
    /// rounding errors.
    pub(super) fn basis(x: &Mat<f64>, tensor: &str) -> Result<Mat<f64>, Error> {
        let qr = x.qr();
        let svd = qr.thin_R().thin_svd().map_err(|_| no_svd(tensor))?;
        let values = svd.S().column_vector();
        let largest = values.iter().copied().fold(0.0, f64::max);
        let rank = values.iter().take_while(|&&s| s > 1e-6 * largest).count();
        Ok(times(&qr, &svd.U().subcols(0, rank).to_owned()))
    }

    /// Converts to PEFT's factors in a dtype, and measures the squared norm of the rounding error.
    ///
    /// # Errors
    /// Returns [`Error::Overflow`] for values outside the range of the dtype.
    pub(super) fn encode(&self, module: &str, kind: LayerKind, dtype: Dtype) -> Result<Encoded, Error> {
        let (left, left_values) = (row_major(&self.left), &self.left);
        let right: Vec<f64> = (0..self.rank()).flat_map(|k| self.right.col_as_slice(k).iter().copied()).collect();
        let stored = |values: &[f64], factor: &str| {
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            let bytes = convert::from_f32(dtype, &values).expect("f32, f16 or bf16");
            let back = convert::to_f32(dtype, &bytes).expect("it was written as such");
            match back.iter().position(|v| !v.is_finite()) {
                None => Ok((bytes, back)),
                Some(index) => {
                    let tensor = format!("{module}, {factor}");
                    Err(Error::Overflow { tensor, index, value: values[index], dtype })
                }
            }
        };
        let rank = self.rank();
        let (rows, columns) = (self.left.nrows(), self.right.nrows());
        let ((a, b), [left_back, right_back]) = match kind {
            LayerKind::Linear => {
                let (b, left_back) = stored(&left, "lora_B")?;
                let (a, right_back) = stored(&right, "lora_A")?;
                (
                    (a, b),
                    [
                        Mat::from_fn(rows, rank, |i, k| left_back[i * rank + k].into()),
                        columns_of(&right_back, columns, rank),
                    ],
                )
            }
            LayerKind::Embedding => {
                let left: Vec<f64> = (0..rank).flat_map(|k| left_values.col_as_slice(k).iter().copied()).collect();
                let (a, left_back) = stored(&left, "lora_embedding_A")?;
                let (b, right_back) = stored(&row_major(&self.right), "lora_embedding_B")?;
                let right_back = Mat::from_fn(columns, rank, |i, k| right_back[i * rank + k].into());
                ((a, b), [columns_of(&left_back, rows, rank), right_back])
            }
        };
        Ok(Encoded { a, b, rank, changed: self.changed(left_back, right_back) })
    }

    /// Returns the squared norm of the change from rounding the factors: `(L − L̂)Rᵀ + L̂(R − R̂)ᵀ`, a form without
    /// cancellation of large terms.
    fn changed(&self, left: Mat<f64>, right: Mat<f64>) -> f64 {
        let (of_left, of_right) = (&self.left - &left, &self.right - &right);
        let none = |x: &Mat<f64>| x.norm_max() == 0.0;
        match (none(&of_left), none(&of_right)) {
            (true, true) => 0.0,
            (false, true) => LowRank { left: of_left, right }.energy(),
            (true, false) => LowRank { left, right: of_right }.energy(),
            (false, false) => {
                let left = beside(of_left.as_ref(), left.as_ref());
                LowRank { left, right: beside(self.right.as_ref(), of_right.as_ref()) }.energy()
            }
        }
    }
}

/// The encoded bytes of `lora_A` and `lora_B`.
pub(super) struct Encoded {
    pub(super) a: Vec<u8>,
    pub(super) b: Vec<u8>,
    pub(super) rank: usize,
    /// Squared norm of the rounding error.
    pub(super) changed: f64,
}

/// Computes `Q · x` without forming `Q`.
pub(super) fn times(qr: &Qr<f64>, x: &Mat<f64>) -> Mat<f64> {
    let (basis, coefficients) = (qr.Q_basis(), qr.Q_coeff());
    let mut out = Mat::zeros(basis.nrows(), x.ncols());
    out.subrows_mut(0, x.nrows()).copy_from(x);
    let scratch = apply_scratch::<f64>(basis.nrows(), coefficients.nrows(), x.ncols());
    let mut memory = MemBuffer::new(scratch);
    apply(basis, coefficients, Conj::No, out.as_mut(), Par::Seq, MemStack::new(&mut memory));
    out
}

/// Concatenates two matrices horizontally: `[x y]`.
fn beside(x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols() + y.ncols(), |i, j| if j < x.ncols() { x[(i, j)] } else { y[(i, j - x.ncols())] })
}

fn row_major(x: &Mat<f64>) -> Vec<f64> {
    (0..x.nrows()).flat_map(|i| (0..x.ncols()).map(move |j| x[(i, j)])).collect()
}

/// Converts column-major values to a matrix.
fn columns_of(values: &[f32], rows: usize, columns: usize) -> Mat<f64> {
    Mat::from_fn(rows, columns, |i, j| values[j * rows + i].into())
}

pub(super) fn no_svd(tensor: &str) -> Error {
    let kind = Undefined::NoSingularValues { merging: false };
    Error::Undefined { tensor: tensor.to_owned(), method: "low rank", kind }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Stream;

    /// Generates a random update.
    fn update(shape: [usize; 2], rank: usize, seed: u64) -> Update {
        let random = |n: usize, key: &str| {
            let mut words = vec![0; n];
            Stream::new(seed, "w", key).fill(0, &mut words);
            words.iter().map(|&w| f32::from(w) / 65_536.0 - 0.5).collect::<Vec<f32>>()
        };
        Update::new(LayerKind::Linear, shape, rank, random(rank * shape[1], "a"), random(shape[0] * rank, "b"))
    }

    fn product(x: &LowRank) -> Mat<f64> {
        &x.left * x.right.transpose()
    }

    /// The truncation error and energy agree with the singular values of the dense matrix (Eckart and Young).
    #[test]
    fn a_cut_loses_the_smallest_singular_values() {
        for (shape, ranks) in [([30, 20], [4, 3]), ([9, 40], [8, 7]), ([6, 5], [4, 4])] {
            let updates = [update(shape, ranks[0], 1), update(shape, ranks[1], 2)];
            let sum = LowRank::sum(shape, &[(0.5, &updates[0]), (-2.0, &updates[1])]);
            let dense = product(&sum);
            let expected = dense.singular_values().unwrap();
            let values = sum.singular_values("w").unwrap();
            assert!(values.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-12 * expected[0]), "{shape:?}");
            for rank in 1..=ranks[0] + ranks[1] {
                let cut = sum.leading(rank, "w").unwrap();
                let error = (&dense - product(&cut.factors)).norm_l2();
                let tail: f64 = expected.iter().skip(rank).map(|s| s * s).sum();
                assert!((error - tail.sqrt()).abs() < 1e-12 * expected[0], "{shape:?} {rank}: {error} {tail}");
                assert!((cut.lost - tail).abs() < 1e-12 * cut.energy);
                assert!((cut.energy - sum.energy()).abs() < 1e-12 * cut.energy);
                let balanced = cut.factors.left.col(0).norm_l2() / cut.factors.right.col(0).norm_l2();
                assert!((balanced - 1.0).abs() < 1e-9, "{balanced}");
            }
        }
    }

    #[test]
    fn inner_products_and_differences_are_those_of_dense_matrices() {
        let (x, y) = (LowRank::of(1.5, &update([12, 7], 3, 1)), LowRank::of(1.0, &update([12, 7], 5, 2)));
        let (dense_x, dense_y) = (product(&x), product(&y));
        let inner: f64 = (0..12).map(|i| (0..7).map(|j| dense_x[(i, j)] * dense_y[(i, j)]).sum::<f64>()).sum();
        assert!((x.inner(&y) - inner).abs() < 1e-12);
        assert!((x.minus(&y).energy().sqrt() - (&dense_x - &dense_y).norm_l2()).abs() < 1e-12);
        let rest: f64 = x.minus(&x).singular_values("w").unwrap().iter().sum();
        assert!(rest < 1e-14, "{rest}");
    }

    /// The reported rounding error is the actual one.
    #[test]
    fn encoded_factors_are_peft_s_with_their_error() {
        for kind in [LayerKind::Linear, LayerKind::Embedding] {
            let exact = LowRank::of(0.3, &update([10, 6], 3, 4));
            let encoded = exact.encode("m", kind, Dtype::BF16).unwrap();
            let read = |bytes: &[u8]| convert::to_f32(Dtype::BF16, bytes).unwrap();
            let back = LowRank::of(1.0, &Update::new(kind, [10, 6], 3, read(&encoded.a), read(&encoded.b)));
            let error = (product(&exact) - product(&back)).norm_l2();
            assert!((encoded.changed.sqrt() - error).abs() < 1e-12, "{kind:?} {error}");
            assert!(error > 1e-5 && error < 0.01 * exact.energy().sqrt(), "{error}");
        }
        let large = LowRank::of(1e30, &update([4, 4], 1, 1));
        assert!(large.encode("m", LayerKind::Linear, Dtype::F16).err().unwrap().to_string().contains("lora_B"));
    }

    #[test]
    fn a_basis_spans_what_is_there() {
        let x = update([9, 5], 2, 1);
        let twice = LowRank::sum([9, 5], &[(1.0, &x), (1.0, &x)]);
        let basis = LowRank::basis(&twice.left, "w").unwrap();
        assert_eq!((basis.nrows(), basis.ncols()), (9, 2));
        let off = &twice.left - &basis * (basis.transpose() * &twice.left);
        assert!(off.norm_l2() < 1e-14);
        assert_eq!(LowRank::basis(&Mat::zeros(9, 3), "w").unwrap().ncols(), 0);
    }
}
