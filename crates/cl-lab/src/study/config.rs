use std::path::{Path, PathBuf};

use cl_adapters::Overlap;
use cl_checkpoint::HubSnapshot;
use cl_data::Profile;
use cl_train::TrainConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::problem::StudyProblem;
use crate::rounds::overlay;
use crate::{EvalConfig, Limits, RoundConfig, ValidationConfig};

/// Configuration of `cl study`: one model, several rounds, and the methods to compare. Paths are relative to the
/// current directory.
///
/// ```
/// let study: cl_lab::StudyConfig = toml::from_str(
///     r#"
///     name = "three rounds"
///     model = "models/base"
///     data = "data"
///     tasks = ["news", "recipes", "law"]
///     seeds = [1, 2, 3]
///     compare = ["sequence", "replay", "merge"]
///     [train]
///     epochs = 3
///     [lora]
///     learning_rate = 2e-4
///     lora = { r = 16 }
///     [full]
///     learning_rate = 1e-5
///     "#,
/// )?;
/// assert_eq!(study.seeds.len(), 3);
/// # Ok::<(), toml::de::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyConfig {
    /// Name of the study.
    pub name: String,
    /// Description for the report, in one or two sentences.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Model directory to start from.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// Name of the model in the report; defaults to the last component of its path.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model_name: String,
    /// Directory of tasks in TRACE's layout, each with a train and a test split.
    pub data: PathBuf,
    /// Tasks in training order, one per round: a short form of `[[rounds]]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// Random seeds; the paper's comparisons are repeated with each.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// Methods to compare; all by default.
    #[serde(default = "everything")]
    pub compare: Vec<Comparison>,
    /// Profile: which set of definitions applies.
    #[serde(default, deserialize_with = "Profile::of_training")]
    pub profile: Profile,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// Number of threads of each stage; defaults to the number of cores divided by the number of parallel stages. Sums
    /// can differ in their last bits when this number changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u16>,
    /// Rows of each earlier round for replay, as a fraction of the current round's rows.
    #[serde(default = "tenth")]
    pub replay: f64,
    /// Numbers of models to merge; a merge of n uses those of the first n rounds. Defaults to all numbers from 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members: Option<Vec<usize>>,
    /// Rounds whose fully fine-tuned models form an additional mixture of experts; none if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<String>,
    /// Number of alternative orders of the rounds, one of the open questions: the first is the reverse order, the
    /// others are random, each with its number as the seed. LoRA and full fine-tuning are repeated in each, with the
    /// first seed.
    #[serde(default = "three")]
    pub orders: usize,
    /// o-LoRA's penalty and the coefficients λ to compare.
    #[serde(default)]
    pub olora: OloraComparison,
    /// Limits on the data.
    #[serde(default)]
    pub limit: Limits,
    /// `[train]` of all stages, as in a sequence, without the tables `lora` and `full`.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub train: toml::Table,
    /// Overrides of `train` for LoRA; its key `lora` contains the LoRA settings.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub lora: toml::Table,
    /// Overrides of `train` for full fine-tuning.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub full: toml::Table,
    /// Overrides of `train` for router training, which uses all tasks at once; its key `router` contains the auxiliary
    /// losses.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub router: toml::Table,
    /// Overrides of `lora` and `full` for joint training.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub joint: toml::Table,
    /// Validation during training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationConfig>,
    /// Evaluation settings.
    #[serde(default)]
    pub eval: EvalConfig,
    /// Rounds with their own settings, as in a sequence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<RoundConfig>,
    /// Additional information about scored tasks, for the report.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<ColumnConfig>,
}

/// A group of methods that a study can compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Comparison {
    /// Each round alone on the base model, with LoRA and with full fine-tuning. Merges and mixtures are built from
    /// these models.
    OneRound,
    /// The rounds in sequence, with LoRA and with full fine-tuning.
    Sequence,
    /// The rounds in sequence with LoRA, each adapter kept orthogonal to the earlier ones.
    Olora,
    /// The rounds in sequence, with replay of earlier rounds.
    Replay,
    /// Joint training on all data at once, upsampled to equal proportions and in natural proportions.
    Joint,
    /// Merges of one-round models: averages of fully fine-tuned models; averages, TIES and DARE-TIES of adapters.
    Merge,
    /// Mixtures of one-round models as experts, with untrained routers, prototypes of each expert, or trained routers.
    Mixture,
    /// Questions that the paper leaves open, with the first seed: DARE's rescaling, definitions of o-LoRA's term, pure
    /// bf16 weights, a fixed replay buffer, orders of the rounds, and BOS.
    Questions,
}

