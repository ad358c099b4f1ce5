use std::path::PathBuf;

use cl_checkpoint::Interrupt;
use serde::{Deserialize, Serialize};

use crate::methods::Profile;
use crate::recipe::config::{FloatType, Parameters};

/// What is combined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Space {
    /// The updates `ΔW = s·B·A`, as the methods' papers mean it.
    #[default]
    Delta,
    /// The factors A and B apart, each times `√(w·s)`, as PEFT does. Their product has terms `BᵢAⱼ` across adapters.
    Factors,
}

/// How adapters are combined.
#[derive(Clone, Debug)]
pub struct CombineOptions {
    /// `cat`, `linear`, `magnitude_prune`, or a method of [`crate::METHODS`] that works on task vectors; `-` counts as `_`.
    pub method: String,
    /// One for each adapter; none for ones.
    pub weights: Vec<f64>,
    /// Names of the adapters, one each; none for their directories as given. They key random masks and decide the order in which
    /// sums are taken, so that with names a result does not depend on where the adapters are.
    pub names: Vec<String>,
    /// One for all adapters, or one for each; none for the method's default.
    pub density: Vec<f64>,
    /// Other parameters of the method.
    pub parameters: Parameters,
    /// Rank of the output at most. Without it sums keep all ranks, and other methods are cut to the largest rank of an input.
    pub rank: Option<usize>,
    /// What is combined.
    pub space: Space,
    /// Whose definitions hold where nothing is set.
    pub profile: Profile,
    /// Key of random masks.
    pub seed: u64,
    /// Model directory that the adapters were made for; modules and shapes are checked against it.
    pub base: Option<PathBuf>,
    /// Take adapters whose manifests say that they were made for different bases.
    pub ignore_base: bool,
    /// Threads; 0 for all cores. The result does not depend on it.
    pub threads: usize,
    /// Bytes that may be held.
    pub memory: usize,
    /// Element type of the output.
    pub dtype: FloatType,
    /// Replace an output that exists.
    pub overwrite: bool,
    /// A request to stop.
    pub interrupt: Interrupt,
}

impl Space {
    /// Where the paper's code ran a method: PEFT's `ties` and `dare_ties` see A and B, sums are of whole models.
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
