//! How the experts of a mixture of models are stored.

use std::fmt;
use std::str::FromStr;

use cl_checkpoint::TensorSource;
use serde::{Deserialize, Serialize};

/// How experts are stored: in full, or as the base's weight and a compressed difference from it.
///
/// ```
/// use cl_moe::ExpertStorage;
/// assert_eq!("lowrank:64".parse(), Ok(ExpertStorage::LowRank(64)));
/// assert_eq!(ExpertStorage::BitDelta.to_string(), "bitdelta");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ExpertStorage {
    /// Every expert's own weights (`full`).
    #[default]
    Full,
    /// `W₀ + uᵀ·v`: the difference, truncated to this many singular values (`lowrank:R`).
    LowRank(usize),
    /// `W₀ + s·sign(W − W₀)`: one bit per weight and one scale per matrix, the mean absolute difference (`bitdelta`;
    /// Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", arXiv:2402.10193, without its training of the
    /// scales).
    BitDelta,
}

impl ExpertStorage {
    /// Whether experts are stored as differences.
    pub fn is_delta(self) -> bool {
        self != ExpertStorage::Full
    }
}

impl FromStr for ExpertStorage {
    type Err = String;

    fn from_str(text: &str) -> Result<ExpertStorage, String> {
        match (text, text.strip_prefix("lowrank:").map(str::parse)) {
            ("full", _) => Ok(ExpertStorage::Full),
            ("bitdelta", _) => Ok(ExpertStorage::BitDelta),
            (_, Some(Ok(rank))) if rank > 0 => Ok(ExpertStorage::LowRank(rank)),
            _ => Err(format!("`{text}`: expected full, lowrank:R with a rank R of at least 1, or bitdelta")),
        }
    }
}

impl fmt::Display for ExpertStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExpertStorage::Full => f.write_str("full"),
            ExpertStorage::LowRank(rank) => write!(f, "lowrank:{rank}"),
            ExpertStorage::BitDelta => f.write_str("bitdelta"),
        }
    }
}

impl TryFrom<String> for ExpertStorage {
    type Error = String;

    fn try_from(text: String) -> Result<ExpertStorage, String> {
        text.parse()
    }
}

impl From<ExpertStorage> for String {
    fn from(storage: ExpertStorage) -> String {
        storage.to_string()
    }
}

/// Names of the tensors with a matrix's low-rank differences: u `[experts, r, out]` and v `[experts, r, in]`, with
/// `ΔWₑ = uₑᵀ·vₑ`, where r is the minimum of the requested rank, out and in.
pub fn low_rank_delta_tensors(module: &str) -> [String; 2] {
    ["delta_u", "delta_v"].map(|part| format!("{module}.experts.{part}"))
}

/// Names of the tensors with a matrix's signs and scales. Signs are U8 `[experts, out, ⌈in / 8⌉]`; bit j of byte i is
/// for column 8i + j and is set for +. Scales are F32 `[experts]`.
pub fn sign_delta_tensors(module: &str) -> [String; 2] {
    ["delta_sign", "delta_scale"].map(|part| format!("{module}.experts.{part}"))
}

/// Number of parameters in a model directory. Each sign of an expert counts as one parameter, although a byte holds
/// eight of them; the constants stored in place of routers do not count.
pub fn parameters(model: &dyn TensorSource) -> u64 {
    let [signs, _] = sign_delta_tensors("");
    let of_tensor = |name: &str| {
        let shape = &model.info(name).expect("one of its names").shape;
        let elements = shape.iter().product::<usize>();
        let matrix = name.strip_suffix(&signs).and_then(|module| model.info(&format!("{module}.weight")));
        match (matrix, shape.as_slice()) {
            _ if name.ends_with(".router") => 0,
            (Some(matrix), [experts, ..]) => experts * matrix.elements(),
            _ => elements,
        }
    };
    model.names().into_iter().map(|name| of_tensor(name) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for storage in [ExpertStorage::Full, ExpertStorage::LowRank(8), ExpertStorage::BitDelta] {
            assert_eq!(storage.to_string().parse(), Ok(storage));
            assert_eq!(storage.is_delta(), storage != ExpertStorage::Full);
        }
        for text in ["lowrank", "lowrank:0", "lowrank:x", "lowrank:-1", "bit", ""] {
            let message = text.parse::<ExpertStorage>().unwrap_err();
            assert!(message.contains("lowrank:R") && message.contains(text), "{message}");
        }
    }
}
