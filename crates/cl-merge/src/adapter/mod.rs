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
mod info;
mod low_rank;
mod merge;
mod output;
mod set;
mod update;
mod whole;

pub use combine::{CombineOptions, CombineReport, ModuleReport, Space, WholeReport, combine};
pub use compare::{AdapterDiff, ModuleDiff, compare, overlap};
pub use extract::{ExtractOptions, ExtractReport, Untouched, extract};
pub use fold::{Drift, FoldOptions, FoldReport, ModuleDrift, fold, fold_with};
pub use info::{AdapterInfo, BesideInfo, ModuleInfo, info};

use cl_checkpoint::{Adapter, Interrupt};
use std::path::PathBuf;

use crate::Error;

/// Opens adapters.
///
/// # Errors
/// [`Error::Problems`] with everything that is wrong with any of them.
pub fn open(dirs: &[PathBuf]) -> Result<Vec<Adapter>, Error> {
    let (mut adapters, mut problems) = (Vec::new(), Vec::new());
    for dir in dirs {
        match Adapter::open(dir) {
            Ok(adapter) => adapters.push(adapter),
            Err(error) => problems.push(error.to_string()),
        }
    }
    if problems.is_empty() { Ok(adapters) } else { Err(Error::Problems(problems)) }
}

/// Ends the work between two modules when that was asked for.
fn stop_if_asked(interrupt: &Interrupt) -> Result<(), Error> {
    if interrupt.requested() { Err(Error::Interrupted) } else { Ok(()) }
}

/// Runs on so many threads; 0 for all cores.
fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> Result<R, Error> + Send) -> Result<R, Error> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(crate::run::options::at_most(threads)).build();
    let wrong = |e| Error::Io { path: PathBuf::from("threads"), source: std::io::Error::other(e) };
    pool.map_err(wrong)?.install(f)
}
