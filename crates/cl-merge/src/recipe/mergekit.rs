//! mergekit's YAML, read as it is. What of it has no counterpart here is an error that names it, never left out in silence.

use serde::Deserialize;
use serde_json::Value;

use super::config::{
    ExtraTensors, FloatType, MergeConfig, MergeFile, MethodConfig, ModelConfig, Parameters, SliceConfig, SliceSource,
    Vocabulary,
};
use crate::methods::Profile;

/// One document.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    name: Option<String>,
    merge_method: String,
    base_model: Option<Model>,
    models: Option<Vec<InputModel>>,
    slices: Option<Vec<Slice>>,
    modules: Option<Value>,
    parameters: Option<Parameters>,
    dtype: Option<FloatType>,
    out_dtype: Option<FloatType>,
    tokenizer_source: Option<String>,
    tokenizer: Option<Tokenizer>,
    chat_template: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InputModel {
    model: Model,
    parameters: Option<Parameters>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Slice {
    sources: Vec<Source>,
    base_model: Option<Model>,
    residual_weight: Option<f64>,
    parameters: Option<Parameters>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    model: Model,
    layer_range: [usize; 2],
    parameters: Option<Parameters>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokenizer {
    source: Option<String>,
    tokens: Option<Value>,
    pad_to_multiple_of: Option<u64>,
}

/// A path, or mergekit's long form of it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "the path of a model")]
enum Model {
    Path(String),
    Long(LongModel),
}

#[derive(Deserialize)]
struct LongModel {
    model: LongPath,
    lora: Option<Value>,
    override_architecture: Option<Value>,
}

#[derive(Deserialize)]
struct LongPath {
    path: String,
    revision: Option<String>,
}

/// Reads one merge, or several documents, of which later ones may name earlier ones.
pub(crate) fn from_yaml(text: &str) -> Result<MergeFile, String> {
    let documents: Vec<Document> = serde_saphyr::from_multiple(text).map_err(|e| told(&e.to_string()))?;
    if documents.is_empty() {
        return Err("the file is empty".to_owned());
    }
    let mut stages = Vec::new();
    let mut problems = Vec::new();
    for document in documents {
        stages.push(stage(document, &mut problems));
    }
    // The one without a name is the result.
    stages.sort_by_key(|stage: &MergeConfig| stage.name.is_none());
    if problems.is_empty() { Ok(MergeFile { stages }) } else { Err(problems.join("\n  ")) }
}

/// The first line of the parser's message, without its advice to programmers and its picture of the text.
fn told(message: &str) -> String {
    const LONGEST: usize = 300;
    let first = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
    let plain = first
        .replace(", set DuplicateKeyPolicy in Options if acceptable", "; keep one of the two")
        .replace("recursive references require weak recursion types", "an anchor holds itself; write the value out");
    plain.chars().take(LONGEST).collect()
}

fn stage(document: Document, problems: &mut Vec<String>) -> MergeConfig {
    let mut refuse = |set: bool, what: &str| {
        if set {
            problems.push(format!("{what} is not supported; remove it"));
        }
    };
    refuse(document.modules.is_some(), "`modules`");
    refuse(document.chat_template.is_some(), "`chat_template`");
    let tokenizer = document.tokenizer.as_ref();
    refuse(tokenizer.is_some_and(|t| t.tokens.is_some()), "`tokenizer.tokens`");
    refuse(tokenizer.is_some_and(|t| t.pad_to_multiple_of.is_some()), "`tokenizer.pad_to_multiple_of`");
    let tokenizer_source = document.tokenizer_source.or(document.tokenizer.and_then(|t| t.source));
    refuse(tokenizer_source.as_deref() == Some("union"), "`tokenizer_source: union`");
    let slices = document.slices.unwrap_or_default();
    refuse(slices.iter().any(|s| s.residual_weight.is_some()), "`residual_weight`");
    let mut path = |model: Model| match model {
        Model::Path(path) => path,
        Model::Long(long) => {
            refuse(long.lora.is_some_and(|v| !v.is_null()), "`lora` of a model");
            refuse(long.override_architecture.is_some_and(|v| !v.is_null()), "`override_architecture`");
            refuse(long.model.revision.is_some(), "`revision` of a model");
            long.model.path
        }
    };
    let models = document.models.unwrap_or_default();
    MergeConfig {
        name: document.name,
        profile: Profile::Mergekit,
        base_model: document.base_model.map(&mut path),
        models: models
            .into_iter()
            .map(|m| ModelConfig { model: path(m.model), name: None, parameters: m.parameters.unwrap_or_default() })
            .collect(),
        slices: slices
            .into_iter()
            .map(|s| SliceConfig {
                sources: s
                    .sources
                    .into_iter()
                    .map(|source| SliceSource {
                        model: path(source.model),
                        layer_range: source.layer_range,
                        parameters: source.parameters.unwrap_or_default(),
                    })
                    .collect(),
                base_model: s.base_model.map(&mut path),
                parameters: s.parameters.unwrap_or_default(),
            })
            .collect(),
        method: MethodConfig { name: document.merge_method, parameters: document.parameters.unwrap_or_default() },
        dtype: document.out_dtype.or(document.dtype),
        seed: 42,
        // With a tokenizer of its own mergekit gives tokens that a model lacks the base's rows.
        vocabulary: if tokenizer_source.is_some() { Vocabulary::Base } else { Vocabulary::Error },
        extra_tensors: ExtraTensors::default(),
        tokenizer_source,
        ignore_tokenizers: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::parameter::Parameter;

    #[test]
    fn a_typical_file_is_read_as_it_is() {
        let text = "
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
";
        let file = from_yaml(text).unwrap();
        let stage = &file.stages[0];
        assert_eq!((stage.method.name.as_str(), stage.profile), ("slerp", Profile::Mergekit));
        assert_eq!(stage.slices[0].sources[1].layer_range, [0, 40]);
        assert_eq!(stage.dtype, Some(FloatType::Float16));
        let t = stage.method.parameters.t.as_ref().unwrap();
        assert_eq!(t.resolve("model.layers.20.self_attn.q_proj.weight", 0.25), Some(0.5));
        assert_eq!(t.resolve("model.layers.20.mlp.up_proj.weight", 0.0), Some(1.0));
        assert_eq!(t.resolve("model.norm.weight", 0.0), Some(0.5));
    }

    #[test]
    fn stages_booleans_long_models_and_the_base_tokenizer() {
        let text = "
name: first
merge_method: dare_ties
base_model: {model: {path: base}}
tokenizer_source: base
models:
  - model: base
  - model: a
    parameters: {weight: 0.5, density: 0.53}
parameters: {rescale: true, int8_mask: true, normalize: false}
---
merge_method: linear
models:
  - model: first
    parameters: {weight: 1}
out_dtype: bfloat16
dtype: float32
";
        let file = from_yaml(text).unwrap();
        assert_eq!(file.stages[0].base_model.as_deref(), Some("base"));
        assert_eq!(file.stages[0].vocabulary, Vocabulary::Base);
        assert_eq!(file.stages[0].models[1].parameters.weight, Some(Parameter::Number(0.5)));
        assert_eq!(file.stages[0].method.parameters.rescale, Some(crate::methods::Rescale::Norm));
        assert_eq!(file.stages[1].dtype, Some(FloatType::Bfloat16));
        assert_eq!(file.stages[1].name, None);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let text = "
merge_method: linear
models: [{model: {model: {path: a}, lora: {path: b}}}]
tokenizer: {source: union, pad_to_multiple_of: 8}
chat_template: auto
";
        let message = from_yaml(text).unwrap_err();
        for part in ["lora", "union", "pad_to_multiple_of", "chat_template"] {
            assert!(message.contains(part), "{part} is not in {message}");
        }
        assert!(from_yaml("merge_method: linear\nmodell: []\n").unwrap_err().contains("modell"));
        assert!(from_yaml("a: [").is_err() && from_yaml("").is_err());
    }
}
