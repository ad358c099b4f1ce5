use cl_torch::tch::Tensor;

use crate::{Lora, Mode};

/// A linear layer `y = x·Wᵀ + b`, with or without an adapter.
pub struct Linear {
    /// Name of the module, as the checkpoint has it without `.weight`.
    pub name: String,
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// The low-rank update beside the weight.
    pub lora: Option<Lora>,
}

impl Linear {
    /// A layer without an adapter.
    pub fn new(name: &str, weight: Tensor, bias: Option<Tensor>) -> Linear {
        Linear { name: name.to_owned(), weight, bias, lora: None }
    }

    /// `(in, out)`.
    pub fn widths(&self) -> (i64, i64) {
        let (output, input) = self.weight.size2().expect("a linear layer's weight is a matrix");
        (input, output)
    }

    /// `x` is `[tokens, in]`; the result is `[tokens, out]` in the dtype of `x`.
    ///
    /// Weights kept in another dtype (f32 master weights under bf16 compute) are converted on the way, so that their
    /// gradients arrive in the dtype they are kept in.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Tensor {
        let kind = x.kind();
        let bias = self.bias.as_ref().map(|b| b.to_kind(kind));
        let y = x.linear(&self.weight.to_kind(kind), bias.as_ref());
        match &self.lora {
            Some(lora) => lora.add_to(y, x, mode),
            None => y,
        }
    }

    /// Another handle on the same tensors.
    pub fn shallow_clone(&self) -> Linear {
        Linear {
            name: self.name.clone(),
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            lora: self.lora.as_ref().map(Lora::shallow_clone),
        }
    }
}
