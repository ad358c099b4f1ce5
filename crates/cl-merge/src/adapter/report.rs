use serde::Serialize;

use super::options::Space;

/// What was written of a module, or of all together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ModuleReport {
    /// Its name; empty for all together.
    pub module: String,
    /// Rank of the output.
    pub rank: usize,
    /// `‖ΔW‖` before it was cut and rounded.
    pub norm: f64,
    /// `‖kept‖² / ‖ΔW‖²`; 1 where nothing was to be kept. In the space of factors the energy of what was written against
    /// that of the weighted sum `Σ wᵢΔWᵢ`.
    pub energy: f64,
    /// `‖ΔW − written‖ / ‖ΔW‖`, rounding included. In the space of factors the distance from the weighted sum.
    pub relative_error: f64,
}

/// What combining did.
#[derive(Clone, Debug, Serialize)]
pub struct CombineReport {
    /// The method.
    pub method: String,
    /// What was combined.
    pub space: Space,
    /// The adapters, in the order in which they were taken.
    pub adapters: Vec<String>,
    /// By name.
    pub modules: Vec<ModuleReport>,
    /// All modules together; its rank is the largest.
    pub total: ModuleReport,
    /// What was trained beside the factors and was combined, too.
    pub whole: Vec<WholeReport>,
    /// Numbers in the tensors that were written.
    pub parameters: usize,
    /// What one should know.
    pub notes: Vec<String>,
}

/// A tensor beside the factors that was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WholeReport {
    /// Its name in the base.
    pub tensor: String,
    /// Shape of what was written.
    pub shape: Vec<usize>,
    /// Norm of the difference from the base's values; of an update's own bias its norm.
    pub norm: f64,
}
