//! Writes combined or extracted adapters as PEFT directories.

use std::collections::BTreeMap;
use std::path::Path;

use cl_checkpoint::{
    AdapterConfig, BaseExperts, BesideKind, Checkpoint, Dtype, LayerKind, Manifest, TargetModules, TensorSource,
    TensorSpec, target_names, write_adapter_with_files,
};

use serde_json::{Value, json};

use super::low_rank::Encoded;
use super::set::{HEAD, Set, Whole, WholePart};
use super::whole::View;
use crate::Error;

/// The new factors of one module, with a scaling of one.
pub(super) struct NewModule {
    pub(super) name: String,
    pub(super) kind: LayerKind,
    pub(super) shape: [usize; 2],
    pub(super) factors: Encoded,
}

/// A tensor of the output other than the factors.
pub(super) struct NewWhole {
    /// Name of the tensor in the base model.
    tensor: String,
    kind: NewKind,
    pub(super) shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// How PEFT stores a [`NewWhole`].
#[derive(PartialEq)]
enum NewKind {
    Saved,
    Bias,
    UpdateBias,
    Rows(Vec<usize>),
}

impl NewWhole {
    pub(super) fn new(
        set: &Set<'_>,
        whole: &Whole,
        view: &View,
        base: Option<&Checkpoint>,
        bytes: Vec<u8>,
    ) -> NewWhole {
        let is_bias = |part: &WholePart| matches!(part.kind, BesideKind::Bias | BesideKind::UpdateBias { .. });
        let (kind, shape) = match whole.rows() {
            Some(ids) => (NewKind::Rows(ids), vec![view.rows(), view.columns]),
            None => {
                let kind = match () {
                    () if whole.is_update() => NewKind::UpdateBias,
                    () if whole.parts.iter().all(is_bias) => NewKind::Bias,
                    () => NewKind::Saved,
                };
                (kind, whole.shape(set, base))
            }
        };
        NewWhole { tensor: whole.tensor.clone(), kind, shape, bytes }
    }

    /// Creates an entry for a tensor of a fine-tuned model that is stored in full.
    pub(super) fn saved(tensor: String, shape: Vec<usize>, bytes: Vec<u8>) -> NewWhole {
        NewWhole { tensor, kind: NewKind::Saved, shape, bytes }
    }

    /// Returns the name of the tensor in the base model.
    pub(super) fn tensor(&self) -> &str {
        &self.tensor
    }

    /// Returns the name of the tensor's module in the base model.
    fn module(&self) -> &str {
        self.tensor.rsplit_once('.').map_or(&self.tensor, |(module, _)| module)
    }

