//! Eigenvectors of a symmetric matrix, in f64: all of them, or only the leading ones, which takes half the time.
//!
//! Both start with a reduction to tridiagonal form. All of its eigenvectors are computed by faer's divide-and-conquer
//! algorithm, leading ones by bisection and inverse iteration (Golub and Van Loan, "Matrix Computations", 8.4 and
//! 8.2.2).

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::tridiag::{tridiag_in_place, tridiag_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, EvdError, self_adjoint_evd_scratch, tridiagonal_self_adjoint_evd};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::qr::no_pivoting::factor::recommended_block_size;
use faer::traits::ComplexField;
use faer::{Col, Conj, Mat, MatRef, Par};
use pulp::Simd;

/// Number of eigenvalues that are bisected together, in SIMD lanes.
const LANES: usize = 16;
/// Eigenvectors of consecutive eigenvalues that are closer than this fraction of the matrix norm are orthogonalized
/// against each other.
const NEAR: f64 = 1e-3;
/// Tolerance for the residuals and the orthonormality of eigenvectors from inverse iteration.
const ERROR: f64 = 1e-11;

/// Tridiagonal reduction `G = Q T Qᵀ` of a symmetric matrix, with an orthogonal `Q` and a tridiagonal `T`.
pub(super) struct Tridiagonal {
    /// Householder vectors of `Q`, below the subdiagonal.
    reflectors: Mat<f64>,
    /// Triangular factors of the blocks of Householder reflections.
    factors: Mat<f64>,
    diagonal: Vec<f64>,
    /// Off-diagonal of `T`, followed by a zero.
    beside: Vec<f64>,
}

/// Eigenvalues and, in the columns of a matrix, their eigenvectors.
pub(super) type Eigen = (Vec<f64>, Mat<f64>);

impl Tridiagonal {
    /// Reduces a non-empty symmetric matrix; only its lower triangle is read.
    pub(super) fn new(mut a: Mat<f64>) -> Tridiagonal {
        let n = a.nrows();
        let mut factors = Mat::zeros(recommended_block_size::<f64>(n, n), n - 1);
        let mut memory = MemBuffer::new(tridiag_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
        tridiag_in_place(a.as_mut(), factors.as_mut(), Par::Seq, MemStack::new(&mut memory), Default::default());
        let diagonal = (0..n).map(|i| a[(i, i)]).collect();
        let beside = (0..n).map(|i| if i + 1 < n { a[(i + 1, i)] } else { 0.0 }).collect();
        Tridiagonal { reflectors: a, factors, diagonal, beside }
    }

    /// All eigenvalues of `T`, smallest first, and its eigenvectors.
    pub(super) fn all(&self) -> Result<Eigen, EvdError> {
        let n = self.diagonal.len();
        let column = |values: &[f64]| Col::from_fn(n, |i| values[i]);
        let (diagonal, beside) = (column(&self.diagonal), column(&self.beside));
        let (mut values, mut vectors) = (Col::zeros(n), Mat::zeros(n, n));
        // The workspace memory for decomposing a whole matrix is more than enough.
        let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default());
        let mut memory = MemBuffer::new(scratch);
        tridiagonal_self_adjoint_evd(
            diagonal.as_diagonal(),
            beside.as_diagonal(),
            values.as_diagonal_mut(),
            Some(vectors.as_mut()),
            Par::Seq,
            MemStack::new(&mut memory),
            Default::default(),
        )?;
        Ok((values.iter().copied().collect(), vectors))
    }

