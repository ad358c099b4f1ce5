//! Names of tensors in Llama-like checkpoints and in Mixtral's.

/// The three matrices of an MLP: in a dense model, and of a Mixtral expert.
pub(crate) const MATRICES: [(&str, &str); 3] = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")];

/// `model.layers.N.mlp.MATRIX.weight`.
pub(crate) fn dense(layer: usize, matrix: &str) -> String {
    format!("model.layers.{layer}.mlp.{matrix}.weight")
}

/// `model.layers.N.block_sparse_moe.experts.E.W.weight`.
pub(crate) fn expert(layer: usize, expert: usize, matrix: &str) -> String {
    format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight")
}

/// `model.layers.N.block_sparse_moe.gate.weight`, `(experts, hidden)`.
pub(crate) fn router(layer: usize) -> String {
    format!("model.layers.{layer}.block_sparse_moe.gate.weight")
}

/// Whether a tensor of the base is taken as it is: what a Mixtral has under the same name.
pub(crate) fn is_stem(name: &str) -> bool {
    if ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].contains(&name) {
        return true;
    }
    let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return false;
    };
    let parts = [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
    ];
    layer.parse::<usize>().is_ok() && parts.contains(&part)
}

/// Whether a tensor of the base has no place in the mixture and needs none: its MLPs, which the experts replace, and buffers
/// that follow from config.json.
pub(crate) fn is_replaced(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || (name.starts_with("model.layers.")
            && MATRICES.iter().any(|(dense, _)| name.ends_with(&format!(".mlp.{dense}.weight"))))
}
