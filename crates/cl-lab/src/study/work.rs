//! Execution of a stage: computes its result in its directory and scores it.
//!
//! ```text
//! stages/<id>/key              the keys, and where model and data lie
//! stages/<id>/stage.json       key, scores, seconds, bytes; written last
//! stages/<id>/run/            for a sequence, as in `cl sequence`
//! stages/<id>/adapter, model, mixture    for a merge or a mixture
//! stages/<id>/run/            for trained routers, as in `cl moe train-router`
//! stages/<id>/scores/         predictions, except for a sequence
//! ```

use std::path::{Path, PathBuf};
use std::time::Instant;

use cl_checkpoint::files::{MAX_CONFIG, read_file, write_file};
use cl_checkpoint::{HubSnapshot, Interrupt, OutputDir};
use cl_data::Dataset;
use cl_eval::{Task, TaskGroup};
use cl_merge::adapter::{CombineOptions, combine};
use cl_merge::{MergeFile, MergeOptions, Plan, merge};
use cl_report::Routing;
use cl_torch::tch::Device;
use cl_train::Ranks;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::graph::{Combination, Stage, Work};
use super::key::StageKey;
use crate::model_dir::verify;
use crate::output::{discard, to_toml};
use crate::sequence::{Scoring, cells, run_scored};
use crate::{EvalConfig, LabError, LoadedModel, Observer, Round, SequenceConfig, score_model, write_scores};

/// The record of a completed stage: `stage.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Cache key: hash of everything that the result depends on.
    pub(super) key: String,
    /// Scores after each round of a sequence; a single row for other stages.
    pub(super) rows: Vec<ScoredRow>,
    /// Duration of the last process, and of an earlier one whose models or adapters were scored again, in seconds.
    pub(super) seconds: f64,
    /// Size of the stored weights in bytes.
    pub(super) bytes: u64,
    /// For a mixture, its router statistics on the rounds' data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) routing: Option<Routing>,
}

/// Scores by column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ScoredRow {
    pub(super) scores: Vec<Option<f64>>,
    pub(super) standard_errors: Vec<Option<f64>>,
}

impl Record {
    pub(super) fn read(dir: &Path) -> Option<Record> {
        serde_json::from_slice(&read_file(&dir.join("stage.json"), MAX_CONFIG).ok()?).ok()
    }
}

/// Inputs of a stage: the results of its dependencies.
pub(super) struct Inputs {
    pub(super) dirs: Vec<PathBuf>,
    /// Names of the dependencies. Random masks are derived from them, so that results do not depend on paths.
    pub(super) names: Vec<String>,
    /// For a mixture, the round of each expert, from 0.
    pub(super) experts: Vec<usize>,
}

/// State shared by all stages.
pub(super) struct Site<'a> {
    /// The base model and the evaluation settings, as a sequence.
    pub(super) config: &'a SequenceConfig,
    pub(super) device: Device,
    /// The tasks.
    pub(super) tasks: &'a [Box<dyn Task>],
    /// The tasks of each column.
    pub(super) columns: &'a [TaskGroup],
    pub(super) rounds: &'a [Round],
    /// Training data of each round.
    pub(super) datasets: &'a [Vec<Dataset>],
    /// The study's directory.
    pub(super) out: &'a Path,
    pub(super) interrupt: &'a Interrupt,
}

