use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Once;

use cl_checkpoint::{Checkpoint, TensorSource};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{Quantization, kind_of, load_tensor};

use crate::build::build;
use crate::config::{ModelConfig, add_generation_config};
use crate::problem::ExpertsProblem;
use crate::quantized::is_quantizable;
use crate::routing::is_router_weight;
use crate::{Decoder, ModelError};

/// Dtypes, quantization and device of a loaded model.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Dtype of the weights in memory: f32 master weights for full fine-tuning, otherwise the same as `compute`.
    pub weights: Kind,
    /// Dtype of activations and matrix products.
    pub compute: Kind,
    /// Dtype of the adapters' matrix products. PEFT uses f32 without autocast, regardless of `compute`, and with
    /// autocast the same dtype as everything else.
    pub adapters: Kind,
    /// Quantization format of the weights of linear layers in memory (see [`is_quantizable`](crate::is_quantizable)),
    /// which then cannot be trained. If `None`, they are dense.
    pub quantization: Option<Quantization>,
    /// The device.
    pub device: Device,
}

impl LoadOptions {
    /// Options for weights and matrix products in one dtype, on the CPU.
    pub fn cpu(kind: Kind) -> LoadOptions {
        LoadOptions { weights: kind, compute: kind, adapters: kind, quantization: None, device: Device::Cpu }
    }
}

impl Decoder {
    /// Loads a Hugging Face model directory.
    ///
    /// # Errors
    /// Returns an error for an unknown architecture, an invalid config, and tensors that are missing, unused, or of
    /// another shape than the config implies.
    pub fn load(checkpoint: &Checkpoint, options: LoadOptions) -> Result<Decoder, ModelError> {
        Decoder::load_with(checkpoint, options, &|_, tensor| Ok(tensor))
    }

    /// Like [`Decoder::load`], but passes each tensor with its name to `place` as soon as it is read. The model uses
    /// the tensor that `place` returns, which must have the same shape and dtype.
    ///
    /// # Errors
    /// Returns the errors of [`Decoder::load`] and those of `place`.
    pub fn load_with(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        place: &dyn Fn(&str, Tensor) -> Result<Tensor, ModelError>,
    ) -> Result<Decoder, ModelError> {
        warn_of_emulation(options);
        from_checkpoint(checkpoint, options, &|name| {
            let kind = match name {
                _ if is_signs(name) => Kind::Uint8,
                _ if is_router_weight(name) || name.ends_with(".delta_scale") => Kind::Float,
                // Quantization formats are defined on the checkpoint's own values.
                _ if options.quantization.is_some() && is_quantizable(name) => Kind::Float,
                _ => options.weights,
            };
            let tensor = load_tensor(checkpoint, name, kind, options.device)?;
            if is_gateless_buffer(name) {
                check_equal_weights(checkpoint.dir(), name, &tensor)?;
            }
            place(name, tensor)
        })
    }

    /// Checks a model directory like [`Decoder::load`], but without reading tensors.
    ///
    /// # Errors
    /// Returns the errors of [`Decoder::load`].
    pub fn check(checkpoint: &Checkpoint) -> Result<ModelConfig, ModelError> {
        let options = LoadOptions::cpu(Kind::Float);
        let nothing = |_: &str| Ok(Tensor::zeros([0], (Kind::Float, Device::Cpu)));
        Ok(from_checkpoint(checkpoint, options, &nothing)?.config)
    }
}

/// Warns once that bf16 saves memory, but no time, on a processor without bf16 instructions.
fn warn_of_emulation(options: LoadOptions) {
    static ONCE: Once = Once::new();
    if options.compute == Kind::BFloat16 && options.device == Device::Cpu && cl_torch::emulates_bf16() {
        ONCE.call_once(|| {
            tracing::warn!(
                "this processor has no instructions for bf16: training and scoring are faster with precision = \"f32\", in more memory"
            );
        });
    }
}

/// Whether a tensor contains an expert's signs, one bit per weight.
fn is_signs(name: &str) -> bool {
    name.ends_with(".delta_sign")
}

