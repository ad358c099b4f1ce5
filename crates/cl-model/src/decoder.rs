use cl_adapters::{Linear, Lora, LoraConfig, Mode, Targets};
use cl_checkpoint::Adapter;
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{TorchError, checkpoint};

use crate::attention::packed_causal;
use crate::batch::PackedBatch;
use crate::config::ModelConfig;
use crate::layer::Layer;
use crate::norm::RmsNorm;
use crate::rope::{Angles, Rope};
use crate::{ModelError, kv_cache::KvCache};

/// A decoder-only transformer of the Llama family.
pub struct Decoder {
    /// Its shape.
    pub config: ModelConfig,
    /// The dtype that activations and products are in.
    pub compute: Kind,
    /// Where it lives.
    pub device: Device,
    /// Recompute each layer's activations in the backward pass instead of keeping them.
    pub activation_checkpointing: bool,
    pub(crate) embed_tokens: Tensor, // (vocab, hidden)
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: RmsNorm,
    pub(crate) lm_head: Option<Linear>, // absent when tied to the embedding
    pub(crate) rope: Rope,
}

impl Decoder {
    /// The residual stream after the last layer, before the final norm: `(tokens, hidden)`.
    ///
    /// # Errors
    /// [`ModelError::Torch`].
    pub fn forward(&self, batch: &PackedBatch, mode: Mode) -> Result<Tensor, ModelError> {
        let angles = self.rope.angles(&batch.position_ids, self.compute);
        let mut x = self.embed(&batch.input_ids);
        for layer in &self.layers {
            x = if self.activation_checkpointing && mode != Mode::Eval && x.requires_grad() {
                recomputed(layer, &x, &angles, batch, mode)?
            } else {
                attend_packed(layer, &x, &angles, batch, mode)?
            };
        }
        Ok(x)
    }

    /// As [`Decoder::forward`] without a graph, and remembers every layer's keys and values.
    pub(crate) fn prefill(&self, batch: &PackedBatch, cache: &mut KvCache) -> Result<Tensor, ModelError> {
        let angles = self.rope.angles(&batch.position_ids, self.compute);
        let mut x = self.embed(&batch.input_ids);
        for layer in &self.layers {
            let mut failure = None;
            x = layer.forward(&x, &angles, Mode::Eval, &mut |q, k, v, window| {
                cache.store_prompt(&k, &v);
                catch(packed_causal(&q, &k, &v, &batch.cu_seqlens, &batch.cu_tensor, window), &q, &mut failure)
            });
            failure.map_or(Ok(()), Err)?;
        }
        Ok(x)
    }

