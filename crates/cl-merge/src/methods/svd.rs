//! Singular vectors from the eigenvectors of the smaller Gram matrix, in f64.
//!
//! The eigenvalues of a Gram matrix are the squares of singular values. In f64, this is accurate down to [`TOLERANCE`]
//! times the largest singular value, which is also the limit of f32 inputs. Singular vectors of smaller singular values
//! are determined only by rounding errors, and are always dropped: a merge must not depend on them. Products with
//! singular vectors do not square anything, so methods that need all singular vectors use them in f32
//! ([`Algebra::triplets_f32`]), which takes half the time. Work is divided into blocks that do not depend on the number
//! of threads, so that results are bit-identical.

use std::borrow::Cow;
use std::ops::Range;

use faer::linalg::evd::EvdError;
use faer::linalg::matmul::matmul;
use faer::traits::ComplexField;
use faer::{Accum, Mat, MatMut, MatRef, Par, unzip, zip};
use rayon::prelude::*;

use super::eigen::Tridiagonal;
use super::method::{MergePieces, undefined};
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, kernels};

/// Singular values of at most this fraction of the largest one count as zero.
pub(super) const TOLERANCE: f64 = 1e-6;

/// Number of rows or columns that one thread processes at a time.
pub(super) const BLOCK: usize = 256;

/// Number of rows of a Gram matrix that are computed at a time: small, because entries above the diagonal are wasted
/// work.
const GRAM_BLOCK: usize = 128;

/// Range of the largest diagonal entry of a Gram matrix for which f32 can represent both it and a millionth of it.
const GRAM_RANGE: Range<f64> = 1e-20..1e30;

/// A Gram matrix in f32 is accurate enough for singular values down to this fraction of the largest: their squares are
/// a thousand times its error, which is about 1e-9 of the largest square in every direction.
const LEAST_IN_F32: f64 = 1e-3;

/// Minimum number of rows of a Gram matrix for computing only leading eigenvectors.
const FEW: usize = 32;

/// The merged task vector of a matrix, added to the base piece by piece: `θ = θ₀ + factor · values`.
pub(super) struct Step<'a> {
    pub(super) values: Cow<'a, [f32]>,
    pub(super) factor: f64,
}

impl MergePieces for Step<'_> {
    fn merge(&self, piece: &mut Piece, out: &mut [f32]) {
        let end = piece.start + out.len();
        out.copy_from_slice(&piece.base);
        kernels::add_scaled(out, self.factor as f32, &self.values[piece.start..end]);
    }
}

/// `θ = θ₀ + factor · Σ δᵢ`, piece by piece, for tensors that are not matrices.
pub(super) fn add_sum(factor: f64) -> impl MergePieces {
    move |piece: &mut Piece, out: &mut [f32]| {
        piece.subtract_base();
        out.copy_from_slice(&piece.base);
        for task_vector in &piece.models {
            kernels::add_scaled(out, factor as f32, task_vector);
        }
    }
}

/// Calls `f` with one task vector after the other, so that only one is in memory at a time.
pub(super) fn each_task_vector(
    group: &TensorGroup<'_>,
    mut f: impl FnMut(usize, &[f32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let base = group.load(group.base.as_ref().expect("Algebra::new has seen the base"))?;
    for (i, model) in group.models.iter().enumerate() {
        let mut values = group.load(model)?;
        kernels::subtract(&mut values, &base);
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            let (model, tensor, value) = (model.model().to_owned(), group.name.to_owned(), values[index]);
            return Err(Error::NotFinite { model, tensor, index, value });
        }
        f(i, &values)?;
    }
    Ok(())
}

/// Views the row-major values of a tensor as a matrix of its shape `(rows, columns)`.
pub(super) fn matrix<'a, T>(values: &'a [T], shape: &[usize]) -> MatRef<'a, T> {
    MatRef::from_row_major_slice(values, shape[0], shape[1])
}

/// Mutable version of [`matrix`].
pub(super) fn matrix_mut<'a, T>(values: &'a mut [T], shape: &[usize]) -> MatMut<'a, T> {
    MatMut::from_row_major_slice_mut(values, shape[0], shape[1])
}