/// Whether a tensor is stored in place of a router in a model without routers.
fn is_gateless_buffer(name: &str) -> bool {
    name.ends_with(".router")
}

/// Checks that the weights stored in place of a router are 1/experts, with which the model computes, up to rounding to
/// bf16 (8 bits).
fn check_equal_weights(dir: &Path, name: &str, weights: &Tensor) -> Result<(), ModelError> {
    let values: Vec<f64> = Vec::try_from(weights.to_kind(Kind::Double).to_device(Device::Cpu)).unwrap_or_default();
    let expected = 1.0 / values.len() as f64;
    let near = expected * (1.0 - 1.0 / 128.0)..=expected * (1.0 + 1.0 / 128.0);
    match values.iter().find(|value| !near.contains(value)) {
        None => Ok(()),
        Some(&value) => {
            let problem = ExpertsProblem::UnequalWeights { tensor: name.to_owned(), value, expected };
            Err(ModelError::Config { path: dir.to_owned(), problem: problem.into() })
        }
    }
}

/// Builds a decoder, reading every tensor that config.json implies with `read`; checks names, shapes and dtypes against
/// the files.
fn from_checkpoint(
    checkpoint: &Checkpoint,
    options: LoadOptions,
    read: &dyn Fn(&str) -> Result<Tensor, ModelError>,
) -> Result<Decoder, ModelError> {
    let dir = checkpoint.dir();
    let mut config = ModelConfig::from_json(dir, checkpoint.config())?;
    add_generation_config(&mut config, dir)?;
    if config.tie_word_embeddings && has_own_head(checkpoint)? {
        tracing::warn!(
            "{}: config.json ties the output head to the embedding, but lm_head.weight differs from it; \
             lm_head.weight is used, as in Transformers 5",
            dir.display()
        );
        config.tie_word_embeddings = false;
    }
    let missing = RefCell::new(Vec::new());
    let used = RefCell::new(BTreeSet::new());
    let get = |name: &str, shape: &[i64]| -> Result<Tensor, ModelError> {
        used.borrow_mut().insert(name.to_owned());
        let Some(info) = checkpoint.info(name) else {
            missing.borrow_mut().push(name.to_owned());
            return Ok(Tensor::zeros([0], (options.weights, options.device)));
        };
        let got: Vec<i64> = info.shape.iter().map(|&d| d as i64).collect();
        if got != shape {
            let (tensor, expected) = (name.to_owned(), shape.to_vec());
            return Err(ModelError::Shape { path: dir.to_owned(), tensor, expected, got });
        }
        let floats = [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16];
        let (allowed, expected) =
            if is_signs(name) { (&[Kind::Uint8][..], "U8") } else { (&floats[..], "F32, F16, BF16 or F64") };
        if !kind_of(info.dtype).is_some_and(|kind| allowed.contains(&kind)) {
            // Otherwise, quantized weights would be loaded as integers.
            let (tensor, dtype) = (name.to_owned(), format!("{:?}", info.dtype));
            return Err(ModelError::Dtype { path: dir.to_owned(), tensor, dtype, expected });
        }
        read(name)
    };
    let decoder = build(config, options, &get)?;
    let (missing, used) = (missing.into_inner(), used.into_inner());
    let left_over = |name: &&str| !used.contains(*name) && !decoder.config.is_redundant(name);
    let unused: Vec<&str> = checkpoint.names().into_iter().filter(left_over).collect();
    if missing.is_empty() && unused.is_empty() {
        return Ok(decoder);
    }
    let missing: Vec<&str> = missing.iter().map(String::as_str).collect();
    Err(ModelError::Tensors { path: dir.to_owned(), missing: some(&missing), unused: some(&unused) })
}

/// Whether the files contain an output head that differs from the embedding.
fn has_own_head(checkpoint: &Checkpoint) -> Result<bool, ModelError> {
    let (head, table) = ("lm_head.weight", "model.embed_tokens.weight");
    let stored = checkpoint.info(head).is_some() && checkpoint.info(table).is_some();
    Ok(stored && !checkpoint.same_bytes(head, table)?)
}

/// Lists the first few names, and the number of the others.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}
