//! Low-rank adapters: combining, folding into the base, extracting from a fine-tuned model, describing and comparing.
//!
//! An adapter is a PEFT directory. It changes the weight of each of its modules by `ΔW = s·B·A` (of an embedding by its
//! transpose), where the scaling `s` follows from ranks, alphas, patterns and rsLoRA. Everything here works on `ΔW`,
//! never on `A` and `B` separately, except for [`Space::Factors`], which reproduces PEFT. Products of two large
//! matrices are avoided where possible: norms, inner products and singular values are computed from QR decompositions
//! of the factors.
//!
//! Other parameters that an adapter trains (PEFT's `modules_to_save`, `bias`, `lora_bias`, `trainable_token_indices`)
//! are treated as differences from the base's values, and folded and combined like updates.
//!
//! If an adapter lacks a module, its `ΔW` is 0 there, so adapters with any ranks, scalings and target modules can be
//! combined.

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
pub use dense::{Truncated, truncated_svd, truncated_svd_scratch};
pub use extract::{ExtractOptions, ExtractReport, Untouched, extract};
pub use fold::{Drift, FoldOptions, FoldReport, ModuleDrift, fold, fold_with};
pub use info::{AdapterInfo, BesideInfo, ModuleInfo, info};
pub use options::{CombineOptions, Space};
pub use report::{CombineReport, ModuleReport, WholeReport};
pub use set::open;