/// Rounds each value to f32.
pub(super) fn rounded(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// Upper estimate of the workspace memory of [`Algebra::triplets`] and [`Algebra::polar`] in bytes, in addition to
/// arguments and results.
pub(super) fn scratch(rows: usize, columns: usize) -> usize {
    let short = rows.min(columns);
    // A Gram matrix, its eigenvectors and four times as much for the eigensolver; or blocks of operands.
    8 * (6 * short * short + 2 * BLOCK * (short + BLOCK))
}

/// Estimated work for a merge that decomposes this number of matrices, in units of the work for one element.
pub(super) fn cost(group: &TensorGroup<'_>, matrices: usize) -> f64 {
    let elements = (group.elements() * (group.models.len() + 1)) as f64;
    match matrix_shape(group) {
        Some([rows, columns]) => {
            elements + 0.1 * matrices as f64 * (rows.min(columns) as f64).powi(2) * (rows + columns) as f64
        }
        None => elements,
    }
}

/// Rows and columns of a matrix that these methods decompose; `None` for other tensors.
pub(super) fn matrix_shape(group: &TensorGroup<'_>) -> Option<[usize; 2]> {
    if group.is_matrix() { group.shape.try_into().ok() } else { None }
}

/// Leading singular triplets of `A = U diag(s) Vᵀ`, largest singular value first. Columns of `u` and `v` are determined
/// up to a common sign.
pub(super) struct Triplets<T = f64> {
    /// `(rows, k)`
    pub(super) u: Mat<T>,
    pub(super) s: Vec<f64>,
    /// `(columns, k)`
    pub(super) v: Mat<T>,
}

/// Element type of an operand.
pub(super) trait Real: Copy + Into<f64> + Send + Sync {}
impl Real for f32 {}
impl Real for f64 {}

/// Element type of singular vectors.
trait Entry: Copy {
    fn of(value: f64) -> Self;
}

impl Entry for f64 {
    fn of(value: f64) -> f64 {
        value
    }
}

impl Entry for f32 {
    fn of(value: f64) -> f32 {
        value as f32
    }
}

/// Matrix products and decompositions for one tensor.
pub(super) struct Algebra<'g> {
    tensor: &'g str,
    method: &'static str,
    parallel: bool,
}

