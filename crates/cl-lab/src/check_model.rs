use std::path::Path;

use cl_adapters::{AdapterError, InitLoraWeights, LoraConfig, Targets, check_frozen};
use cl_checkpoint::{Adapter, AdapterModule, Checkpoint, LayerKind, TensorSource};
use cl_data::Tokenizer;
use cl_model::{Decoder, ModelConfig, ModelError, check_trained};
use cl_moe::parameters;
use cl_train::TrainConfig;
use serde::Serialize;

use crate::Finding;
use crate::findings::note;
use crate::model_dir::{check_fits, model_hash, open_adapter, open_checkpoint, other_base};
use crate::rounds::is_stack;

/// Checks the base model of a run: headers, tensor names and shapes, tokenizer, and compatibility with `[train]`.
pub(crate) fn check_model(dir: &Path, train: &TrainConfig, findings: &mut Vec<Finding>) -> Option<ModelConfig> {
    let checkpoint = note(open_checkpoint(dir), findings)?;
    if let Some(tokenizer) = note(Tokenizer::from_dir(dir), findings) {
        note(tokenizer.require_eos(), findings);
    }
    let model = note(Decoder::check(&checkpoint), findings);
    let millions = parameters(&checkpoint) as f64 / 1e6;
    findings.push(Finding::Fact(format!("model: {} with {millions:.1} M parameters", dir.display())));
    check_adapters(&checkpoint, train, findings);
    let storage = model.as_ref().and_then(|m| m.experts.as_ref()).map(|experts| experts.storage);
    if let Some(storage) = storage.filter(|storage| storage.is_delta() && train.full.is_some()) {
        findings.push(Finding::Problem(ModelError::DeltaExperts { path: dir.to_owned(), storage }.into()));
    }
    model
}

/// Formats a setting as it is written in a configuration file, without quotation marks.
fn as_written(setting: &impl Serialize) -> String {
    toml::Value::try_from(setting).map_or_else(|_| String::new(), |value| value.to_string().replace('"', ""))
}

/// Warns if the adapter that a run continues was trained on another base. Training does so itself, since it hashes the
/// model anyway.
pub(crate) fn check_base_of_initial_adapter(model: &Path, train: &TrainConfig, findings: &mut Vec<Finding>) {
    let adapter = train.initial_adapter.as_ref().and_then(|dir| Adapter::open(dir).ok());
    let Some(adapter) = adapter.filter(|adapter| adapter.base_hash().is_some()) else { return };
    let warning = model_hash(model).ok().and_then(|hash| other_base(&adapter, model, &hash));
    findings.extend(warning.map(|warning| Finding::Fact(format!("warning: {warning}"))));
}

/// Checks the adapter that a run trains or continues, and those of earlier rounds that it stays orthogonal to.
fn check_adapters(base: &Checkpoint, train: &TrainConfig, findings: &mut Vec<Finding>) {
    let stack = is_stack(train);
    if let Some(dir) = &train.initial_adapter {
        // The existing adapter determines the modules; `target_modules` is ignored.
        if let Some(adapter) = note(open_adapter(dir, base), findings) {
            note(check_fits(base, &adapter), findings);
            note(check_continued(&adapter, train), findings);
            if stack && adapter.config().use_dora {
                // With o-lora's shape `stack`, the adapter must be one that can be added to the base together with the
                // others.
                note(check_frozen(&adapter), findings);
            }
        }
    } else if let Some(lora) = &train.lora {
        let plain = LoraConfig { use_dora: false, ..lora.clone() };
        if let (true, Some(key)) = (lora.use_dora, plain.beyond_factors()) {
            // The result could not be merged into the round's model.
            let (value, expected) = ("set together with use_dora".to_owned(), "only one of the two");
            findings.push(Finding::Problem(AdapterError::Parameter { key, value, expected }.into()));
        }
        note(check_targets(base, lora), findings);
    }
    let Some(olora) = &train.olora else { return };
    findings.push(Finding::Fact(format!(
        "o-lora: mode {}, lambda {}, shape {}, {} earlier adapters",
        as_written(&olora.mode),
        as_written(&olora.lambda),
        as_written(&olora.shape),
        olora.earlier.len()
    )));
    for dir in &olora.earlier {
        if let Some(adapter) = note(open_adapter(dir, base), findings) {
            note(check_fits(base, &adapter), findings);
            if stack {
                note(check_frozen(&adapter), findings);
            }
        }
    }
}

