use std::collections::BTreeMap;
use std::sync::Arc;

use cl_adapters::{
    AdapterError, Embedding, Frozen, Linear, Lora, LoraConfig, Mode, Site, Targets, TokenRows, Whole, WholeKind,
    WholePlan, leaf,
};
use cl_checkpoint::{Adapter, LayerKind};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{Around, TorchError, checkpoint_around, linear, on_backward};

use crate::attention::packed_causal;
use crate::batch::PackedBatch;
use crate::config::{Family, ModelConfig};
use crate::layer::Layer;
use crate::norm::RmsNorm;
use crate::prefix_tree::PrefixTree;
use crate::quantized::{check_continued, check_trained};
use crate::rope::{Angles, Rope};
use crate::routing::{Gate, Pass, Router, Selection};
use crate::tree_attention::TreeAttention;
use crate::{
    ModelError,
    kv_cache::{KvCache, Prefix},
};

/// A decoder-only transformer of the Llama family.
pub struct Decoder {
    /// The model's configuration.
    pub config: ModelConfig,
    /// Dtype of activations and matrix products.
    pub compute: Kind,
    /// The device of the weights.
    pub device: Device,
    /// Whether to recompute each layer's activations in the backward pass instead of keeping them.
    pub activation_checkpointing: bool,
    /// Hooks that are called around each layer.
    pub layer_hooks: Option<Arc<dyn LayerHooks>>,
    pub(crate) embed_tokens: Embedding,
    /// Router that reads the token embeddings and selects the experts of all layers.
    pub(crate) global_router: Option<Router>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: RmsNorm,
    pub(crate) lm_head: Option<Linear>, // if tied to the embedding, exists only while it has an adapter
    pub(crate) rope: Rope,
    /// Base tensors that the current adapter trains in full.
    pub(crate) whole: WholePlan,
    /// The base's original values of those tensors, by name.
    pub(crate) originals: Vec<(String, Tensor)>,
}

impl Decoder {
    /// Returns the residual stream after the last layer, before the final norm: `(tokens, hidden)`.
    ///
    /// # Errors
    /// [`ModelError::Torch`].
    pub fn forward(&self, batch: &PackedBatch, mode: Mode) -> Result<Tensor, ModelError> {
        self.forward_observed(batch, mode, &mut |_, _| {})
    }