impl<'g> Algebra<'g> {
    /// Returns an error if there is no base.
    pub(super) fn new(group: &TensorGroup<'g>, method: &'static str) -> Result<Algebra<'g>, Error> {
        if group.base.is_none() {
            return Err(undefined(group, method, Undefined::NoBase("works on task vectors")));
        }
        if group.models.is_empty() {
            return Err(undefined(group, method, Undefined::NoModels));
        }
        Ok(Algebra { tensor: group.name, method, parallel: group.parallel })
    }

    /// `out += factor · a b`.
    pub(super) fn add_product<B: Real>(&self, out: MatMut<'_, f64>, factor: f64, a: MatRef<'_, f64>, b: MatRef<'_, B>) {
        self.each(column_blocks(out), |(start, out)| {
            let b = in_f64(b.subcols(start, out.ncols()));
            matmul(out, Accum::Add, a, b.as_ref(), factor, Par::Seq);
        });
    }

    /// [`Algebra::add_product`] in f32.
    pub(super) fn add_product_f32(&self, out: MatMut<'_, f32>, factor: f32, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
        self.each(column_blocks(out), |(start, out)| {
            let b = b.subcols(start, out.ncols());
            matmul(out, Accum::Add, a, b, factor, Par::Seq);
        });
    }

    /// `a b` in f32.
    pub(super) fn product_f32(&self, a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Mat<f32> {
        let mut out = Mat::zeros(a.nrows(), b.ncols());
        self.add_product_f32(out.as_mut(), 1.0, a, b);
        out
    }

    /// `a b`.
    pub(super) fn product<B: Real>(&self, a: MatRef<'_, f64>, b: MatRef<'_, B>) -> Mat<f64> {
        let mut out = Mat::zeros(a.nrows(), b.ncols());
        self.add_product(out.as_mut(), 1.0, a, b);
        out
    }

    /// The lower triangle of `A Aᵀ`; entries above the diagonal must not be read.
    fn gram<B: Real>(&self, a: MatRef<'_, B>) -> Mat<f64> {
        let mut out = Mat::zeros(a.nrows(), a.nrows());
        for start in (0..a.ncols()).step_by(BLOCK) {
            let a = in_f64(a.subcols(start, BLOCK.min(a.ncols() - start)));
            self.each(row_blocks(out.as_mut()), |(first, block)| {
                let (rows, end) = (block.nrows(), first + block.nrows());
                let block = block.subcols_mut(0, end);
                matmul(block, Accum::Add, a.subrows(first, rows), a.subrows(0, end).transpose(), 1.0, Par::Seq);
            });
        }
        out
    }

    /// [`Algebra::gram`] with sums over [`BLOCK`] columns in f32, which takes half the time. Rounding errors are
    /// practically random, so they are small in every single direction.
    fn gram_f32(&self, a: MatRef<'_, f32>) -> Mat<f64> {
        let mut out = Mat::zeros(a.nrows(), a.nrows());
        self.each(row_blocks(out.as_mut()), |(first, block)| {
            let (rows, end) = (block.nrows(), first + block.nrows());
            let mut block = block.subcols_mut(0, end);
            let mut part = Mat::zeros(rows, end);
            for start in (0..a.ncols()).step_by(BLOCK) {
                let a = a.subcols(start, BLOCK.min(a.ncols() - start));
                let (left, right) = (a.subrows(first, rows), a.subrows(0, end).transpose());
                matmul(part.as_mut(), Accum::Replace, left, right, 1.0, Par::Seq);
                zip!(block.as_mut(), &part).for_each(|unzip!(sum, part)| *sum += f64::from(*part));
            }
        });
        out
    }

    /// Leading singular values and left singular vectors of `A`, computed by `roots` from the Gram matrix `A Aᵀ`: in
    /// f32 if that is accurate enough, otherwise in f64.
    fn roots_of<T>(
        &self,
        a: MatRef<'_, f32>,
        keep: usize,
        roots: impl Fn(Mat<f64>) -> Result<(Vec<f64>, T), Error>,
    ) -> Result<(Vec<f64>, T), Error> {
        // The full set of singular values of a nearly square matrix includes some near zero.
        let nearly_square = keep >= a.nrows() && a.ncols() < 2 * a.nrows();
        if a.nrows() >= FEW && !nearly_square {
            let gram = self.gram_f32(a);
            let largest = (0..gram.nrows()).map(|i| gram[(i, i)]).fold(0.0, f64::max);
            if GRAM_RANGE.contains(&largest) {
                let (s, vectors) = roots(gram)?;
                let exact = |last: &f64| *last >= LEAST_IN_F32 * s[0];
                if s.len() == keep.min(a.nrows()) && s.last().is_some_and(exact) {
                    return Ok((s, vectors));
                }
            }
        }
        roots(self.gram(a))
    }

    /// Square roots of the nonzero eigenvalues of a Gram matrix, largest first and at most `keep`, and the eigenvectors
    /// as columns.
    fn roots(&self, gram: Mat<f64>, keep: usize) -> Result<(Vec<f64>, Mat<f64>), Error> {
        let n = gram.nrows();
        if n == 0 {
            return Ok((Vec::new(), Mat::new()));
        }
        let form = Tridiagonal::new(gram);
        let few = n >= FEW && keep <= n / 2;
        let (roots, mut vectors) = match few.then(|| form.leading(keep)).flatten() {
            Some((values, vectors)) => {
                let roots = not_zero(values.into_iter());
                let kept = vectors.subcols(0, roots.len()).to_owned();
                (roots, kept)
            }
            None => self.all_roots(&form, keep)?,
        };
        form.turn(&mut vectors);
        Ok((roots, vectors))
    }

    /// Square roots as in [`Algebra::roots`], and the eigenvectors of the tridiagonal form.
    fn all_roots<T: Entry>(&self, form: &Tridiagonal, keep: usize) -> Result<(Vec<f64>, Mat<T>), Error> {
        let (values, vectors) = form.all().map_err(|error| self.no_convergence(error))?;
        let n = values.len();
        let roots = not_zero(values.into_iter().rev().take(keep));
        let vectors = Mat::from_fn(n, roots.len(), |i, j| T::of(vectors[(i, n - 1 - j)]));
        Ok((roots, vectors))
    }

    fn no_convergence(&self, _: EvdError) -> Error {
        let kind = Undefined::NoSingularValues { merging: true };
        Error::Undefined { tensor: self.tensor.to_owned(), method: self.method, kind }
    }

    /// The leading singular triplets, at most `keep`.
    pub(super) fn triplets<B: Real>(&self, a: MatRef<'_, B>, keep: usize) -> Result<Triplets, Error> {
        if a.nrows() > a.ncols() {
            let Triplets { u, s, v } = self.triplets(a.transpose(), keep)?;
            return Ok(Triplets { u: v, s, v: u });
        }
        let (mut s, u) = self.roots(self.gram(a), keep)?;
        let mut v = Mat::zeros(a.ncols(), s.len());
        self.add_product(v.as_mut().transpose_mut(), 1.0, u.transpose(), a);
        for (j, s) in s.iter_mut().enumerate() {
            // The norm is more accurate than the square root of the eigenvalue, which lost digits by squaring.
            *s = v.col(j).norm_l2();
            v.col_as_slice_mut(j).iter_mut().for_each(|v| *v /= *s);
        }
        Ok(Triplets { u, s, v })
    }

    /// [`Algebra::triplets`] of an f32 matrix with products in f32, which takes half the time.
    pub(super) fn leading(&self, a: MatRef<'_, f32>, keep: usize) -> Result<Triplets, Error> {
        if a.nrows() > a.ncols() {
            let Triplets { u, s, v } = self.leading(a.transpose(), keep)?;
            return Ok(Triplets { u: v, s, v: u });
        }
        if a.nrows() < FEW {
            return self.triplets(a, keep);
        }
        let (mut s, u) = self.roots_of(a, keep, |gram| self.roots(gram, keep))?;
        let single = Mat::from_fn(u.nrows(), u.ncols(), |i, j| u[(i, j)] as f32);
        let product = self.product_f32(a.transpose(), single.as_ref());
        let mut v = in_f64(product.as_ref());
        for (j, s) in s.iter_mut().enumerate() {
            *s = v.col(j).norm_l2();
            v.col_as_slice_mut(j).iter_mut().for_each(|v| *v /= *s);
        }
        Ok(Triplets { u, s, v })
    }

    /// All singular triplets, with vectors in f32.
    ///
    /// Eigenvalues, and the eigenvectors of the tridiagonal form, are computed in f64, so that vectors of neighbouring
    /// singular values do not mix; the remaining steps are products in f32, with an error of about 1e-7 of the largest
    /// singular value.
    pub(super) fn triplets_f32(&self, a: MatRef<'_, f32>) -> Result<Triplets<f32>, Error> {
        if a.nrows() > a.ncols() {
            let Triplets { u, s, v } = self.triplets_f32(a.transpose())?;
            return Ok(Triplets { u: v, s, v: u });
        }
        let (mut s, u) = self.roots_of(a, usize::MAX, |gram| {
            let form = Tridiagonal::new(gram);
            let (s, mut u) = self.all_roots::<f32>(&form, usize::MAX)?;
            form.turn_f32(&mut u);
            Ok((s, u))
        })?;
        let mut v = Mat::zeros(a.ncols(), s.len());
        self.add_product_f32(v.as_mut().transpose_mut(), 1.0, u.transpose(), a);
        for (j, s) in s.iter_mut().enumerate() {
            let norm = v.col_as_slice(j).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            // If values are too small for f32, their norm can be zero.
            *s = if norm > 0.0 { norm } else { *s };
            v.col_as_slice_mut(j).iter_mut().for_each(|v| *v = (f64::from(*v) / *s) as f32);
        }
        Ok(Triplets { u, s, v })
    }

    /// The polar factor `U Vᵀ` and the singular values of `A = U diag(s) Vᵀ`. On the range of `A`, `U Vᵀ` is the
    /// nearest matrix with orthonormal columns or rows (orthogonal Procrustes).
    pub(super) fn polar(&self, a: MatRef<'_, f64>) -> Result<(Mat<f64>, Vec<f64>), Error> {
        let wide = a.nrows() <= a.ncols();
        let (s, vectors) = self.roots(self.gram(if wide { a } else { a.transpose() }), usize::MAX)?;
        let scaled = Mat::from_fn(vectors.nrows(), s.len(), |i, j| vectors[(i, j)] / s[j]);
        let inverse_root = self.product(scaled.as_ref(), vectors.transpose());
        let factor = if wide { self.product(inverse_root.as_ref(), a) } else { self.product(a, inverse_root.as_ref()) };
        Ok((factor, s))
    }

    fn each<T: Send>(&self, items: Vec<T>, f: impl Fn(T) + Send + Sync) {
        if self.parallel {
            items.into_par_iter().for_each(f);
        } else {
            items.into_iter().for_each(f);
        }
    }
}

