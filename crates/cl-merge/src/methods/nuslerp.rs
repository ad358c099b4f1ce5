use serde::Deserialize;

use super::gram::{Gram, Vectors, combine, combine_rows};
use super::info::{Base, MethodInfo};
use super::method::{MergeMethod, MergePieces, undefined};
use super::parameters::ParameterInfo;
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::slerp::arc;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{PIECE, Piece, TensorGroup};

/// Spherical interpolation of two models, or of their task vectors with a base:
/// `(sin((1−t)φ) v₁ + sin(tφ) v₂) / sin φ` with `t = w₂ / (w₁ + w₂)`, plus the base.
///
/// mergekit's NuSLERP. Vectors are whole tensors, rows or columns. Unlike [`super::Slerp`], it interpolates linearly
/// only if the cosine is ±1 within f32 precision.
#[derive(Clone, Debug)]
pub struct NuSlerp {
    /// One weight per model; any numbers. If they sum to zero, `t` is 0.5.
    pub weights: [f64; 2],
    /// Whether to interpolate columns (along dimension 0) instead of rows, if not flattened; mergekit's
    /// `nuslerp_row_wise`.
    pub row_wise: bool,
    /// Whether to treat the tensor as one vector.
    pub flatten: bool,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "NuSLERP",
    paper: "mergekit",
    formula: "SLERP of two models, or of their task vectors, at w₂ / (w₁ + w₂)",
    parameters: &["weight", "nuslerp_row_wise", "nuslerp_flatten"],
    own_parameters: &[
        ParameterInfo::choice(
            "nuslerp_row_wise",
            "interpolate columns instead of rows, if not flattened",
            "true or false",
        ),
        ParameterInfo::choice("nuslerp_flatten", "treat each tensor as one vector", "true or false"),
    ],
    base: Base::Optional,
    models: 2..=2,
    ordered: true,
    defaults: |_| Defaults::new().with("weight", 1.0).with("nuslerp_row_wise", false).with("nuslerp_flatten", true),
    ..MethodInfo::new("nuslerp", build)
};

#[derive(Deserialize)]
struct Settings {
    weight: Vec<f64>,
    nuslerp_row_wise: bool,
    nuslerp_flatten: bool,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { weight, nuslerp_row_wise, nuslerp_flatten } = settings.read()?;
    let weights = weight.try_into().map_err(|_| SettingsError::NotTwoModels { method: "nuslerp" })?;
    Ok(Box::new(NuSlerp { weights, row_wise: nuslerp_row_wise, flatten: nuslerp_flatten }))
}

/// Number of pieces whose column sums are in memory at the same time.
const BATCH: usize = 1024;

impl MergeMethod for NuSlerp {
    fn whole_rows(&self) -> bool {
        !self.flatten && !self.row_wise
    }

    fn workspace(&self, group: &TensorGroup<'_>) -> usize {
        if self.flatten || !self.row_wise || group.shape.len() < 2 {
            return 0;
        }
        // Three sums and two coefficients for each column, and the sums of a batch.
        let width: usize = group.shape[1..].iter().product();
        width * size_of::<[f64; 5]>() + BATCH * width.min(PIECE) * size_of::<[f64; 3]>()
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.models.len() != 2 {
            return Err(undefined(group, "nuslerp", Undefined::NotTwoModels("interpolates between two models")));
        }
        let vectors = Vectors::of(group);
        let of_gram = |gram: &Gram| self.coefficients(gram.dot(0, 0), gram.dot(0, 1), gram.dot(1, 1)).to_vec();
        // A one-dimensional tensor is both a row and a column.
        if self.flatten || group.shape.len() < 2 {
            combine(group, vectors, |gram| Ok(of_gram(gram)))
        } else if self.row_wise {
            self.by_columns(group, vectors)
        } else {
            Ok(combine_rows(group.columns(), vectors, of_gram))
        }
    }
}

