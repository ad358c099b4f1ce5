//! Drafts: every output tensor with its sources and settings.

use std::collections::{BTreeMap, BTreeSet};

use cl_checkpoint::TensorSource;

use super::head::Head;
use super::inputs::{Inputs, is_buffer, names};
use crate::methods::{Base, MethodInfo, OpcmState, Profile};
use crate::problem::{ConfigProblem, ModelProblem, Place, Problem, ProblemKind};
use crate::recipe::check::base_is_input;
use crate::recipe::config::{MergeConfig, ModelConfig, Parameters, SliceConfig};
use crate::recipe::settings::Scopes;

/// The draft of one output tensor: its sources and settings.
pub(crate) struct Draft<'c> {
    pub(crate) name: String,
    pub(crate) t: f64,
    pub(crate) shared: Vec<&'c Parameters>,
    pub(crate) base: Option<(usize, String, &'c Parameters)>,
    pub(crate) models: Vec<DraftInput<'c>>,
}

pub(crate) struct DraftInput<'c> {
    pub(crate) model: usize,
    pub(crate) tensor: String,
    pub(crate) key: String,
    pub(crate) parameters: &'c Parameters,
}

static NO_PARAMETERS: std::sync::LazyLock<Parameters> = std::sync::LazyLock::new(Parameters::default);

/// Whether a component of a tensor's name denotes a list of layers: `layers`, `h`, T5's `block`, ALBERT's
/// `albert_layer_groups`.
fn is_stack(part: &str) -> bool {
    part == "h" || ["layer", "layers", "block", "blocks", "layer_groups"].iter().any(|end| part.ends_with(end))
}

/// Splits a name such as `model.layers.7.mlp.up_proj.weight` into prefix, layer number and rest. For nested lists, as
/// in T5's `encoder.block.3.layer.1`, the outermost is used. Layers with the same prefix form a layer stack.
fn layer_of(tensor: &str) -> Option<(&str, usize, &str)> {
    let (mut list, mut start) = ("", 0);
    for part in tensor.split('.') {
        let end = start + part.len();
        if is_stack(list)
            && let Ok(layer) = part.parse()
        {
            return Some((&tensor[..start], layer, tensor.get(end + 1..)?));
        }
        (list, start) = (part, end + 1);
    }
    None
}

/// Returns the layer stacks of a model: prefixes and numbers of layers.
fn stacks(source: &dyn TensorSource) -> BTreeMap<String, usize> {
    let mut stacks = BTreeMap::new();
    for (prefix, layer, _) in source.names().into_iter().filter_map(layer_of) {
        let layers: &mut usize = stacks.entry(prefix.to_owned()).or_default();
        *layers = layer.saturating_add(1).max(*layers);
    }
    stacks
}

/// Whether a tensor outside the layer stacks comes before the layers.
fn before_layers(tensor: &str) -> bool {
    ["embed", "wte", "wpe"].iter().any(|part| tensor.contains(part))
}

/// Returns the relative position of a layer among `count`, from 0 to 1; 1 for a single layer.
fn place(layer: usize, count: usize) -> f64 {
    if count > 1 { layer as f64 / (count - 1) as f64 } else { 1.0 }
}

/// Lists every output tensor with its sources.
pub(crate) fn drafts<'c>(
    config: &'c MergeConfig,
    method: &MethodInfo,
    inputs: &Inputs,
    head: &Head,
) -> Result<Vec<Draft<'c>>, Vec<Problem>> {
    if config.slices.is_empty() {
        Ok(whole_drafts(config, method, inputs, head))
    } else {
        slice_drafts(config, method, inputs, head)
    }
}

/// Returns the keys of each model's random masks: its name, or else its path as written; repeated names get distinct
/// keys.
fn mask_keys(models: &[ModelConfig]) -> Vec<String> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let key = |model: &'_ ModelConfig, n: usize| {
        let name = model.name.as_ref().unwrap_or(&model.model);
        if n > 1 { format!("{name}#{n}") } else { name.clone() }
    };
    models
        .iter()
        .map(|model| {
            let n = seen.entry(model.name.as_deref().unwrap_or(&model.model)).or_default();
            *n += 1;
            key(model, *n)
        })
        .collect()
}

/// Converts the tensor names of a model to those of the output, which may have another output head.
fn with_head<'n>(mut names: Vec<&'n str>, head: &'n Head) -> Vec<&'n str> {
    names.retain(|name| head.keeps(name));
    if let Some(own) = head.own().filter(|own| !names.contains(own)) {
        names.insert(names.partition_point(|name| *name < own), own);
    }
    names
}

