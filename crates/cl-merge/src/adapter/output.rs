//! A PEFT directory of new factors, as PEFT itself loads it.

use std::collections::BTreeMap;
use std::path::Path;

use cl_checkpoint::{
    AdapterConfig, Checkpoint, Dtype, LayerKind, Manifest, TargetModules, TensorSource, TensorSpec, target_names,
    write_adapter_with_files,
};

use super::low_rank::Encoded;
use super::set::Set;
use crate::Error;

/// New factors of a module; their scaling is one.
pub(super) struct NewModule {
    pub(super) name: String,
    pub(super) kind: LayerKind,
    pub(super) shape: [usize; 2],
    pub(super) factors: Encoded,
}

/// What a directory is to say beside its factors.
pub(super) struct About {
    pub(super) base_model: Option<String>,
    pub(super) task_type: Option<String>,
    pub(super) targets: Vec<String>,
    pub(super) dtype: Dtype,
    pub(super) manifest: Manifest,
    pub(super) card: String,
}

/// Writes the directory, whole or not at all.
pub(super) fn write(out: &Path, modules: Vec<NewModule>, about: About, overwrite: bool) -> Result<(), Error> {
    let config = config(&modules, &about);
    let mut tensors = Vec::new();
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
    Ok(write_adapter_with_files(out, &config, &tensors, &files, about.manifest, overwrite)?)
}

/// A config that gives every module its rank and a scaling of one.
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
        rank_pattern: other.iter().map(|m| (key(&m.name), m.factors.rank)).collect(),
        alpha_pattern: other.iter().map(|m| (key(&m.name), m.factors.rank as f64)).collect(),
        ..AdapterConfig::default()
    };
    // Plain names are understood by every version of PEFT. As expressions they match the end of a name too, which another
    // module's name may have; then they are anchored, which PEFT understands since 0.14.
    let plain = with_keys(&str::to_owned);
    let exact = modules.iter().all(|m| plain.rank(&m.name) == m.factors.rank && plain.scaling(&m.name) == 1.0);
    if exact { plain } else { with_keys(&|name| format!("^{}", escaped(name))) }
}

fn most_common_rank(modules: &[NewModule]) -> usize {
    let mut count: BTreeMap<usize, usize> = BTreeMap::new();
    modules.iter().for_each(|m| *count.entry(m.factors.rank).or_default() += 1);
    count.into_iter().max_by_key(|(rank, count)| (*count, *rank)).map_or(1, |(rank, _)| rank)
}

/// A name as an expression that matches it alone.
fn escaped(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c.to_string() } else { format!("\\{c}") }).collect()
}

/// What `target_modules` says, so that PEFT adapts these modules and no others: the list on which all adapters agree, last
/// parts of names where the base is known and has no other module of such a name, or else whole names.
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

/// Last parts of names where the base is known and has no other module of these, else whole names.
pub(super) fn shortest(names: &[&str], base: Option<&Checkpoint>) -> Vec<String> {
    // Without a base any other module may be there.
    let Some(base) = base else { return target_names(names, names) };
    let modules = base.names().into_iter().filter_map(|n| n.strip_suffix(".weight"));
    target_names(names, &modules.filter(|n| !names.contains(n)).collect::<Vec<_>>())
}
