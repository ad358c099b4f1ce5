//! Low-rank adapters: combined, folded into their base, extracted from a tuned model, described and compared.
//!
//! An adapter is a PEFT directory. Of every module it changes the weight by `ΔW = s·B·A` (of an embedding by its transpose),
//! with `s` the scaling that ranks, alphas, patterns and rsLoRA give. Everything here works on `ΔW`, never on `A` and `B`
//! apart, except for [`Space::Factors`], which is there to do what PEFT does. Nothing forms a product of two large matrices
//! where ranks allow to do without: norms, inner products and singular values come from QR decompositions of the factors.
//!
//! What an adapter trains beside its factors (PEFT's `modules_to_save`, `bias`, `lora_bias`, `trainable_token_indices`) counts as
//! its difference from the base's values, and is folded and combined like an update.
//!
//! A module that an adapter lacks has `ΔW = 0` in it, so any mix of ranks, scalings and targets can be combined.

mod card;
#[cfg(feature = "cli")]
pub mod cli;
mod combine;
mod compare;
mod dense;
mod extract;
mod factors;
mod fold;
pub(crate) mod folded;
mod info;
mod low_rank;
mod merge;
mod options;
mod output;
mod report;
mod set;
mod threads;
mod update;
mod whole;

pub use combine::combine;
pub use compare::{AdapterDiff, ModuleDiff, compare, overlap};
pub use dense::{Truncated, truncated_svd};
pub use extract::{ExtractOptions, ExtractReport, Untouched, extract};
pub use fold::{Drift, FoldOptions, FoldReport, ModuleDrift, fold, fold_with};
pub use info::{AdapterInfo, BesideInfo, ModuleInfo, info};
pub use options::{CombineOptions, Space};
pub use report::{CombineReport, ModuleReport, WholeReport};
pub use set::open;