    /// Returns the name of the tensor in PEFT's weight file.
    fn name(&self, adapted: &[String]) -> String {
        let module = self.module();
        let own = match &self.kind {
            NewKind::Saved => self.tensor.clone(),
            NewKind::Bias if adapted.iter().any(|a| a == module) => format!("{module}.base_layer.bias"),
            NewKind::Bias => self.tensor.clone(),
            NewKind::UpdateBias => format!("{module}.lora_B.bias"),
            NewKind::Rows(_) => format!("{module}.token_adapter.trainable_tokens_delta"),
        };
        format!("base_model.model.{own}")
    }
}

/// The metadata of the output directory.
pub(super) struct About {
    pub(super) base_model: Option<String>,
    pub(super) task_type: Option<String>,
    pub(super) targets: Vec<String>,
    /// The experts of the base.
    pub(super) experts: BaseExperts,
    /// Whether a stored embedding also serves as the head (tied embeddings).
    pub(super) as_one: bool,
    pub(super) dtype: Dtype,
    pub(super) manifest: Manifest,
    pub(super) card: String,
}

/// Writes the adapter directory atomically.
pub(super) fn write(
    out: &Path,
    modules: Vec<NewModule>,
    mut wholes: Vec<NewWhole>,
    about: About,
    overwrite: bool,
) -> Result<(), Error> {
    let adapted: Vec<String> = modules.iter().map(|m| m.name.clone()).collect();
    wholes.extend(missing_biases(&modules, &wholes, about.dtype));
    let mut config = config(&modules, &about);
    name_wholes(&mut config, &wholes, &adapted, about.as_one);
    let mut tensors = Vec::new();
    for whole in wholes {
        let spec = |name: String| TensorSpec { name, dtype: about.dtype, shape: whole.shape.clone() };
        if about.as_one && whole.kind == NewKind::Saved && whole.tensor.ends_with("embed_tokens.weight") {
            tensors.push((spec(format!("base_model.model.{HEAD}")), whole.bytes.clone()));
        }
        tensors.push((spec(whole.name(&adapted)), whole.bytes));
    }
    for module in modules {
        let [rows, columns] = module.shape;
        let rank = module.factors.rank;
        let (suffixes, a, b) = match module.kind {
            LayerKind::Linear => (["lora_A.weight", "lora_B.weight"], [rank, columns], [rows, rank]),
            LayerKind::Embedding => (["lora_embedding_A", "lora_embedding_B"], [rank, rows], [columns, rank]),
        };
        for ((suffix, shape), bytes) in suffixes.iter().zip([a, b]).zip([module.factors.a, module.factors.b]) {
            let name = format!("base_model.model.{}.{suffix}", module.name);
            tensors.push((TensorSpec { name, dtype: about.dtype, shape: shape.to_vec() }, bytes));
        }
    }
    let files = [("README.md", about.card.as_bytes())];
    Ok(write_adapter_with_files(out, &config, &tensors, &files, &about.experts, about.manifest, overwrite)?)
}

/// Returns zero biases for the modules without a bias: with `lora_bias`, PEFT gives every module one.
fn missing_biases(modules: &[NewModule], wholes: &[NewWhole], dtype: Dtype) -> Vec<NewWhole> {
    let has = |module: &str| wholes.iter().any(|w| w.kind == NewKind::UpdateBias && w.module() == module);
    if !wholes.iter().any(|w| w.kind == NewKind::UpdateBias) {
        return Vec::new();
    }
    let zeros = |m: &NewModule| NewWhole {
        tensor: format!("{}.bias", m.name),
        kind: NewKind::UpdateBias,
        shape: vec![m.shape[0]],
        bytes: vec![0; m.shape[0] * dtype.bitsize() / 8],
    };
    modules.iter().filter(|m| !has(&m.name)).map(zeros).collect()
}

/// Sets PEFT's configuration keys for the tensors other than the factors.
fn name_wholes(config: &mut AdapterConfig, wholes: &[NewWhole], adapted: &[String], as_one: bool) {
    let of = |kind: &NewKind| wholes.iter().filter(|w| w.kind == *kind).map(NewWhole::module).collect::<Vec<&str>>();
    let mut saved: Vec<String> = of(&NewKind::Saved).into_iter().map(str::to_owned).collect();
    saved.dedup();
    config.modules_to_save = (!saved.is_empty()).then_some(saved);
    let biases = of(&NewKind::Bias);
    if !biases.is_empty() {
        let only_adapted = biases.iter().all(|bias| adapted.iter().any(|a| a == bias));
        config.bias = if only_adapted { "lora_only" } else { "all" }.to_owned();
    }
    let mut set = |key: &str, value: Value| config.other.insert(key.to_owned(), value);
    if !of(&NewKind::UpdateBias).is_empty() {
        set("lora_bias", true.into());
    }
    if as_one && config.modules_to_save.is_some() {
        set("ensure_weight_tying", true.into());
    }
    let rows = wholes.iter().filter_map(|w| match &w.kind {
        NewKind::Rows(ids) => Some((w.module().rsplit('.').next().unwrap_or_default().to_owned(), json!(ids))),
        _ => None,
    });
    let rows: serde_json::Map<String, Value> = rows.collect();
    // A plain list of token ids applies to the embedding.
    match rows.get("embed_tokens") {
        Some(ids) if rows.len() == 1 => set("trainable_token_indices", ids.clone()),
        _ if rows.is_empty() => None,
        _ => set("trainable_token_indices", rows.into()),
    };
}

/// Returns a config that gives every module its rank and a scaling of one.
fn config(modules: &[NewModule], about: &About) -> AdapterConfig {
    let r = most_common_rank(modules);
    let other: Vec<&NewModule> = modules.iter().filter(|m| m.factors.rank != r).collect();
    let with_keys = |key: &dyn Fn(&str) -> String| AdapterConfig {
        task_type: about.task_type.clone(),
        base_model_name_or_path: about.base_model.clone(),
        inference_mode: true,
        r,
        lora_alpha: r as f64,
        target_modules: Some(TargetModules::List(about.targets.clone())),
        rank_pattern: other.iter().map(|m| (key(&m.name).into(), m.factors.rank)).collect(),
        alpha_pattern: other.iter().map(|m| (key(&m.name).into(), m.factors.rank as f64)).collect(),
        ..AdapterConfig::default()
    };
    // Plain names work in every version of PEFT. As regular expressions, however, they match the end of a name, so a
    // plain name may also match another module. In that case the patterns are anchored, which PEFT supports since 0.14.
    let plain = with_keys(&str::to_owned);
    let exact = modules.iter().all(|m| plain.rank(&m.name) == m.factors.rank && plain.scaling(&m.name) == 1.0);
    if exact { plain } else { with_keys(&|name| format!("^{}", escaped(name))) }
}

fn most_common_rank(modules: &[NewModule]) -> usize {
    let mut count: BTreeMap<usize, usize> = BTreeMap::new();
    modules.iter().for_each(|m| *count.entry(m.factors.rank).or_default() += 1);
    count.into_iter().max_by_key(|(rank, count)| (*count, *rank)).map_or(1, |(rank, _)| rank)
}

/// Escapes a name, for use as a regular expression that matches it literally.
fn escaped(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c.to_string() } else { format!("\\{c}") }).collect()
}

