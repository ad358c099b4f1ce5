//! Runs a plan: reads, converts and writes tensors in pieces, on all cores.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use cl_checkpoint::{
    Checkpoint, CheckpointWriter, Dtype, HubSnapshot, Interrupt, Manifest, TensorSource, TensorSpec, WriteOptions,
    convert,
};
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::delta;
use crate::model_info::INFO;
use crate::plan::{Planned, Source};
use crate::task_vectors;
use crate::{Error, ExpertStorage, MixArchitecture, ModelInfo, Plan};

/// Name of the resolved configuration in an output directory.
pub(crate) const CONFIG_NAME: &str = "moe_config.toml";
/// Number of elements of a tensor that each thread has in memory at the same time.
pub(crate) const PIECE: usize = 1 << 20;

/// Options for writing a mixture.
#[derive(Clone, Debug)]
pub struct MixOptions {
    /// Maximum bytes of tensors per file.
    pub max_shard_size: u64,
    /// Whether to replace an existing output.
    pub overwrite: bool,
    /// Memory limit in bytes; the number of threads is reduced to stay within it.
    pub memory: usize,
    /// Number of threads; 0 for all cores. The result does not depend on it.
    pub threads: usize,
    /// Requests to stop.
    pub interrupt: Interrupt,
}

impl Default for MixOptions {
    /// Shards of 5 GB, 2 GiB of memory, all cores; nothing is overwritten.
    fn default() -> Self {
        MixOptions {
            max_shard_size: 5_000_000_000,
            overwrite: false,
            memory: 2 << 30,
            threads: 0,
            interrupt: Interrupt::default(),
        }
    }
}

/// Summary of a written mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of tensors written.
    pub bytes: u64,
    /// Parameter counts by purpose.
    pub info: ModelInfo,
}

/// Writes the mixture as a model directory of [`MixConfig::architecture`](crate::MixConfig::architecture), with
/// tokenizer, model card, `model_info.json`, the resolved configuration and a manifest. The directory is written
/// atomically.
///
/// Each thread has about a million elements in memory, regardless of the models' size; with low-rank differences, it
/// has a matrix and the memory that its decomposition takes. `progress` is called with the number of bytes written so
/// far, from any thread.
///
/// # Errors
/// Returns an error for values that are not finite, for inputs that change during the run, for a stop request, and for
/// I/O errors. In these cases, no output is left.
pub fn mix(plan: &Plan, out: &Path, options: &MixOptions, progress: &(dyn Fn(u64) + Sync)) -> Result<Summary, Error> {
    let threads = plan.threads(options)?;
    plan.check_output(out, options.overwrite)?;
    let write = WriteOptions { max_shard_size: options.max_shard_size, overwrite: options.overwrite };
    let writer = CheckpointWriter::create(out, &plan.tensors(), write)?;
    let written = AtomicU64::new(0);
    let done = |bytes: usize| {
        progress(written.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64);
        if options.interrupt.requested() { Err(Error::Interrupted) } else { Ok(()) }
    };
    let write = || {
        plan.tensors.par_iter().with_max_len(1).try_for_each(|tensor| write_tensor(plan, tensor, &writer, &done))?;
        plan.deltas.par_iter().with_max_len(1).try_for_each(|planned| done(delta::write(plan, planned, &writer)?))
    };
    match ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool.install(write)?,
        // If no more threads can be started, the program's existing threads do the work.
        Err(_) => write()?,
    }
    put_files(plan, &writer)?;
    plan.experts.iter().chain([&plan.base]).try_for_each(Checkpoint::check_unchanged)?;
    writer.finish(manifest(plan)?)?;
    Ok(Summary { tensors: plan.tensors.len(), bytes: plan.bytes_written(), info: plan.info() })
}

