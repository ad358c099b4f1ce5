use std::path::Path;

use cl_checkpoint::{Adapter, Checkpoint, CheckpointWriter, Dtype, Manifest, TensorSource, TensorSpec, WriteOptions};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{kind_of, load_tensor, tensor_bytes};

use crate::{AdapterError, check_supported, check_whole_tensors};

/// What folding did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FoldReport {
    /// Matrices that changed.
    pub folded: usize,
    /// Tensors copied byte for byte.
    pub copied: usize,
    /// Largest absolute difference between the f32 sum and what was stored.
    pub max_rounding_error: f64,
}

/// Writes `base + Σ scalingᵢ·Bᵢ·Aᵢ` as a model directory in the base's dtypes.
///
/// The sum over all adapters is taken in f32 and rounded once, so that the adapters of a whole sequence of rounds cost one
/// rounding, not one a round. Tensors without an adapter are copied byte for byte, and so are tokenizer and config.
///
/// # Errors
/// An adapter of another shape or kind, a module the base does not have, or `out` that exists while `overwrite` is false.
pub fn fold(
    base: &Checkpoint,
    adapters: &[Adapter],
    out: &Path,
    manifest: Manifest,
    overwrite: bool,
) -> Result<FoldReport, AdapterError> {
    for adapter in adapters {
        check(base, adapter)?;
    }
    let specs: Vec<TensorSpec> = base
        .names()
        .into_iter()
        .filter_map(|name| {
            let info = base.info(name)?;
            Some(TensorSpec { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone() })
        })
        .collect();
    let options = WriteOptions { overwrite, ..Default::default() };
    let writer = CheckpointWriter::create(out, &specs, options)?;
    let mut report = FoldReport::default();
    for spec in &specs {
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        let deltas: Vec<Tensor> =
            adapters.iter().map(|a| delta(a, module)).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        if deltas.is_empty() {
            writer.write(&spec.name, base.bytes(&spec.name)?)?;
            report.copied += 1;
            continue;
        }
        let sum = deltas.iter().fold(load_tensor(base, &spec.name, Kind::Float, Device::Cpu)?, |w, d| w + d);
        let kind = stored_kind(spec.dtype, &spec.name)?;
        let error = (sum.to_kind(kind).to_kind(Kind::Float) - &sum).abs().max().double_value(&[]);
        report.max_rounding_error = report.max_rounding_error.max(error);
        writer.write(&spec.name, &tensor_bytes(&sum, kind))?;
        report.folded += 1;
    }
    for file in base.companion_files()? {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        writer.copy_file(&file, &name)?;
    }
    writer.put_json("config.json", &serde_json::Value::Object(base.config().clone()))?;
    writer.finish(manifest)?;
    Ok(report)
}

fn stored_kind(dtype: Dtype, name: &str) -> Result<Kind, AdapterError> {
    let error = || cl_torch::TorchError::Dtype { tensor: name.to_owned(), dtype: format!("{dtype:?}") };
    Ok(kind_of(dtype)
        .filter(|k| matches!(k, Kind::Double | Kind::Float | Kind::Half | Kind::BFloat16))
        .ok_or_else(error)?)
}

/// The adapter's modules exist in the base and fit, before anything is written.
fn check(base: &Checkpoint, adapter: &Adapter) -> Result<(), AdapterError> {
    check_supported(adapter)?;
    check_whole_tensors(adapter, &|name| {
        base.info(name).map(|_| Ok(load_tensor(base, name, Kind::Float, Device::Cpu)?)).transpose()
    })?;
    for module in adapter.modules() {
        let path = adapter.dir().to_owned();
        let Some(info) = base.info(&format!("{}.weight", module.name)) else {
            return Err(AdapterError::UnknownModule { path, module: module.name.clone() });
        };
        let fits = info.shape.len() == 2
            && module.a_shape.get(1) == info.shape.get(1)
            && module.b_shape.first() == info.shape.first();
        if !fits {
            return Err(AdapterError::Shape {
                path,
                module: module.name.clone(),
                input: info.shape.get(1).map_or(0, |&d| d as i64),
                output: info.shape.first().map_or(0, |&d| d as i64),
                a: module.a_shape.clone(),
                b: module.b_shape.clone(),
            });
        }
    }
    Ok(())
}

/// `scaling · B·A` of one module in f32, `[out, in]`; `None` when the adapter leaves it alone.
fn delta(adapter: &Adapter, module: &str) -> Result<Option<Tensor>, AdapterError> {
    let name = |factor: &str| format!("base_model.model.{module}.lora_{factor}.weight");
    if adapter.info(&name("A")).is_none() {
        return Ok(None);
    }
    let a = load_tensor(adapter, &name("A"), Kind::Float, Device::Cpu)?;
    let b = load_tensor(adapter, &name("B"), Kind::Float, Device::Cpu)?;
    Ok(Some(b.matmul(&a) * adapter.config().scaling(module)))
}