fn whole_drafts<'c>(config: &'c MergeConfig, method: &MethodInfo, inputs: &Inputs, head: &Head) -> Vec<Draft<'c>> {
    let keys = mask_keys(&config.models);
    let base = config.base_model.as_deref();
    let mut members: Vec<(usize, String, &'c Parameters)> = config
        .models
        .iter()
        .zip(keys)
        // A base that is also listed among the models is not a task vector.
        .filter(|(model, _)| method.base == Base::Input || Some(model.model.as_str()) != base)
        .map(|(model, key)| (inputs.index(&model.model), key, &model.parameters))
        .collect();
    if let Some(base) = base
        && base_is_input(config, method)
        && config.models.iter().all(|m| m.model != base)
    {
        members.push((inputs.index(base), base.to_owned(), &NO_PARAMETERS));
    }
    if !method.ordered {
        members.sort_by(|a, b| a.1.cmp(&b.1));
    }
    if let Some(written) = config.method.parameters.previous.as_deref() {
        members.insert(0, (inputs.index(written), written.to_owned(), &NO_PARAMETERS));
    }
    let base = base.filter(|_| method.base != Base::Input).map(|base| {
        let parameters = config.models.iter().find(|m| m.model == base).map_or(&*NO_PARAMETERS, |m| &m.parameters);
        (inputs.index(base), parameters)
    });
    let reference = inputs.models[inputs.reference(config)].source();
    let stacks = stacks(reference);
    let draft = |name: &str| Draft {
        name: name.to_owned(),
        t: match layer_of(name) {
            Some((prefix, layer, _)) => place(layer, stacks[prefix]),
            None if before_layers(name) || config.profile == Profile::Mergekit => 0.0,
            None => 1.0,
        },
        shared: vec![&config.method.parameters],
        base: base.map(|(model, parameters)| (model, name.to_owned(), parameters)),
        models: members
            .iter()
            .map(|(model, key, parameters)| DraftInput {
                model: *model,
                tensor: name.to_owned(),
                key: key.clone(),
                parameters,
            })
            .collect(),
    };
    with_head(names(reference), head).into_iter().map(draft).collect()
}

/// Reports sources of slices with several layer stacks: a range of layers would be ambiguous.
fn several_stacks(config: &MergeConfig, inputs: &Inputs) -> Vec<Problem> {
    let sources = config.slices.iter().flat_map(|slice| &slice.sources).map(|source| source.model.as_str());
    let models: BTreeSet<&str> = sources.collect();
    let stacks = models.into_iter().map(|model| (model, stacks(inputs.models[inputs.index(model)].source())));
    let several = stacks.filter(|(_, stacks)| stacks.len() > 1).map(|(model, stacks)| {
        Problem::new(Place::model(model), ModelProblem::SeveralStacks { stacks: stacks.into_iter().collect() })
    });
    several.collect()
}

fn slice_drafts<'c>(
    config: &'c MergeConfig,
    method: &MethodInfo,
    inputs: &Inputs,
    head: &Head,
) -> Result<Vec<Draft<'c>>, Vec<Problem>> {
    let mut drafts = Vec::new();
    let mut problems = several_stacks(config, inputs);
    if !problems.is_empty() {
        return Err(problems);
    }
    let outside = |slice: &'c SliceConfig, before: bool| -> Vec<String> {
        let model = inputs.models[inputs.index(&slice.sources[0].model)].source();
        let names =
            with_head(names(model), head).into_iter().filter(|n| layer_of(n).is_none() && before_layers(n) == before);
        names.map(str::to_owned).collect()
    };
    let (Some(first), Some(last)) = (config.slices.first(), config.slices.last()) else { return Ok(drafts) };
    for name in outside(first, true) {
        drafts.push(slice_draft(config, method, inputs, first, &name, 0.0, |_| name.clone()));
    }
    let mut layer = 0;
    for (number, slice) in config.slices.iter().enumerate() {
        let of_slice = |kind: ConfigProblem| Problem::new(Place::Slice { number: number + 1, model: None }, kind);
        let base = slice.base_model.as_deref().or(config.base_model.as_deref()).filter(|_| method.base != Base::Input);
        if let Some(base) = base
            && slice.sources.iter().all(|s| s.model != base)
        {
            problems.push(of_slice(ConfigProblem::BaseNotASource { base: base.to_owned() }));
        }
        for source in &slice.sources {
            let checkpoint = inputs.models[inputs.index(&source.model)].source();
            let layers = stacks(checkpoint).into_values().max().unwrap_or(0);
            if source.layer_range[1] > layers {
                let (model, end) = (source.model.clone(), source.layer_range[1]);
                problems.push(of_slice(ConfigProblem::LayersBeyond { model, layers, end }));
            }
        }
        if !problems.is_empty() {
            // Invalid ranges can be arbitrarily long, so they are not enumerated.
            continue;
        }
        for i in 0..slice.layers() {
            let model = inputs.models[inputs.index(&slice.sources[0].model)].source();
            let from = slice.sources[0].layer_range[0] + i;
            let parts: Vec<(String, String)> = model
                .names()
                .iter()
                .filter(|n| !is_buffer(n) || n.ends_with(".attn.bias"))
                .filter_map(|n| layer_of(n).filter(|l| l.1 == from))
                .map(|(prefix, _, rest)| (prefix.to_owned(), rest.to_owned()))
                .collect();
            for (prefix, rest) in parts {
                let t = place(i, slice.layers());
                let name = format!("{prefix}{layer}.{rest}");
                drafts.push(slice_draft(config, method, inputs, slice, &name, t, |start| {
                    format!("{prefix}{}.{rest}", start + i)
                }));
            }
            layer += 1;
        }
    }
    let t = if config.profile == Profile::Mergekit { 0.0 } else { 1.0 };
    for name in outside(last, false) {
        drafts.push(slice_draft(config, method, inputs, last, &name, t, |_| name.clone()));
    }
    if problems.is_empty() { Ok(drafts) } else { Err(problems) }
}