fn write_tensor(
    plan: &Plan,
    tensor: &Planned,
    writer: &CheckpointWriter,
    done: &dyn Fn(usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let spec = &tensor.spec;
    match &tensor.source {
        Source::Base(name) => copy(&plan.base, name, 1.0, tensor, writer, done),
        Source::Expert(index, name) => copy(&plan.experts[*index], name, 1.0, tensor, writer, done),
        Source::Shared(name, scale) => copy(&plan.experts[0], name, *scale, tensor, writer, done),
        Source::Deltas => Ok(()),
        Source::Constant { value, .. } => {
            write_values(&vec![*value as f32; spec.shape.iter().product()], spec, writer, done)
        }
        Source::Router { layer, name } => {
            write_values(&plan.routers.rows(*layer, name.as_deref(), spec.shape[1])?, spec, writer, done)
        }
        Source::TaskVectors { layer, matrices } => {
            write_values(&task_vectors::rows(plan, *layer, matrices, spec.shape[1])?, spec, writer, done)
        }
        Source::SharedGate { layer } => {
            write_values(&plan.routers.shared_gate(*layer, spec.shape[1])?, spec, writer, done)
        }
    }
}

/// Writes a tensor in the output's dtype.
fn write_values(
    values: &[f32],
    spec: &TensorSpec,
    writer: &CheckpointWriter,
    done: &dyn Fn(usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let bytes = convert::from_f32(spec.dtype, values).expect("a floating output");
    writer.write(&spec.name, &bytes)?;
    done(bytes.len())
}

/// Copies a tensor times `scale` in pieces, converted to the output's dtype.
fn copy(
    model: &Checkpoint,
    name: &str,
    scale: f64,
    tensor: &Planned,
    writer: &CheckpointWriter,
    done: &dyn Fn(usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let info = model.info(name).expect("planned from this model");
    let (from, to) = (info.dtype, tensor.spec.dtype);
    let width = |dtype: Dtype| dtype.bitsize() / 8;
    let mut buffer = vec![0; PIECE.min(info.elements()) * width(from)];
    for start in (0..info.elements()).step_by(PIECE) {
        let count = PIECE.min(info.elements() - start);
        let bytes = &mut buffer[..count * width(from)];
        model.read(name, start * width(from), bytes)?;
        if let Some((index, value)) = convert::first_not_finite(from, bytes) {
            let (model, tensor) = (model.dir().display().to_string(), name.to_owned());
            return Err(Error::NotFinite { model, tensor, index: start + index, value });
        }
        let place = start * width(to);
        if from == to && scale == 1.0 {
            writer.write_part(&tensor.spec.name, place, bytes)?;
        } else {
            let mut values = convert::to_f32(from, bytes).expect("checked to be floating");
            if scale != 1.0 {
                values.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            }
            let converted = convert::from_f32(to, &values).expect("a floating output");
            // The values may exceed the range of a narrower dtype, or after a large factor.
            if let Some((index, value)) = convert::first_not_finite(to, &converted) {
                let (model, tensor) = (model.dir().display().to_string(), tensor.spec.name.clone());
                return Err(Error::NotFinite { model, tensor, index: start + index, value });
            }
            writer.write_part(&tensor.spec.name, place, &converted)?;
        }
        done(count * width(to))?;
    }
    Ok(())
}

fn put_files(plan: &Plan, writer: &CheckpointWriter) -> Result<(), Error> {
    writer.put_json("config.json", &Value::Object(plan.out_config.clone()))?;
    for file in plan.base.companion_files()? {
        writer.copy_file(&file, &file.file_name().unwrap_or_default().to_string_lossy())?;
    }
    let toml = toml::to_string(&plan.config).expect("settings are strings, numbers and tables");
    writer.put_json(INFO, &json!(plan.info()))?;
    writer.put_file(CONFIG_NAME, toml.as_bytes())?;
    writer.put_file("README.md", card(plan, &toml).as_bytes())?;
    Ok(())
}

fn manifest(plan: &Plan) -> Result<Manifest, Error> {
    let mut manifest = Manifest::new("model").with_config(json!({ "mix": plan.config }));
    manifest = manifest.with_source("base", plan.base.dir(), plan.base.content_hash()?);
    let shared = plan.config.shared_expert.iter().map(|_| "shared_expert");
    for (role, expert) in shared.chain(std::iter::repeat("expert")).zip(&plan.experts) {
        manifest = manifest.with_source(role, expert.dir(), expert.content_hash()?);
    }
    Ok(manifest)
}

/// The model card, with the metadata that the Hub reads.
fn card(plan: &Plan, toml: &str) -> String {
    let quoted = |path: &Path| serde_json::to_string(&HubSnapshot::model_name(path)).unwrap_or_default();
    let models: String = std::iter::once(&plan.config.base_model)
        .chain(plan.config.shared_expert.iter().map(|e| &e.model))
        .chain(plan.config.experts.iter().map(|e| &e.model))
        .map(|path| format!("- {}\n", quoted(path)))
        .collect();
    let info = plan.info();
    let kind = match (plan.config.architecture(), plan.config.expert_storage) {
        (MixArchitecture::Mixtral, _) => "A Mixtral",
        (MixArchitecture::Qwen2Moe, _) => "A Qwen2-MoE with a shared expert",
        (MixArchitecture::Moetify, ExpertStorage::Full) => "A model in the format of moetify",
        (MixArchitecture::Moetify, _) => {
            "A model in a format of the `cl` tools, experts stored as differences from the base,"
        }
    };
    let library =
        if plan.config.architecture() == MixArchitecture::Moetify { "" } else { "library_name: transformers\n" };
    format!(
        "---\nbase_model:\n{models}{library}tags:\n- moe\n- merge\n- cl-moe\n---\n# Mixture of experts\n\n\
         {} of {} experts, {} for each token, made with cl-moe {}: {} parameters, {} active.\n\n## Configuration\n\n\
         All settings, defaults filled in, as in `{CONFIG_NAME}`:\n\n```toml\n{toml}```\n",
        kind,
        plan.config.experts.len(),
        plan.config.top_k(),
        env!("CARGO_PKG_VERSION"),
        info.total_parameters,
        info.active_parameters,
    )
}
