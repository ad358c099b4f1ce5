//! Comparison of two adapters, module by module.

use std::path::{Path, PathBuf};

use faer::{Mat, MatRef};
use rayon::prelude::*;
use serde::Serialize;

use super::low_rank::LowRank;
use super::set::{Module, Set, open};
use crate::Error;
use crate::diff::cosine;
use crate::methods::Undefined;

/// Comparison of two adapters.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterDiff {
    /// Modules of both adapters, by name.
    pub modules: Vec<ModuleDiff>,
    /// All modules together, including those of only one adapter; overlaps are means over common modules.
    pub total: ModuleDiff,
    /// Modules of only the first adapter.
    pub only_a: Vec<String>,
    /// Modules of only the second adapter.
    pub only_b: Vec<String>,
    /// Notes.
    pub notes: Vec<String>,
}

/// Comparison of one module.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ModuleDiff {
    /// Name of the module; empty for all modules together.
    pub module: String,
    /// `‖ΔW_a‖`, including the scaling.
    pub norm_a: f64,
    /// `‖ΔW_b‖`.
    pub norm_b: f64,
    /// `‖ΔW_a − ΔW_b‖`.
    pub norm_diff: f64,
    /// `⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖·‖ΔW_b‖)`; 1 where both are zero.
    pub cosine: f64,
    /// [`overlap`] of the row spaces of A: the input directions.
    pub overlap_a: f64,
    /// [`overlap`] of the column spaces of B: the output directions.
    pub overlap_b: f64,
}

/// Overlap of the row spaces of two matrices: `‖QᵀQ'‖²_F / min(r, r')` with orthonormal bases `Q` and `Q'`, the mean
/// squared cosine of their principal angles. 0 for orthogonal spaces and if one is empty, 1 if one contains the other.
///
/// `a` and `b` are row-major with this number of columns; directions smaller than 1e-6 of the largest are ignored.
///
/// ```
/// use cl_merge::adapter::overlap;
/// let a = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]; // two rows
/// assert!((overlap(&a, &[0.6, 0.8, 0.0], 3)? - 1.0).abs() < 1e-12);
/// assert!((overlap(&a, &[0.0, 1.0, 1.0], 3)? - 0.5).abs() < 1e-12);
/// # Ok::<(), cl_merge::Error>(())
/// ```
///
/// # Errors
/// Returns [`Error::Undefined`] for values that are not rows of this length or not finite.
pub fn overlap(a: &[f32], b: &[f32], columns: usize) -> Result<f64, Error> {
    let undefined = |kind: Undefined| Error::Undefined { tensor: "rows".to_owned(), method: "overlap", kind };
    for values in [a, b] {
        if columns == 0 || !values.len().is_multiple_of(columns) {
            return Err(undefined(Undefined::NotRows { values: values.len(), columns }));
        }
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(undefined(Undefined::NotFinite { index: i, value: values[i] }));
        }
    }
    let basis = |values: &[f32]| {
        let rows = MatRef::from_row_major_slice(values, values.len() / columns, columns);
        LowRank::basis(&Mat::from_fn(columns, rows.nrows(), |i, j| f64::from(rows[(j, i)])), "rows")
    };
    Ok(of_bases(&basis(a)?, &basis(b)?))
}

fn of_bases(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let least = a.ncols().min(b.ncols());
    if least == 0 { 0.0 } else { (a.transpose() * b).squared_norm_l2() / least as f64 }
}