/// Square roots of the nonzero eigenvalues among `values`, which are sorted largest first.
fn not_zero(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let roots: Vec<f64> = values.map(|value| value.max(0.0).sqrt()).collect();
    let least = TOLERANCE * roots.first().copied().unwrap_or(0.0);
    roots.into_iter().take_while(|&root| root > least).collect()
}

/// Splits a matrix into blocks of [`GRAM_BLOCK`] rows, each with the index of its first row.
fn row_blocks(mut a: MatMut<'_, f64>) -> Vec<(usize, MatMut<'_, f64>)> {
    let mut blocks = Vec::new();
    let mut start = 0;
    while a.nrows() > GRAM_BLOCK {
        let (block, rest) = a.split_at_row_mut(GRAM_BLOCK);
        blocks.push((start, block));
        (a, start) = (rest, start + GRAM_BLOCK);
    }
    blocks.push((start, a));
    blocks
}

/// Splits a matrix into blocks of [`BLOCK`] columns, each with the index of its first column.
fn column_blocks<T: ComplexField>(mut a: MatMut<'_, T>) -> Vec<(usize, MatMut<'_, T>)> {
    let mut blocks = Vec::new();
    let mut start = 0;
    while a.ncols() > BLOCK {
        let (block, rest) = a.split_at_col_mut(BLOCK);
        blocks.push((start, block));
        (a, start) = (rest, start + BLOCK);
    }
    blocks.push((start, a));
    blocks
}

