//! The operation for each output tensor.

use std::ops::Range;
use std::sync::Arc;

use cl_checkpoint::TensorSpec;

use super::token_table::TokenTable;
use crate::methods::MergeMethod;

/// One output tensor.
pub(crate) struct PlannedTensor {
    pub(crate) spec: TensorSpec,
    pub(crate) work: Work,
}

pub(crate) enum Work {
    /// The bytes of a tensor of a model, as they are.
    Copy(Source),
    /// Consecutive parts, each merged by itself.
    Merge(Vec<Segment>),
}

/// A tensor of a model.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) model: usize,
    pub(crate) tensor: String,
    /// What keys its random masks.
    pub(crate) key: String,
    /// Its rows in the output's order, where tokenizers differ.
    pub(crate) table: Option<Arc<TokenTable>>,
}

/// Some rows of a tensor, or all of it.
pub(crate) struct Segment {
    pub(crate) elements: Range<usize>,
    pub(crate) shape: Vec<usize>,
    pub(crate) method: Box<dyn MergeMethod>,
    pub(crate) base: Option<Source>,
    pub(crate) models: Vec<Source>,
    /// Whether it is merged by the method of the plan, and so counts in a trim of the whole model.
    pub(crate) whole: bool,
}

impl PlannedTensor {
    pub(crate) fn elements(&self) -> usize {
        self.spec.shape.iter().product()
    }
}
