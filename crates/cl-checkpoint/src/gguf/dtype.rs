use std::str::FromStr;

use crate::Dtype;

/// The dtype in which all weights are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FloatDtype {
    /// bfloat16.
    #[default]
    Bf16,
    /// IEEE half precision; a weight beyond ±65504 is an error.
    F16,
    /// Single precision: exactly the dequantized values.
    F32,
}

impl FloatDtype {
    /// Returns `bfloat16`, `float16` or `float32`, as in `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            FloatDtype::Bf16 => "bfloat16",
            FloatDtype::F16 => "float16",
            FloatDtype::F32 => "float32",
        }
    }

    pub(super) fn dtype(self) -> Dtype {
        match self {
            FloatDtype::Bf16 => Dtype::BF16,
            FloatDtype::F16 => Dtype::F16,
            FloatDtype::F32 => Dtype::F32,
        }
    }
}

/// Error for a name that is not `bf16`, `f16` or `f32`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype `{0}`; expected bf16, f16 or f32")]
pub struct UnknownDtype(pub String);

impl FromStr for FloatDtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<FloatDtype, UnknownDtype> {
        match name {
            "bf16" => Ok(FloatDtype::Bf16),
            "f16" => Ok(FloatDtype::F16),
            "f32" => Ok(FloatDtype::F32),
            other => Err(UnknownDtype(other.to_owned())),
        }
    }
}
