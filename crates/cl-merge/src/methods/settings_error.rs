//! Errors in the settings of a method.

/// An error in the settings of a method.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// A parameter is missing or has the wrong type.
    #[error("{}", .0.to_string().trim())]
    Unreadable(Box<toml::de::Error>),
    /// A list or a table is neither a gradient nor a set of filters.
    #[error("`{parameter}`: {}", source.to_string().trim())]
    Varying {
        /// The parameter.
        parameter: String,
        /// The parser's error.
        r#source: Box<toml::de::Error>,
    },
    /// A value cannot be represented in TOML.
    #[error(transparent)]
    NotToml(#[from] toml::ser::Error),
    /// A required parameter is missing.
    #[error("{method} needs `{parameter}`, {hint}")]
    Missing {
        /// The method.
        method: &'static str,
        /// The parameter.
        parameter: &'static str,
        /// Its meaning, or a usual value.
        hint: &'static str,
    },
    /// Weights are to be divided by their sum, which is zero.
    #[error("the weights sum to zero; set `{switch}` to false, or other weights")]
    WeightsSumToZero {
        /// The parameter that makes them sum to one.
        switch: &'static str,
    },
    /// A method for two models was given another number of models.
    #[error("{method} takes exactly two models")]
    NotTwoModels {
        /// The method.
        method: &'static str,
    },
    /// DELLA's probabilities are not between 0 and 1.
    #[error("density {density} ± epsilon {epsilon} must be between 0 and 1; choose a smaller epsilon")]
    DensitySpan {
        /// The mean probability.
        density: f64,
        /// Half of the range of probabilities.
        epsilon: f64,
    },
    /// A parameter does not name one of the models.
    #[error(
        "`{parameter}` is `{name}`, which is not one of the models; use the path or name of a model as written in the \
         file"
    )]
    NotAModel {
        /// The parameter.
        parameter: &'static str,
        /// The name.
        name: String,
    },
    /// The error message of a custom method.
    #[error("{0}")]
    Custom(String),
}

impl From<toml::de::Error> for SettingsError {
    fn from(error: toml::de::Error) -> SettingsError {
        SettingsError::Unreadable(Box::new(error))
    }
}
