use cl_checkpoint::{Adapter, AdapterModule, LayerKind, TensorSource};
use cl_torch::load_tensor;
use cl_torch::tch::{Device, Kind, Tensor};

use crate::dora::Magnitude;
use crate::linear::Frozen;
use crate::random::name_key;
use crate::{AdapterError, Embedding, Linear, LoraConfig, Mode, WholeProblem, start};

/// The two factors of one layer's update `ΔW = scaling · B·A`, in f32 regardless of the dtype of the computation.
pub struct Lora {
    /// `[r, in]`, f32; for an embedding `[r, tokens]`.
    pub a: Tensor,
    /// `[out, r]`, f32.
    pub b: Tensor,
    /// The bias of the update, `[out]`, f32, with `lora_bias`.
    pub bias: Option<Tensor>,
    /// `lora_alpha / r`, or `lora_alpha / √r` with rsLoRA.
    pub scaling: f64,
    /// Probability of dropping an input element during training.
    pub dropout: f64,
    /// The magnitudes of the outputs, with DoRA.
    pub magnitude: Option<Magnitude>,
    pub(crate) key: u64,
}

impl Lora {
    /// Adds a new adapter to `layer`, replacing an existing one, initialized as specified by
    /// [`LoraConfig::init_lora_weights`].
    ///
    /// The values depend only on `seed` and the layer's name.
    ///
    /// # Errors
    /// Returns [`AdapterError::Parameter`] for DoRA on the output head, and for a rank that the initialization does not
    /// support.
    pub fn start(layer: &mut Linear, config: &LoraConfig, seed: u64) -> Result<(), AdapterError> {
        let (input, output) = layer.widths();
        config.check_layer(&layer.name, LayerKind::Linear, [output, input])?;
        let init = config.init_lora_weights;
        let [a, b] = start::linear(&layer.name, &layer.weight, config, seed);
        let scaling = config.scaling(&layer.name);
        layer.frozen.retain(|f| !f.is_init_offset);
        if init.changes_the_base() {
            layer.frozen.push(Frozen { a: a.copy(), b: -b.copy(), scaling, is_init_offset: true });
        }
        let mut lora = Lora::new(a, b, scaling, config.lora_dropout, &layer.name);
        if config.lora_bias {
            lora.bias = Some(Tensor::zeros([output], (Kind::Float, layer.weight.device())).set_requires_grad(true));
        }
        if config.use_dora {
            lora.magnitude = Some(Magnitude::new(&layer.weight, &lora, None));
        }
        layer.lora = Some(lora);
        Ok(())
    }

    /// Adds a new adapter to an embedding, initialized as in PEFT regardless of [`LoraConfig::init_lora_weights`].
    ///
    /// # Errors
    /// Returns [`AdapterError::Parameter`] with DoRA, or with an initialization from the weight.
    ///
    /// # Panics
    /// Panics if the embedding's weight is not a matrix.
    pub fn start_embedding(table: &mut Embedding, config: &LoraConfig, seed: u64) -> Result<(), AdapterError> {
        let (tokens, width) = table.weight.size2().expect("an embedding is a matrix");
        config.check_layer(&table.name, LayerKind::Embedding, [tokens, width])?;
        let [a, b] = start::embedding(&table.name, &table.weight, config, seed);
        table.lora = Some(Lora::new(a, b, config.scaling(&table.name), 0.0, &table.name));
        Ok(())
    }

    fn new(a: Tensor, b: Tensor, scaling: f64, dropout: f64, name: &str) -> Lora {
        let (a, b) = (a.set_requires_grad(true), b.set_requires_grad(true));
        Lora { a, b, bias: None, scaling, dropout, magnitude: None, key: name_key(name) }
    }

    /// Loads the factors of `layer` from a PEFT directory.
    ///
    /// # Errors
    /// Returns [`AdapterError::Shape`] if the factors do not fit the layer, or an error if reading fails.
    pub fn load(layer: &Linear, adapter: &Adapter, dropout: f64) -> Result<Lora, AdapterError> {
        let mut lora =
            read(adapter, &layer.name, LayerKind::Linear, (layer.weight.shape(), layer.weight.device()), dropout)?;
        lora.bias = bias(adapter, layer)?;
        let module = adapter.modules().into_iter().find(|m| m.name == layer.name);
        if let Some(name) = module.and_then(|module| adapter.magnitude(module)) {
            let vector = load_tensor(adapter, &name, Kind::Float, layer.weight.device())?.flatten(0, -1);
            lora.magnitude = Some(Magnitude::new(&layer.weight, &lora, Some(vector)));
        }
        Ok(lora)
    }

