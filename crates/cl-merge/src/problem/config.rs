//! Merge files that contradict themselves, or a method.

use std::ops::RangeInclusive;

use super::Joint;

/// What is wrong with a merge file, whatever its models are.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// No method has this name.
    #[error("no method is called `{method}`; {}there are {}", if *.for_adapters { "for adapters " } else { "" }, known.join(", "))]
    UnknownMethod {
        /// The name.
        method: String,
        /// The names that there are.
        known: Vec<&'static str>,
        /// Whether these are the ones that combine adapters.
        for_adapters: bool,
    },
    /// A merge with a given method, of a file that names another one.
    #[error("the method is `{method}`, but the file names `{named}`")]
    OtherMethod {
        /// The given method.
        method: &'static str,
        /// The one in the file.
        named: String,
    },
    /// The method has no such parameter.
    #[error(
        "{method} has no parameter `{parameter}`{}; it has {}",
        similar(parameter, known).map_or(String::new(), |known| format!(" (did you mean `{known}`?)")),
        if known.is_empty() { "no parameters".to_owned() } else { known.join(", ") }
    )]
    UnknownParameter {
        /// The method.
        method: &'static str,
        /// The parameter.
        parameter: String,
        /// Those that it has.
        known: &'static [&'static str],
    },
    /// A parameter that all models share, given to one of them.
    #[error("`{parameter}` is one for all models; set it under the method")]
    SharedParameter {
        /// The parameter.
        parameter: String,
    },
    /// A number out of range.
    #[error("`{parameter}` is {value}; it has to be {range}")]
    OutOfRange {
        /// The parameter.
        parameter: &'static str,
        /// Its value.
        value: f64,
        /// The range, in words.
        range: &'static str,
    },
    /// NaN or an infinity.
    #[error("`{parameter}` is no finite number; it has to be {range}")]
    NotFinite {
        /// The parameter.
        parameter: &'static str,
        /// The range, in words.
        range: &'static str,
    },
    /// A gradient without values.
    #[error("`{parameter}` is an empty list")]
    EmptyList {
        /// The parameter.
        parameter: &'static str,
    },
    /// A density that varies between tensors, where the whole model is trimmed at once.
    #[error("a gradient or filter means nothing when the whole model is trimmed at once; set trim = \"tensor\"")]
    VaryingDensity,
    /// Both `models` and `slices`, or neither.
    #[error("set either `models` or `slices`")]
    ModelsOrSlices,
    /// The method needs a base.
    #[error("{method} needs a `base_model`")]
    NoBase {
        /// The method.
        method: &'static str,
    },
    /// Too few or too many models.
    #[error("{method} merges {} model(s){}, not {found}", wanted(models), if *.beside_base { " beside the base" } else { "" })]
    ModelCount {
        /// The method.
        method: &'static str,
        /// How many it takes.
        models: RangeInclusive<usize>,
        /// Whether a base comes on top.
        beside_base: bool,
        /// How many there are.
        found: usize,
    },
    /// A base that mergekit merges as one more model, where the method does not take as many.
    #[error(
        "{method} merges {} model(s), and mergekit merges `base_model` as one more; remove `base_model`",
        wanted(models)
    )]
    BaseIsModel {
        /// The method.
        method: &'static str,
        /// How many it takes.
        models: RangeInclusive<usize>,
    },
    /// A model twice in one slice.
    #[error("{model} is named twice")]
    NamedTwice {
        /// The model.
        model: String,
    },
    /// A range without layers.
    #[error("layer_range {range:?} is empty")]
    EmptyLayerRange {
        /// The first layer, and the one after the last.
        range: [usize; 2],
    },
    /// Sources of one slice with different numbers of layers.
    #[error("all sources need the same number of layers")]
    LayerCounts,
    /// A range beyond a model's layers.
    #[error("{model} has layers 0 to {layers}, not up to {end}")]
    LayersBeyond {
        /// The model.
        model: String,
        /// How many layers it has.
        layers: usize,
        /// Where the range ends.
        end: usize,
    },
    /// A slice whose base is none of its sources.
    #[error("`{base}` is the base and has to be among the sources")]
    BaseNotASource {
        /// The base.
        base: String,
    },
    /// A merge file without a merge.
    #[error("the file holds no merge")]
    NoMerge,
    /// A stage that no other can refer to.
    #[error("every stage but the last needs a `name`")]
    UnnamedStage,
    /// Two stages of one name.
    #[error("two stages are called `{name}`")]
    StageNamedTwice {
        /// The name.
        name: String,
    },
    /// A name that cannot be a directory's.
    #[error("`{name}` cannot be the name of a stage; use letters, digits, - and _")]
    StageName {
        /// The name.
        name: String,
    },
    /// A model that is the result of a later stage.
    #[error("`{stage}` is a stage that comes later")]
    LaterStage {
        /// The stage.
        stage: String,
    },
    /// A stage whose result is lost.
    #[error("no stage uses `{name}`; the last one is the result")]
    UnusedStage {
        /// Its name.
        name: String,
    },
}

/// The name that is most similar to an unknown one, if it could be a typing error: at most a third of its letters differ.
fn similar<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let distance = |other: &str| {
        // Levenshtein's distance, row by row.
        let mut row: Vec<usize> = (0..=other.chars().count()).collect();
        for (i, a) in name.chars().enumerate() {
            let mut diagonal = std::mem::replace(&mut row[0], i + 1);
            for (j, b) in other.chars().enumerate() {
                let best = (diagonal + usize::from(a != b)).min(row[j] + 1).min(row[j + 1] + 1);
                diagonal = std::mem::replace(&mut row[j + 1], best);
            }
        }
        row.last().copied().unwrap_or(0)
    };
    let (distance, nearest) = known.iter().map(|known| (distance(known), *known)).min()?;
    let letters = name.chars().count();
    (distance < letters && 3 * distance <= letters.max(3)).then_some(nearest)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_have_a_suggestion() {
        let known = ["weight", "density", "t", "lambda"];
        for (name, expected) in [("densty", "density"), ("wieght", "weight"), ("lamda", "lambda")] {
            assert_eq!(similar(name, &known), Some(expected));
        }
        for other in ["gamma_ray", "election", "filter_wise", "", "x_y_z"] {
            assert_eq!(similar(other, &known), None, "{other}");
        }
        assert_eq!(similar("density", &[]), None);
    }
}
