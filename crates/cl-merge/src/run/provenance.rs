//! Metadata of an output: resolved settings, model card, sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cl_checkpoint::{CheckpointWriter, HubSnapshot, Manifest, hash_file};
use serde_json::{Value, json};

use crate::Error;
use crate::plan::Plan;
use crate::plan::inputs::Input;
use crate::recipe::config::{MergeConfig, model_and_adapter};

/// File name of the resolved merge file in an output.
pub const CONFIG_NAME: &str = "merge_config.toml";

/// Writes all files except tensors and manifest.
pub(crate) fn put_files(plan: &Plan, writer: &CheckpointWriter) -> Result<(), Error> {
    writer.put_json("config.json", &Value::Object(plan.out_config.clone()))?;
    for file in &plan.companions {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if !plan.made.contains_key(&*name) {
            writer.copy_file(file, &name)?;
        }
    }
    for (name, content) in &plan.made {
        writer.put_file(name, content)?;
    }
    let toml = to_toml(plan);
    writer.put_file(CONFIG_NAME, toml.as_bytes())?;
    writer.put_file("README.md", card(plan, &toml).as_bytes())?;
    Ok(())
}

/// Returns the manifest: the settings and all sources.
pub(crate) fn manifest(plan: &Plan, hash_inputs: bool) -> Result<Manifest, Error> {
    let mut config = json!({ "merge": plan.config });
    if !plan.stages.is_empty() {
        config["stages"] = json!(plan.stages);
    }
    let mut manifest = Manifest::new("model").with_config(config);
    for input in &plan.inputs.models {
        let role = if plan.config.base_model.as_deref() == Some(&input.written) { "base" } else { "model" };
        let hash = if hash_inputs { Some(hash_model(input)?) } else { known_hash(&input.path) };
        let Some(folded) = &input.folded else {
            manifest = manifest.with_source(role, source(input, &input.written), hash);
            continue;
        };
        // A model with an adapter has two sources, the model and then the adapter.
        let adapter = folded.adapter();
        let of_adapter = if hash_inputs { Some(adapter.content_hash()?) } else { known_hash(adapter.dir()) };
        let (model, _) = model_and_adapter(&input.written);
        manifest = manifest.with_source(role, source(input, model), hash);
        manifest = manifest.with_source("adapter", adapter.dir(), of_adapter);
    }
    Ok(manifest)
}

/// Returns the source of a model for the manifest: its name in the file, or for a Hub model its snapshot path, which
/// contains the commit.
fn source<'a>(input: &'a Input, written: &'a str) -> &'a Path {
    if HubSnapshot::of(&input.path).is_some() { &input.path } else { Path::new(written) }
}

/// Returns one hash over the weight files and config.json.
fn hash_model(input: &Input) -> Result<String, Error> {
    let mut lines = String::new();
    let config = input.path.join("config.json");
    for file in input.checkpoint.files().chain([config.as_path()]) {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        lines += &format!("{}  {name}\n", hash_file(file)?.blake3);
    }
    Ok(blake3::hash(lines.as_bytes()).to_hex().to_string())
}

/// Returns the hash from a directory's manifest, if the files have the sizes listed there.
fn known_hash(dir: &Path) -> Option<String> {
    let manifest = Manifest::read(dir).ok()?;
    let unchanged = |(name, entry): (&String, &cl_checkpoint::FileEntry)| {
        std::fs::metadata(dir.join(name)).is_ok_and(|m| m.len() == entry.bytes)
    };
    manifest.files.iter().all(unchanged).then(|| manifest.content_hash())
}

/// Returns the merge file that reproduces the output, including the stages that it depends on.
pub(crate) fn to_toml(plan: &Plan) -> String {
    let text = if plan.stages.is_empty() {
        toml::to_string(&plan.config)
    } else {
        let stages: Vec<&MergeConfig> = plan.stages.iter().chain([&plan.config]).collect();
        toml::to_string(&BTreeMap::from([("stage", stages)]))
    };
    text.expect("settings are strings, numbers and tables")
}

/// Returns the model card, with the metadata that the Hugging Face Hub reads.
fn card(plan: &Plan, toml: &str) -> String {
    let config = &plan.config;
    let models: Vec<&str> = plan.inputs.models.iter().map(|m| m.written.as_str()).collect();
    let parts = models.iter().flat_map(|model| {
        let (model, adapter) = model_and_adapter(model);
        std::iter::once(model).chain(adapter)
    });
    let parts = parts.map(|part| config.card_name(part));
    let mut seen = BTreeSet::new();
    let parts: Vec<&str> = parts.filter(|part| seen.insert(*part)).collect();
    let quoted = |name: &str| serde_json::to_string(name).unwrap_or_default();
    let list: String = parts.iter().map(|m| format!("- {}\n", quoted(m))).collect();
    let role = |m: &&str| if config.base_model.as_deref() == Some(m) { "base model" } else { "model" };
    let members: String = models.iter().map(|m| format!("- `{m}` ({})\n", role(m))).collect();
    format!(
        "---\nbase_model:\n{list}library_name: transformers\ntags:\n- merge\n- cl-merge\n---\n# Merged model\n\n\
         Merged with cl-merge {} by {} ({}): {}.\n\nDefinitions: profile `{}`.\nValues were merged in float32 and rounded \
         once.\n\n## Models\n\n{members}\n## Configuration\n\nAll settings, defaults filled in, as in `{CONFIG_NAME}`:\n\n\
         ```toml\n{toml}```\n",
        env!("CARGO_PKG_VERSION"),
        plan.method.title,
        plan.method.paper,
        plan.method.formula,
        serde_json::to_value(config.profile).unwrap_or_default().as_str().unwrap_or_default(),
    )
}