    /// The `k` largest eigenvalues of `T`, largest first, and their eigenvectors; `None` if inverse iteration does not
    /// find them or they are not orthonormal.
    pub(super) fn leading(&self, k: usize) -> Option<Eigen> {
        let n = self.diagonal.len();
        let reach = |i: usize| {
            self.diagonal[i].abs() + self.beside[i].abs() + if i > 0 { self.beside[i - 1].abs() } else { 0.0 }
        };
        let norm = (0..n).map(reach).fold(0.0, f64::max);
        if !(norm > 0.0 && norm.is_finite()) {
            return None;
        }
        let scaled = |values: &[f64]| values.iter().map(|v| v / norm).collect::<Vec<f64>>();
        let (diagonal, beside) = (scaled(&self.diagonal), scaled(&self.beside));
        let near = largest_values(&diagonal, &beside, k);
        let mut values = Vec::with_capacity(k);
        let mut vectors = Mat::<f64>::zeros(n, k);
        let mut cluster = 0;
        for j in 0..k {
            if j > 0 && near[j - 1] - near[j] > NEAR {
                cluster = j;
            }
            let shifted = Shifted::new(&diagonal, &beside, near[j]);
            let mut x = start(n, j);
            for _ in 0..3 {
                shifted.solve(&mut x);
                (cluster..j).for_each(|other| subtract_projection(&mut x, vectors.col_as_slice(other)));
                let length = x.iter().map(|x| x * x).sum::<f64>().sqrt();
                x.iter_mut().for_each(|x| *x /= length);
            }
            vectors.col_as_slice_mut(j).copy_from_slice(&x);
            values.push(rayleigh(&diagonal, &beside, &x));
        }
        accurate(&diagonal, &beside, &values, &vectors).then(|| (values.iter().map(|v| v * norm).collect(), vectors))
    }

    /// Computes `Q X`: turns eigenvectors of `T` into those of `G`.
    pub(super) fn turn(&self, vectors: &mut Mat<f64>) {
        turn(self.reflectors.as_ref(), self.factors.as_ref(), vectors);
    }

    /// [`Tridiagonal::turn`] in f32. Householder reflections do not amplify the rounding errors of the vectors.
    pub(super) fn turn_f32(&self, vectors: &mut Mat<f32>) {
        let single = |a: &Mat<f64>| Mat::from_fn(a.nrows(), a.ncols(), |i, j| a[(i, j)] as f32);
        turn(single(&self.reflectors).as_ref(), single(&self.factors).as_ref(), vectors);
    }
}

fn turn<T: ComplexField>(reflectors: MatRef<'_, T>, factors: MatRef<'_, T>, vectors: &mut Mat<T>) {
    let (n, k) = (vectors.nrows(), vectors.ncols());
    if n < 2 || k == 0 {
        return;
    }
    let scratch = apply_block_householder_sequence_on_the_left_in_place_scratch::<T>(n - 1, factors.nrows(), k);
    apply_block_householder_sequence_on_the_left_in_place_with_conj(
        reflectors.submatrix(1, 0, n - 1, n - 1),
        factors,
        Conj::No,
        vectors.as_mut().subrows_mut(1, n - 1),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
}

/// The `k` largest eigenvalues of a tridiagonal matrix whose norm is 1, largest first.
fn largest_values(diagonal: &[f64], beside: &[f64], k: usize) -> Vec<f64> {
    let n = diagonal.len();
    let squares: Vec<f64> = std::iter::once(0.0).chain(beside[..n - 1].iter().map(|b| b * b)).collect();
    let mut values = Vec::with_capacity(k);
    for first in (0..k).step_by(LANES) {
        let (mut low, mut high) = ([-1.0; LANES], [1.0; LANES]);
        // Bisects to within 2⁻⁴². From there, each step of inverse iteration gains ten digits, and the eigenvalue is
        // then computed to full precision from the eigenvector.
        for _ in 0..43 {
            let middle: [f64; LANES] = std::array::from_fn(|l| 0.5 * (low[l] + high[l]));
            let mut below = [0.0; LANES];
            count_below(diagonal, &squares, &middle, &mut below);
            for l in 0..LANES {
                // If more than n - 1 - j eigenvalues are below the middle, the j-th largest is one of them.
                let place = n as f64 - 1.0 - (first + l) as f64;
                if below[l] > place {
                    high[l] = middle[l];
                } else {
                    low[l] = middle[l];
                }
            }
        }
        values.extend((0..LANES.min(k - first)).map(|l| 0.5 * (low[l] + high[l])));
    }
    values
}

/// The Rayleigh quotient `xᵀ T x` of a vector of length 1; its error is the square of the vector's error.
fn rayleigh(diagonal: &[f64], beside: &[f64], x: &[f64]) -> f64 {
    let next = x[1..].iter().copied().chain([0.0]);
    diagonal.iter().zip(beside).zip(x).zip(next).map(|(((d, b), x), next)| x * (d * x + 2.0 * b * next)).sum()
}

/// Counts the eigenvalues below each `x`, which are as many as the negative pivots of `T - x` (Sylvester's law of
/// inertia).
#[pulp::with_simd(count_below = pulp::Arch::new())]
#[inline(always)]
// The macro requires named lifetimes; with plain indices, all lanes are compiled to one instruction.
#[allow(clippy::needless_lifetimes, clippy::needless_range_loop)]
fn count_below_simd<'a, S: Simd>(
    _simd: S,
    diagonal: &'a [f64],
    squares: &'a [f64],
    x: &'a [f64; LANES],
    below: &'a mut [f64; LANES],
) {
    let (x, mut counts, mut pivots) = (*x, [0.0; LANES], [1.0; LANES]);
    for (d, square) in diagonal.iter().zip(squares) {
        for l in 0..LANES {
            let pivot = d - x[l] - square / pivots[l];
            // Squares are at most 1, so dividing one by this does not overflow.
            let pivot = if pivot.abs() < 1e-300 { -1e-300 } else { pivot };
            counts[l] += if pivot < 0.0 { 1.0 } else { 0.0 };
            pivots[l] = pivot;
        }
    }
    *below = counts;
}

