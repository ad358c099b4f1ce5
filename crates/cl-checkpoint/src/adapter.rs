use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::writer::{CheckpointWriter, WriteOptions};
use crate::{AdapterConfig, Error, Manifest, SafetensorsFile, TensorInfo, TensorSource, TensorSpec};

/// A PEFT adapter directory, opened lazily.
pub struct Adapter {
    dir: PathBuf,
    config: AdapterConfig,
    file: SafetensorsFile,
    modules: Vec<AdapterModule>,
}

/// One adapted layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterModule {
    /// Name of the layer in the base model.
    pub name: String,
    /// Shape of `lora_A`: `[r, in]`.
    pub a_shape: Vec<usize>,
    /// Shape of `lora_B`: `[out, r]`.
    pub b_shape: Vec<usize>,
}

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

impl Adapter {
    /// Opens `adapter_config.json` and `adapter_model.safetensors` and checks that every `lora_A` has its `lora_B` and that
    /// ranks agree with each other and with the config.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Json`], [`Error::Adapter`], and those of the weight file.
    pub fn open(dir: &Path) -> Result<Adapter, Error> {
        let path = dir.join(CONFIG);
        if !path.exists() {
            return Err(Error::NotFound { path, hint: "an adapter directory holds adapter_config.json" });
        }
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        let config: AdapterConfig = serde_json::from_slice(&text).map_err(Error::json(&path))?;
        if let Some(message) = config.problem() {
            return Err(Error::Adapter { path, message });
        }
        let path = dir.join(WEIGHTS);
        if !path.exists() {
            let hint = if dir.join("adapter_model.bin").exists() {
                "this adapter has only adapter_model.bin; save it again with safe_serialization=True"
            } else {
                "an adapter directory holds adapter_model.safetensors"
            };
            return Err(Error::NotFound { path, hint });
        }
        let file = SafetensorsFile::open(&path)?;
        let shapes = file.names().into_iter().filter_map(|n| Some((n, file.info(n)?.shape.as_slice()))).collect();
        let modules = modules(&path, &shapes, &config)?;
        Ok(Adapter { dir: dir.to_owned(), config, file, modules })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Content of `adapter_config.json`.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The adapted layers, by name.
    pub fn modules(&self) -> Vec<&AdapterModule> {
        self.modules.iter().collect()
    }
}

fn modules(
    path: &Path,
    shapes: &BTreeMap<&str, &[usize]>,
    config: &AdapterConfig,
) -> Result<Vec<AdapterModule>, Error> {
    let wrong = |message: String| Error::Adapter { path: path.to_owned(), message };
    let mut modules = Vec::new();
    if config.peft_type != "LORA" {
        return Ok(modules);
    }
    for &name in shapes.keys() {
        let Some(module) = name.strip_suffix(".lora_A.weight").or_else(|| name.strip_suffix(".lora_B.weight")) else {
            continue;
        };
        let shape = |factor: &str| shapes.get(format!("{module}.lora_{factor}.weight").as_str()).map(|s| s.to_vec());
        let (Some(a), Some(b)) = (shape("A"), shape("B")) else {
            return Err(wrong(format!("tensor `{name}` has no counterpart; both lora_A and lora_B are needed")));
        };
        if name.ends_with("lora_B.weight") {
            continue;
        }
        let Some(module) = module.strip_prefix(PREFIX) else {
            return Err(wrong(format!("tensor `{name}`: expected a name that starts with `{PREFIX}`")));
        };
        let rank = config.rank(module);
        if a.len() != 2 || b.len() != 2 || a[0] != rank || b[1] != rank {
            return Err(wrong(format!(
                "module `{module}`: adapter_config.json implies rank {rank}, lora_A is {a:?} and lora_B is {b:?}"
            )));
        }
        modules.push(AdapterModule { name: module.to_owned(), a_shape: a, b_shape: b });
    }
    if modules.is_empty() {
        return Err(wrong("no lora_A and lora_B tensors".to_owned()));
    }
    Ok(modules)
}

impl TensorSource for Adapter {
    fn names(&self) -> Vec<&str> {
        self.file.names()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.file.info(name)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], Error> {
        self.file.bytes(name)
    }
}

/// Writes a PEFT directory, whole or not at all.
///
/// # Errors
/// [`Error::Adapter`] for tensors that contradict the config, as [`Adapter::open`] finds them; those of [`CheckpointWriter`].
pub fn write_adapter(
    dir: &Path,
    config: &AdapterConfig,
    tensors: &[(TensorSpec, Vec<u8>)],
    manifest: Manifest,
    overwrite: bool,
) -> Result<(), Error> {
    let shapes = tensors.iter().map(|(spec, _)| (spec.name.as_str(), spec.shape.as_slice())).collect();
    if let Some(message) = config.problem() {
        return Err(Error::Adapter { path: dir.join(CONFIG), message });
    }
    modules(&dir.join(WEIGHTS), &shapes, config)?;
    let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.0.clone()).collect();
    let options = WriteOptions { max_shard_size: u64::MAX, overwrite };
    let writer = CheckpointWriter::create_named(dir, &specs, options, "adapter_model")?;
    for (spec, bytes) in tensors {
        writer.write(&spec.name, bytes)?;
    }
    let json = serde_json::to_value(config).map_err(Error::json(&dir.join(CONFIG)))?;
    writer.put_json(CONFIG, &json)?;
    writer.finish(manifest)
}
