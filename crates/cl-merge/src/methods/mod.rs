//! The merge methods, one per file, and the list of all methods. Methods with a common equation share its
//! implementation.

mod arcee_fusion;
mod breadcrumbs;
mod consensus;
mod dare;
mod della;
mod eigen;
mod gram;
mod info;
mod iso_c;
mod karcher;
mod knots;
mod linear;
mod magmax;
mod method;
mod model_stock;
mod multislerp;
mod nearswap;
mod nuslerp;
mod opcm;
mod opcm_state;
mod parameters;
mod passthrough;
mod ram;
mod ranked;
mod sce;
mod settings;
mod settings_error;
mod slerp;
mod svd;
mod task_arithmetic;
mod task_vector_settings;
mod task_vectors;
#[cfg(test)]
mod testing;
mod ties;
mod tsv;
mod undefined;

pub use arcee_fusion::ArceeFusion;
pub use cl_checkpoint::Profile;
pub use consensus::ConsensusMerging;
pub use info::{Base, Build, MethodInfo};
pub use iso_c::{IsoC, IsoCts};
pub use karcher::Karcher;
pub use knots::Knots;
pub use linear::Linear;
pub use magmax::MagMax;
pub use method::{Measured, MergeMethod, MergePieces, merge_tensor};
pub(crate) use method::{held_bytes, merge_runs};
pub use model_stock::ModelStock;
pub use multislerp::MultiSlerp;
pub use nearswap::Nearswap;
pub use nuslerp::NuSlerp;
pub use opcm::{Opcm, Projection};
pub use opcm_state::{OpcmNorms, OpcmState, OpcmTensor};
pub use parameters::ParameterInfo;
pub(crate) use parameters::SHARED;
pub use passthrough::Passthrough;
pub use ram::Ram;
pub use sce::Sce;
pub use settings::{Defaults, TensorSettings};
pub use settings_error::SettingsError;
pub use slerp::Slerp;
pub use task_vector_settings::Election;
pub use task_vectors::{Consensus, Divisor, Rescale, Sign, Sparsify, TaskVectors};
pub use ties::Trimmed;
pub(crate) use ties::whole_model_trim;
pub use tsv::Tsv;
pub use undefined::Undefined;

/// All methods, in the order in which they are listed. New methods are added here.
pub const METHODS: &[MethodInfo] = &[
    linear::INFO,
    slerp::INFO,
    nuslerp::INFO,
    multislerp::INFO,
    karcher::INFO,
    task_arithmetic::INFO,
    ties::INFO,
    dare::LINEAR,
    dare::TIES,
    della::TIES,
    della::LINEAR,
    breadcrumbs::LINEAR,
    breadcrumbs::TIES,
    sce::INFO,
    model_stock::INFO,
    nearswap::INFO,
    arcee_fusion::INFO,
    passthrough::INFO,
    tsv::INFO,
    iso_c::ISO_C,
    iso_c::ISO_CTS,
    knots::INFO,
    consensus::INFO,
    magmax::INFO,
    opcm::INFO,
    ram::RAM,
    ram::RAM_PLUS,
];