impl Site<'_> {
    /// Returns the directory of a stage.
    pub(super) fn dir(&self, stage: &Stage) -> PathBuf {
        self.out.join("stages").join(&stage.id)
    }

    /// Returns the path of the result that other stages use: the adapter for LoRA, the model, or the mixture.
    pub(super) fn artifact(&self, stage: &Stage) -> Option<PathBuf> {
        let part = match &stage.work {
            Work::Rounds(config) => {
                let part = if config.train.lora.is_some() { "adapter" } else { "model" };
                format!("run/rounds/{}-{}/{part}", config.rounds.len(), config.rounds.last()?.name)
            }
            Work::Blend(_) => "mixture".to_owned(),
            Work::Mix { .. } => "model".to_owned(),
            Work::Base { .. } | Work::Adapters(_) | Work::Average | Work::Routers { .. } => return None,
        };
        Some(self.dir(stage).join(part))
    }

    /// Whether the result of a complete stage, needed by other stages, has been removed.
    pub(super) fn is_gone(&self, stage: &Stage) -> bool {
        self.artifact(stage).is_some_and(|path| !path.join("manifest.json").exists())
    }

    /// Runs a stage and writes its record.
    pub(super) fn run(
        &self,
        stage: &Stage,
        inputs: &Inputs,
        key: &StageKey,
        observer: &mut Observer<'_>,
    ) -> Result<Record, LabError> {
        let (dir, started) = (self.dir(stage), Instant::now());
        std::fs::create_dir_all(&dir).map_err(LabError::io(&dir))?;
        self.begin(stage, &dir, key)?;
        inputs.dirs.iter().try_for_each(|input| verify(input))?;
        let (base, eval) = (&self.config.model, &self.config.eval);
        let (rows, routing) = match &stage.work {
            Work::Base { add_bos_token } => {
                let mut eval = eval.clone();
                if let Some(add) = add_bos_token {
                    (eval.add_bos_token, eval.lm_eval_add_bos_token) = (Some(*add), Some(*add));
                }
                (self.score(&self.load(base, None)?, &eval, &dir, observer)?, None)
            }
            Work::Rounds(config) => {
                let scored = self.out.join("stages/base");
                // The base is scored again if its predictions are missing, for example if only records were copied.
                let base = scored.join("scores.json").exists().then_some(scored.as_path());
                // For an open question, only the end of a sequence is scored.
                let scoring = Scoring { base, last_only: stage.row.question.is_some() };
                let report =
                    run_scored(&Ranks::alone(), config, &dir.join("run"), true, scoring, self.interrupt, observer)?;
                let rows = report.matrix.scores.into_iter().zip(report.standard_errors).skip(1);
                let rows = rows.map(|(scores, standard_errors)| ScoredRow { scores, standard_errors });
                (rows.collect(), None)
            }
            Work::Adapters(combination) => {
                let adapter = dir.join("adapter");
                if !stands(&adapter)? {
                    combine(&inputs.dirs, &adapter, &combination.options(inputs, base, self.interrupt))?;
                }
                (self.score(&self.load(base, Some(&adapter))?, eval, &dir, observer)?, None)
            }
            Work::Average => {
                let model = dir.join("model");
                if !stands(&model)? {
                    self.average(&inputs.dirs, &model)?;
                }
                (self.score(&self.load(&model, None)?, eval, &dir, observer)?, None)
            }
            Work::Blend(router) => {
                let mixture = dir.join("mixture");
                if !stands(&mixture)? {
                    self.blend(router, inputs, &mixture)?;
                }
                self.score_mixture(self.load(base, Some(&mixture))?, inputs, &dir, observer)?
            }
            Work::Mix { router, num_experts_per_tok, prompts } => {
                let model = dir.join("model");
                if !stands(&model)? {
                    self.mix(router, *num_experts_per_tok, *prompts, inputs, &model)?;
                }
                self.score_mixture(self.load(&model, None)?, inputs, &dir, observer)?
            }
            Work::Routers { train, seed, limit } => {
                let loaded = self.train_routers(train, *seed, *limit, inputs, &dir.join("run"), observer)?;
                self.score_mixture(loaded, inputs, &dir, observer)?
            }
        };
        let bytes = if matches!(stage.work, Work::Base { .. }) { 0 } else { stored(&dir) };
        let seconds = seconds_before(&dir) + started.elapsed().as_secs_f64();
        let record = Record { key: key.scored.clone(), rows, seconds, bytes, routing };
        write_file(&dir.join("stage.json"), json!(record).to_string().as_bytes())?;
        Ok(record)
    }

    /// Loads a model, optionally with an adapter or a mixture.
    pub(super) fn load(&self, model: &Path, adapter: Option<&Path>) -> Result<LoadedModel, LabError> {
        let eval = &self.config.eval;
        LoadedModel::open(model, adapter, eval.precision, eval.quantize, self.device)
    }

    /// Scores a mixture and collects its router statistics.
    fn score_mixture(
        &self,
        mut loaded: LoadedModel,
        inputs: &Inputs,
        dir: &Path,
        observer: &mut Observer<'_>,
    ) -> Result<(Vec<ScoredRow>, Option<Routing>), LabError> {
        let rows = self.score(&loaded, &self.config.eval, dir, observer)?;
        Ok((rows, Some(self.routing(&mut loaded, inputs)?)))
    }

    /// Scores a model on all of the study's tasks.
    fn score(
        &self,
        loaded: &LoadedModel,
        eval: &EvalConfig,
        dir: &Path,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<ScoredRow>, LabError> {
        let scores = score_model(loaded, self.tasks, eval, &dir.join("scores"), self.interrupt, observer)?;
        write_scores(&dir.join("scores.json"), &scores)?;
        let (scores, standard_errors) = cells(self.columns, &scores)?;
        Ok(vec![ScoredRow { scores, standard_errors }])
    }

    /// Keeps what an earlier process left in the directory for the same keys and the same paths of model and data. If only
    /// the scoring has changed, removes the scores; otherwise everything.
    fn begin(&self, stage: &Stage, dir: &Path, key: &StageKey) -> Result<(), LabError> {
        let note = dir.join("key");
        let (model, data) = (HubSnapshot::source_name(&self.config.model), self.config.data.display());
        let made = format!("{}\n{model}\n{data}\n", key.made);
        let all = format!("{made}{}\n", key.scored);
        let saved = std::fs::read_to_string(&note).unwrap_or_default();
        if !saved.starts_with(&made) {
            std::fs::remove_dir_all(dir).map_err(LabError::io(dir))?;
            std::fs::create_dir_all(dir).map_err(LabError::io(dir))?;
        } else if saved != all {
            if let Some(record) = Record::read(dir).filter(|_| !self.is_gone(stage)) {
                write_file(&dir.join(SECONDS), record.seconds.to_string().as_bytes())?;
            }
            remove_scores(dir)?;
            if matches!(stage.work, Work::Routers { .. }) {
                // The settings of this run contain the path of the study, so it might not be continued. It is short.
                let run = dir.join("run");
                remove_if_there(&run, std::fs::remove_dir_all(&run))?;
            }
        }
        // A sequence is continued with the new settings.
        let settings = dir.join("run/config.toml");
        match &stage.work {
            Work::Rounds(config) if settings.exists() => {
                write_file(&settings, to_toml(&settings, config)?.as_bytes())?;
            }
            _ => {}
        }
        Ok(write_file(&note, all.as_bytes())?)
    }

    fn average(&self, models: &[PathBuf], out: &Path) -> Result<(), LabError> {
        let recipe = to_toml(out, &average_recipe(models))?;
        let file =
            MergeFile::from_toml(&recipe).map_err(|source| cl_merge::Error::Config { path: out.to_owned(), source })?;
        let plan = Plan::new(&file.stages[0])?;
        let options = MergeOptions { threads: 1, interrupt: self.interrupt.clone(), ..MergeOptions::default() };
        merge(&plan, out, &options, &|_bytes| ())?;
        Ok(())
    }

    /// Removes the models of a stage that no other stage needs anymore; adapters are small and are kept.
    pub(super) fn drop_models(&self, stage: &Stage) -> Result<(), LabError> {
        let dir = self.dir(stage);
        for model in weights_in(&dir, "model") {
            discard(&model)?;
        }
        Ok(())
    }
}

