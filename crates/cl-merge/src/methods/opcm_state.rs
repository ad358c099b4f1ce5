//! State that OPCM carries from tensor to tensor and from one merge to the next.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// State of a merge, by tensor name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpcmState(pub BTreeMap<String, OpcmTensor>);

/// State of the merge of one tensor; [`crate::MergePieces::state`] returns it as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpcmTensor {
    /// Number of merged models.
    pub models: usize,
    /// `λ_T`.
    pub lambda: f64,
    /// Sum of the norms of their task vectors: of this tensor, or of the whole model if it was scaled by norms over the
    /// model.
    pub norm_sum: f64,
}

/// Squared norms, which can be summed over tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpcmNorms {
    /// `‖δ‖²` of each new model.
    pub task_vectors: Vec<f64>,
    /// `‖S_T‖²`.
    pub sum: f64,
}

impl AddAssign<&OpcmNorms> for OpcmNorms {
    fn add_assign(&mut self, other: &OpcmNorms) {
        self.task_vectors.resize(other.task_vectors.len().max(self.task_vectors.len()), 0.0);
        self.task_vectors.iter_mut().zip(&other.task_vectors).for_each(|(sum, x)| *sum += x);
        self.sum += other.sum;
    }
}
