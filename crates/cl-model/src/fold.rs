use cl_checkpoint::LayerKind;
use cl_torch::tch::{Kind, Tensor};

use crate::{Decoder, ModelError};

/// The weights of a model with its adapter in them.
pub struct Folded {
    /// By name in the checkpoint, f32.
    pub parameters: Vec<(String, Tensor)>,
    /// Embedding and output head were one tensor and are two now.
    pub untied: bool,
}

impl Decoder {
    /// The base's weights with everything in them that the adapter trains: updates, whole modules, biases, rows of tokens.
    /// Sums are taken in f32.
    ///
    /// # Errors
    /// [`ModelError::Fold`] for an adapter with DoRA, whose norms are those of the layer it was trained beside, and for an
    /// update's bias beside a layer that has none.
    pub fn folded(&self) -> Result<Folded, ModelError> {
        let _no_graph = cl_torch::tch::no_grad_guard();
        let wide = |t: &Tensor| t.to_kind(Kind::Float).detach().copy();
        let refuse = |module: &str, what| Err(ModelError::Fold { module: module.to_owned(), what });
        let mut parameters: Vec<(String, Tensor)> =
            self.current_parameters().into_iter().map(|(name, t)| (name, wide(&t))).collect();
        for site in self.sites() {
            let Some(lora) = site.lora else { continue };
            if lora.magnitude.is_some() {
                return refuse(site.name, "use_dora beside what is trained whole");
            }
            let product = lora.b.matmul(&lora.a) * lora.scaling;
            let update = if site.kind == LayerKind::Embedding { product.tr() } else { product };
            for (part, update) in [("weight", Some(update)), ("bias", lora.bias.as_ref().map(|b| b * lora.scaling))] {
                let Some(update) = update else { continue };
                match parameters.iter_mut().find(|(name, _)| *name == format!("{}.{part}", site.name)) {
                    Some((_, tensor)) => *tensor += update,
                    None => return refuse(site.name, "lora_bias where the layer has no bias"),
                }
            }
        }
        for linear in self.linears() {
            for frozen in &linear.frozen {
                let name = format!("{}.weight", linear.name);
                if let Some((_, tensor)) = parameters.iter_mut().find(|(n, _)| *n == name) {
                    *tensor += frozen.b.matmul(&frozen.a) * frozen.scaling;
                }
            }
        }
        let tables = [(&self.embed_tokens.name, &self.embed_tokens.rows)];
        for (module, rows) in tables.into_iter().chain(self.lm_head.iter().map(|head| (&head.name, &head.rows))) {
            let Some(rows) = rows else { continue };
            let name = format!("{module}.weight");
            if let Some((_, tensor)) = parameters.iter_mut().find(|(n, _)| *n == name) {
                let _ = tensor.index_copy_(0, rows.places(), &rows.values);
            }
        }
        let untied = self.config.tie_word_embeddings && head_differs(&parameters);
        if self.config.tie_word_embeddings && !untied {
            parameters.retain(|(name, _)| name != "lm_head.weight");
        }
        Ok(Folded { parameters, untied })
    }
}

/// Whether there is a head that is not the embedding.
fn head_differs(parameters: &[(String, Tensor)]) -> bool {
    let find = |name: &str| parameters.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    match (find("model.embed_tokens.weight"), find("lm_head.weight")) {
        (Some(table), Some(head)) => table != head,
        _ => false,
    }
}
