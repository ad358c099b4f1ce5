//! Recording of router decisions during forward passes.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use cl_torch::tch::Tensor;

/// The decisions of one router for the tokens of one forward pass.
pub struct RouterRecord {
    /// Name of the router; in a mixture of adapters, of its linear layer.
    pub router: String,
    /// Logits, `(tokens, experts)`, f32; part of the graph during training.
    pub logits: Tensor,
    /// Gates, `(tokens, experts)`, f32, without a graph; 0 for experts that are not selected.
    pub gates: Tensor,
    /// Number of selected experts per token.
    pub top_k: i64,
}

/// A log of router decisions; routers record into it until it is dropped.
#[derive(Default)]
pub struct RouterLog(Arc<Mutex<Vec<RouterRecord>>>);

impl RouterLog {
    /// Returns the records since the last call, in the order of the forward pass.
    pub fn take(&self) -> Vec<RouterRecord> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns a handle with which a router records its decisions.
    pub fn recorder(&self, router: &str) -> RouterRecorder {
        RouterRecorder { router: router.to_owned(), log: Arc::downgrade(&self.0) }
    }
}

/// A router's connection to a [`RouterLog`]; has no effect after the log is dropped.
#[derive(Clone)]
pub struct RouterRecorder {
    router: String,
    log: Weak<Mutex<Vec<RouterRecord>>>,
}

impl RouterRecorder {
    /// Adds a record, with the gates computed by `gates`.
    pub fn record(&self, logits: &Tensor, top_k: i64, gates: impl FnOnce() -> Tensor) {
        let Some(log) = self.log.upgrade() else { return };
        let (router, logits, gates) = (self.router.clone(), logits.shallow_clone(), gates().detach());
        log.lock().unwrap_or_else(PoisonError::into_inner).push(RouterRecord { router, logits, gates, top_k });
    }
}

/// Returns the indices of the `k` largest entries along the last dimension, largest first; ties go to the lowest index
/// (the order of ties is unspecified in `topk`).
///
/// # Panics
/// Panics if the dimension has fewer than `k` entries.
pub fn top_k(values: &Tensor, k: i64) -> Tensor {
    let (_, order) = values.detach().sort_stable(true, -1, true);
    order.narrow(-1, 0, k)
}
