//! Why a method has no answer for a tensor.

use super::settings_error::SettingsError;

/// Why a method has no answer, and how to go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Undefined {
    /// No base. As in the next three, the field says what the method does with its inputs.
    #[error("{0}; name a base")]
    NoBase(&'static str),
    /// No base, or another number of models than one.
    #[error("{0}; name a base and one model")]
    NotOneModelOnBase(&'static str),
    /// Another number of models than two.
    #[error("{0}; name two")]
    NotTwoModels(&'static str),
    /// Another number of inputs than one.
    #[error("{0}; name one")]
    NotOneInput(&'static str),
    /// The angle between fewer than two task vectors.
    #[error("the angle between task vectors needs a base and at least two models")]
    NoAngle,
    /// A model by its number that is not there.
    #[error("the model whose mask is to be used is not among the models")]
    NoSuchModel {
        /// The number, from 0.
        model: usize,
    },
    /// Settings that have no meaning for these models.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Weighted directions whose mean is zero.
    #[error("the weighted directions of the models cancel out, so their mean has none; choose other weights")]
    DirectionsCancel,
    /// A state of an earlier merge without this tensor.
    #[error("the earlier merge's state has no such tensor; its models differ from these")]
    NotInState,
    /// A decomposition that did not converge.
    #[error("its singular values cannot be computed{}", if *.merging { "; merge this tensor by another method" } else { "" })]
    NoSingularValues {
        /// Whether models are merged, where another method is a way out.
        merging: bool,
    },
    /// DoRA's direction of zeros.
    #[error("{} {index} of the weight with its update is zero and has no direction", if *.column { "column" } else { "row" })]
    NoDirection {
        /// Whether it is a column; else a row.
        column: bool,
        /// Which, from 0.
        index: usize,
    },
    /// Values that do not fill rows.
    #[error("{values} values are no rows of {columns}")]
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
    /// What a method that is not built in has to say.
    #[error("{0}")]
    Custom(String),
}
