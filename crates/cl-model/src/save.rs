use std::path::Path;

use cl_checkpoint::convert::first_not_finite;
use cl_checkpoint::{CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions};
use cl_moe::ExpertStorage;
use cl_torch::tch::Kind;
use cl_torch::tensor_bytes;
use serde_json::{Map, Value};

use crate::{Decoder, ModelError};

impl Decoder {
    /// Writes the base weights (without adapters) as a Hugging Face model directory, rounded once to `kind` (f32, f16
    /// or bf16).
    ///
    /// `config` is the content of config.json; `companions` are names and contents of other files to write.
    ///
    /// # Errors
    /// Returns [`ModelError::DeltaExperts`] for experts stored as differences from the base, [`ModelError::Quantized`]
    /// for quantized weights, and [`ModelError::Checkpoint`] if `dir` exists and `overwrite` is false, if it cannot be
    /// written, or if a value does not fit into `kind`.
    pub fn save(
        &self,
        dir: &Path,
        kind: Kind,
        config: &Map<String, Value>,
        companions: &[(String, Vec<u8>)],
        manifest: Manifest,
        overwrite: bool,
    ) -> Result<(), ModelError> {
        let storage = self.config.experts.as_ref().map_or(ExpertStorage::Full, |experts| experts.storage);
        if storage.is_delta() {
            return Err(ModelError::DeltaExperts { path: dir.to_owned(), storage });
        }
        if let Some(format) = self.quantization() {
            return Err(ModelError::Quantized { path: dir.to_owned(), format: format.name() });
        }
        let mut parameters = self.named_parameters();
        parameters.extend(self.gateless_buffers());
        let dtype = match kind {
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::BF16,
            _ => Dtype::F32,
        };
        let kind = cl_torch::kind_of(dtype).expect("a floating dtype that libtorch has");
        let specs: Vec<TensorSpec> = parameters
            .iter()
            .map(|(name, t)| TensorSpec {
                name: name.clone(),
                dtype,
                shape: t.size().iter().map(|&d| d as usize).collect(),
            })
            .collect();
        let options = WriteOptions { overwrite, ..Default::default() };
        let writer = CheckpointWriter::create(dir, &specs, options)?;
        for (name, t) in &parameters {
            let bytes = tensor_bytes(t, kind);
            // A narrower dtype may not be able to represent an f32 value.
            if let Some((index, value)) = first_not_finite(dtype, &bytes) {
                let (path, tensor) = (dir.to_owned(), name.clone());
                return Err(cl_checkpoint::Error::NotFinite { path, tensor, index, value }.into());
            }
            writer.write(name, &bytes)?;
        }
        let mut config = config.clone();
        let name = match dtype {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            _ => "float32",
        };
        // Transformers reads `dtype` since version 5, and `torch_dtype` before.
        for key in ["torch_dtype", "dtype"] {
            if key == "torch_dtype" || config.contains_key(key) {
                config.insert(key.to_owned(), Value::from(name));
            }
        }
        writer.put_json("config.json", &Value::Object(config))?;
        for (name, content) in companions {
            writer.put_file(name, content)?;
        }
        writer.finish(manifest)?;
        Ok(())
    }
}
