//! Merges that are linear combinations of whole vectors, with coefficients that depend only on inner products.
//!
//! Norms, angles and means on a sphere are functions of the Gram matrix. A tensor is therefore read once for that
//! matrix and once for the sum, and never held in memory as a whole.

use super::method::MergePieces;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, kernels};

/// Which vectors are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vectors {
    /// The base, if there is one, and the models.
    Inputs,
    /// The task vectors (differences of the models from the base), in f32; the base is added to the combination.
    ///
    /// Their inner products could be computed from those of the inputs, but only as small differences of large numbers.
    TaskVectors,
}

impl Vectors {
    /// Task vectors if there is a base, otherwise the models themselves.
    pub(super) fn of(group: &TensorGroup<'_>) -> Vectors {
        if group.base.is_some() { Vectors::TaskVectors } else { Vectors::Inputs }
    }

    /// The summands of the output: the base, if there is one, followed by the models or task vectors.
    pub(super) fn summands(self, piece: &mut Piece) -> Vec<&[f32]> {
        if self == Vectors::TaskVectors {
            piece.subtract_base();
        }
        let base = (!piece.base.is_empty()).then_some(&piece.base);
        base.into_iter().chain(&piece.models).map(Vec::as_slice).collect()
    }

    /// Number of summands before the vectors: 1 for task vectors, for the base with the coefficient 1.
    fn before(self) -> usize {
        usize::from(self == Vectors::TaskVectors)
    }

    /// Coefficients of all summands, from those of the vectors.
    fn coefficients(self, vectors: Vec<f64>) -> Vec<f64> {
        if self == Vectors::TaskVectors { [vec![1.0], vectors].concat() } else { vectors }
    }
}

/// Gram matrix: inner products of all pairs of vectors, `(vectors, vectors)`.
#[derive(Clone, Debug)]
pub(super) struct Gram {
    size: usize,
    products: Vec<f64>,
}

impl Gram {
    /// The Gram matrix of vectors of the same length.
    pub(super) fn new(vectors: &[&[f32]]) -> Gram {
        let size = vectors.len();
        let mut products = vec![0.0; size * size];
        for i in 0..size {
            for j in 0..=i {
                let product = kernels::dot(vectors[i], vectors[j]);
                (products[i * size + j], products[j * size + i]) = (product, product);
            }
        }
        Gram { size, products }
    }

    /// The Gram matrix of a tensor's vectors, summed in the order of pieces, so that it does not depend on the number
    /// of threads.
    fn of_tensor(group: &TensorGroup<'_>, vectors: Vectors) -> Result<Gram, Error> {
        let products = |piece: &mut Piece| Gram::new(&vectors.summands(piece)[vectors.before()..]).products;
        let pieces = group.pieces(false);
        let parts = match vectors {
            Vectors::Inputs => group.map_pieces(&pieces, products)?,
            Vectors::TaskVectors => group.map_task_vectors(&pieces, products)?,
        };
        let size = group.models.len() + usize::from(group.base.is_some()) - vectors.before();
        let mut products = vec![0.0; size * size];
        for part in parts {
            products.iter_mut().zip(part).for_each(|(sum, product)| *sum += product);
        }
        Ok(Gram { size, products })
    }

    /// Number of vectors.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// `xᵢ · xⱼ`.
    pub(super) fn dot(&self, i: usize, j: usize) -> f64 {
        self.products[i * self.size + j]
    }

    /// `‖xᵢ‖`.
    pub(super) fn norm(&self, i: usize) -> f64 {
        self.dot(i, i).sqrt()
    }

    /// All norms.
    pub(super) fn norms(&self) -> Vec<f64> {
        (0..self.size).map(|i| self.norm(i)).collect()
    }

    /// The Gram matrix of some of the vectors, each divided by its divisor.
    pub(super) fn divided(&self, vectors: &[usize], divisors: &[f64]) -> Gram {
        let products = vectors.iter().flat_map(|&i| vectors.iter().map(move |&j| (i, j)));
        let products = products.map(|(i, j)| self.dot(i, j) / (divisors[i] * divisors[j])).collect();
        Gram { size: vectors.len(), products }
    }

