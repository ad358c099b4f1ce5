//! Problems with models: with a single model, or incompatible models.

use cl_checkpoint::Dtype;
use serde_json::Value;

use super::Joint;

/// A problem with a model, or between models.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelProblem {
    /// A key of `config.json` that determines the meaning of weights has another value than in the reference.
    #[error("`{key}` is {value} in config.json, but {of_reference} in {reference}")]
    ConfigDiffers {
        /// The key.
        key: &'static str,
        /// Its value in this model.
        value: Value,
        /// The model that it is compared with.
        reference: String,
        /// Its value in the reference.
        of_reference: Value,
    },
    /// A model was saved without its head, as the bare model.
    #[error(
        "was saved without its output head: its tensor names do not start with `{prefix}`, unlike those of {whole}; \
         save it as a complete model (AutoModelForCausalLM)"
    )]
    BareModel {
        /// The prefix that its tensor names lack.
        prefix: &'static str,
        /// A model whose tensor names have it.
        whole: String,
    },
    /// A model has neither a head nor tied embeddings, but another model has a head.
    #[error(
        "has no lm_head.weight, but {reference} has one; if its output head is tied to its embedding, set \
         tie_word_embeddings to true in its config.json, otherwise save it with its head"
    )]
    HeadMissing {
        /// The model with a head.
        reference: String,
    },
    /// Tensors of the reference are missing from this model.
    #[error(
        "lacks {} tensor(s) that {reference} has: {}; to copy them from a model that has them, set `extra_tensors` to \
         \"base\" or \"union\"",
        tensors.len(), list(tensors)
    )]
    TensorsMissing {
        /// Their names.
        tensors: Vec<String>,
        /// The model that has them.
        reference: String,
    },
    /// Tensors of this model are missing from the reference.
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
    /// Tensors of a slice are missing from a model.
    #[error("lacks {}", if let [one] = &tensors[..] { format!("tensor `{one}`") } else { format!("{} tensors (`{}`, …)", tensors.len(), tensors[0]) })]
    LacksTensors {
        /// Their names, at least one.
        tensors: Vec<String>,
    },
    /// A source of slices has several layer stacks.
    #[error(
        "has {} stacks of layers: {}; `slices` supports only models with a single stack. Merge whole models with \
         `models`",
        stacks.len(), stacks.iter().map(|(prefix, layers)| format!("`{prefix}` with {layers}")).collect::<Vec<_>>().join(", ")
    )]
    SeveralStacks {
        /// Prefix and number of layers of each stack.
        stacks: Vec<(String, usize)>,
    },
    /// A model has 8-bit weights with separate scales, so it is quantized.
    #[error("its 8-bit weights are quantized with separate scales such as `{scale}`; convert the model to bf16 first")]
    ScaledWeights {
        /// The name of a tensor of scales.
        scale: String,
    },
    /// A tensor has a dtype that cannot be merged in one model, but one that can in others.
    #[error("{dtype:?} in {model}, but {elsewhere:?} in other models")]
    MixedDtypes {
        /// The dtype that cannot be merged.
        dtype: Dtype,
        /// The model.
        model: String,
        /// Its dtype in the reference.
        elsewhere: Dtype,
    },
    /// A tensor cannot be merged, and differs between models.
    #[error("{dtype:?} cannot be merged, and differs between {} and {}", models[0], models[1])]
    CannotMerge {
        /// Its dtype.
        dtype: Dtype,
        /// Two models in which it differs.
        models: [String; 2],
    },
    /// A tensor has different shapes.
    #[error("has different shapes: {}", by_shape(shapes))]
    Shapes {
        /// Shapes, outermost dimension first, and the models that have them.
        shapes: Vec<(Vec<usize>, Vec<String>)>,
    },
    /// A token table has different numbers of rows.
    #[error(
        "has different numbers of rows: {}; set `vocabulary` to \"common\" (rows that all models have), \"base\" (the \
         base's rows) or \"keep\" (all rows)",
        by_shape(shapes)
    )]
    RowCounts {
        /// Shapes `[rows, columns]`, and the models that have them.
        shapes: Vec<(Vec<usize>, Vec<String>)>,
    },
    /// No model has this tensor.
    #[error("is in none of the models")]
    NoSource,
    /// `previous` has no state of an earlier merge.
    #[error("{source}; `previous` is the output of an earlier opcm merge")]
    NoState {
        /// The error of reading it.
        r#source: std::io::Error,
    },
    /// The state of an earlier merge is invalid.
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
            | ModelProblem::SeveralStacks { .. } => Joint::Sentence,
            _ => Joint::Colon,
        }
    }
}
