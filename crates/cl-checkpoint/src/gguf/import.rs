use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::config::Shape;
use super::tensors::{Planned, plan};
use super::tokenizer::{SpecialIds, Tokenizer};
use super::{Error, FloatDtype, GgufFile, TensorProblem, dequantize};
use crate::{CheckpointWriter, Manifest, OutputDir, TensorSpec, WriteOptions, hash_file};

/// Options of an import.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImportOptions {
    /// Dtype of the written weights, which are rounded to nearest even.
    pub dtype: FloatDtype,
    /// Whether to replace an existing output.
    pub overwrite: bool,
}

/// Summary of an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportReport {
    /// `model_type` of the written `config.json`.
    pub model_type: &'static str,
    /// Number of tensors written.
    pub tensors: usize,
    /// Number of weights written.
    pub parameters: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Assumptions about what the file does not specify; empty for files of current converters.
    pub notes: Vec<String>,
}

/// Imports a GGUF file as a Hugging Face model directory: `config.json`, `model.safetensors` (in shards of 5 GB),
/// `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `manifest.json`.
///
/// Weights are dequantized in f32 and rounded once. One output tensor at a time is held in memory.
///
/// # Errors
/// Returns an error if the file is invalid or not supported, or if the output cannot be written. Everything except the
/// values of the weights is checked before anything is written; after an error, there is no output.
pub fn import(file: &Path, out: &Path, options: &ImportOptions) -> Result<ImportReport, Error> {
    let gguf = GgufFile::open(file)?;
    OutputDir::check(out, options.overwrite, &[("the GGUF file", file)])?;
    let shape = Shape::read(&gguf)?;
    let (planned, optional) = plan(&gguf, &shape)?;
    let tokenizer = Tokenizer::read(&gguf, shape.vocab, shape.context)?;
    let config = shape.to_json(&optional, &tokenizer.ids, options.dtype);

    let spec =
        |p: &Planned| TensorSpec { name: p.name.clone(), dtype: options.dtype.dtype(), shape: p.tensor.shape.clone() };
    let specs: Vec<TensorSpec> = planned.iter().map(spec).collect();
    let layout = WriteOptions { overwrite: options.overwrite, ..WriteOptions::default() };
    let writer = CheckpointWriter::create(out, &specs, layout)?;
    for tensor in &planned {
        writer.write(&tensor.name, &convert(&gguf, tensor, options.dtype)?)?;
    }
    writer.put_json("config.json", &config)?;
    writer.put_file("tokenizer.json", tokenizer.json.to_string().as_bytes())?;
    writer.put_json("tokenizer_config.json", &tokenizer.config)?;
    writer.put_json("special_tokens_map.json", &tokenizer.special_tokens_map)?;
    writer.put_json("generation_config.json", &generation_config(&tokenizer.ids))?;
    let manifest = Manifest::new("model")
        .with_source("gguf", file, hash_file(file)?.blake3)
        .with_config(json!({"dtype": options.dtype.torch_name()}));
    writer.finish(manifest)?;
    Ok(ImportReport {
        model_type: shape.model_type().0,
        tensors: planned.len(),
        parameters: planned.iter().map(|p| p.tensor.elements()).sum(),
        tokens: tokenizer.tokens,
        notes: tokenizer.notes,
    })
}

/// Converts one tensor to its new dtype and row order, in parallel over rows.
fn convert(gguf: &GgufFile, planned: &Planned, dtype: FloatDtype) -> Result<Vec<u8>, Error> {
    let tensor = planned.tensor;
    // A vector whose elements are reordered (a bias) is treated as rows of one element.
    let columns = if planned.interleaved_heads.is_some() && tensor.shape.len() == 1 {
        tensor.ggml_type.block_len()
    } else {
        tensor.shape[tensor.shape.len() - 1]
    };
    if columns != 1 && planned.interleaved_heads.is_some() && tensor.shape.len() == 1 {
        let problem = TensorProblem::Bias { ggml_type: tensor.ggml_type.name() };
        return Err(gguf.tensor_error(&planned.source, problem));
    }
    let rows = tensor.elements() / columns;
    let source = gguf.bytes(tensor);
    let stored = columns / tensor.ggml_type.block_len() * tensor.ggml_type.block_bytes();
    let size = dtype.dtype().bitsize() / 8;
    let mut bytes = vec![0; tensor.elements() * size];
    let bad = bytes.par_chunks_exact_mut(columns * size).enumerate().map_init(
        || vec![0.0; columns],
        |values, (row, out)| {
            let from = planned.source_row(row, rows);
            dequantize(tensor.ggml_type, &source[from * stored..][..stored], values);
            let column = round(values, dtype, out)?;
            Some((from * columns + column, values[column]))
        },
    );
    match bad.find_first(Option::is_some).flatten() {
        None => Ok(bytes),
        Some((index, value)) => Err(Error::NotFinite {
            path: gguf.path().to_owned(),
            tensor: planned.source.clone(),
            index,
            value,
            dtype: dtype.torch_name(),
            hint: if value.is_finite() { "; choose f32, or bf16 unless values are near the largest f32" } else { "" },
        }),
    }
}

/// Rounds to nearest even; returns the position of the first value that is not finite after rounding, if any.
fn round(values: &[f32], dtype: FloatDtype, out: &mut [u8]) -> Option<usize> {
    let mut bad = None;
    for (i, &value) in values.iter().enumerate() {
        let finite = match dtype {
            FloatDtype::Bf16 => {
                let rounded = bf16::from_f32(value);
                out[i * 2..][..2].copy_from_slice(&rounded.to_le_bytes());
                rounded.is_finite()
            }
            FloatDtype::F16 => {
                let rounded = f16::from_f32(value);
                out[i * 2..][..2].copy_from_slice(&rounded.to_le_bytes());
                rounded.is_finite()
            }
            FloatDtype::F32 => {
                out[i * 4..][..4].copy_from_slice(&value.to_le_bytes());
                value.is_finite()
            }
        };
        if !finite && bad.is_none() {
            bad = Some(i);
        }
    }
    bad
}

/// Returns `generation_config.json`. Generation stops at the end of the text and, if that is a separate token, at the
/// end of a turn.
fn generation_config(ids: &SpecialIds) -> Value {
    let mut config = json!({});
    for (name, id) in ids.named() {
        if let Some(id) = id {
            config[name] = id.into();
        }
    }
    if let (Some(eos), Some(eot)) = (ids.eos, ids.eot)
        && eos != eot
    {
        config["eos_token_id"] = json!([eos, eot]);
    }
    config
}
