use std::path::{Path, PathBuf};

use cl_adapters::Overlap;
use cl_checkpoint::HubSnapshot;
use cl_checkpoint::files::shorten;
use cl_data::Profile;
use cl_train::TrainConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::rounds::overlay;
use crate::{EvalConfig, Limits, RoundConfig, ValidationConfig};

/// A study: one model, several rounds, and the ways of learning them that are compared. The file of `cl study`. Paths are taken
/// from the current directory.
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
    /// One or two sentences for the report.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Model directory that everything starts from.
    #[serde(serialize_with = "HubSnapshot::serialize")]
    pub model: PathBuf,
    /// What the report calls the model; defaults to the last part of its path.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model_name: String,
    /// Directory of tasks, each with a train and a test split, as TRACE is laid out.
    pub data: PathBuf,
    /// Tasks in the order they are learned, one a round: the short form of `[[rounds]]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// Random seeds; every comparison of the paper is made with each.
    #[serde(default = "one_seed")]
    pub seeds: Vec<u64>,
    /// What is compared; everything when absent.
    #[serde(default = "everything")]
    pub compare: Vec<Comparison>,
    /// Which definitions apply.
    #[serde(default, deserialize_with = "Profile::of_training")]
    pub profile: Profile,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default = "auto")]
    pub device: String,
    /// Threads of each stage; defaults to the number of cores divided by the number of stages that run at once. Sums may differ
    /// in their last bits with another number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u16>,
    /// Share of rows replayed from each earlier round.
    #[serde(default = "tenth")]
    pub replay: f64,
    /// Numbers of models that are merged, the first so many rounds' each; defaults to 2 up to all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members: Option<Vec<usize>>,
    /// Rounds whose fully tuned models become a mixture of experts beside that of all; none when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<String>,
    /// Further orders of the rounds, among the open questions: the first reversed, the others drawn by their number. LoRA and
    /// full fine-tuning are repeated in each with the first seed.
    #[serde(default = "three")]
    pub orders: usize,
    /// o-LoRA's term and the strengths λ that are compared.
    #[serde(default)]
    pub olora: OloraComparison,
    /// How much of the data.
    #[serde(default)]
    pub limit: Limits,
    /// `[train]` of all trainings, as in a sequence, without `lora` and `full`.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub train: toml::Table,
    /// What differs from it with LoRA; its `lora` are LoRA's own settings.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub lora: toml::Table,
    /// What differs from it in full fine-tuning.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub full: toml::Table,
    /// What differs from `[train]` where the routers of a mixture are trained, on all tasks at once; its `router` are the
    /// auxiliary losses.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub router: toml::Table,
    /// What differs from either where all tasks are learned at once.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub joint: toml::Table,
    /// Held-out rows on which the loss is measured while training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ValidationConfig>,
    /// What is scored, and how.
    #[serde(default)]
    pub eval: EvalConfig,
    /// Rounds that are more than a task each, as in a sequence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<RoundConfig>,
    /// What the report should know about scored tasks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<ColumnConfig>,
}

/// What a study can compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Comparison {
    /// Each round alone on the base model, with LoRA and with all weights. Merges and mixtures are made of these.
    OneRound,
    /// The rounds one after another, with LoRA and with all weights.
    Sequence,
    /// The rounds with LoRA, each kept orthogonal to the ones before.
    Olora,
    /// The rounds with rows of earlier ones beside.
    Replay,
    /// All rounds' data at once, upsampled to equal shares and as it is.
    Joint,
    /// One-round models merged: averages of fully tuned models, averages, TIES and DARE-TIES of adapters.
    Merge,
    /// One-round models as mixtures of experts, with routers that are untrained, prototypes of each expert, or trained.
    Mixture,
    /// What the paper leaves open, with the first seed: DARE's rescaling, definitions of o-LoRA's term, pure bf16 weights, a
    /// fixed replay buffer, orders of the rounds, BOS.
    Questions,
}

impl Comparison {
    /// Everything: first what the paper compares, then its open questions.
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

    /// What the paper compares.
    pub fn of_paper() -> &'static [Comparison] {
        &Self::ALL[..7]
    }
}

/// Strengths of o-LoRA's term.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OloraComparison {
    /// The term's definition.
    pub mode: Overlap,
    /// Strengths, a sequence each.
    pub lambda: Vec<f64>,
}

impl Default for OloraComparison {
    /// The paper's two strengths of the published term.
    fn default() -> Self {
        OloraComparison { mode: Overlap::L1, lambda: vec![0.5, 5.0] }
    }
}

/// What the report should know about a scored task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ColumnConfig {
    /// Name of the task.
    pub name: String,
    /// Score of guessing, in `[0, 1]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chance: Option<f64>,
    /// The column of the paper's tables that it stands for, such as `cstan`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paper: Option<String>,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tuning {
    Lora,
    Full,
    /// The routers of a mixture and nothing else.
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
    /// The rounds, those of `tasks` written out.
    pub(super) fn all_rounds(&self) -> Vec<RoundConfig> {
        if self.rounds.is_empty() {
            self.tasks.iter().map(|task| RoundConfig::of_task(task)).collect()
        } else {
            self.rounds.clone()
        }
    }

    /// `[train]` for LoRA or full fine-tuning.
    ///
    /// # Errors
    /// Returns a text that names the key, what is wrong and what is expected.
    pub(super) fn train_config(&self, tuning: Tuning) -> Result<TrainConfig, String> {
        let (own, key) = match tuning {
            Tuning::Lora => (&self.lora, "lora"),
            Tuning::Full => (&self.full, "full"),
            Tuning::Router => (&self.router, "router"),
        };
        for other in ["lora", "full", "olora", "router"] {
            if self.train.contains_key(other) {
                return Err(format!(
                    "train.{other}: a study compares LoRA and full fine-tuning; write it as [{other}]"
                ));
            }
        }
        let plain = |e: serde_json::Error| format!("[{key}]: {}", shorten(&e.to_string()));
        let mut values = serde_json::to_value(&self.train).map_err(plain)?;
        overlay(&mut values, serde_json::to_value(own).map_err(plain)?);
        if let Value::Object(values) = &mut values {
            values.entry(key).or_insert_with(|| json!({}));
        }
        let train: TrainConfig = serde_json::from_value(values).map_err(plain)?;
        train.validate().map_err(|e| format!("[{key}]: {e}"))?;
        Ok(train)
    }

    /// What the report calls the base model.
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
