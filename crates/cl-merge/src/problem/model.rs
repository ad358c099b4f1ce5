//! Models that do not fit together.

use cl_checkpoint::Dtype;
use serde_json::Value;

use super::Joint;

/// What is wrong with models, between each other or with one of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelProblem {
    /// A key of `config.json` on which weights depend has another value than in the reference.
    #[error("`{key}` is {value} in config.json, {of_reference} in {reference}")]
    ConfigDiffers {
        /// The key.
        key: &'static str,
        /// Its value here.
        value: Value,
        /// The model that it is compared with.
        reference: String,
        /// Its value there.
        of_reference: Value,
    },
    /// A model that was saved without its head.
    #[error(
        "was saved from the bare model: its names lack `{prefix}`, which those of {whole} begin with, and it has no head; save it \
         from the whole one (AutoModelForCausalLM)"
    )]
    BareModel {
        /// What its names lack.
        prefix: &'static str,
        /// A model whose names have it.
        whole: String,
    },
    /// A pointer to the weights instead of the weights.
    #[error("is a Git LFS pointer instead of weights; run `git lfs pull` in its directory")]
    LfsPointer,
    /// No output head, and embeddings that are not tied, where another model has a head.
    #[error(
        "has no lm_head.weight, {reference} has one; if its embeddings are its output head, set tie_word_embeddings to true in its \
         config.json, otherwise save it with its head"
    )]
    HeadMissing {
        /// The model with a head.
        reference: String,
    },
    /// Tensors that the reference has and this model lacks.
    #[error(
        "lacks {} tensor(s) that {reference} has: {}; set `extra_tensors` to \"base\" or \"union\" to copy them from the one that has them",
        tensors.len(), list(tensors)
    )]
    TensorsMissing {
        /// Their names.
        tensors: Vec<String>,
        /// The model that has them.
        reference: String,
    },
    /// Tensors that this model has and the reference lacks.
    #[error(
        "has {} tensor(s) that {reference} lacks: {}; set `extra_tensors` to \"base\" to leave them out, or to \"union\" to copy them",
        tensors.len(), list(tensors)
    )]
    TensorsAdded {
        /// Their names.
        tensors: Vec<String>,
        /// The model that lacks them.
        reference: String,
    },
    /// Tensors of slices that a model lacks.
    #[error("lacks {}", if let [one] = &tensors[..] { format!("tensor `{one}`") } else { format!("{} tensors (`{}`, …)", tensors.len(), tensors[0]) })]
    LacksTensors {
        /// Their names, at least one.
        tensors: Vec<String>,
    },
    /// Several stacks of layers in a source of slices.
    #[error(
        "has {} stacks of layers: {}; `slices` cannot say which of them is meant, so they take models with one stack only. Merge \
         whole models with `models`",
        stacks.len(), stacks.iter().map(|(prefix, layers)| format!("`{prefix}` with {layers}")).collect::<Vec<_>>().join(", ")
    )]
    SeveralStacks {
        /// What their names begin with, and how many layers they have.
        stacks: Vec<(String, usize)>,
    },
    /// Weights of eight bits with scales of their own: those of a quantized model.
    #[error(
        "its weights have eight bits and mean something only times scales such as `{scale}`; convert the model to bf16 first"
    )]
    ScaledWeights {
        /// A tensor of scales.
        scale: String,
    },
    /// A tensor that cannot be merged in one of the models, and can in others.
    #[error("{dtype:?} in {model}, elsewhere {elsewhere:?}")]
    MixedDtypes {
        /// Its element type that cannot be merged.
        dtype: Dtype,
        /// The model.
        model: String,
        /// Its element type in the reference.
        elsewhere: Dtype,
    },
    /// A tensor that cannot be merged, and is not the same everywhere.
    #[error("{dtype:?} cannot be merged, and differs between {} and {}", models[0], models[1])]
    CannotMerge {
        /// Its element type.
        dtype: Dtype,
        /// Two models.
        models: [String; 2],
    },
    /// A tensor of different shapes.
    #[error("has different shapes: {}", by_shape(shapes))]
    Shapes {
        /// Shapes, outermost dimension first, and the models that have them.
        shapes: Vec<(Vec<usize>, Vec<String>)>,
    },
    /// A token table of different lengths.
    #[error(
        "has different numbers of rows: {}; set `vocabulary` to \"common\" (rows that all have), \"base\" (the base's rows) or \
         \"keep\" (all rows)",
        by_shape(shapes)
    )]
    RowCounts {
        /// Shapes `[rows, columns]`, and the models that have them.
        shapes: Vec<(Vec<usize>, Vec<String>)>,
    },
    /// A tensor that no model has.
    #[error("has no source")]
    NoSource,
    /// `previous` without the state of an earlier merge.
    #[error("{source}; `previous` is the output of an earlier opcm merge")]
    NoState {
        /// Why it cannot be read.
        source: std::io::Error,
    },
    /// A state of an earlier merge that is not one.
    #[error(transparent)]
    State(serde_json::Error),
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(SHOWN);
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

fn by_shape(shapes: &[(Vec<usize>, Vec<String>)]) -> String {
    let each: Vec<String> = shapes.iter().map(|(shape, of)| format!("{shape:?} in {}", of.join(", "))).collect();
    each.join("; ")
}

impl ModelProblem {
    pub(super) fn joint(&self) -> Joint {
        match self {
            ModelProblem::Shapes { .. }
            | ModelProblem::RowCounts { .. }
            | ModelProblem::NoSource
            | ModelProblem::LfsPointer
            | ModelProblem::SeveralStacks { .. } => Joint::Sentence,
            _ => Joint::Colon,
        }
    }
}
