//! Saves and loads adapters as PEFT directories.

use std::collections::BTreeMap;
use std::path::Path;

use cl_checkpoint::{
    Adapter, AdapterConfig, AdapterModule, BaseExperts, Dtype, LayerKind, Manifest, TensorSpec, alpha_for,
    lora_scaling, target_names,
};
use cl_torch::tch::{Kind, Tensor};
use cl_torch::{load_tensor, tensor_bytes};
use serde_json::Value;

use crate::linear::Frozen;
use crate::whole::stands_in;
use crate::{AdapterError, Bias, InitLoraWeights, Lora, LoraConfig, Whole, WholeKind, WholePlan, WholeProblem};

/// A layer that can have an adapter.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// The layer's name.
    pub name: &'a str,
    /// The layer's kind.
    pub kind: LayerKind,
    /// The layer's adapter, if it has one.
    pub lora: Option<&'a Lora>,
    /// The adapter's initial update, if it is subtracted in the forward pass.
    pub start: Option<&'a Frozen>,
}

/// Writes the adapters of `sites` (all layers of a model, adapted or not), and the other trained tensors `whole`, as a
/// PEFT directory in f32, as PEFT does.
///
/// Ranks and scalings are those of the layers. If they differ from `config`, for example after an adapter was loaded,
/// they are written to `rank_pattern` and `alpha_pattern`. An adapter that was initialized from the weight is written
/// as the difference from its initialization, at twice the rank, so that it applies to the original base. Factors of
/// experts are written with `target_parameters` if PEFT would misread them otherwise, see
/// [`write_adapter_with_files`](cl_checkpoint::write_adapter_with_files).
///
/// # Errors
/// Returns [`AdapterError::Checkpoint`] if the directory exists and `overwrite` is false, or if it cannot be written.
pub fn save_lora<'a>(
    dir: &Path,
    sites: impl Iterator<Item = Site<'a>>,
    whole: &[Whole],
    config: &LoraConfig,
    base_model: &str,
    manifest: Manifest,
    overwrite: bool,
) -> Result<(), AdapterError> {
    let (adapted, bare): (Vec<Site<'a>>, Vec<Site<'a>>) = sites.partition(|s| s.lora.is_some());
    let mut tensors = Vec::new();
    let mut peft = adapter_config(config, base_model, adapted.iter().any(|s| s.start.is_some()));
    let names = |sites: &[Site<'a>]| sites.iter().map(|s| s.name).collect::<Vec<_>>();
    let experts = BaseExperts::of(adapted.iter().chain(&bare).map(|s| s.name));
    peft.target_modules = Some(cl_checkpoint::TargetModules::List(target_names(&names(&adapted), &names(&bare))));
    let some = |has: &dyn Fn(&Lora) -> bool| adapted.iter().filter_map(|s| s.lora).any(has);
    peft.use_dora = some(&|lora| lora.magnitude.is_some());
    if some(&|lora| lora.bias.is_some()) {
        peft.other.insert("lora_bias".to_owned(), Value::Bool(true));
    }
    name_whole(&mut peft, whole, config, &names(&adapted));
    for site in adapted {
        let Some(lora) = site.lora else { continue };
        let [a, b] = factors(lora, site.start);
        let rank = a.size()[0];
        if rank != peft.r as i64 {
            peft.rank_pattern.push((site.name.into(), rank as usize));
        }
        if lora_scaling(peft.lora_alpha, rank as f64, config.use_rslora) != lora.scaling {
            let alpha = alpha_for(lora.scaling, rank as usize, config.use_rslora);
            peft.alpha_pattern.push((site.name.into(), alpha));
        }
        let (a_shape, b_shape) = (shape(&a), shape(&b));
        let module = AdapterModule { name: site.name.to_owned(), kind: site.kind, a_shape, b_shape, dora: false };
        let [a_name, b_name] = module.factors();
        if let Some(bias) = &lora.bias {
            tensors.push(stored(b_name.replace(".weight", ".bias"), bias));
        }
        tensors.extend([stored(a_name, &a), stored(b_name, &b)]);
        if let Some(magnitude) = &lora.magnitude {
            let name = format!("{PREFIX}{}.lora_magnitude_vector", site.name);
            tensors.push(stored(name, &magnitude.vector));
        }
    }
    tensors.extend(whole.iter().map(|w| stored(format!("{PREFIX}{}", w.name), &w.tensor)));
    cl_checkpoint::write_adapter_with_files(dir, &peft, &tensors, &[], &experts, manifest, overwrite)?;
    Ok(())
}

const PREFIX: &str = "base_model.model.";
const BOTH: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];
const TOKENS: &str = ".token_adapter.trainable_tokens_delta";