/// LU decomposition of `T - x` with partial pivoting, for solving linear systems.
struct Shifted {
    /// Rows of `U`: the diagonal entry and the two to its right.
    upper: Vec<[f64; 3]>,
    /// For each elimination step, the multiplier and whether rows were exchanged.
    steps: Vec<(f64, bool)>,
}

impl Shifted {
    fn new(diagonal: &[f64], beside: &[f64], x: f64) -> Shifted {
        let n = diagonal.len();
        // Pivots near zero are replaced by the size of a rounding error, relative to the norm of 1.
        let pivot = |a: f64| if a.abs() < f64::EPSILON { f64::EPSILON } else { a };
        let (mut upper, mut steps) = (Vec::with_capacity(n), Vec::with_capacity(n - 1));
        let (mut a, mut b) = (diagonal[0] - x, beside[0]);
        for i in 0..n - 1 {
            let next = [beside[i], diagonal[i + 1] - x, beside[i + 1]];
            if a.abs() >= next[0].abs() {
                let divisor = pivot(a);
                let factor = next[0] / divisor;
                upper.push([divisor, b, 0.0]);
                steps.push((factor, false));
                (a, b) = (next[1] - factor * b, next[2]);
            } else {
                let factor = a / next[0];
                upper.push(next);
                steps.push((factor, true));
                (a, b) = (b - factor * next[1], -factor * next[2]);
            }
        }
        upper.push([pivot(a), 0.0, 0.0]);
        Shifted { upper, steps }
    }

    /// Solves the system with the right-hand side `x` and overwrites `x` with the solution.
    fn solve(&self, x: &mut [f64]) {
        for (i, &(factor, exchanged)) in self.steps.iter().enumerate() {
            if exchanged {
                x.swap(i, i + 1);
            }
            x[i + 1] -= factor * x[i];
        }
        let (mut one, mut two) = (0.0, 0.0);
        for (x, [d, u, uu]) in x.iter_mut().zip(&self.upper).rev() {
            *x = (*x - u * one - uu * two) / d;
            (one, two) = (*x, one);
        }
    }
}

/// Makes `x` orthogonal to `v`, a vector of length 1.
#[pulp::with_simd(subtract_projection = pulp::Arch::new())]
#[inline(always)]
// The macro requires named lifetimes.
#[allow(clippy::needless_lifetimes)]
fn subtract_projection_simd<'a, S: Simd>(_simd: S, x: &'a mut [f64], v: &'a [f64]) {
    let (xs, vs) = (x.as_chunks::<LANES>(), v.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (x, v) in xs.0.iter().zip(vs.0) {
        sums.iter_mut().zip(x.iter().zip(v)).for_each(|(sum, (x, v))| *sum += x * v);
    }
    let rest: f64 = xs.1.iter().zip(vs.1).map(|(x, v)| x * v).sum();
    let dot = sums.iter().sum::<f64>() + rest;
    x.iter_mut().zip(v).for_each(|(x, v)| *x -= dot * v);
}