/// Creates the draft of one tensor of a slice. `tensor(first layer of the range)` returns its name in a source.
fn slice_draft<'c>(
    config: &'c MergeConfig,
    method: &MethodInfo,
    inputs: &Inputs,
    slice: &'c SliceConfig,
    name: &str,
    t: f64,
    tensor: impl Fn(usize) -> String,
) -> Draft<'c> {
    let written = slice.base_model.as_deref().or(config.base_model.as_deref()).filter(|_| method.base != Base::Input);
    let mut base = None;
    let mut models = Vec::new();
    for source in &slice.sources {
        let (model, tensor) = (inputs.index(&source.model), tensor(source.layer_range[0]));
        if Some(source.model.as_str()) == written {
            base = Some((model, tensor, &source.parameters));
        } else {
            models.push(DraftInput { model, tensor, key: source.model.clone(), parameters: &source.parameters });
        }
    }
    if !method.ordered {
        models.sort_by(|a, b| a.key.cmp(&b.key));
    }
    Draft { name: name.to_owned(), t, shared: vec![&slice.parameters, &config.method.parameters], base, models }
}

impl Draft<'_> {
    /// Creates a problem at this tensor.
    pub(crate) fn problem(&self, kind: impl Into<ProblemKind>) -> Problem {
        Problem::new(Place::tensor(&self.name), kind)
    }

    pub(crate) fn scopes<'s>(&'s self, config: &MergeConfig, previous: Option<&'s OpcmState>) -> Scopes<'s> {
        Scopes {
            shared: self.shared.clone(),
            models: self.models.iter().map(|m| (m.parameters, m.tensor.as_str())).collect(),
            tensor: &self.name,
            t: self.t,
            keys: self.models.iter().map(|m| m.key.as_str()).collect(),
            previous,
            seed: config.seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_the_names_of_several_families() {
        assert_eq!(layer_of("model.layers.12.mlp.up_proj.weight"), Some(("model.layers.", 12, "mlp.up_proj.weight")));
        assert_eq!(layer_of("transformer.h.0.ln_1.bias"), Some(("transformer.h.", 0, "ln_1.bias")));
        assert_eq!(layer_of("h.3.ln_1.bias"), Some(("h.", 3, "ln_1.bias")));
        assert_eq!(
            layer_of("bert.encoder.layer.5.output.dense.weight"),
            Some(("bert.encoder.layer.", 5, "output.dense.weight"))
        );
        // The outermost list is used.
        assert_eq!(
            layer_of("encoder.block.3.layer.1.DenseReluDense.wo.weight"),
            Some(("encoder.block.", 3, "layer.1.DenseReluDense.wo.weight"))
        );
        assert_eq!(
            layer_of("model.layers.1.block_sparse_moe.experts.7.w1.weight"),
            Some(("model.layers.", 1, "block_sparse_moe.experts.7.w1.weight"))
        );
        assert_eq!(layer_of("visual.blocks.2.attn.qkv.bias"), Some(("visual.blocks.", 2, "attn.qkv.bias")));
        for outside in ["model.embed_tokens.weight", "visual.merger.mlp.0.weight", "layers.0", "h"] {
            assert_eq!(layer_of(outside), None, "{outside}");
        }
        assert_eq!([place(0, 3), place(1, 3), place(2, 3), place(0, 1)], [0.0, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn masks_of_a_model_that_is_named_twice_are_told_apart() {
        let model = |model: &str, name: Option<&str>| ModelConfig {
            model: model.to_owned(),
            name: name.map(str::to_owned),
            ..ModelConfig::default()
        };
        let keys = mask_keys(&[model("a", None), model("a", None), model("b", Some("x")), model("a", None)]);
        assert_eq!(keys, ["a", "a#2", "x", "a#3"]);
    }
}