/// File with the duration of what an earlier process made for this stage, if only its scores are computed again.
const SECONDS: &str = "seconds";

fn seconds_before(dir: &Path) -> f64 {
    std::fs::read_to_string(dir.join(SECONDS)).ok().and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

/// Removes the record and all scores of a stage.
fn remove_scores(dir: &Path) -> Result<(), LabError> {
    let run = dir.join("run");
    for path in [dir.join("stage.json"), run.join("matrix.json"), run.join("tables.md")] {
        remove_if_there(&path, std::fs::remove_file(&path))?;
    }
    let rounds = std::fs::read_dir(run.join("rounds")).into_iter().flatten().flatten().map(|entry| entry.path());
    for scored in rounds.chain([dir.to_owned()]) {
        let (file, folder) = (scored.join("scores.json"), scored.join("scores"));
        remove_if_there(&file, std::fs::remove_file(&file))?;
        remove_if_there(&folder, std::fs::remove_dir_all(&folder))?;
    }
    Ok(())
}

fn remove_if_there(path: &Path, removed: std::io::Result<()>) -> Result<(), LabError> {
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(LabError::io(path)(error)),
        _ => Ok(()),
    }
}

impl Combination {
    fn options(&self, inputs: &Inputs, base: &Path, interrupt: &Interrupt) -> CombineOptions {
        let mut options = CombineOptions {
            method: self.method.to_owned(),
            weights: vec![self.weight; inputs.dirs.len()],
            names: inputs.names.clone(),
            profile: self.profile,
            density: self.density.into_iter().collect(),
            space: self.space,
            seed: self.seed,
            base: Some(base.to_owned()),
            threads: 1,
            interrupt: interrupt.clone(),
            ..CombineOptions::default()
        };
        options.parameters.rescale = self.rescale;
        options
    }
}

