//! Descriptions of parameters, and the parameters shared by several methods.

/// Description of a parameter.
#[derive(Clone, Copy, Debug)]
pub struct ParameterInfo {
    /// Name in merge files.
    pub name: &'static str,
    /// Effect.
    pub meaning: &'static str,
    /// Valid values, in words.
    pub range: &'static str,
    /// Bounds of a numeric parameter.
    pub bounds: (f64, f64),
    /// Whether it can be set per model.
    pub per_model: bool,
}

impl ParameterInfo {
    /// A numeric parameter within `bounds`, with one value for all models.
    pub const fn number(
        name: &'static str,
        meaning: &'static str,
        range: &'static str,
        bounds: (f64, f64),
    ) -> ParameterInfo {
        ParameterInfo { name, meaning, range, bounds, per_model: false }
    }

    /// A parameter that is a word, a boolean or a path.
    pub const fn choice(name: &'static str, meaning: &'static str, range: &'static str) -> ParameterInfo {
        ParameterInfo { name, meaning, range, bounds: INFINITE, per_model: false }
    }

    /// The same parameter, but settable per model.
    pub const fn per_model(self) -> ParameterInfo {
        ParameterInfo { per_model: true, ..self }
    }
}

/// Bounds of any finite number.
pub(super) const INFINITE: (f64, f64) = (f64::MIN, f64::MAX);
/// Bounds of a fraction.
pub(super) const SHARE: (f64, f64) = (0.0, 1.0);

/// Parameters that several methods share.
pub(crate) const SHARED: &[ParameterInfo] = &[
    ParameterInfo::number("weight", "weight of the model", "a finite number", INFINITE).per_model(),
    ParameterInfo::number("density", "fraction of a task vector's entries to keep", "0 to 1", SHARE).per_model(),
    ParameterInfo::number("lambda", "scale of the merged task vector", "a finite number", INFINITE),
    ParameterInfo::number(
        "t",
        "interpolation between base (0) and model (1); nearswap: similarity threshold",
        "a finite number",
        INFINITE,
    ),
    ParameterInfo::choice("normalize", "divide by the sum of the weights that contribute", "true or false"),
    ParameterInfo::choice("int8_mask", "no effect; accepted for mergekit", "true or false"),
    ParameterInfo::choice(
        "rescale",
        "how to compensate for dropped entries",
        "none, density (1 / density), norm (keep the L1 norm)",
    ),
    ParameterInfo::choice(
        "election",
        "how to elect the sign of an entry",
        "unweighted, weighted (sums), count (of signs)",
    ),
    ParameterInfo::choice("divisor", "divisor of the sum", "none, weight, count (of the models that contribute)"),
];
