//! Routers computed from the adapters alone, by the singular value decomposition of an update `B·A`, which is never
//! materialized.
//!
//! With `B = Q₁R₁` and `Aᵀ = Q₂R₂`, the core `R₁R₂ᵀ = U Σ Vᵀ` has the singular values of `B·A`, whose singular vectors
//! are `Q₁U` and `Q₂V`. Everything is computed in f64.

use faer::Mat;

/// Singular value decomposition `B·A = left · diag(values) · rightᵀ`.
pub(crate) struct Spectrum {
    /// `(out, n)`, orthonormal columns.
    left: Mat<f64>,
    /// `(in, n)`, orthonormal columns.
    right: Mat<f64>,
    /// The `n` singular values, largest first.
    values: Vec<f64>,
}

impl Spectrum {
    /// Decomposes the product of `a` `(rank, in)` and `b` `(out, rank)`, row-major; `None` if it does not converge.
    pub(crate) fn of(a: &[f32], b: &[f32], rank: usize) -> Option<Spectrum> {
        let (input, output) = (a.len() / rank, b.len() / rank);
        let a_transposed = Mat::from_fn(input, rank, |i, j| f64::from(a[j * input + i]));
        let b = Mat::from_fn(output, rank, |i, j| f64::from(b[i * rank + j]));
        let (q_b, q_a) = (b.qr(), a_transposed.qr());
        let core = q_b.thin_R() * q_a.thin_R().transpose();
        let svd = core.thin_svd().ok()?;
        Some(Spectrum {
            left: q_b.compute_thin_Q() * svd.U(),
            right: q_a.compute_thin_Q() * svd.V(),
            values: svd.S().column_vector().iter().copied().collect(),
        })
    }

    /// Returns the leading right singular vector, `in` values; `None` for an update of zeros.
    pub(crate) fn prototype(&self) -> Option<Vec<f32>> {
        let leading = self.values.first().is_some_and(|&value| value > 0.0);
        leading.then(|| self.right.col(0).iter().map(|&x| x as f32).collect())
    }

    /// Returns factors of the same product: `Σ·Vᵀ` `(rank, in)` and `U` `(out, rank)`, row-major. With them, `‖B·A·x‖`
    /// is the norm of `Σ·Vᵀ·x`. If the rank exceeds the narrower side of the update, the remaining rows and columns are
    /// zeros.
    pub(crate) fn factors(&self, rank: usize) -> [Vec<f32>; 2] {
        let (input, output) = (self.right.nrows(), self.left.nrows());
        let mut a = vec![0.0; rank * input];
        let mut b = vec![0.0; output * rank];
        for (k, value) in self.values.iter().enumerate() {
            (0..input).for_each(|i| a[k * input + i] = (value * self.right[(i, k)]) as f32);
            (0..output).for_each(|i| b[i * rank + k] = self.left[(i, k)] as f32);
        }
        [a, b]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `count` pseudorandom values.
    fn noise(count: usize, phase: f64) -> Vec<f32> {
        (0..count).map(|i| ((i as f64 * 12.9898 + phase).sin() * 43758.5453).fract() as f32).collect()
    }

    fn product(a: &[f32], b: &[f32], rank: usize) -> Mat<f64> {
        let (input, output) = (a.len() / rank, b.len() / rank);
        let entry =
            |i: usize, j: usize| (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * input + j])).sum();
        Mat::from_fn(output, input, entry)
    }

    #[test]
    fn prototypes_are_leading_right_singular_vectors_of_the_dense_update() {
        // The rank of the last update exceeds its width.
        for (rank, input, output) in [(3, 12, 7), (1, 5, 9), (6, 4, 9)] {
            let (a, b) = (noise(rank * input, 0.1), noise(output * rank, 0.7));
            let dense = product(&a, &b, rank);
            let spectrum = Spectrum::of(&a, &b, rank).unwrap();
            let svd = dense.thin_svd().unwrap();
            let prototype = spectrum.prototype().unwrap();
            let cosine: f64 = prototype.iter().zip(svd.V().col(0).iter()).map(|(p, v)| f64::from(*p) * v).sum();
            assert!((cosine.abs() - 1.0).abs() < 1e-6, "{cosine}");
            let [sv, u] = spectrum.factors(rank);
            let largest = (product(&sv, &u, rank) - &dense).norm_max();
            // Factors are rounded to f32.
            assert!(largest < 1e-6, "{largest}");
        }
        assert!(Spectrum::of(&noise(8, 0.3), &[0.0; 6], 2).unwrap().prototype().is_none());
    }
}
