//! Tensor names in Llama-like checkpoints and in mixtures.

use crate::{MixArchitecture, MixModule};

/// The three matrices of an MLP: their names in a dense model, and in a Mixtral expert.
const MLP: [(&str, &str); 3] = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")];
const ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];

/// Which tensors of the base are replaced by experts, and the names of experts and routers.
#[derive(Clone, Copy)]
pub(crate) struct Layout<'a> {
    pub(crate) architecture: MixArchitecture,
    pub(crate) modules: &'a [MixModule],
    /// The layers with experts; all layers if `None`.
    pub(crate) layers: Option<&'a [usize]>,
    /// Whether there is a shared expert.
    pub(crate) shared: bool,
}

/// Name of the weight of a global router, `(experts, hidden)`.
pub(crate) const GLOBAL_ROUTER: &str = "model.router.weight";

/// A matrix of a dense model that is replaced by experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replaced<'n> {
    pub(crate) layer: usize,
    pub(crate) module: MixModule,
    /// Name of the matrix: `gate_proj`, `q_proj`, ….
    pub(crate) matrix: &'n str,
}

impl Layout<'_> {
    /// Describes a tensor of the base that is replaced by experts; `None` if it is not.
    pub(crate) fn replaced<'n>(&self, name: &'n str) -> Option<Replaced<'n>> {
        let (layer, block, matrix) = projection(name)?;
        if self.layers.is_some_and(|layers| !layers.contains(&layer)) {
            return None;
        }
        let module = match (block, matrix) {
            ("mlp", _) => self.modules.iter().find(|m| matches!(m, MixModule::Mlp | MixModule::MlpFg)),
            (_, matrix) => self.modules.iter().find(|m| m.attention() == Some(matrix)),
        };
        module.map(|&module| Replaced { layer, module, matrix })
    }

    /// Whether a tensor, of any kind, belongs to a module that is replaced by experts.
    pub(crate) fn is_of_module(&self, name: &str) -> bool {
        let of_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((Ok(layer), rest)) = of_layer.map(|(layer, rest)| (layer.parse::<usize>(), rest)) else {
            return false;
        };
        if self.layers.is_some_and(|layers| !layers.contains(&layer)) {
            return false;
        }
        match rest.split_once('.') {
            Some(("mlp", _)) => self.modules.iter().any(|module| module.attention().is_none()),
            Some(("self_attn", rest)) => {
                let own = rest.split('.').next();
                self.modules.iter().any(|module| module.attention().is_some() && module.attention() == own)
            }
            _ => false,
        }
    }

    /// Name of the weight of a routed expert.
    pub(crate) fn expert(&self, of: Replaced<'_>, expert: usize) -> String {
        // In moetify's format, the shared expert is the first one.
        let moetify = expert + usize::from(self.shared);
        let (layer, matrix) = (of.layer, of.matrix);
        match (of.module, self.architecture) {
            (MixModule::Mlp, MixArchitecture::Mixtral) => {
                let mixed = MLP.iter().find(|(dense, _)| *dense == matrix).map_or(matrix, |(_, mixed)| mixed);
                format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{mixed}.weight")
            }
            (MixModule::Mlp, MixArchitecture::Qwen2Moe) => {
                format!("model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight")
            }
            (MixModule::Mlp, _) => format!("model.layers.{layer}.mlp.experts.{moetify}.{matrix}.weight"),
            (MixModule::MlpFg, _) => format!("model.layers.{layer}.mlp.{matrix}.experts.{moetify}.weight"),
            _ => format!("model.layers.{layer}.self_attn.{matrix}.experts.{moetify}.weight"),
        }
    }

    /// Name of the shared expert's weight.
    pub(crate) fn shared_expert(&self, of: Replaced<'_>) -> String {
        let (layer, matrix) = (of.layer, of.matrix);
        match (of.module, self.architecture) {
            (MixModule::Mlp, MixArchitecture::Qwen2Moe) => {
                format!("model.layers.{layer}.mlp.shared_expert.{matrix}.weight")
            }
            (MixModule::Mlp, _) => format!("model.layers.{layer}.mlp.experts.0.{matrix}.weight"),
            (MixModule::MlpFg, _) => format!("model.layers.{layer}.mlp.{matrix}.experts.0.weight"),
            _ => format!("model.layers.{layer}.self_attn.{matrix}.experts.0.weight"),
        }
    }

    /// Name of the weight of Qwen2-MoE's gate of the shared expert, `(1, hidden)`.
    pub(crate) fn shared_gate(&self, layer: usize) -> Option<String> {
        (self.architecture == MixArchitecture::Qwen2Moe)
            .then(|| format!("model.layers.{layer}.mlp.shared_expert_gate.weight"))
    }

    /// Name of the module that is a router, whose weight is `(experts, in)`.
    pub(crate) fn router(&self, of: Replaced<'_>) -> String {
        let (layer, matrix) = (of.layer, of.matrix);
        match (of.module, self.architecture) {
            (MixModule::Mlp, MixArchitecture::Mixtral) => format!("model.layers.{layer}.block_sparse_moe.gate"),
            (MixModule::Mlp, MixArchitecture::Qwen2Moe) => format!("model.layers.{layer}.mlp.gate"),
            (MixModule::Mlp, _) => format!("model.layers.{layer}.mlp.router"),
            (MixModule::MlpFg, _) => format!("model.layers.{layer}.mlp.{matrix}.router"),
            _ => format!("model.layers.{layer}.self_attn.{matrix}.router"),
        }
    }
}

