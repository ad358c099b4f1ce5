//! config.json and companion files of the output.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::inputs::{Input, Inputs};
use super::work::PlannedTensor;
use crate::problem::{Place, Problem, TokenizerProblem};
use crate::recipe::config::{MergeConfig, Vocabulary};

/// Keys of config.json that hold the number of layers.
const LAYER_COUNTS: [&str; 4] = ["num_hidden_layers", "n_layer", "n_layers", "num_layers"];

/// Returns config.json of the output.
pub(crate) fn out_config(
    config: &MergeConfig,
    reference: &Input,
    vocabulary: Option<usize>,
    tensors: &[PlannedTensor],
    layers: usize,
) -> Map<String, Value> {
    let mut out = reference.config().clone();
    if let Some(rows) = vocabulary {
        out.insert("vocab_size".to_owned(), rows.into());
    }
    if let Some(dtype) = config.dtype.map(|d| serde_json::to_value(d).unwrap_or_default()) {
        let key = if out.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        out.insert(key.to_owned(), dtype);
    }
    if layers > 0 {
        let before = LAYER_COUNTS.iter().find_map(|key| out.get(*key)?.as_u64());
        for key in LAYER_COUNTS {
            if out.contains_key(key) {
                out.insert(key.to_owned(), layers.into());
            }
        }
        // Lists with one entry per layer, such as layer_types, are reordered like the layers.
        let order: Vec<usize> = config
            .slices
            .iter()
            .filter_map(|s| s.sources.first())
            .flat_map(|s| s.layer_range[0]..s.layer_range[1])
            .collect();
        for value in out.values_mut() {
            if let Value::Array(list) = value
                && Some(list.len() as u64) == before
            {
                *list = order.iter().filter_map(|&i| list.get(i).cloned()).collect();
            }
        }
    }
    debug_assert!(!tensors.is_empty());
    out
}

/// Returns the model whose tokenizer and generation files are copied to the output.
pub(crate) fn tokenizer_model(
    config: &MergeConfig,
    inputs: &Inputs,
    reference: usize,
    stages: &BTreeMap<String, PathBuf>,
) -> Result<usize, Problem> {
    match config.tokenizer_source.as_deref() {
        None | Some("base") if config.vocabulary == Vocabulary::Keep => Ok(longest(inputs, reference)),
        None | Some("base") => Ok(reference),
        Some(written) => {
            let named = config.models.iter().find(|m| m.name.as_deref() == Some(written)).map(|m| m.model.as_str());
            let path = stages.get(written).cloned().unwrap_or_else(|| PathBuf::from(written));
            match inputs.models.iter().position(|m| m.written == named.unwrap_or(written) || m.path == path) {
                Some(index) => Ok(index),
                None => {
                    let kind = TokenizerProblem::NotAModel { named: written.to_owned(), words: &["base"] };
                    Err(Problem::new(Place::key("tokenizer_source"), kind))
                }
            }
        }
    }
}

/// Returns the model with the longest token table, whose tokenizer covers all kept rows.
fn longest(inputs: &Inputs, reference: usize) -> usize {
    let rows = |input: &Input| {
        let tables = input.source().names().into_iter().filter(|n| n.contains("embed") || n.contains("wte"));
        tables.filter_map(|n| input.source().info(n)?.shape.first().copied()).max().unwrap_or(0)
    };
    let most = inputs.models.iter().map(rows).max().unwrap_or(0);
    if rows(&inputs.models[reference]) == most {
        return reference;
    }
    inputs.models.iter().position(|m| rows(m) == most).unwrap_or(reference)
}