fn in_f64<B: Real>(a: MatRef<'_, B>) -> Mat<f64> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| a[(i, j)].into())
}

#[cfg(test)]
pub(super) mod testing {
    use crate::methods::{MergeMethod, merge_tensor};
    use crate::tensor::{TensorGroup, Values};

    /// Task vectors whose NumPy form is
    /// `i = np.arange(rows * columns); ((i * i * (t + 2) + 3 * i + t) % 11 - 5).reshape(rows, columns) / 8`.
    pub(in crate::methods) fn task_vectors(shape: [usize; 2], tasks: usize) -> Vec<Vec<f32>> {
        let value = |t: usize, i: usize| ((i * i * (t + 2) + 3 * i + t) % 11) as f32 / 8.0 - 0.625;
        (0..tasks).map(|t| (0..shape[0] * shape[1]).map(|i| value(t, i)).collect()).collect()
    }

    /// Random task vectors.
    pub(in crate::methods) fn random(shape: [usize; 2], tasks: usize, seed: u64) -> Vec<Vec<f32>> {
        let values = |t: usize| {
            let mut words = vec![0; shape[0] * shape[1]];
            crate::tensor::Stream::new(seed, "w", &t.to_string()).fill(0, &mut words);
            words.iter().map(|&w| f32::from(w) / 65_536.0 - 0.5).collect()
        };
        (0..tasks).map(values).collect()
    }

    /// `u vᵀ`, of rank one.
    pub(in crate::methods) fn outer(u: &[f32], v: &[f32]) -> Vec<f32> {
        u.iter().flat_map(|u| v.iter().map(move |v| u * v)).collect()
    }

