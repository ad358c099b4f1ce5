//! Reasons why a method is not defined for a tensor.

use super::settings_error::SettingsError;

/// The reason why a method is not defined for a tensor; the message says how to proceed if possible.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Undefined {
    /// No base. As in the next three, the field says what the method does with its inputs.
    #[error("{0}; specify a base")]
    NoBase(&'static str),
    /// No base, or a number of models other than one.
    #[error("{0}; specify a base and one model")]
    NotOneModelOnBase(&'static str),
    /// A number of models other than two.
    #[error("{0}; specify two models")]
    NotTwoModels(&'static str),
    /// A number of inputs other than one.
    #[error("{0}; specify one model")]
    NotOneInput(&'static str),
    /// No models.
    #[error("it merges the task vectors of models, and there are none")]
    NoModels,
    /// An angle between task vectors without a base or with fewer than two models.
    #[error("the angle between task vectors needs a base and at least two models")]
    NoAngle,
    /// The index of a model is out of range.
    #[error("the model whose mask is to be used is not among the models")]
    NoSuchModel {
        /// The index, starting at 0.
        model: usize,
    },
    /// A setting that each model has was given for another number of models.
    #[error("{found} values of `{setting}` for {models} models; it needs one per model")]
    NotOnePerModel {
        /// The setting.
        setting: &'static str,
        /// Number of values.
        found: usize,
        /// Number of models.
        models: usize,
    },
    /// Settings that are invalid for these models.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Weighted directions whose mean is zero.
    #[error("the weighted directions of the models cancel out, so their mean has no direction; choose other weights")]
    DirectionsCancel,
    /// The state of an earlier merge does not contain this tensor.
    #[error("the state of the earlier merge does not contain this tensor; that merge had different models")]
    NotInState,
    /// A decomposition that did not converge.
    #[error(
        "the computation of its singular values did not converge{}",
        if *.merging { "; merge this tensor by another method" } else { "" }
    )]
    NoSingularValues {
        /// Whether models are being merged, in which case another method can be used.
        merging: bool,
    },
    /// A row or column of zeros, for which DoRA's direction is undefined.
    #[error("{} {index} of the weight with its update is zero and has no direction", if *.column { "column" } else { "row" })]
    NoDirection {
        /// Whether it is a column; otherwise a row.
        column: bool,
        /// Index of the row or column, starting at 0.
        index: usize,
    },
    /// The number of values is not a multiple of the row length.
    #[error("{values} values cannot be divided into rows of {columns}")]
    NotRows {
        /// Number of values.
        values: usize,
        /// Length of a row.
        columns: usize,
    },
    /// A value that is NaN or an infinity.
    #[error("element {index} is {value}")]
    NotFinite {
        /// Flat index.
        index: usize,
        /// The value.
        value: f32,
    },
    /// The reason given by a custom method.
    #[error("{0}")]
    Custom(String),
}