fn average_recipe(models: &[PathBuf]) -> serde_json::Value {
    let entry = |model: &PathBuf| json!({"model": model, "weight": 1.0});
    json!({"method": {"linear": {}}, "models": models.iter().map(entry).collect::<Vec<_>>()})
}

/// Whether a directory was completed by an earlier process; removes leftovers of incomplete writes.
pub(super) fn stands(dir: &Path) -> Result<bool, LabError> {
    OutputDir::clean_up(dir)?;
    if dir.join("manifest.json").exists() {
        verify(dir)?;
        return Ok(true);
    }
    Ok(false)
}

/// Returns the size in bytes of the weights in a stage's directory: those of adapters and mixtures, or else of models.
fn stored(dir: &Path) -> u64 {
    let size = |kind: &str| -> u64 {
        let files = weights_in(dir, kind).into_iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
        let weights = files.filter(|file| file.path().extension().is_some_and(|e| e == "safetensors"));
        weights.filter_map(|file| file.metadata().ok()).map(|m| m.len()).sum()
    };
    [size("adapter") + size("mixture"), size("model")].into_iter().find(|bytes| *bytes > 0).unwrap_or(0)
}

/// Returns the directories with this name in a stage's directory, its run and its rounds.
fn weights_in(dir: &Path, name: &str) -> Vec<PathBuf> {
    let rounds = std::fs::read_dir(dir.join("run/rounds")).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut rounds: Vec<PathBuf> = rounds.collect();
    rounds.sort();
    rounds
        .into_iter()
        .chain([dir.to_owned(), dir.join("run")])
        .map(|parent| parent.join(name))
        .filter(|dir| dir.is_dir())
        .collect()
}

/// Returns a hash of the requests and targets of a study's tasks.
pub(super) fn tasks_hash(tasks: &[Box<dyn Task>]) -> String {
    let mut hasher = blake3::Hasher::new();
    for task in tasks {
        hasher.update(json!([task.name(), task.metric(), task.len()]).to_string().as_bytes());
        for document in 0..task.len() {
            let asked = json!([task.request(document), task.target(document)]);
            hasher.update(asked.to_string().as_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}