impl Comparison {
    /// All comparisons: those of the paper, then its open questions.
    pub const ALL: [Comparison; 8] = [
        Comparison::OneRound,
        Comparison::Sequence,
        Comparison::Olora,
        Comparison::Replay,
        Comparison::Joint,
        Comparison::Merge,
        Comparison::Mixture,
        Comparison::Questions,
    ];

    /// The comparisons of the paper.
    pub fn of_paper() -> &'static [Comparison] {
        &Self::ALL[..7]
    }
}

/// Coefficients of o-LoRA's penalty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OloraComparison {
    /// Definition of the penalty.
    pub mode: Overlap,
    /// Coefficients λ; each is trained as a separate sequence.
    pub lambda: Vec<f64>,
}

impl Default for OloraComparison {
    /// Returns the paper's two coefficients, for the published definition of the penalty.
    fn default() -> Self {
        OloraComparison { mode: Overlap::L1, lambda: vec![0.5, 5.0] }
    }
}

/// Additional information about a scored task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnConfig {
    /// Name of the task.
    pub name: String,
    /// Expected score of random guessing, in `[0, 1]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chance: Option<f64>,
    /// The corresponding column of the paper's tables, such as `cstan`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paper: Option<String>,
}

/// Which parameters are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tuning {
    Lora,
    Full,
    /// Only the routers of a mixture.
    Router,
}

impl Default for StudyConfig {
    fn default() -> Self {
        StudyConfig {
            name: "study".to_owned(),
            description: String::new(),
            model: PathBuf::new(),
            model_name: String::new(),
            data: PathBuf::new(),
            tasks: Vec::new(),
            seeds: one_seed(),
            compare: everything(),
            profile: Profile::default(),
            device: auto(),
            threads: None,
            replay: tenth(),
            members: None,
            experts: Vec::new(),
            orders: three(),
            olora: OloraComparison::default(),
            limit: Limits::default(),
            train: toml::Table::new(),
            lora: toml::Table::new(),
            full: toml::Table::new(),
            router: toml::Table::new(),
            joint: toml::Table::new(),
            validation: None,
            eval: EvalConfig::default(),
            rounds: Vec::new(),
            columns: Vec::new(),
        }
    }
}

impl StudyConfig {
    /// Returns the rounds; `tasks` are expanded to rounds.
    pub(super) fn all_rounds(&self) -> Vec<RoundConfig> {
        if self.rounds.is_empty() {
            self.tasks.iter().map(|task| RoundConfig::of_task(task)).collect()
        } else {
            self.rounds.clone()
        }
    }

    /// Returns `[train]` for LoRA or full fine-tuning.
    ///
    /// # Errors
    /// Returns what is wrong, with the name of the table.
    pub(super) fn train_config(&self, tuning: Tuning) -> Result<TrainConfig, StudyProblem> {
        let (own, table) = match tuning {
            Tuning::Lora => (&self.lora, "lora"),
            Tuning::Full => (&self.full, "full"),
            Tuning::Router => (&self.router, "router"),
        };
        if let Some(table) = ["lora", "full", "olora", "router"].into_iter().find(|key| self.train.contains_key(*key)) {
            return Err(StudyProblem::TableInTrain { table });
        }
        let invalid = |error| StudyProblem::Table { table, error };
        let mut values = serde_json::to_value(&self.train).map_err(invalid)?;
        overlay(&mut values, serde_json::to_value(own).map_err(invalid)?);
        if let Value::Object(values) = &mut values {
            values.entry(table).or_insert_with(|| json!({}));
        }
        let train: TrainConfig = serde_json::from_value(values).map_err(invalid)?;
        train.validate().map_err(|e| StudyProblem::Train { table, source: Box::new(e) })?;
        Ok(train)
    }

    /// Returns the name of the base model in the report.
    pub(super) fn base_name(&self) -> String {
        match self.model_name.as_str() {
            "" => {
                let name = HubSnapshot::model_name(&self.model);
                Path::new(&name).file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
            }
            name => name.to_owned(),
        }
    }

    pub(super) fn compares(&self, comparison: Comparison) -> bool {
        self.compare.contains(&comparison)
    }
}

fn one_seed() -> Vec<u64> {
    vec![42]
}

fn everything() -> Vec<Comparison> {
    Comparison::ALL.to_vec()
}

fn auto() -> String {
    "auto".to_owned()
}

fn three() -> usize {
    3
}

fn tenth() -> f64 {
    0.1
}
