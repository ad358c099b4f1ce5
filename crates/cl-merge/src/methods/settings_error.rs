//! Why a method cannot be made of its settings.

/// What is missing or wrong in the settings of a method.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// A parameter that is missing, or of another type than the method reads.
    #[error("{}", .0.to_string().trim())]
    Unreadable(#[source] Box<toml::de::Error>),
    /// A list or a table that is neither a gradient nor filters.
    #[error("`{parameter}`: {}", source.to_string().trim())]
    Varying {
        /// The parameter.
        parameter: String,
        /// The parser's error.
        source: Box<toml::de::Error>,
    },
    /// A number beyond what TOML holds.
    #[error(transparent)]
    NotToml(#[from] toml::ser::Error),
    /// A parameter without which the method cannot do.
    #[error("{method} needs `{parameter}`, {hint}")]
    Missing {
        /// The method.
        method: &'static str,
        /// The parameter.
        parameter: &'static str,
        /// What it means, or a usual value.
        hint: &'static str,
    },
    /// Weights to be divided by their sum, which is zero.
    #[error("the weights sum to zero; set `{switch}` to false, or other weights")]
    WeightsSumToZero {
        /// The parameter that makes them sum to one.
        switch: &'static str,
    },
    /// A method of two models with another number of them.
    #[error("{method} merges two models")]
    NotTwoModels {
        /// The method.
        method: &'static str,
    },
    /// DELLA's probabilities beyond 0 or 1.
    #[error("density {density} ± epsilon {epsilon} has to lie between 0 and 1; choose a smaller epsilon")]
    DensitySpan {
        /// The mean.
        density: f64,
        /// Half of the span.
        epsilon: f64,
    },
    /// A parameter that has to name a model and does not.
    #[error("`{parameter}` is `{name}`, which is none of the models; give a path or name as written")]
    NotAModel {
        /// The parameter.
        parameter: &'static str,
        /// What it names.
        name: String,
    },
    /// What a method that is not built in has to say.
    #[error("{0}")]
    Custom(String),
}

impl From<toml::de::Error> for SettingsError {
    fn from(error: toml::de::Error) -> SettingsError {
        SettingsError::Unreadable(Box::new(error))
    }
}
