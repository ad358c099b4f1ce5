use std::path::PathBuf;

use cl_checkpoint::Interrupt;
use serde::{Deserialize, Serialize};

use crate::methods::Profile;
use crate::recipe::config::{FloatType, Parameters};

/// The quantity that is combined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Space {
    /// The updates `ΔW = s·B·A`, as in the methods' papers.
    #[default]
    Delta,
    /// The factors A and B separately, each times `√(w·s)`, as in PEFT. Their product has cross terms `BᵢAⱼ`.
    Factors,
}

/// Options for combining adapters.
#[derive(Clone, Debug)]
pub struct CombineOptions {
    /// `cat`, `linear`, `magnitude_prune`, or a method of [`crate::METHODS`] for task vectors; `-` and `_` are
    /// equivalent.
    pub method: String,
    /// One weight per adapter; 1 if empty.
    pub weights: Vec<f64>,
    /// One name per adapter; by default their paths as given. Names are the keys of random masks and determine the
    /// order of summation, so with names the result does not depend on paths.
    pub names: Vec<String>,
    /// Fraction of entries to keep: one for all adapters, or one per adapter; the method's default if empty.
    pub density: Vec<f64>,
    /// Other parameters of the method.
    pub parameters: Parameters,
    /// Maximum rank of the output. By default, sums keep the full rank, and other methods the largest rank of an input.
    pub rank: Option<usize>,
    /// The quantity that is combined.
    pub space: Space,
    /// Which definitions are the defaults.
    pub profile: Profile,
    /// Random seed of masks.
    pub seed: u64,
    /// Base model directory, to check modules and shapes.
    pub base: Option<PathBuf>,
    /// Whether to accept adapters whose manifests name different bases.
    pub ignore_base: bool,
    /// Number of threads; 0 for all cores. The result does not depend on it.
    pub threads: usize,
    /// Memory limit in bytes.
    pub memory: usize,
    /// Dtype of the output.
    pub dtype: FloatType,
    /// Whether to replace an existing output.
    pub overwrite: bool,
    /// Stop request.
    pub interrupt: Interrupt,
}

impl Space {
    /// Returns the space in which the paper's code applied a method: PEFT's `ties` and `dare_ties` use A and B, sums
    /// use whole models.
    pub fn of_paper(method: &str) -> Space {
        match method.replace('-', "_").as_str() {
            "ties" | "dare_ties" => Space::Factors,
            _ => Space::Delta,
        }
    }
}

impl Default for CombineOptions {
    /// `linear` with weights of one, exact, in f32, with 1 GiB on all cores.
    fn default() -> Self {
        CombineOptions {
            method: "linear".to_owned(),
            weights: Vec::new(),
            names: Vec::new(),
            density: Vec::new(),
            parameters: Parameters::default(),
            rank: None,
            space: Space::Delta,
            profile: Profile::Method,
            seed: 42,
            base: None,
            ignore_base: false,
            threads: 0,
            memory: 1 << 30,
            dtype: FloatType::Float32,
            overwrite: false,
            interrupt: Interrupt::default(),
        }
    }
}
