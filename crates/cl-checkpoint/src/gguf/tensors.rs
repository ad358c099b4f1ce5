use std::collections::BTreeSet;

use super::config::{Architecture, Optional, Shape};
use super::{Error, GgufFile, GgufTensor, TensorProblem, rope};

/// A tensor of the output: its source and the order of its rows.
pub(super) struct Planned<'f> {
    pub(super) name: String,
    pub(super) source: String,
    pub(super) tensor: &'f GgufTensor,
    /// Number of heads whose rows are interleaved in the file and have to be rearranged into halves.
    pub(super) interleaved_heads: Option<usize>,
}

impl Planned<'_> {
    /// Returns the row of the file that becomes row `row`.
    ///
    /// Transformers rotates dimension `j` of a head together with `j + d/2`, llama.cpp's llama rotates `2j` with
    /// `2j + 1`, so its converter moves row `j + i·d/2` to `2j + i` in the query and key projections.
    pub(super) fn source_row(&self, row: usize, rows: usize) -> usize {
        let Some(heads) = self.interleaved_heads else { return row };
        let head_dim = rows / heads;
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + within % (head_dim / 2) * 2 + within / (head_dim / 2)
    }
}

/// Finds every tensor of the architecture, checks its shape, and checks that no other tensors are left.
pub(super) fn plan<'f>(file: &'f GgufFile, shape: &Shape) -> Result<(Vec<Planned<'f>>, Optional), Error> {
    let optional = optional(file, shape)?;
    let mut plan = Plan { file, planned: Vec::new(), used: BTreeSet::new() };
    let (hidden, vocab) = (shape.hidden, shape.vocab);
    plan.add("token_embd.weight", "model.embed_tokens.weight", &[vocab, hidden], None)?;
    for layer in 0..shape.layers {
        plan.layer(layer, shape, &optional)?;
    }
    plan.add("output_norm.weight", "model.norm.weight", &[hidden], None)?;
    if optional.lm_head {
        plan.add("output.weight", "lm_head.weight", &[vocab, hidden], None)?;
    }
    // This tensor becomes `rope_scaling` of the config.
    plan.used.insert(rope::FACTORS.to_owned());
    if let Some(extra) = file.tensors().keys().find(|name| !plan.used.contains(*name)) {
        return Err(Error::UnusedTensor {
            path: file.path().to_owned(),
            tensor: extra.clone(),
            architecture: shape.architecture.name().to_owned(),
        });
    }
    Ok((plan.planned, optional))
}

/// Determines which optional tensors exist. Biases are detected in the first layer; the plan then requires them in all
/// layers.
fn optional(file: &GgufFile, shape: &Shape) -> Result<Optional, Error> {
    let has = |name: &str| file.tensors().contains_key(name);
    let llama_biases = shape.model_type().0 == "llama";
    let qwen3 = shape.architecture == Architecture::Qwen3;
    Ok(Optional {
        lm_head: has("output.weight"),
        attention_bias: (llama_biases || qwen3) && has("blk.0.attn_q.bias"),
        mlp_bias: llama_biases && has("blk.0.ffn_up.bias"),
    })
}

struct Plan<'f> {
    file: &'f GgufFile,
    planned: Vec<Planned<'f>>,
    used: BTreeSet<String>,
}

impl Plan<'_> {
    fn layer(&mut self, layer: usize, shape: &Shape, optional: &Optional) -> Result<(), Error> {
        let (hidden, inner) = (shape.hidden, shape.intermediate);
        let (query, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let interleaved = |heads| (shape.architecture == Architecture::Llama).then_some(heads);
        let (blk, hf) = (format!("blk.{layer}"), format!("model.layers.{layer}"));
        let norm = [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];
        for (gguf, name) in norm {
            self.add(&format!("{blk}.{gguf}.weight"), &format!("{hf}.{name}.weight"), &[hidden], None)?;
        }
        if shape.architecture == Architecture::Qwen3 {
            for (gguf, name) in [("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")] {
                let name = format!("{hf}.self_attn.{name}.weight");
                self.add(&format!("{blk}.{gguf}.weight"), &name, &[shape.head_dim], None)?;
            }
        }
        let qkv_bias = optional.attention_bias || shape.architecture == Architecture::Qwen2;
        let linears = [
            ("attn_q", "self_attn.q_proj", query, hidden, qkv_bias, interleaved(shape.heads)),
            ("attn_k", "self_attn.k_proj", kv, hidden, qkv_bias, interleaved(shape.kv_heads)),
            ("attn_v", "self_attn.v_proj", kv, hidden, qkv_bias, None),
            ("attn_output", "self_attn.o_proj", hidden, query, optional.attention_bias, None),
            ("ffn_gate", "mlp.gate_proj", inner, hidden, optional.mlp_bias, None),
            ("ffn_up", "mlp.up_proj", inner, hidden, optional.mlp_bias, None),
            ("ffn_down", "mlp.down_proj", hidden, inner, optional.mlp_bias, None),
        ];
        for (gguf, name, rows, columns, bias, heads) in linears {
            self.add(&format!("{blk}.{gguf}.weight"), &format!("{hf}.{name}.weight"), &[rows, columns], heads)?;
            if bias {
                self.add(&format!("{blk}.{gguf}.bias"), &format!("{hf}.{name}.bias"), &[rows], heads)?;
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        source: &str,
        name: &str,
        shape: &[usize],
        interleaved_heads: Option<usize>,
    ) -> Result<(), Error> {
        let missing = || Error::MissingTensor { path: self.file.path().to_owned(), tensor: source.to_owned() };
        let tensor = self.file.tensors().get(source).ok_or_else(missing)?;
        if tensor.shape != shape {
            let problem = TensorProblem::Shape { expected: shape.to_vec(), found: tensor.shape.clone() };
            return Err(self.file.tensor_error(source, problem));
        }
        self.used.insert(source.to_owned());
        self.planned.push(Planned { name: name.to_owned(), source: source.to_owned(), tensor, interleaved_heads });
        Ok(())
    }
}