impl NuSlerp {
    /// Coefficients of two vectors, from their squared norms `aa` and `bb` and their inner product `ab`.
    fn coefficients(&self, aa: f64, ab: f64, bb: f64) -> [f64; 2] {
        let total = self.weights[0] + self.weights[1];
        let t = if total.abs() < 1e-6 { 0.5 } else { self.weights[1] / total };
        let cosine = (ab / (aa.sqrt().max(1e-7) * bb.sqrt().max(1e-7))).clamp(-1.0, 1.0);
        // In f32, the precision to which the vectors determine their angle: in f64, rounded antiparallel vectors would
        // have a small nonzero sine as the divisor.
        let rounded = cosine as f32;
        if 1.0 - rounded * rounded <= 1e-16 { [1.0 - t, t] } else { arc(cosine, t) }
    }

    /// Combines each column, a vector along dimension 0, with its own coefficients.
    fn by_columns<'t>(&self, group: &TensorGroup<'_>, vectors: Vectors) -> Result<Box<dyn MergePieces + 't>, Error> {
        let width: usize = group.shape[1..].iter().product();
        let mut sums = vec![[0.0f64; 3]; width];
        // In batches, because the sums of all columns and pieces may not fit into memory, and in order, so that the
        // result does not depend on the number of threads.
        for batch in group.pieces(false).chunks(BATCH) {
            for (start, part) in group.map_pieces(batch, |piece| (piece.start, column_sums(piece, vectors, width)))? {
                for (i, part) in part.into_iter().enumerate() {
                    let sums = &mut sums[(start + i) % width];
                    sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
            }
        }
        let coefficients: Vec<[f64; 2]> = sums.into_iter().map(|[aa, ab, bb]| self.coefficients(aa, ab, bb)).collect();
        Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| {
            let columns = coefficients.iter().cycle().skip(piece.start % width);
            let summands = vectors.summands(piece);
            let (base, [a, b]) = summands.split_last_chunk().expect("there are two models");
            for (i, (out, [ca, cb])) in out.iter_mut().zip(columns).enumerate() {
                let base = base.first().map_or(-0.0, |base| f64::from(base[i]));
                *out = (base + ca * f64::from(a[i]) + cb * f64::from(b[i])) as f32;
            }
        }))
    }
}

