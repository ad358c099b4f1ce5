//! The methods, one file each. Those that share an equation share its code.

mod arcee_fusion;
mod consensus;
mod gram;
mod iso_c;
mod karcher;
mod knots;
mod linear;
mod magmax;
mod model_stock;
mod multislerp;
mod nearswap;
mod nuslerp;
mod opcm;
mod passthrough;
mod sce;
mod slerp;
mod svd;
mod task_vectors;
mod tsv;

pub use arcee_fusion::ArceeFusion;
pub use consensus::ConsensusMerging;
pub use iso_c::{IsoC, IsoCts};
pub use karcher::Karcher;
pub use knots::Knots;
pub use linear::Linear;
pub use magmax::MagMax;
pub use model_stock::ModelStock;
pub use multislerp::MultiSlerp;
pub use nearswap::Nearswap;
pub use nuslerp::NuSlerp;
pub use opcm::{Opcm, OpcmNorms, OpcmState, OpcmTensor, Projection};
pub use passthrough::Passthrough;
pub use sce::Sce;
pub use slerp::Slerp;
pub(crate) use task_vectors::kept;
pub use task_vectors::{Consensus, Divisor, Rescale, Sign, Sparsify, TaskVectors};
pub use tsv::Tsv;

use crate::{Error, TensorGroup};

/// The error of a method that has no answer for a tensor.
fn undefined(group: &TensorGroup<'_>, method: &'static str, message: &str) -> Error {
    Error::Undefined { tensor: group.name.to_owned(), method, message: message.to_owned() }
}

/// Merges values in memory, on one thread and on several, which has to give the same bits.
#[cfg(test)]
fn merged(
    method: &dyn crate::MergeMethod,
    shape: &[usize],
    base: Option<&[f32]>,
    models: &[&[f32]],
) -> Result<Vec<f32>, Error> {
    let base = base.map(|x| crate::Values::from_slice("base", x));
    let models: Vec<_> = models.iter().map(|x| crate::Values::from_slice("model", x)).collect();
    let mut group = TensorGroup { name: "w", shape, base, models, parallel: false, model_trims: None };
    let serial = crate::merge_tensor(method, &group)?;
    group.parallel = true;
    assert_eq!(serial, crate::merge_tensor(method, &group)?);
    Ok(serial)
}