    /// Like [`Lora::load`], for an embedding.
    ///
    /// # Errors
    /// Returns the errors of [`Lora::load`].
    ///
    /// # Panics
    /// Panics if the embedding's weight is not a matrix.
    pub fn load_embedding(table: &Embedding, adapter: &Adapter) -> Result<Lora, AdapterError> {
        let (tokens, width) = table.weight.size2().expect("an embedding is a matrix");
        read(adapter, &table.name, LayerKind::Embedding, ([tokens, width], table.weight.device()), 0.0)
    }

    /// Computes `scaling · dropout(x)·Aᵀ`, `[tokens, r]` in the dtype `kind`; the caller multiplies it by `Bᵀ`.
    pub fn project_down(&self, x: &Tensor, kind: Kind, mode: Mode) -> Tensor {
        let h = mode.linear(&mode.dropout(&x.to_kind(kind), self.dropout, self.key), &self.a.to_kind(kind), None);
        // Scaling `x·Aᵀ` costs `r` multiplications per token; scaling the update would cost `out`.
        h * self.scaling
    }

    /// Returns `y + scaling · ((dropout(x)·Aᵀ)·Bᵀ + b)`, computed in the dtype of `y`; reuses the memory of `y`.
    pub(crate) fn add_to(&self, mut y: Tensor, x: &Tensor, mode: Mode) -> Tensor {
        let kind = y.kind();
        self.add_bias(y.addmm_(&self.project_down(x, kind, mode), &self.b.to_kind(kind).tr()))
    }

    /// Returns `y + scaling · b` if the update has a bias, otherwise `y`.
    pub(crate) fn add_bias(&self, y: Tensor) -> Tensor {
        match &self.bias {
            Some(bias) => &y + bias.to_kind(y.kind()) * self.scaling,
            None => y,
        }
    }

    /// Returns a second handle to the same tensors.
    pub fn shallow_clone(&self) -> Lora {
        Lora {
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            magnitude: self.magnitude.as_ref().map(Magnitude::shallow_clone),
            ..*self
        }
    }
}

/// Reads the factors of a module of an adapter, checked against the shape of the weight that they update.
fn read(
    adapter: &Adapter,
    name: &str,
    kind: LayerKind,
    (shape, device): ([i64; 2], Device),
    dropout: f64,
) -> Result<Lora, AdapterError> {
    let module = find(adapter, name, kind)?;
    check_dora(adapter, module)?;
    if module.weight_shape() != shape.map(|d| d as usize) {
        let [output, input] = shape;
        let (output, input) = if kind == LayerKind::Linear { (output, input) } else { (input, output) };
        let (a, b) = (module.a_shape.clone(), module.b_shape.clone());
        return Err(AdapterError::Shape {
            path: adapter.dir().to_owned(),
            module: name.to_owned(),
            input,
            output,
            a,
            b,
        });
    }
    let [a, b] = module.factors();
    let load = |name: &str| load_tensor(adapter, name, Kind::Float, device);
    Ok(Lora::new(load(&a)?, load(&b)?, adapter.config().scaling(name), dropout, name))
}

/// Reads the bias of the update, if the adapter has one.
fn bias(adapter: &Adapter, layer: &Linear) -> Result<Option<Tensor>, AdapterError> {
    let name = format!("base_model.model.{}.lora_B.bias", layer.name);
    let Some(info) = adapter.info(&name) else { return Ok(None) };
    let output = layer.widths().1;
    if info.shape != [output as usize] {
        let problem = WholeProblem::Shape { expected: vec![output], found: info.shape.clone() };
        return Err(AdapterError::Whole { path: adapter.dir().to_owned(), tensor: name, problem });
    }
    Ok(Some(load_tensor(adapter, &name, Kind::Float, layer.weight.device())?.set_requires_grad(true)))
}

/// Checks that a module of an adapter with DoRA is a linear layer of a block, not the embedding or the output head.
///
/// # Errors
/// [`AdapterError::DoraOutside`].
pub fn check_dora(adapter: &Adapter, module: &AdapterModule) -> Result<(), AdapterError> {
    if module.dora && (module.kind == LayerKind::Embedding || module.name == "lm_head") {
        let (path, module) = (adapter.dir().to_owned(), module.name.clone());
        return Err(AdapterError::DoraOutside { path, module });
    }
    Ok(())
}

fn find<'a>(adapter: &'a Adapter, name: &str, kind: LayerKind) -> Result<&'a AdapterModule, AdapterError> {
    adapter
        .modules()
        .into_iter()
        .find(|m| m.name == name && m.kind == kind)
        .ok_or_else(|| AdapterError::UnknownModule { path: adapter.dir().to_owned(), module: name.to_owned() })
}
