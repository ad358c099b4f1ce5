use serde::Serialize;

use super::options::Space;

/// Result for one module, or for all modules together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ModuleReport {
    /// Name of the module; empty for all modules together.
    pub module: String,
    /// Rank of the output.
    pub rank: usize,
    /// `‖ΔW‖` before truncation and rounding.
    pub norm: f64,
    /// `‖kept‖² / ‖ΔW‖²`; 1 if the update is zero. In the space of factors, the energy of the written update relative
    /// to that of the weighted sum `Σ wᵢΔWᵢ`.
    pub energy: f64,
    /// `‖ΔW − written‖ / ‖ΔW‖`, including rounding. In the space of factors, the distance from the weighted sum.
    pub relative_error: f64,
}

/// Report of a combination.
#[derive(Clone, Debug, Serialize)]
pub struct CombineReport {
    /// The method.
    pub method: String,
    /// The quantity that was combined.
    pub space: Space,
    /// The adapters, in the order of computation.
    pub adapters: Vec<String>,
    /// Modules by name.
    pub modules: Vec<ModuleReport>,
    /// All modules together; its rank is the largest.
    pub total: ModuleReport,
    /// Other trained tensors that were combined.
    pub whole: Vec<WholeReport>,
    /// Number of elements written.
    pub parameters: usize,
    /// Notes.
    pub notes: Vec<String>,
}

/// A combined tensor that is not a factor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WholeReport {
    /// Name of the tensor in the base.
    pub tensor: String,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Norm of the difference from the base's values; for the bias of an update, its norm.
    pub norm: f64,
}
