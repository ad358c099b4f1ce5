//! Comparison of two models, tensor by tensor.

use std::path::Path;

use cl_checkpoint::{Checkpoint, Dtype, TensorSource};
use rayon::prelude::*;
use serde::Serialize;

use crate::Error;
use crate::tensor::{Piece, TensorGroup, Values, is_readable, kernels};

/// Comparison of one tensor.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TensorDiff {
    /// Name of the tensor; empty for all tensors together.
    pub tensor: String,
    /// Number of elements.
    pub elements: usize,
    /// Euclidean norm in the first model; with a base, of its task vector.
    pub norm_a: f64,
    /// The same in the second.
    pub norm_b: f64,
    /// Norm of the difference.
    pub norm_diff: f64,
    /// Cosine similarity of the two; 1 if both are zero.
    pub cosine: f64,
    /// Fraction of elements with opposite signs.
    pub sign_conflict: f64,
    /// Largest absolute difference of an element.
    pub max_diff: f32,
}

/// Comparison of two models.
#[derive(Clone, Debug, Serialize)]
pub struct Diff {
    /// Tensors of both models, by name.
    pub tensors: Vec<TensorDiff>,
    /// All tensors together.
    pub total: TensorDiff,
    /// Tensors of only the first model.
    pub only_a: Vec<String>,
    /// Tensors of only the second model.
    pub only_b: Vec<String>,
    /// Tensors with different shapes, and integers.
    pub not_compared: Vec<String>,
}

#[derive(Clone, Copy, Default)]
struct Sums {
    aa: f64,
    bb: f64,
    ab: f64,
    dd: f64,
    conflicts: usize,
    max: f32,
}

impl Sums {
    fn plus(self, other: Sums) -> Sums {
        Sums {
            aa: self.aa + other.aa,
            bb: self.bb + other.bb,
            ab: self.ab + other.ab,
            dd: self.dd + other.dd,
            conflicts: self.conflicts + other.conflicts,
            max: self.max.max(other.max),
        }
    }

    fn diff(self, tensor: &str, elements: usize) -> TensorDiff {
        TensorDiff {
            tensor: tensor.to_owned(),
            elements,
            norm_a: self.aa.sqrt(),
            norm_b: self.bb.sqrt(),
            norm_diff: self.dd.sqrt(),
            cosine: cosine(self.aa, self.bb, self.ab),
            sign_conflict: self.conflicts as f64 / elements.max(1) as f64,
            max_diff: self.max,
        }
    }
}

/// Cosine similarity of two vectors, from their squared norms `aa` and `bb` and their inner product `ab`; 1 if both are
/// zero, 0 if one is.
pub(crate) fn cosine(aa: f64, bb: f64, ab: f64) -> f64 {
    let product = (aa * bb).sqrt();
    match (aa == 0.0 && bb == 0.0, product > 0.0) {
        (true, _) => 1.0,
        (_, true) => (ab / product).clamp(-1.0, 1.0),
        _ => 0.0,
    }
}

/// Compares two models, or, with a base, their task vectors.
///
/// # Errors
/// Returns an error if opening or reading fails.
pub fn diff(a: &Path, b: &Path, base: Option<&Path>) -> Result<Diff, Error> {
    let (first, second) = (Checkpoint::open(a)?, Checkpoint::open(b)?);
    let base = base.map(Checkpoint::open).transpose()?;
    let (mut names, mut only_a, mut not_compared) = (Vec::new(), Vec::new(), Vec::new());
    for name in first.names() {
        match (first.info(name), second.info(name)) {
            (_, None) => only_a.push(name.to_owned()),
            (Some(x), Some(y)) => {
                let z = base.as_ref().map(|base| base.info(name));
                let alike = x.shape == y.shape && z.is_none_or(|z| z.is_some_and(|z| z.shape == x.shape));
                let floats =
                    is_readable(x.dtype) && is_readable(y.dtype) && z.flatten().is_none_or(|z| is_readable(z.dtype));
                if alike && floats { names.push(name) } else { not_compared.push(name.to_owned()) }
            }
            (None, _) => unreachable!("it is one of its names"),
        }
    }
    let only_b = second.names().into_iter().filter(|n| first.info(n).is_none()).map(str::to_owned).collect();
    let sums: Vec<Result<Sums, Error>> =
        names.par_iter().map(|name| sums(&first, &second, base.as_ref(), name)).collect();
    let sums: Vec<Sums> = sums.into_iter().collect::<Result<_, _>>()?;
    let elements = |name: &str| first.info(name).map_or(0, |info| info.elements());
    let tensors: Vec<TensorDiff> = names.iter().zip(&sums).map(|(name, s)| s.diff(name, elements(name))).collect();
    let total = sums.into_iter().fold(Sums::default(), Sums::plus).diff("", tensors.iter().map(|t| t.elements).sum());
    Ok(Diff { tensors, total, only_a, only_b, not_compared })
}

fn sums(a: &Checkpoint, b: &Checkpoint, base: Option<&Checkpoint>, name: &str) -> Result<Sums, Error> {
    let values = |checkpoint: &'_ Checkpoint| checkpoint.info(name).map(|info| info.dtype).unwrap_or(Dtype::F32);
    let shape = &a.info(name).expect("compared tensors are there").shape;
    let (a_name, b_name) = (a.dir().display().to_string(), b.dir().display().to_string());
    let base = base.map(|base| Values::from_source("base", base, name, values(base)));
    let models =
        vec![Values::from_source(&a_name, a, name, values(a)), Values::from_source(&b_name, b, name, values(b))];
    let group = TensorGroup { parallel: true, ..TensorGroup::new(name, shape, base, models) };
    let parts = group.map_pieces(&group.pieces(false), |piece: &mut Piece| {
        if group.base.is_some() {
            piece.subtract_base();
        }
        let (a, b) = (&piece.models[0], &piece.models[1]);
        let mut sums =
            Sums { aa: kernels::dot(a, a), bb: kernels::dot(b, b), ab: kernels::dot(a, b), ..Sums::default() };
        for (x, y) in a.iter().zip(b) {
            let d = x - y;
            sums.dd += f64::from(d) * f64::from(d);
            sums.max = sums.max.max(d.abs());
            sums.conflicts += usize::from((*x > 0.0 && *y < 0.0) || (*x < 0.0 && *y > 0.0));
        }
        sums
    })?;
    Ok(parts.into_iter().fold(Sums::default(), Sums::plus))
}