    /// Like [`Decoder::forward`]; `observe` receives the hidden states `(tokens, hidden)` that enter each layer, with
    /// the layer's index: the embeddings for layer 0, and finally the result, with the number of layers as index.
    ///
    /// # Errors
    /// [`ModelError::Torch`].
    pub fn forward_observed(
        &self,
        batch: &PackedBatch,
        mode: Mode,
        observe: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Tensor, ModelError> {
        let angles = self.rope.angles(&batch.position_ids, self.compute);
        let mut x = self.embed(&batch.input_ids);
        let selection = self.select(&x, mode);
        let pass = Pass { mode, selection: selection.as_ref() };
        for (index, layer) in self.layers.iter().enumerate() {
            observe(index, &x);
            let hooks = self.layer_hooks.as_ref().map(|hooks| LayerHook { hooks: Arc::clone(hooks), layer: index });
            if hooks.as_ref().is_some_and(|h| h.hooks.spreads_weights()) && mode != Mode::Eval && !x.requires_grad() {
                // Makes the first layer be recomputed in the backward pass too, after its weights have been gathered
                // again.
                x = x.detach().set_requires_grad(true);
            }
            x = match hooks {
                _ if mode == Mode::Eval || !x.requires_grad() => {
                    hooks.iter().for_each(Around::before);
                    let y = attend_packed(layer, &x, &angles, batch, pass)?;
                    hooks.iter().for_each(Around::after_forward);
                    y
                }
                None if self.activation_checkpointing => recomputed(layer, &x, &angles, batch, pass, ())?,
                Some(hook) if self.activation_checkpointing => recomputed(layer, &x, &angles, batch, pass, hook)?,
                None => attend_packed(layer, &x, &angles, batch, pass)?,
                Some(hook) => {
                    let x = on_backward(&x, move || hook.after_backward())?;
                    attend_packed(layer, &x, &angles, batch, pass)?
                }
            };
        }
        observe(self.layers.len(), &x);
        Ok(x)
    }

    /// Returns the input of the feed-forward block of every layer, `(tokens, hidden)` each, without recording a graph.
    ///
    /// # Errors
    /// [`ModelError::Torch`].
    pub fn feed_forward_inputs(&self, batch: &PackedBatch) -> Result<Vec<Tensor>, ModelError> {
        let _no_graph = cl_torch::tch::no_grad_guard();
        let angles = self.rope.angles(&batch.position_ids, self.compute);
        let (mut x, mut inputs) = (self.embed(&batch.input_ids), Vec::new());
        let selection = self.select(&x, Mode::Eval);
        let pass = Pass { mode: Mode::Eval, selection: selection.as_ref() };
        for layer in &self.layers {
            let mut failure = None;
            let mut attend = |q: Tensor, k: Tensor, v: Tensor, rule| {
                catch(packed_causal(&q, &k, &v, &batch.cu_seqlens, &batch.cu_tensor, rule), &q, &mut failure)
            };
            let mut keep = |x: &Tensor| inputs.push(x.shallow_clone());
            x = layer.forward_observed(&x, &angles, pass, &mut attend, &mut keep);
            failure.map_or(Ok(()), Err)?;
        }
        Ok(inputs)
    }

    /// Applies the feed-forward block of a layer to rows `x` `(tokens, hidden)`.
    ///
    /// # Panics
    /// Panics if there is no such layer, or if its experts are selected by a global router, which needs the token
    /// embeddings.
    pub fn feed_forward(&self, layer: usize, x: &Tensor) -> Tensor {
        self.layers[layer].feed_forward.forward(x, Pass { mode: Mode::Eval, selection: None })
    }

    /// Computes the residual stream of sequences with shared prefixes, after a cached past that is common to all of
    /// them, without recording a graph. Returns the rows of the tree with the indices `wanted`, `(wanted, hidden)`.
    /// `keep` receives the keys and values of every layer, `(rows, kv_heads, head_dim)`.
    ///
    /// # Errors
    /// [`ModelError::TokenId`], [`ModelError::Torch`].
    pub(crate) fn forward_tree(
        &self,
        tree: &PrefixTree,
        past: &Prefix,
        wanted: &[i64],
        keep: &mut dyn FnMut(usize, &Tensor, &Tensor),
    ) -> Result<Tensor, ModelError> {
        let ids: Vec<i64> = tree.ids.iter().map(|&id| i64::from(id)).collect();
        if let Some(&id) = ids.iter().find(|&&id| id >= self.config.vocab_size) {
            return Err(ModelError::TokenId { id, vocab_size: self.config.vocab_size });
        }
        let angles = self.rope.angles(&Tensor::from_slice(&tree.positions).to_device(self.device), self.compute);
        let attention = TreeAttention::new(tree, self.compute, self.device);
        let mut x = self.embed(&Tensor::from_slice(&ids).to_device(self.device));
        let selection = self.select(&x, Mode::Eval);
        let pass = Pass { mode: Mode::Eval, selection: selection.as_ref() };
        let wanted = Tensor::from_slice(wanted).to_device(self.device);
        for (index, layer) in self.layers.iter().enumerate() {
            let mut failure = None;
            let attend = &mut |q: Tensor, k: Tensor, v: Tensor, rule| {
                keep(index, &k, &v);
                catch(attention.forward(&q, &k, &v, past.layer(index), rule), &q, &mut failure)
            };
            let last = index + 1 == self.layers.len();
            x = match selection {
                None if last => layer.forward_rows(&x, &wanted, &angles, pass, attend),
                Some(_) if last => layer.forward(&x, &angles, pass, attend).index_select(0, &wanted),
                _ => layer.forward(&x, &angles, pass, attend),
            };
            failure.map_or(Ok(()), Err)?;
        }
        Ok(x)
    }

    /// Whether sequences up to this length can share prefixes. They cannot with a shorter sliding window, which would
    /// have to be applied along each sequence.
    pub(crate) fn may_share(&self, longest: usize) -> bool {
        self.config.windows.iter().flatten().all(|&w| w >= longest as i64)
    }

    /// Computes the new tokens of every sequence in the caches, whose step has begun ([`KvCache::begin_step`]). `ids`
    /// is `(tokens)`, ordered by sequence; the result is `(tokens, hidden)`. Afterwards, [`KvCache::end_step`] sets how
    /// many of the tokens are kept.
    pub(crate) fn step(&self, ids: &Tensor, caches: &mut [&mut KvCache]) -> Tensor {
        let positions: Vec<i64> = caches.iter().flat_map(|cache| cache.positions()).collect();
        let angles = self.rope.angles(&Tensor::from_slice(&positions).to_device(self.device), self.compute);
        let mut x = self.embed(ids);
        let selection = self.select(&x, Mode::Eval);
        let pass = Pass { mode: Mode::Eval, selection: selection.as_ref() };
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &angles, pass, &mut |q, k, v, rule| {
                let mut start = 0;
                let parts = caches.iter_mut().map(|cache| {
                    let [q, k, v] = [&q, &k, &v].map(|t| t.narrow(0, start, cache.tokens()));
                    start += cache.tokens();
                    cache.attend(index, &q, &k, &v, rule)
                });
                let parts: Vec<Tensor> = parts.collect();
                if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::cat(&parts, 0) }
            });
        }
        x
    }

    /// Selects the experts of tokens with these embeddings, `(tokens, hidden)`, with the global router, if there is
    /// one.
    fn select(&self, embeddings: &Tensor, mode: Mode) -> Option<Selection> {
        self.global_router.as_ref().map(|router| router.select(embeddings, mode))
    }

    fn embed(&self, ids: &Tensor) -> Tensor {
        let x = self.embed_tokens.forward(ids, self.compute);
        let factor = self.config.embedding_multiplier;
        match self.config.family {
            _ if factor == 1.0 => x,
            // Gemma's multiplier is a tensor in the dtype of the embedding, so it is rounded to that dtype.
            Family::Gemma2 | Family::Gemma3 => {
                x * Tensor::from(factor as f32).to_kind(self.compute).to_device(self.device)
            }
            _ => x * factor,
        }
    }

    /// Applies the final norm and the output head to rows of the residual stream: `(rows, hidden)` to f32
    /// `(rows, vocab)`.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let h = self.norm.forward(x);
        let logits = match &self.lm_head {
            Some(head) => head.forward(&h, Mode::Eval),
            None => {
                let logits = linear(&h, &self.embed_tokens.weight.to_kind(self.compute), None);
                match &self.embed_tokens.rows {
                    Some(rows) => logits.index_copy(-1, rows.places(), &rows.logits(&h)),
                    None => logits,
                }
            }
        };
        self.scaled(logits.to_kind(Kind::Float))
    }

    /// Applies the family's scaling and soft cap to logits.
    pub(crate) fn scaled(&self, logits: Tensor) -> Tensor {
        let scaling = self.config.logits_scaling;
        let logits = if scaling == 1.0 { logits } else { logits / scaling };
        match self.config.final_logit_softcapping {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// Backpropagates through [`Decoder::scaled`]: `d_logits` is the gradient of its result, `logits` the result
    /// itself.
    pub(crate) fn unscaled_gradient(&self, d_logits: Tensor, logits: &Tensor) -> Tensor {
        let scaling = self.config.logits_scaling;
        let d_logits = match self.config.final_logit_softcapping {
            // tanh' = 1 - tanh²
            Some(cap) => d_logits * (1.0 - (logits / cap).square()),
            None => d_logits,
        };
        if scaling == 1.0 { d_logits } else { d_logits / scaling }
    }

    /// The linear layers, in the order of the model.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let global = self.global_router.iter().map(|router| &router.linear);
        global.chain(self.layers.iter().flat_map(Layer::linears)).chain(self.lm_head.iter())
    }

    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let global = self.global_router.iter_mut().map(|router| &mut router.linear);
        global.chain(self.layers.iter_mut().flat_map(Layer::linears_mut)).chain(self.lm_head.iter_mut())
    }

    /// The modules that can have adapters: the embedding, then the linear layers.
    pub fn sites(&self) -> impl Iterator<Item = Site<'_>> {
        std::iter::once(self.embed_tokens.site()).chain(self.linears().map(Linear::site))
    }

    /// The output head as a separate linear layer, even if it shares its weight with the embedding.
    fn head(&self) -> Linear {
        match &self.lm_head {
            Some(head) => head.shallow_clone(),
            None => {
                let mut head = Linear::new("lm_head", self.embed_tokens.weight.shallow_clone(), None);
                head.adapter_kind = self.embed_tokens.adapter_kind;
                head.rows = self.embed_tokens.rows.as_ref().map(TokenRows::shallow_clone);
                head
            }
        }
    }

    /// All layers that can have an adapter, with the shapes of their weights.
    fn adaptable(&self) -> Vec<(&str, LayerKind, [i64; 2])> {
        let shape = |t: &Tensor| t.size2().map_or([0, 0], |(rows, columns)| [rows, columns]);
        let table = &self.embed_tokens;
        let mut layers = vec![(table.name.as_str(), LayerKind::Embedding, shape(&table.weight))];
        layers.extend(self.linears().map(|l| (l.name.as_str(), LayerKind::Linear, l.weight.shape())));
        if self.lm_head.is_none() {
            layers.push(("lm_head", LayerKind::Linear, shape(&table.weight)));
        }
        layers
    }

    /// Adds a newly initialized adapter to every target layer, replacing an existing one, and freezes everything else.
    ///
    /// # Errors
    /// Returns an error for a hyperparameter outside its range, or a target that matches nothing.
    pub fn add_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<(), ModelError> {
        config.validate()?;
        let mut layers = self.adaptable();
        let names: Vec<&str> = layers.iter().map(|(name, ..)| *name).collect();
        let targets = Targets::new(&config.target_modules, &names)?;
        layers.retain(|(name, ..)| targets.contains(name) && !config.is_saved(name));
        config.check_layers(&layers)?;
        let targets: Vec<String> = layers.into_iter().map(|(name, ..)| name.to_owned()).collect();
        let targeted = |name: &str| targets.iter().any(|t| t == name);
        let whole = self.whole_plan(config, &targets)?;
        self.unload_lora();
        self.set_requires_grad(false);
        if targeted("lm_head") {
            self.lm_head = Some(self.head());
        }
        if targeted(&self.embed_tokens.name) {
            Lora::start_embedding(&mut self.embed_tokens, config, seed)?;
        }
        for layer in self.linears_mut().filter(|layer| targeted(&layer.name)) {
            Lora::start(layer, config, seed)?;
        }
        self.train_whole(whole, &BTreeMap::new());
        Ok(())
    }

    /// The tensors of this model that a configuration trains in full, in addition to factors of the `adapted` layers.
    fn whole_plan(&self, config: &LoraConfig, adapted: &[String]) -> Result<WholePlan, ModelError> {
        let mut tensors: Vec<(String, Vec<i64>)> = self.own_tensors().into_iter().map(|(n, t)| (n, t.size())).collect();
        let quantized = self.linears().filter(|l| l.weight.dense().is_none());
        tensors.extend(quantized.map(|l| (format!("{}.weight", l.name), l.weight.shape().to_vec())));
        let tensors: Vec<(&str, &[i64])> = tensors.iter().map(|(n, shape)| (n.as_str(), shape.as_slice())).collect();
        let adapted: Vec<&str> = adapted.iter().map(String::as_str).collect();
        let plan = config.whole_plan(&tensors, &adapted, self.config.tie_word_embeddings)?;
        if self.quantization().is_some() {
            check_trained(&plan)?;
        }
        Ok(plan)
    }

    /// The base's tensors that are not quantized; a tied output head is listed as a separate tensor.
    fn own_tensors(&self) -> Vec<(String, Tensor)> {
        let mut own = self.named_parameters();
        if self.config.tie_word_embeddings {
            own.push(("lm_head.weight".to_owned(), own[0].1.shallow_clone()));
        }
        own
    }

    /// Replaces base tensors by trainable f32 tensors: by the given values (keyed by the base's name, and for token
    /// rows by the module's name), otherwise by copies.
    fn train_whole(&mut self, plan: WholePlan, values: &BTreeMap<String, Tensor>) {
        let (embedding, head) = ("model.embed_tokens", "lm_head");
        let of = |module: &str| plan.tokens.contains_key(module) || plan.saved.contains(&format!("{module}.weight"));
        if self.config.tie_word_embeddings
            && !plan.tied
            && (of(head) || plan.saved.contains(&format!("{embedding}.weight")))
        {
            // The adapter unties head and embedding.
            self.lm_head = Some(self.head());
        }
        self.whole = plan.clone();
        for name in plan.saved.iter().chain(&plan.biases) {
            if plan.tied && name == "lm_head.weight" {
                continue;
            }
            let Some(place) = self.parameter_mut(name) else { continue };
            let original = place.shallow_clone();
            *place = leaf(values.get(name).unwrap_or(&original));
            self.originals.push((name.clone(), original));
        }
        if plan.tied
            && let Some(head) = &mut self.lm_head
        {
            head.weight = self.embed_tokens.weight.shallow_clone().into();
        }
        for (module, ids) in &plan.tokens {
            let given = values.get(module).map(Tensor::shallow_clone);
            if module == embedding {
                self.embed_tokens.set_rows(ids, given);
            } else if let Some(head) = &mut self.lm_head {
                head.set_rows(ids, given);
            }
        }
        if self.config.tie_word_embeddings
            && !plan.tokens.contains_key(head)
            && let Some(head) = &mut self.lm_head
        {
            head.rows = self.embed_tokens.rows.as_ref().map(TokenRows::shallow_clone);
        }
    }

    /// The name of a base tensor in an adapter's file; in PEFT, an adapted layer becomes a submodule.
    fn stored_name(&self, name: &str) -> String {
        let adapted = |module: &str| self.linears().any(|l| l.name == module && l.lora.is_some());
        match name.rsplit_once('.') {
            Some((module, part)) if adapted(module) => format!("{module}.base_layer.{part}"),
            _ => name.to_owned(),
        }
    }

    /// Returns a base tensor by its name in the checkpoint; a tied output head is found only while it is a separate
    /// layer.
    fn parameter_mut(&mut self, name: &str) -> Option<&mut Tensor> {
        let (module, part) = name.rsplit_once('.')?;
        if module == self.embed_tokens.name {
            return Some(&mut self.embed_tokens.weight);
        }
        if self.linears().any(|l| l.name == module) {
            let linear = self.linears_mut().find(|l| l.name == module)?;
            return if part == "weight" { linear.weight.dense_mut() } else { linear.bias.as_mut() };
        }
        let mut norms = self.layers.iter_mut().flat_map(Layer::norms_mut).chain([&mut self.norm]);
        Some(&mut norms.find(|norm| norm.name == module)?.weight)
    }

    /// All parameters that the current adapter trains in addition to its factors, with their names in the adapter's
    /// file.
    pub fn trained_whole(&self) -> Vec<Whole> {
        let parameters = self.current_parameters();
        let find = |name: &str| parameters.iter().find(|(n, _)| n == name).map(|(_, t)| t.shallow_clone());
        let tensor = |name: &String, kind| {
            let tied = self.whole.tied && name == "lm_head.weight";
            let tensor = if tied { Some(self.embed_tokens.weight.shallow_clone()) } else { find(name) };
            Some(Whole { name: self.stored_name(name), tensor: tensor?, kind })
        };
        let saved = self.whole.saved.iter().filter_map(|name| tensor(name, WholeKind::Saved));
        let biases = self.whole.biases.iter().filter_map(|name| tensor(name, WholeKind::Bias));
        let tokens = self.whole.tokens.keys().filter_map(|module| {
            let rows = if module == "lm_head" {
                self.lm_head.as_ref()?.rows.as_ref()
            } else {
                self.embed_tokens.rows.as_ref()
            };
            let name = format!("{module}.token_adapter.trainable_tokens_delta");
            rows.map(|rows| Whole {
                name,
                tensor: rows.values.shallow_clone(),
                kind: WholeKind::Tokens(rows.ids.clone()),
            })
        });
        saved.chain(biases).chain(tokens).collect()
    }

    /// Loads the adapter of a PEFT directory into the layers it was made for, and freezes everything else.
    ///
    /// # Errors
    /// Returns [`AdapterError`] if the adapter is of an unsupported kind, has a module that this model does not have,
    /// or has factors of another shape.
    pub fn load_lora(&mut self, adapter: &Adapter, dropout: f64) -> Result<(), ModelError> {
        let named = self.named(adapter);
        let adapter = named.as_ref().unwrap_or(adapter);
        self.check_adapter(adapter)?;
        if self.quantization().is_some() {
            check_continued(adapter)?;
        }
        let (whole, values) = cl_adapters::load_whole(adapter, &self.own_tensors(), self.config.tie_word_embeddings)?;
        let has = |name: &str| adapter.modules().iter().any(|m| m.name == name);
        let head = has("lm_head").then(|| self.head());
        let table = &self.embed_tokens;
        let table = has(&table.name).then(|| Lora::load_embedding(table, adapter)).transpose()?;
        let layers =
            self.linears().filter(|layer| layer.name != "lm_head").chain(head.as_ref().or(self.lm_head.as_ref()));
        let load = |layer: &Linear| has(&layer.name).then(|| Lora::load(layer, adapter, dropout)).transpose();
        let loaded = layers.map(load).collect::<Result<Vec<_>, _>>()?;
        let loaded: Vec<Lora> = loaded.into_iter().flatten().collect();
        // From here on, nothing fails: if an adapter is rejected, the model is unchanged.
        self.unload_lora();
        self.set_requires_grad(false);
        if has("lm_head") {
            self.lm_head = Some(self.head());
        }
        self.embed_tokens.lora = table;
        for (layer, lora) in self.linears_mut().filter(|layer| has(&layer.name)).zip(loaded) {
            layer.lora = Some(lora);
        }
        self.train_whole(whole, &values);
        Ok(())
    }

    /// Removes the adapter or the mixture of adapters.
    pub fn unload_lora(&mut self) {
        for (name, original) in std::mem::take(&mut self.originals) {
            if let Some(place) = self.parameter_mut(&name) {
                *place = original;
            }
        }
        self.whole = WholePlan::default();
        (self.embed_tokens.lora, self.embed_tokens.rows) = (None, None);
        for layer in self.linears_mut() {
            (layer.lora, layer.mixture, layer.rows) = (None, None, None);
            layer.frozen.retain(|f| !f.is_init_offset);
        }
        if self.config.tie_word_embeddings {
            let shared = self.embed_tokens.weight.shallow_clone();
            self.lm_head = self.lm_head.take().filter(|head| !head.frozen.is_empty());
            self.lm_head.iter_mut().for_each(|head| head.weight = shared.shallow_clone().into());
        }
    }

    /// Adds the adapters of earlier rounds to their layers, frozen. The updates of a layer are stacked and computed in
    /// one product, regardless of their number.
    ///
    /// # Errors
    /// Returns the errors of [`Decoder::load_lora`]; DoRA and adapters on the embedding are not supported.
    pub fn add_frozen(&mut self, adapters: &[Adapter]) -> Result<(), ModelError> {
        let mut updates: Vec<Vec<Lora>> = Vec::new();
        let named: Vec<Option<Adapter>> = adapters.iter().map(|adapter| self.named(adapter)).collect();
        let adapters: Vec<&Adapter> =
            adapters.iter().zip(&named).map(|(a, named)| named.as_ref().unwrap_or(a)).collect();
        for &adapter in &adapters {
            self.check_adapter(adapter)?;
            cl_adapters::check_frozen(adapter)?;
            cl_adapters::load_whole(adapter, &self.own_tensors(), self.config.tie_word_embeddings)?;
            let modules = adapter.modules();
            if self.lm_head.is_none() && modules.iter().any(|m| m.name == "lm_head") {
                self.lm_head = Some(self.head());
            }
        }
        for layer in self.linears() {
            let of_layer = adapters.iter().filter(|a| a.modules().iter().any(|m| m.name == layer.name));
            updates.push(of_layer.map(|a| Lora::load(layer, a, 0.0)).collect::<Result<_, _>>()?);
        }
        for (layer, updates) in self.linears_mut().zip(updates).filter(|(_, updates)| !updates.is_empty()) {
            let a: Vec<Tensor> = updates.iter().map(|u| u.a.detach()).collect();
            let b: Vec<Tensor> = updates.iter().map(|u| u.b.detach() * u.scaling).collect();
            let (a, b) = (Tensor::cat(&a, 0), Tensor::cat(&b, 1));
            layer.frozen.push(Frozen { a, b, scaling: 1.0, is_init_offset: false });
        }
        Ok(())
    }

    /// Returns an adapter of fused experts with this model's names, if it has others.
    fn named(&self, adapter: &Adapter) -> Option<Adapter> {
        adapter.named_for(&|module| self.adaptable().iter().any(|(name, ..)| *name == module))
    }

    /// Checks that the adapter has only supported features, and that its modules are layers of this model.
    fn check_adapter(&self, adapter: &Adapter) -> Result<(), ModelError> {
        adapter.check_built().map_err(AdapterError::from)?;
        let layers = self.adaptable();
        let fits =
            |m: &&cl_checkpoint::AdapterModule| layers.iter().any(|(name, kind, _)| *name == m.name && *kind == m.kind);
        match adapter.modules().into_iter().find(|m| !fits(m)) {
            None => Ok(()),
            Some(unknown) => {
                let (path, module) = (adapter.dir().to_owned(), unknown.name.clone());
                Err(AdapterError::UnknownModule { path, module }.into())
            }
        }
    }

    /// All weights of the base model that are not quantized, by their names in the checkpoint, including those that an
    /// adapter replaces.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = self.current_parameters();
        let tied = self.config.tie_word_embeddings;
        all.retain(|(name, _)| !tied || name != "lm_head.weight");
        for (name, tensor) in &mut all {
            if let Some((_, original)) = self.originals.iter().find(|(n, _)| n == name) {
                *tensor = original.shallow_clone();
            }
        }
        all
    }

    /// The tensors that checkpoints of models without routers contain in place of routers: f32 `(experts)`, equal
    /// weights that sum to 1.
    pub(crate) fn gateless_buffers(&self) -> Vec<(String, Tensor)> {
        let buffer = |gate: &Gate| match gate {
            Gate::Gateless { name, experts } => {
                Some((name.clone(), Tensor::full([*experts], 1.0 / *experts as f64, (Kind::Float, self.device))))
            }
            _ => None,
        };
        self.layers.iter().flat_map(Layer::gates).filter_map(buffer).collect()
    }

    /// The weights that the forward pass uses: those of an adapter in place of the base's.
    pub(crate) fn current_parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = vec![("model.embed_tokens.weight".to_owned(), self.embed_tokens.weight.shallow_clone())];
        let norms = self.layers.iter().flat_map(Layer::norms).chain([&self.norm]);
        all.extend(norms.map(|norm| (format!("{}.weight", norm.name), norm.weight.shallow_clone())));
        for linear in self.linears() {
            all.extend(linear.weight.dense().map(|w| (format!("{}.weight", linear.name), w.shallow_clone())));
            all.extend(linear.bias.iter().map(|b| (format!("{}.bias", linear.name), b.shallow_clone())));
        }
        all
    }

    /// The trainable tensors by name: the adapters, or the routers of a mixture, if there are any; else every weight
    /// that requires a gradient.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        let mut adapters = Vec::new();
        for site in self.sites() {
            let Some(lora) = site.lora else { continue };
            let [a, b] = match site.kind {
                LayerKind::Linear => ["lora_A.weight", "lora_B.weight"],
                LayerKind::Embedding => ["lora_embedding_A", "lora_embedding_B"],
            };
            adapters.push((format!("{}.{a}", site.name), lora.a.shallow_clone()));
            adapters.push((format!("{}.{b}", site.name), lora.b.shallow_clone()));
            adapters.extend(lora.bias.iter().map(|b| (format!("{}.lora_B.bias", site.name), b.shallow_clone())));
            let magnitude = lora.magnitude.iter().map(|m| m.vector.shallow_clone());
            adapters.extend(magnitude.map(|m| (format!("{}.lora_magnitude_vector", site.name), m)));
        }
        adapters.extend(self.mixture_routers());
        // A tensor that two names share is listed, and therefore trained, only once.
        let own = |w: &Whole| !(self.whole.tied && w.name == "lm_head.weight");
        adapters.extend(self.trained_whole().into_iter().filter(own).map(|w| (w.name, w.tensor)));
        if adapters.is_empty() {
            adapters = self.named_parameters().into_iter().filter(|(_, t)| t.requires_grad()).collect();
        }
        adapters
    }

    /// Makes all base weights trainable, or freezes them.
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
    pass: Pass<'_>,
) -> Result<Tensor, TorchError> {
    let mut failure = None;
    let y = layer.forward(x, angles, pass, &mut |q, k, v, rule| {
        catch(packed_causal(&q, &k, &v, &batch.cu_seqlens, &batch.cu_tensor, rule), &q, &mut failure)
    });
    failure.map_or(Ok(y), Err)
}