/// Checks that no setting contradicts the adapter that training continues from, because it would be ignored.
fn check_continued(adapter: &Adapter, train: &TrainConfig) -> Result<(), AdapterError> {
    let Some(lora) = &train.lora else { return Ok(()) };
    if lora.base.is_some() {
        cl_model::check_continued(adapter)?;
    }
    let wrong = |key, value: String| {
        Err(AdapterError::Parameter { key, value, expected: "no value, since initial_adapter determines it" })
    };
    if lora.use_dora && !adapter.config().use_dora {
        return wrong("use_dora", "true".to_owned());
    }
    if lora.init_lora_weights != InitLoraWeights::default() {
        return wrong("init_lora_weights", format!("{:?}", lora.init_lora_weights));
    }
    if let Some(key) = lora.beyond_factors().filter(|key| *key != "use_dora") {
        return wrong(key, "set".to_owned());
    }
    if let Some(pattern) = lora.rank_pattern.keys().chain(lora.alpha_pattern.keys()).next() {
        return wrong("rank_pattern, alpha_pattern", pattern.key().to_owned());
    }
    let of_tokens = |m: &&AdapterModule| m.kind == LayerKind::Embedding || m.name == "lm_head";
    match lora.embedding_learning_rate {
        Some(rate) if !adapter.modules().iter().any(of_tokens) && adapter.whole_tensors().is_empty() => {
            let expected = "an initial adapter on embed_tokens or lm_head";
            Err(AdapterError::Parameter { key: "embedding_learning_rate", value: rate.to_string(), expected })
        }
        _ => Ok(()),
    }
}

fn check_targets(base: &Checkpoint, lora: &LoraConfig) -> Result<(), AdapterError> {
    let mut layers = targeted(base, lora)?;
    layers.retain(|(name, ..)| !lora.is_saved(name));
    lora.check_layers(&layers)?;
    let adapted: Vec<&str> = layers.iter().map(|(name, ..)| *name).collect();
    check_whole(base, lora, &adapted)
}

/// Checks that tensors trained in addition to the factors exist and can be merged into the base.
fn check_whole(base: &Checkpoint, lora: &LoraConfig, adapted: &[&str]) -> Result<(), AdapterError> {
    let shape = |name: &str| base.info(name).map_or(Vec::new(), |i| i.shape.iter().map(|&d| d as i64).collect());
    let mut shapes: Vec<(&str, Vec<i64>)> = base.names().into_iter().map(|name| (name, shape(name))).collect();
    let (head, table) = ("lm_head.weight", "model.embed_tokens.weight");
    let said = base.config().get("tie_word_embeddings") == Some(&true.into());
    let tied = base.info(head).is_none() || (said && base.same_bytes(head, table).unwrap_or(true));
    if base.info(head).is_none() {
        shapes.push((head, shape(table)));
    }
    let tensors: Vec<(&str, &[i64])> = shapes.iter().map(|(name, shape)| (*name, shape.as_slice())).collect();
    let plan = lora.whole_plan(&tensors, adapted, tied)?;
    if lora.base.is_some() {
        check_trained(&plan)?;
    }
    let bare = |layer: &&&str| base.info(&format!("{layer}.bias")).is_none();
    match adapted.iter().find(bare).filter(|_| lora.lora_bias) {
        Some(layer) => {
            let value = format!("true for `{layer}`, which has no bias to merge the adapter's into");
            Err(AdapterError::Parameter { key: "lora_bias", value, expected: "target_modules that have a bias" })
        }
        None => Ok(()),
    }
}

/// Name and kind of a layer, and the shape of its weight.
pub(crate) type Layer<'n> = (&'n str, LayerKind, [i64; 2]);

/// The layers that get an adapter: linear layers, the embedding, and the head, which may share the embedding's weight.
pub(crate) fn targeted<'n>(base: &'n Checkpoint, lora: &LoraConfig) -> Result<Vec<Layer<'n>>, AdapterError> {
    let layer = |name: &'_ str, weight: &str| {
        let &[rows, columns] = base.info(weight)?.shape.as_slice() else { return None };
        let table = name.ends_with("embed_tokens");
        let kind = if table { LayerKind::Embedding } else { LayerKind::Linear };
        Some((kind, [rows as i64, columns as i64]))
    };
    let matrices = base.names().into_iter().filter_map(|weight| {
        let name = weight.strip_suffix(".weight")?;
        let (kind, shape) = layer(name, weight)?;
        Some((name, kind, shape))
    });
    let mut layers: Vec<Layer<'n>> = matrices.collect();
    if !layers.iter().any(|(name, ..)| *name == "lm_head")
        && let Some((kind, shape)) = layer("lm_head", "model.embed_tokens.weight")
    {
        layers.push(("lm_head", kind, shape));
    }
    let names: Vec<&str> = layers.iter().map(|(name, ..)| *name).collect();
    let targets = Targets::new(&lora.target_modules, &names)?;
    layers.retain(|(name, ..)| targets.contains(name));
    Ok(layers)
}
