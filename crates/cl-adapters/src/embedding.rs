use cl_checkpoint::LayerKind;
use cl_torch::tch::{Kind, Tensor};

use crate::{Lora, Site};

/// A table of tokens, with or without an adapter.
pub struct Embedding {
    /// Name of the module, as the checkpoint has it without `.weight`.
    pub name: String,
    /// `[tokens, width]`.
    pub weight: Tensor,
    /// The low-rank update beside the table: `ΔW = scaling · (B·A)ᵀ` with A `[r, tokens]` and B `[width, r]`.
    pub lora: Option<Lora>,
}

impl Embedding {
    /// A table without an adapter.
    pub fn new(name: &str, weight: Tensor) -> Embedding {
        Embedding { name: name.to_owned(), weight, lora: None }
    }

    /// Rows of `ids` `[tokens]` in the dtype `compute`: `[tokens, width]`.
    pub fn forward(&self, ids: &Tensor, compute: Kind) -> Tensor {
        let rows = |table: &Tensor| Tensor::embedding(table, ids, -1, false, false).to_kind(compute);
        let x = rows(&self.weight);
        match &self.lora {
            Some(lora) => x + (rows(&lora.a.tr()) * lora.scaling).matmul(&lora.b.to_kind(compute).tr()),
            None => x,
        }
    }

    /// The table as a place for an adapter.
    pub fn site(&self) -> Site<'_> {
        Site { name: &self.name, kind: LayerKind::Embedding, lora: self.lora.as_ref(), start: None }
    }
}