    /// One more token for every sequence of the cache: `ids` is `(sequences)`; the result is `(sequences, hidden)`.
    pub(crate) fn step(&self, ids: &Tensor, cache: &mut KvCache) -> Tensor {
        let angles = self.rope.angles(&cache.next_positions(self.device), self.compute);
        let mut x = self.embed(ids);
        cache.begin_step();
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &angles, Mode::Eval, &mut |q, k, v, window| cache.attend(index, &q, &k, &v, window));
        }
        cache.end_step();
        x
    }

    fn embed(&self, ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed_tokens, ids, -1, false, false).to_kind(self.compute)
    }

    /// Final norm and output head on rows of the residual stream: `(rows, hidden)` to f32 `(rows, vocab)`.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let h = self.norm.forward(x);
        match &self.lm_head {
            Some(head) => head.forward(&h, Mode::Eval),
            None => h.linear::<&Tensor>(&self.embed_tokens.to_kind(self.compute), None),
        }
        .to_kind(Kind::Float)
    }

    /// The linear layers, in the order of the model.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(Layer::linears).chain(self.lm_head.iter())
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(Layer::linears_mut).chain(self.lm_head.iter_mut())
    }

    /// Puts a fresh adapter beside every targeted linear layer and freezes everything else.
    ///
    /// # Errors
    /// A hyper-parameter outside its range, or a target that matches nothing.
    pub fn add_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<(), ModelError> {
        config.validate()?;
        let names: Vec<&str> = self.linears().map(|l| l.name.as_str()).collect();
        let targets = Targets::new(&config.target_modules, &names)?;
        self.set_requires_grad(false);
        for layer in self.linears_mut() {
            layer.lora = targets.contains(&layer.name).then(|| Lora::init(layer, config, seed));
        }
        Ok(())
    }

    /// Puts the adapter of a PEFT directory beside the layers it was made for and freezes everything else.
    ///
    /// # Errors
    /// [`cl_adapters::AdapterError`] when it is of a kind that is not built, holds a module this model does not have, or
    /// factors of another shape.
    pub fn load_lora(&mut self, adapter: &Adapter, dropout: f64) -> Result<(), ModelError> {
        cl_adapters::check_supported(adapter)?;
        let own = self.named_parameters();
        cl_adapters::check_whole_tensors(adapter, &|name| {
            Ok(own.iter().find(|(n, _)| n == name).map(|(_, t)| t.shallow_clone()))
        })?;
        let modules: Vec<String> = adapter.modules().into_iter().map(|m| m.name.clone()).collect();
        let names: Vec<&str> = self.linears().map(|l| l.name.as_str()).collect();
        if let Some(unknown) = modules.iter().find(|m| !names.contains(&m.as_str())) {
            let error =
                cl_adapters::AdapterError::UnknownModule { path: adapter.dir().to_owned(), module: unknown.clone() };
            return Err(error.into());
        }
        let load =
            |layer: &Linear| modules.contains(&layer.name).then(|| Lora::load(layer, adapter, dropout)).transpose();
        let loaded = self.linears().map(load).collect::<Result<Vec<_>, _>>()?;
        self.set_requires_grad(false);
        for (layer, lora) in self.linears_mut().zip(loaded) {
            layer.lora = lora;
        }
        Ok(())
    }

    /// Every weight of the base model by its name in the checkpoint.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = vec![("model.embed_tokens.weight".to_owned(), self.embed_tokens.shallow_clone())];
        for (i, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{i}");
            let norm = |name: &str, norm: &RmsNorm| (format!("{prefix}.{name}.weight"), norm.weight.shallow_clone());
            all.push(norm("input_layernorm", &layer.input_layernorm));
            all.push(norm("post_attention_layernorm", &layer.post_attention_layernorm));
            all.extend(layer.self_attn.q_norm.iter().map(|n| norm("self_attn.q_norm", n)));
            all.extend(layer.self_attn.k_norm.iter().map(|n| norm("self_attn.k_norm", n)));
        }
        all.push(("model.norm.weight".to_owned(), self.norm.weight.shallow_clone()));
        for linear in self.linears() {
            all.push((format!("{}.weight", linear.name), linear.weight.shallow_clone()));
            all.extend(linear.bias.iter().map(|b| (format!("{}.bias", linear.name), b.shallow_clone())));
        }
        all
    }

    /// What the optimizer moves, by name: the adapters when there are any, else every weight that requires a gradient.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        let mut adapters = Vec::new();
        for linear in self.linears() {
            if let Some(lora) = &linear.lora {
                adapters.push((format!("{}.lora_A.weight", linear.name), lora.a.shallow_clone()));
                adapters.push((format!("{}.lora_B.weight", linear.name), lora.b.shallow_clone()));
            }
        }
        if adapters.is_empty() {
            adapters = self.named_parameters().into_iter().filter(|(_, t)| t.requires_grad()).collect();
        }
        adapters
    }

    /// Makes every base weight a leaf that collects gradients, or freezes all of them.
    pub fn set_requires_grad(&mut self, on: bool) {
        for (_, t) in self.named_parameters() {
            let _ = t.set_requires_grad(on);
        }
    }
}

fn attend_packed(
    layer: &Layer,
    x: &Tensor,
    angles: &Angles,
    batch: &PackedBatch,
    mode: Mode,
) -> Result<Tensor, TorchError> {
    let mut failure = None;
    let y = layer.forward(x, angles, mode, &mut |q, k, v, window| {
        catch(packed_causal(&q, &k, &v, &batch.cu_seqlens, &batch.cu_tensor, window), &q, &mut failure)
    });
    failure.map_or(Ok(y), Err)
}

/// Keeps the first error of an attention call, since the layers' arithmetic around it has no way to stop half-way.
fn catch(result: Result<Tensor, TorchError>, q: &Tensor, failure: &mut Option<TorchError>) -> Tensor {
    result.unwrap_or_else(|e| {
        failure.get_or_insert(e);
        q.zeros_like()
    })
}

fn recomputed(
    layer: &Layer,
    x: &Tensor,
    angles: &Angles,
    batch: &PackedBatch,
    mode: Mode,
) -> Result<Tensor, TorchError> {
    let (layer, angles) = (layer.shallow_clone(), angles.shallow_clone());
    let (cu_seqlens, cu_tensor) = (batch.cu_seqlens.clone(), batch.cu_tensor.shallow_clone());
    checkpoint(&[x], move |inputs| {
        layer.forward(&inputs[0], &angles, mode, &mut |q, k, v, window| {
            // A panic here is caught at the border and comes back as the node's error.
            packed_causal(&q, &k, &v, &cu_seqlens, &cu_tensor, window).expect("attention worked in the first pass")
        })
    })
}