/// The matrices that read the same input as the router of a whole MLP.
pub(crate) fn read_by_mlp(layer: usize) -> [String; 2] {
    ["gate_proj", "up_proj"].map(|matrix| format!("model.layers.{layer}.mlp.{matrix}.weight"))
}

/// The projection of a dense MLP whose sign determines which units are active.
pub(crate) fn gate_projection(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.gate_proj.weight")
}

/// Splits the name of a projection's weight into layer, block and matrix.
fn projection(name: &str) -> Option<(usize, &str, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (block, matrix) = rest.strip_suffix(".weight")?.split_once('.')?;
    let known = match block {
        "mlp" => MLP.iter().any(|(dense, _)| *dense == matrix),
        "self_attn" => ATTENTION.contains(&matrix),
        _ => false,
    };
    known.then_some((layer.parse().ok()?, block, matrix))
}

/// The layer of a `gate_proj` weight, which identifies layers that have an MLP.
pub(crate) fn layer_with_mlp(name: &str) -> Option<usize> {
    projection(name).filter(|(_, _, matrix)| *matrix == "gate_proj").map(|(layer, ..)| layer)
}

/// Whether a tensor of the base has a place in a mixture: the tensors of Llama and Mistral without biases, and with
/// `biases` also the biases of q, k and v, as in Qwen2.
pub(crate) fn is_known(name: &str, biases: bool) -> bool {
    if ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].contains(&name) {
        return true;
    }
    let norm = |rest: &str| rest == "input_layernorm.weight" || rest == "post_attention_layernorm.weight";
    let of_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let bias = |rest: &str| biases && ["q", "k", "v"].iter().any(|m| rest == format!("self_attn.{m}_proj.bias"));
    let is_of_layer = |(layer, rest): (&str, &str)| layer.parse::<usize>().is_ok() && (norm(rest) || bias(rest));
    projection(name).is_some() || of_layer.is_some_and(is_of_layer)
}

/// Whether a tensor of the base can be ignored: buffers that follow from config.json.
pub(crate) fn is_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_of_chosen_modules_and_layers_become_experts() {
        let modules = [MixModule::MlpFg, MixModule::QProj];
        let layout =
            Layout { architecture: MixArchitecture::Moetify, modules: &modules, layers: Some(&[1]), shared: false };
        assert_eq!(layout.replaced("model.layers.0.self_attn.q_proj.weight"), None);
        assert_eq!(layout.replaced("model.layers.1.self_attn.k_proj.weight"), None);
        let q = layout.replaced("model.layers.1.self_attn.q_proj.weight").unwrap();
        assert_eq!(layout.expert(q, 2), "model.layers.1.self_attn.q_proj.experts.2.weight");
        let down = layout.replaced("model.layers.1.mlp.down_proj.weight").unwrap();
        assert_eq!(layout.router(down), "model.layers.1.mlp.down_proj.router");
        for (name, is_of_module) in [
            ("model.layers.1.mlp.gate_proj.bias", true),
            ("model.layers.1.mlp.gate_proj.weight_scale", true),
            ("model.layers.1.self_attn.q_proj.bias", true),
            ("model.layers.1.self_attn.k_proj.bias", false),
            ("model.layers.1.self_attn.rotary_emb.inv_freq", false),
            ("model.layers.0.mlp.gate_proj.bias", false),
            ("model.norm.weight", false),
        ] {
            assert_eq!(layout.is_of_module(name), is_of_module, "{name}");
        }
        let of = |architecture, shared| Layout { architecture, modules: &[MixModule::Mlp], layers: None, shared };
        let name = "model.layers.1.mlp.down_proj.weight";
        let mixtral = of(MixArchitecture::Mixtral, false);
        let down = mixtral.replaced(name).unwrap();
        assert_eq!(mixtral.expert(down, 0), "model.layers.1.block_sparse_moe.experts.0.w2.weight");
        let (qwen, moetify) = (of(MixArchitecture::Qwen2Moe, true), of(MixArchitecture::Moetify, true));
        assert_eq!(qwen.expert(down, 0), "model.layers.1.mlp.experts.0.down_proj.weight");
        assert_eq!(qwen.shared_expert(down), "model.layers.1.mlp.shared_expert.down_proj.weight");
        assert_eq!(moetify.expert(down, 0), "model.layers.1.mlp.experts.1.down_proj.weight");
        assert_eq!(moetify.shared_expert(down), "model.layers.1.mlp.experts.0.down_proj.weight");
        let bias = "model.layers.3.self_attn.q_proj.bias";
        assert!(is_known("model.layers.3.input_layernorm.weight", false) && !is_known(bias, false));
        assert!(is_known(bias, true) && !is_known("model.layers.3.self_attn.o_proj.bias", true));
    }
}
