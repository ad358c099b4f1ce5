//! Mixtures of adapters beside a model's layers.

use cl_adapters::{AdapterError, Linear, LoraMixture};
use cl_moe::{Mixture, mixture_tensors};
use cl_torch::tch::Tensor;

use crate::{Decoder, ModelError};

impl Decoder {
    /// Puts a mixture of adapters beside the layers it was made for, in place of an adapter or a mixture that is there, and
    /// freezes everything but its routers.
    ///
    /// # Errors
    /// Returns [`AdapterError`] if it holds a module that this model does not have, or factors of another shape; the model is
    /// then as it was.
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

    /// Every module of the mixture is a linear layer of this model.
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

    /// The routers of a mixture, `[experts, in]`, by their names in its file.
    pub(crate) fn routers(&self) -> Vec<(String, Tensor)> {
        let router = |layer: &Linear| {
            let [_, _, name] = mixture_tensors(&layer.name);
            Some((name, layer.mixture.as_ref()?.router.as_ref()?.shallow_clone()))
        };
        self.linears().filter_map(router).collect()
    }
}