/// Pseudorandom starting vector of inverse iteration, different for each `j`. An eigenvector is orthogonal to it only
/// by chance.
fn start(n: usize, j: usize) -> Vec<f64> {
    let mut state = j as u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Whether all entries of `VᵀV - I` and `T V - V diag(values)` are below [`ERROR`] in magnitude, and none is NaN.
fn accurate(diagonal: &[f64], beside: &[f64], values: &[f64], vectors: &Mat<f64>) -> bool {
    let (n, k) = (vectors.nrows(), vectors.ncols());
    let small = |error: f64| error.abs() < ERROR;
    let products = vectors.transpose() * vectors;
    let identity = |i: usize, j: usize| if i == j { 1.0 } else { 0.0 };
    (0..k).all(|j| {
        let v = vectors.col_as_slice(j);
        let difference = |i: usize| {
            let before = if i > 0 { beside[i - 1] * v[i - 1] } else { 0.0 };
            let after = if i + 1 < n { beside[i] * v[i + 1] } else { 0.0 };
            before + (diagonal[i] - values[j]) * v[i] + after
        };
        (0..k).all(|i| small(products[(i, j)] - identity(i, j))) && (0..n).all(|i| small(difference(i)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symmetric(n: usize, spectrum: impl Fn(usize) -> f64) -> Mat<f64> {
        let values: Vec<f32> = super::super::svd::testing::random([n, n], 1, 7).remove(0);
        let q = Mat::from_fn(n, n, |i, j| f64::from(values[i * n + j])).qr().compute_Q();
        let scaled = Mat::from_fn(n, n, |i, j| q[(i, j)] * spectrum(j));
        &scaled * q.transpose()
    }

    fn check(a: &Mat<f64>, k: usize, expected: impl Fn(usize) -> f64) {
        let form = Tridiagonal::new(a.clone());
        let (values, mut vectors) = form.leading(k).expect("inverse iteration finds them");
        form.turn(&mut vectors);
        let scale = expected(0).abs();
        for (j, value) in values.iter().enumerate() {
            assert!((value - expected(j)).abs() < 1e-12 * scale, "{j}: {value} {}", expected(j));
        }
        let scaled = Mat::from_fn(a.nrows(), k, |i, j| vectors[(i, j)] * values[j]);
        assert!((a * &vectors - scaled).norm_max() < 1e-10 * scale);
        assert!((vectors.transpose() * &vectors - Mat::<f64>::identity(k, k)).norm_max() < 1e-10);
    }

    #[test]
    fn leading_pairs_of_spectra_that_are_spread_repeated_and_deficient() {
        for n in [32, 90, 200] {
            check(&symmetric(n, |j| (n - j) as f64), n / 3, |j| (n - j) as f64);
            check(&symmetric(n, |j| 1e-60 / (1.0 + j as f64)), n / 3, |j| 1e-60 / (1.0 + j as f64));
            check(&symmetric(n, |j| (5 - j.min(5)) as f64), n / 3, |j| (5 - j.min(5)) as f64);
            check(&symmetric(n, |j| if j < 4 { 2.0 } else { 1.0 }), n / 3, |j| if j < 4 { 2.0 } else { 1.0 });
        }
    }

    #[test]
    fn leading_and_all_agree_and_f32_is_near() {
        let a = symmetric(150, |j| 1.0 / (1.0 + j as f64).powi(2));
        let form = Tridiagonal::new(a);
        let (values, vectors) = form.all().unwrap();
        let (leading, _) = form.leading(40).unwrap();
        assert!(leading.iter().zip(values.iter().rev()).all(|(a, b)| (a - b).abs() < 1e-14));
        let mut single = Mat::from_fn(150, 150, |i, j| vectors[(i, j)] as f32);
        form.turn_f32(&mut single);
        let mut double = vectors;
        form.turn(&mut double);
        let error = |i, j| (f64::from(single[(i, j)]) - double[(i, j)]).abs();
        // A few rounding errors of 6e-8 in entries below 1.
        assert!((0..150).all(|i| (0..150).all(|j| error(i, j) < 2e-6)));
    }

    #[test]
    fn nothing_leads_in_zero_and_in_what_is_not_a_number() {
        assert!(Tridiagonal::new(Mat::zeros(40, 40)).leading(3).is_none());
        assert!(Tridiagonal::new(Mat::from_fn(40, 40, |_, _| f64::NAN)).leading(3).is_none());
    }
}
