//! Problems with merge files: contradictions in the file, or with a method.

use std::ops::RangeInclusive;

use cl_checkpoint::files::similar;

use super::Joint;

/// A problem with a merge file that does not depend on its models.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// No method has this name.
    #[error(
        "no method is called `{method}`{}; {}there are {}",
        hint(method, known), if *.for_adapters { "for adapters " } else { "" }, known.join(", ")
    )]
    UnknownMethod {
        /// The unknown name.
        method: String,
        /// The existing names.
        known: Vec<&'static str>,
        /// Whether these are the methods for adapters.
        for_adapters: bool,
    },
    /// A method is added under a name that another method has.
    #[error("a method called `{method}` exists; choose another name")]
    MethodNamedTwice {
        /// The name.
        method: &'static str,
    },
    /// A method that is added lists a parameter that it does not describe.
    #[error("{method} lists the parameter `{parameter}` without describing it; add it to `own_parameters`")]
    NotDescribed {
        /// The method.
        method: &'static str,
        /// The parameter.
        parameter: &'static str,
    },
    /// The method has no such parameter.
    #[error(
        "{method} has no parameter `{parameter}`{}; it has {}",
        hint(parameter, known),
        if known.is_empty() { "no parameters".to_owned() } else { known.join(", ") }
    )]
    UnknownParameter {
        /// The method.
        method: &'static str,
        /// The parameter.
        parameter: String,
        /// The parameters that it has.
        known: &'static [&'static str],
    },
    /// A parameter that applies to all models is set for one of them.
    #[error("`{parameter}` cannot be set for a single model; set it under the method")]
    SharedParameter {
        /// The parameter.
        parameter: String,
    },
    /// A number is out of range.
    #[error("`{parameter}` is {value}; it must be {range}")]
    OutOfRange {
        /// The parameter.
        parameter: &'static str,
        /// Its value.
        value: f64,
        /// The range, in words.
        range: &'static str,
    },
    /// A number is NaN or infinite.
    #[error("`{parameter}` is not a finite number; it must be {range}")]
    NotFinite {
        /// The parameter.
        parameter: &'static str,
        /// The range, in words.
        range: &'static str,
    },
    /// A gradient has no values.
    #[error("`{parameter}` is an empty list")]
    EmptyList {
        /// The parameter.
        parameter: &'static str,
    },
    /// The density varies between tensors although the whole model is trimmed at once.
    #[error(
        "trimming over the whole model needs a single density, not a gradient or filters; set trim = \"tensor\" for these"
    )]
    VaryingDensity,
    /// Both `models` and `slices` are set, or neither.
    #[error("set either `models` or `slices`")]
    ModelsOrSlices,
    /// The method needs a base.
    #[error("{method} needs a `base_model`")]
    NoBase {
        /// The method.
        method: &'static str,
    },
    /// There are too few or too many models.
    #[error(
        "{method} merges {} model(s){}, not {found}",
        wanted(models),
        if *.beside_base { " in addition to the base" } else { "" }
    )]
    ModelCount {
        /// The method.
        method: &'static str,
        /// The number of models that it takes.
        models: RangeInclusive<usize>,
        /// Whether the base is not counted among them.
        beside_base: bool,
        /// The number of models in the file.
        found: usize,
    },
    /// mergekit merges the base as one more model, but the method does not take as many.
    #[error(
        "{method} merges {} model(s), but under the profile mergekit, `base_model` is an additional input; remove \
         `base_model`",
        wanted(models)
    )]
    BaseIsModel {
        /// The method.
        method: &'static str,
        /// The number of models that it takes.
        models: RangeInclusive<usize>,
    },
    /// A model is listed twice in one slice.
    #[error("{model} is listed twice")]
    NamedTwice {
        /// The model.
        model: String,
    },
    /// A layer range is empty.
    #[error("layer_range {range:?} is empty")]
    EmptyLayerRange {
        /// The first layer, and the one after the last.
        range: [usize; 2],
    },
    /// The sources of a slice have different numbers of layers.
    #[error("all sources need the same number of layers")]
    LayerCounts,
    /// A layer range exceeds a model's layers.
    #[error("layer_range ends at {end}, but {model} has only {layers} layers")]
    LayersBeyond {
        /// The model.
        model: String,
        /// The number of its layers.
        layers: usize,
        /// The end of the range, exclusive.
        end: usize,
    },
    /// The base of a slice is not one of its sources.
    #[error("`{base}` is the base, so it must be one of the sources")]
    BaseNotASource {
        /// The base.
        base: String,
    },
    /// A merge file has no merge.
    #[error("the file does not contain a merge")]
    NoMerge,
    /// A stage other than the last has no name.
    #[error("every stage but the last needs a `name`")]
    UnnamedStage,
    /// Two stages have the same name.
    #[error("two stages are called `{name}`")]
    StageNamedTwice {
        /// The name.
        name: String,
    },
    /// The name of a stage is not valid as the name of a directory.
    #[error("`{name}` cannot be the name of a stage; use letters, digits, - and _")]
    StageName {
        /// The name.
        name: String,
    },
    /// A model is the result of a later stage.
    #[error("`{stage}` is a later stage; a stage can use only earlier stages")]
    LaterStage {
        /// The stage.
        stage: String,
    },
    /// No stage uses the result of a stage other than the last.
    #[error("the result of stage `{name}` is not used; only the last stage is written to the output")]
    UnusedStage {
        /// The name of the stage.
        name: String,
    },
}

/// Suggests the known name that an unknown one was probably meant to be.
fn hint(name: &str, known: &[&str]) -> String {
    similar(name, known).map_or_else(String::new, |known| format!(" (did you mean `{known}`?)"))
}

fn wanted(models: &RangeInclusive<usize>) -> String {
    match (models.start(), models.end()) {
        (least, most) if least == most => format!("exactly {least}"),
        (least, &usize::MAX) => format!("at least {least}"),
        (least, most) => format!("{least} to {most}"),
    }
}

impl ConfigProblem {
    pub(super) fn joint(&self) -> Joint {
        Joint::Colon
    }
}
