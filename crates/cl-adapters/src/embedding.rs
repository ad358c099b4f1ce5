use cl_checkpoint::LayerKind;
use cl_torch::tch::{Kind, Tensor};

use crate::{Lora, Site, TokenRows};

/// An embedding, with or without an adapter.
pub struct Embedding {
    /// Name of the module, as in the checkpoint, without `.weight`.
    pub name: String,
    /// `[tokens, width]`.
    pub weight: Tensor,
    /// The low-rank update: `ΔW = scaling · (B·A)ᵀ` with A `[r, tokens]` and B `[width, r]`.
    pub lora: Option<Lora>,
    /// Rows that are trained and replace those of the embedding.
    pub rows: Option<TokenRows>,
    /// Dtype of the adapter's product; defaults to the dtype of the result.
    pub adapter_kind: Option<Kind>,
}

impl Embedding {
    /// Creates an embedding without an adapter.
    pub fn new(name: &str, weight: Tensor) -> Embedding {
        Embedding { name: name.to_owned(), weight, lora: None, rows: None, adapter_kind: None }
    }

    /// Returns the rows of `ids` `[tokens]` in the dtype `compute`: `[tokens, width]`.
    pub fn forward(&self, ids: &Tensor, compute: Kind) -> Tensor {
        let rows = |table: &Tensor| Tensor::embedding(table, ids, -1, false, false);
        let x = rows(&self.weight).to_kind(compute);
        let x = match &self.lora {
            Some(lora) => {
                let kind = self.adapter_kind.unwrap_or(compute);
                let narrow = rows(&lora.a.tr()).to_kind(kind) * lora.scaling;
                (x + narrow.matmul(&lora.b.to_kind(kind).tr())).to_kind(compute)
            }
            None => x,
        };
        self.rows.as_ref().map_or_else(|| x.shallow_clone(), |rows| rows.replace(&x, ids))
    }

    /// Makes the rows of these tokens trainable, starting from the given values or from the embedding's.
    ///
    /// # Panics
    /// Panics if an id is not that of a token.
    pub fn set_rows(&mut self, ids: &[i64], values: Option<Tensor>) {
        self.rows = Some(TokenRows::new(&self.weight, ids, values));
    }

    /// Returns the embedding as a layer that can have an adapter.
    pub fn site(&self) -> Site<'_> {
        Site { name: &self.name, kind: LayerKind::Embedding, lora: self.lora.as_ref(), start: None }
    }
}
