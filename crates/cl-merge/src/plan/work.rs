//! The operation that produces each output tensor.

use std::ops::Range;
use std::sync::Arc;

use cl_checkpoint::TensorSpec;

use super::token_table::TokenTable;
use crate::methods::MergeMethod;

/// An output tensor and the operation that produces it.
pub(crate) struct PlannedTensor {
    pub(crate) spec: TensorSpec,
    pub(crate) work: Work,
}

pub(crate) enum Work {
    /// Copies a model's tensor byte for byte.
    Copy(Source),
    /// Merges consecutive segments independently.
    Merge(Vec<Segment>),
}

/// A tensor of one model.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) model: usize,
    pub(crate) tensor: String,
    /// Key of its random masks.
    pub(crate) key: String,
    /// Its rows in the output's order, if tokenizers differ.
    pub(crate) table: Option<Arc<TokenTable>>,
}

/// A tensor, or some of its rows, merged by one method.
pub(crate) struct Segment {
    pub(crate) elements: Range<usize>,
    pub(crate) shape: Vec<usize>,
    pub(crate) method: Box<dyn MergeMethod>,
    pub(crate) base: Option<Source>,
    pub(crate) models: Vec<Source>,
    /// Whether it is merged by the method of the plan, and therefore counts when the whole model is trimmed.
    pub(crate) whole: bool,
}

impl PlannedTensor {
    pub(crate) fn elements(&self) -> usize {
        self.spec.shape.iter().product()
    }
}