/// Returns `target_modules` such that PEFT adapts exactly these modules: the list that all adapters share, or else the
/// last parts of the names if the base is known and has no other module with such a name, or else the full names.
pub(super) fn targets(set: &Set<'_>, base: Option<&Checkpoint>) -> Vec<String> {
    let names: Vec<&str> = set.modules.iter().map(|m| m.name.as_str()).collect();
    agreed(set).unwrap_or_else(|| shortest(&names, base))
}

fn agreed(set: &Set<'_>) -> Option<Vec<String>> {
    let list = |config: &AdapterConfig| {
        let narrowed = ["layers_to_transform", "layers_pattern", "exclude_modules"];
        let narrowed = narrowed.iter().any(|key| config.other.get(*key).is_some_and(|value| !value.is_null()));
        match &config.target_modules {
            Some(TargetModules::List(list)) if !narrowed => {
                let mut list = list.clone();
                list.sort();
                Some(list)
            }
            _ => None,
        }
    };
    let first = list(set.members.first()?.adapter.config())?;
    let same = set.members.iter().all(|m| list(m.adapter.config()).as_ref() == Some(&first));
    let matches = |name: &str| first.iter().any(|t| name == t || name.ends_with(&format!(".{t}")));
    (same && set.modules.iter().all(|m| matches(&m.name))).then_some(first)
}

/// Returns the last parts of the names if the base is known and has no other module with such a name, or else the full
/// names.
pub(super) fn shortest(names: &[&str], base: Option<&Checkpoint>) -> Vec<String> {
    // Without the base, any other module could exist.
    let Some(base) = base else { return target_names(names, names) };
    let modules = base.names().into_iter().filter_map(|n| n.strip_suffix(".weight"));
    target_names(names, &modules.filter(|n| !names.contains(n)).collect::<Vec<_>>())
}

/// Returns the experts of the base, or those that the adapters contain: without the base, every module of experts is
/// assumed to have factors for its last expert.
pub(super) fn experts(set: &Set<'_>, base: Option<&Checkpoint>) -> BaseExperts {
    if let Some(base) = base {
        return experts_of(base);
    }
    let mut experts = BaseExperts::of(set.modules.iter().map(|m| m.name.as_str()));
    set.members.iter().for_each(|member| experts.extend(&member.adapter.experts()));
    experts
}

/// Returns the experts of a model.
pub(super) fn experts_of(base: &Checkpoint) -> BaseExperts {
    BaseExperts::of(base.names().into_iter().filter_map(|name| name.strip_suffix(".weight")))
}
