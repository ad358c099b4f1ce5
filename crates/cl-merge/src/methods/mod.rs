//! The methods, one file each. Those that share an equation share its code.

mod arcee_fusion;
mod consensus;
mod gram;
mod iso_c;
mod karcher;
mod knots;
mod linear;
mod magmax;
mod method;
mod model_stock;
mod multislerp;
mod nearswap;
mod norms;
mod nuslerp;
mod opcm;
mod passthrough;
mod sce;
mod slerp;
mod svd;
mod task_vectors;
#[cfg(test)]
mod testing;
mod tsv;

pub use arcee_fusion::ArceeFusion;
pub use consensus::ConsensusMerging;
pub use iso_c::{IsoC, IsoCts};
pub use karcher::Karcher;
pub use knots::Knots;
pub use linear::Linear;
pub use magmax::MagMax;
pub(crate) use method::merge_runs;
pub use method::{MergeMethod, MergePieces, merge_tensor};
pub use model_stock::ModelStock;
pub use multislerp::MultiSlerp;
pub use nearswap::Nearswap;
pub use norms::OpcmNorms;
pub use nuslerp::NuSlerp;
pub use opcm::{Opcm, OpcmState, OpcmTensor, Projection};
pub use passthrough::Passthrough;
pub use sce::Sce;
pub use slerp::Slerp;
pub use task_vectors::{Consensus, Divisor, Rescale, Sign, Sparsify, TaskVectors};
pub use tsv::Tsv;
