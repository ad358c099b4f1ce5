use cl_torch::tch::{Device, Kind, Tensor};
use cl_torch::{LinearLayer, LinearWeight, Quantized, linears};

/// The weight of a linear layer, `[out, in]`.
pub enum Weight {
    /// A dense tensor with a floating-point dtype.
    Dense(Tensor),
    /// A frozen, quantized matrix (QLoRA: Dettmers et al., arXiv:2305.14314).
    Quantized(Quantized),
}

impl From<Tensor> for Weight {
    fn from(weight: Tensor) -> Weight {
        Weight::Dense(weight)
    }
}

impl Weight {
    /// Returns the shape `[out, in]`.
    pub fn shape(&self) -> [i64; 2] {
        match self {
            // If only the structure of a model is checked, its tensors are empty.
            Weight::Dense(weight) => weight.size2().map_or([0, 0], |(output, input)| [output, input]),
            Weight::Quantized(weight) => weight.size(),
        }
    }

    /// Returns the device.
    pub fn device(&self) -> Device {
        match self {
            Weight::Dense(weight) => weight.device(),
            Weight::Quantized(weight) => weight.device(),
        }
    }

    /// Returns the weight in a floating-point dtype, dequantized if it is quantized.
    pub fn to_kind(&self, kind: Kind) -> Tensor {
        match self {
            Weight::Dense(weight) => weight.to_kind(kind),
            Weight::Quantized(weight) => weight.dequantize(kind),
        }
    }

    /// Returns the tensor of a dense weight, `None` if the weight is quantized.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Weight::Dense(weight) => Some(weight),
            Weight::Quantized(_) => None,
        }
    }

    /// Like [`Weight::dense`], to replace the tensor.
    pub fn dense_mut(&mut self) -> Option<&mut Tensor> {
        match self {
            Weight::Dense(weight) => Some(weight),
            Weight::Quantized(_) => None,
        }
    }

    /// Returns a handle for products with inputs of the dtype `kind`, to which a dense weight is converted.
    pub(crate) fn operand(&self, kind: Kind) -> Weight {
        match self {
            Weight::Dense(weight) => Weight::Dense(weight.to_kind(kind)),
            Weight::Quantized(weight) => Weight::Quantized(weight.shallow_clone()),
        }
    }

    /// The weight as an argument of [`linears`]; a dense one must have the dtype of the input.
    pub(crate) fn as_argument(&self) -> LinearWeight<'_> {
        match self {
            Weight::Dense(weight) => LinearWeight::Dense(weight),
            Weight::Quantized(weight) => LinearWeight::Quantized(weight),
        }
    }

    /// Computes `x·Wᵀ + b`, in the dtype of `x`.
    pub(crate) fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let weight = self.operand(x.kind());
        let layer = LinearLayer { weight: weight.as_argument(), bias, low_rank: None };
        linears(x, &[layer]).pop().expect("one output a layer")
    }

    /// Returns a second handle to the same tensors.
    pub fn shallow_clone(&self) -> Weight {
        match self {
            Weight::Dense(weight) => Weight::Dense(weight.shallow_clone()),
            Weight::Quantized(weight) => Weight::Quantized(weight.shallow_clone()),
        }
    }
}