/// Compares two adapters from their factors, without forming their product.
///
/// # Errors
/// Returns [`Error::Problems`] if a module has different shapes in the two adapters, and an error if opening or reading
/// fails.
pub fn compare(a: &Path, b: &Path) -> Result<AdapterDiff, Error> {
    let adapters = open(&[PathBuf::from(a), PathBuf::from(b)])?;
    let mut problems = Vec::new();
    let set = Set::new(&adapters, &[], &mut problems);
    if !problems.is_empty() {
        return Err(Error::Problems(problems));
    }
    let sums: Vec<Result<Sums, Error>> = set.modules.par_iter().map(|module| sums(&set, module)).collect();
    let sums: Vec<Sums> = sums.into_iter().collect::<Result<_, _>>()?;
    let both = |module: &Module| module.parts.len() == 2;
    let only = |member: usize| {
        let alone = set.modules.iter().filter(|m| !both(m) && m.parts[0].member == member);
        alone.map(|m| m.name.clone()).collect::<Vec<_>>()
    };
    let pairs = set.modules.iter().zip(&sums).filter(|(module, _)| both(module));
    let modules: Vec<ModuleDiff> = pairs.map(|(module, sums)| sums.diff(&module.name)).collect();
    let mut all = sums.iter().fold(Sums::default(), |all, sums| all.plus(sums));
    let count = modules.len().max(1) as f64;
    all.overlaps = all.overlaps.map(|overlap| overlap / count);
    let mut notes = set.notes.clone();
    if adapters.iter().any(|adapter| adapter.config().use_dora) {
        notes.push("of DoRA only the factors are compared, not the magnitudes".to_owned());
    }
    if !set.wholes.is_empty() {
        notes.push(format!("{} tensors other than LoRA factors are not compared", set.wholes.len()));
    }
    Ok(AdapterDiff { total: all.diff(""), modules, only_a: only(0), only_b: only(1), notes })
}

#[derive(Clone, Copy, Default)]
struct Sums {
    aa: f64,
    bb: f64,
    ab: f64,
    dd: f64,
    /// Overlaps of A and of B.
    overlaps: [f64; 2],
}

impl Sums {
    fn plus(self, other: &Sums) -> Sums {
        let overlaps = [0, 1].map(|i| self.overlaps[i] + other.overlaps[i]);
        Sums {
            aa: self.aa + other.aa,
            bb: self.bb + other.bb,
            ab: self.ab + other.ab,
            dd: self.dd + other.dd,
            overlaps,
        }
    }

    fn diff(&self, module: &str) -> ModuleDiff {
        ModuleDiff {
            module: module.to_owned(),
            norm_a: self.aa.sqrt(),
            norm_b: self.bb.sqrt(),
            norm_diff: self.dd.sqrt(),
            cosine: cosine(self.aa, self.bb, self.ab),
            overlap_a: self.overlaps[0],
            overlap_b: self.overlaps[1],
        }
    }
}

fn sums(set: &Set<'_>, module: &Module) -> Result<Sums, Error> {
    // Without the scaling: even if the scaling is zero, the factors still span their subspaces.
    let (mut of_member, mut plain) = ([None, None], [None, None]);
    for part in &module.parts {
        let update = set.load(part)?;
        of_member[part.member] = Some(LowRank::of(part.scaling, &update));
        plain[part.member] = Some(LowRank::of(1.0, &update));
    }
    match of_member {
        [Some(a), Some(b)] => {
            let [Some(plain_a), Some(plain_b)] = plain else { unreachable!("as many as those") };
            let difference = a.minus(&b).singular_values(&module.name)?;
            let overlap = |x: &Mat<f64>, y: &Mat<f64>| {
                Ok::<f64, Error>(of_bases(&LowRank::basis(x, &module.name)?, &LowRank::basis(y, &module.name)?))
            };
            let left = overlap(&plain_a.left, &plain_b.left)?;
            let right = overlap(&plain_a.right, &plain_b.right)?;
            let embedding = module.kind == cl_checkpoint::LayerKind::Embedding;
            Ok(Sums {
                aa: a.energy(),
                bb: b.energy(),
                ab: a.inner(&b),
                dd: difference.iter().map(|s| s * s).sum(),
                overlaps: if embedding { [left, right] } else { [right, left] },
            })
        }
        [Some(a), None] => Ok(Sums { aa: a.energy(), dd: a.energy(), ..Sums::default() }),
        [None, Some(b)] => Ok(Sums { bb: b.energy(), dd: b.energy(), ..Sums::default() }),
        [None, None] => Ok(Sums::default()),
    }
}