    /// Calls `f` with models that are a base of zeros plus these task vectors.
    pub(in crate::methods) fn with_group<R>(
        shape: &[usize],
        task_vectors: &[Vec<f32>],
        parallel: bool,
        f: impl FnOnce(&TensorGroup<'_>) -> R,
    ) -> R {
        let base = vec![0.0; shape.iter().product()];
        let names: Vec<String> = (0..task_vectors.len()).map(|t| format!("model {t}")).collect();
        let models = names.iter().zip(task_vectors).map(|(name, x)| Values::from_slice(name, x)).collect();
        let base = Some(Values::from_slice("base", &base));
        f(&TensorGroup { parallel, ..TensorGroup::new("w", shape, base, models) })
    }

    pub(in crate::methods) fn merge(
        method: &dyn MergeMethod,
        shape: [usize; 2],
        task_vectors: &[Vec<f32>],
    ) -> Vec<f32> {
        with_group(&shape, task_vectors, false, |group| merge_tensor(method, group).unwrap())
    }

    /// Asserts that the largest difference is at most `tolerance` times the largest expected value.
    #[track_caller]
    pub(in crate::methods) fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(got.len(), expected.len());
        let scale = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let error = got.iter().zip(expected).fold(0.0f32, |most, (x, y)| most.max((x - y).abs()));
        assert!(error <= tolerance * scale, "differs by {error}:\n{got:?}\n{expected:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{assert_close, merge, outer, random, with_group};
    use super::*;
    use crate::methods::{
        Consensus, Divisor, IsoC, IsoCts, Knots, MergeMethod, Opcm, Projection, Rescale, Sign, Sparsify, TaskVectors,
        Tsv, merge_tensor,
    };
    use crate::tensor::PIECE;

    const ALGEBRA: Algebra<'_> = Algebra { tensor: "w", method: "test", parallel: false };

    fn difference(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
        (a - b).norm_max()
    }

    #[test]
    fn triplets_are_orthonormal_and_make_up_the_matrix() {
        for shape in [[1, 7], [5, 5], [40, 300], [300, 40], [270, 530]] {
            let values = &random(shape, 1, 3)[0];
            let a = matrix(values, &shape);
            let Triplets { u, s, v } = ALGEBRA.triplets(a, usize::MAX).unwrap();
            let k = shape[0].min(shape[1]);
            assert_eq!((s.len(), u.ncols(), v.ncols()), (k, k, k));
            assert!(s.is_sorted_by(|a, b| a >= b));
            let us = Mat::from_fn(shape[0], k, |i, j| u[(i, j)] * s[j]);
            assert!(difference(&(&us * v.transpose()), &in_f64(a)) < 1e-10, "{shape:?}");
            let eye = Mat::<f64>::identity(k, k);
            assert!(difference(&(u.transpose() * &u), &eye) < 1e-8, "{shape:?}");
            assert!(difference(&(v.transpose() * &v), &eye) < 1e-8, "{shape:?}");
            // The solver uses another algorithm for fewer triplets.
            let leading = ALGEBRA.triplets(a, 1).unwrap().s;
            assert!(leading.len() == 1 && (leading[0] / s[0] - 1.0).abs() < 1e-12, "{leading:?} {}", s[0]);
        }
    }

    #[test]
    fn directions_of_rounding_are_left_out() {
        let x = outer(&[1.0, -2.0, 0.5, 3.0], &[0.1, 0.7, -0.3]);
        assert_eq!(ALGEBRA.triplets(matrix(&x, &[4, 3]), 3).unwrap().s.len(), 1);
        assert_eq!(ALGEBRA.triplets(matrix(&[0.0f32; 12], &[4, 3]), 3).unwrap().s.len(), 0);
        let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let (polar, s) = ALGEBRA.polar(matrix(&x, &[4, 3])).unwrap();
        let scaled = Mat::from_fn(4, 3, |i, j| polar[(i, j)] * s[0]);
        assert!(difference(&scaled, &in_f64(matrix(&x, &[4, 3]))) < 1e-6);
        assert_eq!(ALGEBRA.polar(Mat::<f64>::zeros(4, 0).as_ref()).unwrap().0, Mat::<f64>::zeros(4, 0));
    }

    #[test]
    fn the_polar_factor_is_orthonormal_on_the_short_side() {
        for shape in [[30, 20], [20, 30], [260, 258]] {
            let x: Vec<f64> = random(shape, 1, 5)[0].iter().map(|&x| x.into()).collect();
            let (q, s) = ALGEBRA.polar(matrix(&x, &shape)).unwrap();
            let gram = if shape[0] > shape[1] { q.transpose() * &q } else { &q * q.transpose() };
            assert!(difference(&gram, &Mat::identity(s.len(), s.len())) < 1e-7, "{shape:?}");
            // Of all orthonormal matrices the polar factor has the largest inner product with the matrix: the sum of
            // its singular values.
            let inner: f64 = (0..shape[0] * shape[1]).map(|i| x[i] * q[(i / shape[1], i % shape[1])]).sum();
            assert!((inner - s.iter().sum::<f64>()).abs() < 1e-8 * inner, "{shape:?}");
        }
    }

    fn methods(models: usize) -> Vec<(&'static str, Box<dyn MergeMethod>)> {
        let ties = |density: f64| TaskVectors {
            weights: vec![1.0; models],
            lambda: 1.0,
            sparsify: Sparsify::Magnitude { density: vec![density; models] },
            rescale: Rescale::None,
            consensus: Some(Consensus { sign: Sign::Sum, weighted: false }),
            divisor: Divisor::Count,
            seed: 0,
        };
        let opcm = |projection| Opcm { alpha: 0.5, projection, previous: None, over_model: false, norms: None };
        vec![
            ("tsv", Box::new(Tsv { lambda: 1.0, rank_share: None })),
            ("tsv, all triplets", Box::new(Tsv { lambda: 1.0, rank_share: Some(1.0) })),
            ("iso_c", Box::new(IsoC { lambda: 1.0 })),
            ("iso_cts", Box::new(IsoCts { lambda: 1.0, common_share: 0.8 })),
            ("knots", Box::new(Knots { merge: ties(0.3), scaled: false })),
            ("knots, Σ V", Box::new(Knots { merge: ties(0.3), scaled: true })),
            ("knots, all", Box::new(Knots { merge: ties(1.0), scaled: false })),
            ("knots, none", Box::new(Knots { merge: ties(0.0), scaled: false })),
            ("opcm", Box::new(opcm(Projection::Leading))),
            ("opcm, complement", Box::new(opcm(Projection::Complement))),
        ]
    }

    #[test]
    fn whatever_the_task_vectors_merges_are_finite() {
        for shape in [[4, 6], [6, 4], [5, 5], [1, 9], [9, 1], [2, 2], [2, 300]] {
            let x = &random(shape, 1, 11)[0];
            let zero = vec![0.0; x.len()];
            let scaled = |factor: f32| x.iter().map(|x| x * factor).collect::<Vec<f32>>();
            let thin = outer(&x[..shape[0]], &x[..shape[1]]);
            let corner: Vec<f32> = (0..x.len()).map(|i| if i == 0 { 1.0 } else { 0.0 }).collect();
            let inputs = [
                vec![zero.clone()],
                vec![zero.clone(), zero.clone(), zero.clone()],
                vec![x.clone()],
                vec![x.clone(), x.clone(), x.clone()],
                vec![x.clone(), scaled(-1.0)],
                vec![x.clone(), scaled(1e-20), scaled(1e20)],
                vec![scaled(1e-38), scaled(1e-38)],
                vec![thin.clone(), thin.clone(), x.clone()],
                vec![thin.clone(), thin],
                vec![corner.clone(), zero.clone(), corner],
                random(shape, 8, 17),
            ];
            for (i, task_vectors) in inputs.iter().enumerate() {
                for (name, method) in methods(task_vectors.len()) {
                    let merged = merge(method.as_ref(), shape, task_vectors);
                    assert!(merged.iter().all(|v| v.is_finite()), "{name}, {shape:?}, input {i}: {merged:?}");
                    if task_vectors.iter().all(|x| *x == zero) {
                        assert_eq!(merged, zero, "{name}, {shape:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn one_model_is_merged_to_itself() {
        let shape = [12, 9];
        let model = random(shape, 1, 19);
        for (name, method) in methods(1) {
            // With a flattened spectrum or trimmed entries, the result differs from the model.
            if ["iso", "knots", "knots, Σ", "knots, n"].iter().any(|m| name.starts_with(m)) && name != "knots, all" {
                continue;
            }
            println!("{name}");
            assert_close(&merge(method.as_ref(), shape, &model), &model[0], 1e-6);
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let shape = [270, 300];
        assert!(shape[0] > BLOCK && shape[0] * shape[1] > PIECE);
        let task_vectors = random(shape, 3, 23);
        for (name, method) in methods(3) {
            let one = merge(method.as_ref(), shape, &task_vectors);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let merged = pool.install(|| {
                    with_group(&shape, &task_vectors, true, |group| merge_tensor(method.as_ref(), group).unwrap())
                });
                assert!(merged == one, "{name}, {threads} threads");
            }
        }
    }
}