fn shape(t: &Tensor) -> Vec<usize> {
    t.size().iter().map(|&d| d as usize).collect()
}

fn stored(name: String, tensor: &Tensor) -> (TensorSpec, Vec<u8>) {
    (TensorSpec { name, dtype: Dtype::F32, shape: shape(tensor) }, tensor_bytes(tensor, Kind::Float))
}

/// Sets PEFT's keys for the fully trained tensors. If `config` does not specify them, as after loading an adapter, they
/// are derived from the tensors.
fn name_whole(peft: &mut AdapterConfig, whole: &[Whole], config: &LoraConfig, adapted: &[&str]) {
    let mut modules: Vec<String> = config.modules_to_save.clone();
    let mut tokens: BTreeMap<&str, &[i64]> = BTreeMap::new();
    let mut biases = Vec::new();
    for tensor in whole {
        let module = tensor.name.rsplit_once('.').map_or("", |(module, _)| module);
        match &tensor.kind {
            WholeKind::Saved if config.modules_to_save.is_empty() => modules.push(module.to_owned()),
            WholeKind::Saved => {}
            WholeKind::Bias => biases.push(module.trim_end_matches(".base_layer")),
            WholeKind::Tokens(ids) => {
                let module = module.trim_end_matches(".token_adapter");
                tokens.insert(module.rsplit('.').next().unwrap_or(module), ids);
            }
        }
    }
    modules.dedup();
    peft.modules_to_save = (!modules.is_empty()).then_some(modules);
    let bias = if biases.iter().all(|b| adapted.contains(b)) { Bias::LoraOnly } else { Bias::All };
    let bias = if biases.is_empty() { config.bias } else { bias.max(config.bias) };
    peft.bias = serde_json::to_value(bias).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    let mut set = |key: &str, value: Value| peft.other.insert(key.to_owned(), value);
    if let (1, Some(ids)) = (tokens.len(), tokens.get("embed_tokens")) {
        set("trainable_token_indices", Value::from(ids.to_vec()));
    } else if !tokens.is_empty() {
        set("trainable_token_indices", serde_json::to_value(tokens).unwrap_or_default());
    }
    let own = |name: &str| whole.iter().find(|w| w.name == name).map(|w| w.tensor.data_ptr());
    let as_one = BOTH.map(own);
    if config.ensure_weight_tying || as_one[0].is_some() && as_one[0] == as_one[1] {
        set("ensure_weight_tying", Value::Bool(true));
    }
}

/// Returns A and B, or `[A; A₀]` and `[B, −B₀]` if an initial update is subtracted; their product is the difference
/// from it.
fn factors(lora: &Lora, start: Option<&Frozen>) -> [Tensor; 2] {
    let (a, b) = (lora.a.detach(), lora.b.detach());
    match start {
        None => [a, b],
        // The B of this update is already negated.
        Some(start) => [Tensor::cat(&[&a, &start.a], 0), Tensor::cat(&[&b, &start.b], 1)],
    }
}

/// Creates the PEFT configuration. `doubled` means that ranks are twice those of `config`, with the same scaling.
fn adapter_config(config: &LoraConfig, base_model: &str, doubled: bool) -> AdapterConfig {
    let rank = if doubled { 2 * config.r } else { config.r };
    let one = |rank: i64| lora_scaling(1.0, rank as f64, config.use_rslora);
    let init = match config.init_lora_weights {
        init if init.changes_the_base() => InitLoraWeights::Kaiming,
        init => init,
    };
    AdapterConfig {
        r: rank as usize,
        lora_alpha: config.lora_alpha * one(config.r) / one(rank),
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        base_model_name_or_path: Some(base_model.to_owned()),
        task_type: Some("CAUSAL_LM".to_owned()),
        inference_mode: true,
        init_lora_weights: serde_json::to_value(init).unwrap_or(Value::Bool(true)),
        ..AdapterConfig::default()
    }
}