/// `a·a`, `a·b` and `b·b` for each column that the piece touches, starting with the column of its first element.
fn column_sums(piece: &mut Piece, vectors: Vectors, width: usize) -> Vec<[f64; 3]> {
    let touched = width.min(piece.len());
    let mut sums = vec![[0.0f64; 3]; touched];
    let summands = vectors.summands(piece);
    let (_, [a, b]) = summands.split_last_chunk().expect("there are two models");
    for (a, b) in a.chunks(touched).zip(b.chunks(touched)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            let (a, b) = (f64::from(*a), f64::from(*b));
            *sum = [sum[0] + a * a, sum[1] + a * b, sum[2] + b * b];
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    const FLAT: NuSlerp = NuSlerp { weights: [0.6, 0.4], row_wise: false, flatten: true };
    const ROWS: NuSlerp = NuSlerp { flatten: false, ..FLAT };
    const COLUMNS: NuSlerp = NuSlerp { row_wise: true, ..ROWS };

    fn close(out: &[f32], expected: &[f32]) {
        let near = out.len() == expected.len() && out.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-5);
        assert!(near, "{out:?} {expected:?}");
    }

    /// ```python
    /// def nuslerp(a, b, axis):
    ///     n = lambda x: np.linalg.norm(x, axis=axis, keepdims=True)
    ///     f = np.arccos((a * b).sum(axis, keepdims=True) / n(a) / n(b))
    ///     return (np.sin(.6 * f) * a + np.sin(.4 * f) * b) / np.sin(f)
    /// a, b = np.array([[1., 2, 3], [4, 5, -6]]), np.array([[2., 1, -1], [1, 7, 4]])
    /// nuslerp(a, b, None), nuslerp(a, b, -1), nuslerp(a, b, 0)
    /// ```
    #[test]
    fn known_values() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, -6.0], [2.0, 1.0, -1.0, 1.0, 7.0, 4.0]);
        let out = |method: &NuSlerp| merged(method, &[2, 3], None, &[&a, &b]).unwrap();
        close(&out(&FLAT), &FLAT_OUT);
        close(&out(&ROWS), &ROWS_OUT);
        close(&out(&COLUMNS), &COLUMNS_OUT);
        // With a base, the task vectors are interpolated.
        let base = [0.5f32; 6];
        let (a, b) = (a.map(|x| x + 0.5), b.map(|x| x + 0.5));
        for (method, expected) in [(FLAT, FLAT_OUT), (ROWS, ROWS_OUT), (COLUMNS, COLUMNS_OUT)] {
            close(&merged(&method, &[2, 3], Some(&base), &[&a, &b]).unwrap(), &expected.map(|x| x + 0.5));
        }
    }

    const FLAT_OUT: [f32; 6] = [1.812_212, 2.028_121, 1.711_93, 3.524_142, 7.464_758, -2.359_658];
    const ROWS_OUT: [f32; 6] = [1.883_706, 2.101_901, 1.764_926, 3.507_34, 7.425_891, -2.351_541];
    const COLUMNS_OUT: [f32; 6] = [1.541_879, 1.610_537, 9.355_548, 3.050_642, 5.840_779, -10.225_185];

    /// Rows longer and shorter than a piece, on tensors of several pieces, compared with the rows of the transposed
    /// tensor.
    #[test]
    fn columns_are_the_rows_of_the_transpose() {
        for [rows, columns] in [[3, PIECE + 7], [PIECE / 2 + 3, 5]] {
            let n = rows * columns;
            let a: Vec<f32> = (0..n).map(|i| ((i * 7919) % 101) as f32 - 50.0).collect();
            let b: Vec<f32> = (0..n).map(|i| ((i * 104_729) % 97) as f32 - 48.0).collect();
            let base: Vec<f32> = (0..n).map(|i| (i % 13) as f32).collect();
            let transposed = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..n).map(|i| x[i % rows * columns + i / rows]).collect()
            };
            let by_columns = merged(&COLUMNS, &[rows, columns], Some(&base), &[&a, &b]).unwrap();
            let [base, a, b] = [base, a, b].map(|x| transposed(&x, rows, columns));
            let by_rows = merged(&ROWS, &[columns, rows], Some(&base), &[&a, &b]).unwrap();
            close(&transposed(&by_rows, columns, rows), &by_columns);
        }
    }

    #[test]
    fn every_dimension_but_the_first_is_a_column() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, -6.0, 7.0, 8.0], [2.0, 1.0, -1.0, 1.0, 7.0, 2.0, 0.0, 1.0]);
        let out = |shape: &[usize]| merged(&COLUMNS, shape, None, &[&a, &b]).unwrap();
        assert_eq!(out(&[2, 2, 2]), out(&[2, 4]));
        // A one-dimensional tensor is a single column.
        let flat = merged(&FLAT, &[8], None, &[&a, &b]).unwrap();
        assert_eq!(out(&[8]), flat);
        assert_eq!(merged(&ROWS, &[8], None, &[&a, &b]).unwrap(), flat);
    }

    #[test]
    fn equal_opposite_and_zero_vectors() {
        let (x, zero) = ([0.1, -0.7, 0.3, 0.9], [0.0; 4]);
        let opposite = x.map(|x| -3.0 * x);
        for method in [FLAT, ROWS, COLUMNS] {
            let out = |base: Option<&[f32]>, a: &[f32], b: &[f32]| merged(&method, &[2, 2], base, &[a, b]).unwrap();
            assert_eq!(out(None, &x, &x), x);
            assert_eq!(out(Some(&x), &x, &x), x);
            assert_eq!(out(None, &zero, &zero), zero);
            // 0.6 x − 1.2 x.
            close(&out(None, &x, &opposite), &x.map(|x| -0.6 * x));
            // A zero vector counts as orthogonal to all others: sin(0.6 · 90°) of the other.
            close(&out(None, &x, &zero), &x.map(|x| 0.809_017 * x));
            assert!(merged(&method, &[0, 4], None, &[&[], &[]]).unwrap().is_empty());
            assert!(merged(&method, &[4, 0], Some(&[]), &[&[], &[]]).unwrap().is_empty());
            assert!(merged(&method, &[2, 2], Some(&x), &[&x]).is_err());
        }
        let cancelled = NuSlerp { weights: [1.0, -1.0], ..FLAT };
        assert_eq!(merged(&cancelled, &[2], None, &[&[1.0, 0.0], &[3.0, 0.0]]).unwrap(), [2.0, 0.0]);
    }
}