/// Stores the first error of an attention call and returns zeros, since the computation of a layer cannot stop halfway.
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
    pass: Pass<'_>,
    around: impl Around + 'static,
) -> Result<Tensor, TorchError> {
    let (layer, angles, mode) = (layer.shallow_clone(), angles.shallow_clone(), pass.mode);
    let (cu_seqlens, cu_tensor) = (batch.cu_seqlens.clone(), batch.cu_tensor.shallow_clone());
    let selection = pass.selection.map(Selection::shallow_clone);
    // The weights of a global selection are an input of the segment, so that their gradient reaches the router.
    let weights = selection.as_ref().map(|selection| selection.weights(Kind::Float));
    let inputs: Vec<&Tensor> = std::iter::once(x).chain(&weights).collect();
    let run = move |inputs: &[Tensor]| {
        let selection =
            selection.as_ref().zip(inputs.get(1)).map(|(selection, weights)| selection.with_weights(weights));
        let pass = Pass { mode, selection: selection.as_ref() };
        layer.forward(&inputs[0], &angles, pass, &mut |q, k, v, rule| {
            // A panic here is caught at the FFI boundary and returned as the node's error.
            packed_causal(&q, &k, &v, &cu_seqlens, &cu_tensor, rule).expect("attention worked in the first pass")
        })
    };
    checkpoint_around(&inputs, run, around)
}

/// Hooks around each layer, for example to gather weights that are sharded over processes and to reduce gradients.
pub trait LayerHooks: Send + Sync {
    /// Whether the layers' weights are sharded, so that they are available only from [`LayerHooks::before`] to the
    /// following hook. Training then needs [`Decoder::activation_checkpointing`].
    fn spreads_weights(&self) -> bool;

    /// Called before a layer is computed in a forward pass, and before it is recomputed in a backward pass. In training
    /// without activation checkpointing it is not called.
    fn before(&self, layer: usize);

    /// Called after a layer was computed in a forward pass, under the same condition as [`LayerHooks::before`].
    fn after_forward(&self, layer: usize);

    /// Called in the backward pass, when the gradients of a layer's weights are complete. It is not called for layers
    /// before the first trained weight.
    fn after_backward(&self, layer: usize);
}

/// The hooks of one layer.
struct LayerHook {
    hooks: Arc<dyn LayerHooks>,
    layer: usize,
}

impl Around for LayerHook {
    fn before(&self) {
        self.hooks.before(self.layer);
    }

    fn after_forward(&self) {
        self.hooks.after_forward(self.layer);
    }

    fn after_backward(&self) {
        self.hooks.after_backward(self.layer);
    }
}