/// Loads the modules, biases and token rows that an adapter trains in full. Returns the plan, and their values by the
/// name of the base's tensor (for rows, of the module), checked against the tensors of `base`, including a tied output
/// head. Copies of the base's tensors are ignored: PEFT stores the weight of an adapted embedding or head together with
/// its adapter.
///
/// # Errors
/// Returns [`AdapterError::Whole`] for a tensor of any other kind or of another shape.
pub fn load_whole(
    adapter: &Adapter,
    base: &[(String, Tensor)],
    tied: bool,
) -> Result<(WholePlan, BTreeMap<String, Tensor>), AdapterError> {
    let config = trained_of(adapter);
    let (mut plan, mut values) = (WholePlan::default(), BTreeMap::new());
    for (name, of_base) in adapter.whole_tensors() {
        let wrong =
            |problem| Err(AdapterError::Whole { path: adapter.dir().to_owned(), tensor: name.to_owned(), problem });
        let module = of_base.rsplit_once('.').map_or("", |(module, _)| module);
        if let Some(module) = of_base.strip_suffix(TOKENS) {
            let Some((_, table)) = base.iter().find(|(n, _)| n.strip_suffix(".weight") == Some(module)) else {
                return wrong(WholeProblem::RowsOfNoModule);
            };
            let ids = config.trainable_token_indices.as_ref().map_or(Vec::new(), |t| t.of(module).to_vec());
            let rows = load_tensor(adapter, name, Kind::Float, table.device())?;
            if rows.size() != [ids.len() as i64, table.size()[1]]
                || ids.iter().any(|id| !(0..table.size()[0]).contains(id))
            {
                return wrong(WholeProblem::Rows { shape: rows.size(), ids });
            }
            plan.tokens.insert(module.to_owned(), ids);
            values.insert(module.to_owned(), rows);
            continue;
        }
        if of_base.ends_with(".lora_B.bias") {
            continue;
        }
        let Some((_, own)) = base.iter().find(|(n, _)| *n == of_base) else {
            return wrong(WholeProblem::NotInBase);
        };
        let saved = |name: &str| config.modules_to_save.iter().any(|entry| stands_in(name, entry));
        // If embedding and head are tied, PEFT's configuration names only the embedding.
        let as_one = tied && config.ensure_weight_tying && BOTH.contains(&of_base.as_str());
        let saved = saved(&of_base) || as_one && BOTH.into_iter().any(saved);
        let bias = config.bias != Bias::None && of_base.ends_with(".bias");
        let value = load_tensor(adapter, name, if saved || bias { Kind::Float } else { own.kind() }, own.device())?;
        if value.size() != own.size() {
            return wrong(WholeProblem::ShapeOfBase { found: value.size(), base: own.size() });
        }
        match (saved, bias) {
            (true, _) => plan.saved.push(of_base.clone()),
            (false, true) => plan.biases.push(of_base.clone()),
            (false, false) if value == *own => continue,
            _ => return wrong(WholeProblem::Untrained { module: module.to_owned() }),
        }
        values.insert(of_base, value);
    }
    let both = BOTH.iter().all(|name| values.contains_key(*name));
    plan.saved.sort();
    plan.biases.sort();
    plan.tied = tied && config.ensure_weight_tying && both;
    Ok((plan, values))
}
/// The settings of fully trained modules, biases and token rows in an adapter's configuration.
fn trained_of(adapter: &Adapter) -> LoraConfig {
    let config = adapter.config();
    let other = |key: &str| config.other.get(key).cloned().unwrap_or_default();
    LoraConfig {
        bias: serde_json::from_value(Value::from(config.bias.as_str())).unwrap_or_default(),
        lora_bias: other("lora_bias") == true,
        modules_to_save: config.modules_to_save.clone().unwrap_or_default(),
        trainable_token_indices: serde_json::from_value(other("trainable_token_indices")).unwrap_or_default(),
        ensure_weight_tying: other("ensure_weight_tying") == true,
        ..LoraConfig::default()
    }
}

impl LoraConfig {
    /// Returns these settings for an adapter that is trained further: the adapter determines the structure, and
    /// initialization does not apply.
    pub fn continued(&self, adapter: &Adapter) -> LoraConfig {
        let (of_adapter, config) = (trained_of(adapter), adapter.config());
        LoraConfig {
            r: config.r as i64,
            lora_alpha: config.lora_alpha,
            use_rslora: config.use_rslora,
            use_dora: config.use_dora,
            init_lora_weights: InitLoraWeights::Kaiming,
            lora_dropout: self.lora_dropout,
            target_modules: self.target_modules.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            loraplus_lr_ratio: self.loraplus_lr_ratio,
            embedding_learning_rate: self.embedding_learning_rate,
            base: self.base,
            ..of_adapter
        }
    }
}

/// Rejects an adapter that cannot be applied as a frozen update: DoRA, adapters on embeddings and fully trained tensors
/// are more than a product that is added to a linear layer's output.
///
/// # Errors
/// Returns [`AdapterError::Unsupported`] with the feature.
pub fn check_frozen(adapter: &Adapter) -> Result<(), AdapterError> {
    let modules = adapter.modules();
    let feature = if modules.iter().any(|m| m.kind == LayerKind::Embedding) {
        "frozen embedding"
    } else if modules.iter().any(|m| m.dora) {
        "frozen DoRA"
    } else {
        match trained_of(adapter).beyond_factors() {
            None => return Ok(()),
            Some(key) => &format!("frozen {key}"),
        }
    };
    Err(AdapterError::Unsupported { path: adapter.dir().to_owned(), feature: feature.to_owned() })
}