    /// Inner products of every vector with `Σ cᵢ xᵢ`.
    pub(super) fn dots_with(&self, c: &[f64]) -> Vec<f64> {
        (0..self.size).map(|i| (0..self.size).map(|j| self.dot(i, j) * c[j]).sum()).collect()
    }

    /// `‖Σ cᵢ xᵢ‖`. If it is nearly zero, its rounding error is about 1e-8 of the norms of the vectors.
    pub(super) fn norm_with(&self, c: &[f64]) -> f64 {
        let square: f64 = self.dots_with(c).iter().zip(c).map(|(dot, c)| dot * c).sum();
        square.max(0.0).sqrt()
    }
}

/// Combines whole tensors; `coefficients` computes one coefficient per vector from the Gram matrix.
pub(super) fn combine<'t>(
    group: &TensorGroup<'_>,
    vectors: Vectors,
    coefficients: impl FnOnce(&Gram) -> Result<Vec<f64>, Error>,
) -> Result<Box<dyn MergePieces + 't>, Error> {
    let gram = Gram::of_tensor(group, vectors)?;
    let coefficients = vectors.coefficients(coefficients(&gram)?);
    Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| {
        kernels::weighted_sum(out, &coefficients, &vectors.summands(piece));
    }))
}

/// Combines each row of `columns` elements with its own coefficients; pieces must contain whole rows.
pub(super) fn combine_rows<'t>(
    columns: usize,
    vectors: Vectors,
    coefficients: impl Fn(&Gram) -> Vec<f64> + Sync + 't,
) -> Box<dyn MergePieces + 't> {
    Box::new(move |piece: &mut Piece, out: &mut [f32]| {
        let summands = vectors.summands(piece);
        for (row, out) in out.chunks_mut(columns).enumerate() {
            let start = row * columns;
            let row: Vec<&[f32]> = summands.iter().map(|x| &x[start..start + out.len()]).collect();
            let gram = Gram::new(&row[vectors.before()..]);
            kernels::weighted_sum(out, &vectors.coefficients(coefficients(&gram)), &row);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{PIECE, Values};

    #[test]
    fn a_tensor_of_many_pieces_has_the_products_of_its_inputs_and_of_its_task_vectors() {
        let n = 2 * PIECE + 5;
        let base = vec![1.0f32; n];
        let (a, b) = (vec![3.0f32; n], vec![0.0f32; n]);
        let models = vec![Values::from_slice("a", &a), Values::from_slice("b", &b)];
        let base = Some(Values::from_slice("base", &base));
        let shape = [n];
        let group = TensorGroup { parallel: true, ..TensorGroup::new("w", &shape, base, models) };
        let products = |vectors| Gram::of_tensor(&group, vectors).unwrap().products;
        let of = |x: &[f64]| x.iter().map(|x| x * n as f64).collect::<Vec<f64>>();
        assert_eq!(products(Vectors::TaskVectors), of(&[4.0, -2.0, -2.0, 1.0]));
        assert_eq!(products(Vectors::Inputs), of(&[1.0, 3.0, 0.0, 3.0, 9.0, 0.0, 0.0, 0.0, 0.0]));
    }

    #[test]
    fn norms_of_combinations() {
        let gram = Gram::new(&[&[3.0, 0.0], &[0.0, 4.0], &[-3.0, 0.0]]);
        assert_eq!(gram.norms(), [3.0, 4.0, 3.0]);
        assert_eq!(gram.norm_with(&[1.0, 1.0, 0.0]), 5.0);
        assert_eq!(gram.norm_with(&[0.1, 0.0, 0.1]), 0.0);
        assert_eq!(gram.dots_with(&[1.0, 1.0, 0.0]), [9.0, 16.0, -9.0]);
        assert_eq!(gram.divided(&[0, 2], &[3.0, 4.0, 3.0]).products, [1.0, -1.0, -1.0, 1.0]);
    }
}
