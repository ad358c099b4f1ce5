//! Mixtures of adapters on a model's layers, and the routers of both kinds of mixtures: of adapters and of models.

use cl_adapters::{AdapterError, Linear, LoraMixture, RouterLog};
use cl_moe::{Mixture, mixture_tensors};
use cl_torch::tch::Tensor;

use crate::layer::Layer;
use crate::routing::{Gate, Router};
use crate::{Decoder, ModelError};

impl Decoder {
    /// Loads a mixture of adapters into the layers it was made for, replacing an existing adapter or mixture, and
    /// freezes everything except its routers.
    ///
    /// # Errors
    /// Returns [`AdapterError`] if the mixture has a module that this model does not have, or factors of another shape;
    /// the model is then unchanged.
    pub fn load_mixture(&mut self, mixture: &Mixture) -> Result<(), ModelError> {
        self.check_mixture(mixture)?;
        let has = |layer: &&Linear| mixture.config().modules.contains_key(&layer.name);
        let loaded: Vec<LoraMixture> =
            self.linears().filter(has).map(|layer| LoraMixture::load(layer, mixture)).collect::<Result<_, _>>()?;
        self.unload_lora();
        self.set_requires_grad(false);
        let layers = self.linears_mut().filter(|layer| mixture.config().modules.contains_key(&layer.name));
        for (layer, experts) in layers.zip(loaded) {
            layer.mixture = Some(experts);
        }
        Ok(())
    }

    /// Checks that every module of the mixture is a linear layer of this model.
    fn check_mixture(&self, mixture: &Mixture) -> Result<(), ModelError> {
        let known = |name: &str| self.linears().any(|layer| layer.name == name);
        match mixture.config().modules.keys().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => {
                let (path, module) = (mixture.dir().to_owned(), name.clone());
                Err(AdapterError::UnknownModule { path, module }.into())
            }
        }
    }

    /// The weights of all trainable routers, `(experts, in)` in f32, by their names in the checkpoint or in the
    /// mixture's file. These are the routers of the mixture of adapters if there is one, otherwise those of the model's
    /// own experts.
    pub fn routers(&self) -> Vec<(String, Tensor)> {
        let beside = self.mixture_routers();
        if !beside.is_empty() {
            return beside;
        }
        let weight = |r: &Router| Some((format!("{}.weight", r.linear.name), r.linear.weight.dense()?.shallow_clone()));
        let own = self.layers.iter().flat_map(Layer::gates).filter_map(Gate::router);
        self.global_router.iter().chain(own).filter_map(weight).collect()
    }

    /// Makes the routers of [`Decoder::routers`] trainable and freezes everything else.
    pub fn train_routers(&mut self) {
        self.set_requires_grad(false);
        for (_, router) in self.routers() {
            let _ = router.set_requires_grad(true);
        }
    }

    /// Records the decisions of all routers in forward passes for as long as the returned log exists.
    pub fn record_routers(&mut self) -> RouterLog {
        let log = RouterLog::default();
        let own = self.layers.iter_mut().flat_map(Layer::gates_mut).filter_map(Gate::router_mut);
        for router in self.global_router.iter_mut().chain(own) {
            router.recorder = Some(log.recorder(&router.linear.name));
        }
        for layer in self.linears_mut() {
            if let Some(mixture) = &mut layer.mixture {
                mixture.recorder = Some(log.recorder(&layer.name));
            }
        }
        log
    }

    /// The routers of a mixture of adapters, by their names in its file.
    pub(crate) fn mixture_routers(&self) -> Vec<(String, Tensor)> {
        let router = |layer: &Linear| {
            let [_, _, name] = mixture_tensors(&layer.name);
            Some((name, layer.mixture.as_ref()?.router.as_ref()?.shallow_clone()))
        };
        self.linears().filter_map(router).collect()
    }
}
