use std::fs::File;
use std::path::{Path, PathBuf};

use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_data::{Dataset, Split, load_split};
use cl_eval::{
    Column, Group, ScoreMatrix, Scores, Task, TaskGroup, TaskOptions, TaskSet, TaskSpec, aggregate_group, load_tasks,
    rescore,
};
use cl_torch::tch::Device;

use crate::check::{Checked, require_sequence};
use crate::model_dir::{ModelRef, verify};
use crate::output::{Claim, discard};
use crate::report::{method_name, row_name, tables_of};
use crate::round::{clean_up, is_stack, stop_if_asked};
use crate::scoring::file_names;
use crate::sources::{base_source, data_sources, inputs};
use crate::{
    Event, LabError, LoadedModel, Observer, RoundInput, RoundOutput, SequenceConfig, run_round, score_model,
    write_scores,
};

/// What a sequence came to.
#[derive(Clone, Debug)]
pub struct SequenceReport {
    /// Scores before the first round and after every one.
    pub matrix: ScoreMatrix,
    /// The last round's model.
    pub model: PathBuf,
}

/// Runs the rounds of a sequence into `out`:
///
/// ```text
/// config.toml                    the resolved configuration
/// base.blake3, data.blake3       hashes of the model it starts from and of the files it trains on
/// rounds/0-base/scores/          predictions and scores before the first round
/// rounds/1-<task>/               log.jsonl, rows.json, adapter/, model/, scores/ of each round
/// matrix.json, tables.md         after every round
/// ```
///
/// With `resume` an unfinished sequence goes on where it was: stages that stand are kept.
///
/// # Errors
/// What [`check_sequence`](crate::check_sequence) finds, before anything is written; [`LabError::Output`] when `out` holds
/// something already and `resume` is false, or another configuration; anything a round or a scoring raises.
pub fn run_sequence(
    config: &SequenceConfig,
    out: &Path,
    resume: bool,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<SequenceReport, LabError> {
    let Checked { device, datasets, tasks, columns: scored } = require_sequence(config)?;
    let base = ModelRef::take(&config.model)?;
    let _lock = claim(config, &base, &datasets, out, resume)?;

    // Rounds before the last one that stands are in the matrix already, which does not shrink while they are gone through.
    let latest = latest_model(config, out);
    let mut matrix = ScoreMatrix::new(columns(config, &scored));
    let base_dir = out.join("rounds/0-base");
    observer(Event::Stage("round 0: scoring the base model"));
    let scores = score_round(&config.model, &tasks, config, &base_dir, device, observer)?;
    matrix.push("base", main(&scored, &scores)?)?;
    if latest == 0 {
        report(config, &matrix, out)?;
    }

    let mut model = base.clone();
    let mut last = config.model.clone();
    let mut adapters: Vec<PathBuf> = Vec::new();
    let olora = config.train.olora.as_ref();
    let mut earlier: Vec<PathBuf> = olora.map_or_else(Vec::new, |o| o.earlier.clone());
    let before = earlier.len();
    let stack = is_stack(&config.train);
    for (index, task) in config.tasks.iter().enumerate() {
        let round = index + 1;
        let dir = round_dir(out, round, task);
        observer(Event::Stage(&format!("round {round} of {}: {task}", config.tasks.len())));
        // The method composes all adapters with the first base at once; the paper folds one into the last round's model.
        // What scales or replaces the weights that it was trained beside can only be folded one after another.
        let at_once = config.profile == cl_data::Profile::Method || stack;
        let composed = if stack { earlier.as_slice() } else { adapters.as_slice() };
        let additive = config.train.lora.as_ref().is_some_and(|lora| lora.beyond_factors().is_none());
        let compose = (at_once && additive).then_some((&base, composed));
        let input = RoundInput {
            model: if stack { &base } else { &model },
            interrupt,
            datasets: if config.replay.is_some() { &datasets[..round] } else { &datasets[index..round] },
            mixture: config.mixture(),
            config: &config.train,
            // Rounds before this run count: with the same seed the first one here would start where theirs did.
            seed: config.seed.wrapping_add((round + before) as u64),
            profile: config.profile,
            device,
            compose,
            earlier: if olora.is_some() { &earlier } else { &[] },
        };
        let output = match past(config, &dir, &tasks).filter(|_| round < latest) {
            Some(output) => {
                clean_up(&dir)?;
                if let Some(adapter) = &output.adapter {
                    verify(adapter)?;
                }
                observer(Event::Skipped("training"));
                output
            }
            None => run_round(&input, &dir, observer)?,
        };
        stop_if_asked(interrupt)?;
        let scores = score_round(&output.model, &tasks, config, &dir, device, observer)?;
        stop_if_asked(interrupt)?;
        matrix.push(&row_name(method_name(config), round), main(&scored, &scores)?)?;
        if round >= latest {
            report(config, &matrix, out)?;
        }
        earlier.extend(output.adapter.clone());
        adapters.extend(output.adapter);
        if !config.keep_models && round > 1 {
            // That of the round before; never the base.
            discard(&last)?;
        }
        // The model of a round that is over may be gone; nothing starts from it then.
        model = if output.model.join("manifest.json").exists() { ModelRef::take(&output.model)? } else { model };
        last = output.model;
    }
    Ok(SequenceReport { matrix, model: last })
}

/// The tasks that are scored: new knowledge first, then old.
pub(crate) fn load_each_task(config: &SequenceConfig) -> impl Iterator<Item = Result<TaskSet, LabError>> {
    let options = TaskOptions {
        limit: config.limit.test,
        max_new_tokens: config.eval.max_new_tokens,
        metric: config.eval.metric,
        profile: config.profile,
        lm_eval: config.eval.lm_eval.as_deref(),
        ..TaskOptions::default()
    };
    let new = config.eval.tasks.as_ref().unwrap_or(&config.tasks);
    new.iter().chain(&config.eval.old).map(move |name| Ok(load_tasks(name, &config.data, options)?))
}

/// Training rows of every round.
pub(crate) fn load_each_training(config: &SequenceConfig) -> impl Iterator<Item = Result<Dataset, LabError>> {
    config.tasks.iter().map(|task| {
        let mut data = load_split(&task_dir(&config.data, task), Split::Train)?;
        data.examples.truncate(config.limit.train.unwrap_or(usize::MAX));
        Ok(data)
    })
}

/// Test rows of every round's task, as far as they have the form of training rows.
pub(crate) fn load_each_test(config: &SequenceConfig) -> impl Iterator<Item = Result<Dataset, LabError>> {
    config.tasks.iter().map(|task| Ok(load_split(&task_dir(&config.data, task), Split::Test)?))
}

/// A task's directory by its name, or that of a known task by any of its names, where `cl-eval` looks for them, too.
fn task_dir(data: &Path, task: &str) -> PathBuf {
    let direct = data.join(task);
    let names = TaskSpec::find(task).into_iter().flat_map(|t| std::iter::once(&t.name).chain(t.aliases));
    let homes = [data.to_owned(), data.join(".."), data.join("../lm-eval")];
    let known = names.flat_map(|name| homes.iter().map(move |home| home.join(name)));
    std::iter::once(direct.clone()).chain(known).find(|d| d.is_dir()).unwrap_or(direct)
}

fn columns(config: &SequenceConfig, scored: &[TaskGroup]) -> Vec<Column> {
    let new = config.eval.tasks.as_ref().unwrap_or(&config.tasks).len();
    let round_of = |name: &str| config.tasks.iter().position(|t| canonical(t) == name).map(|index| index + 1);
    let column = |(i, name): (usize, &str)| {
        let group = if i < new { Group::New } else { Group::Old };
        let round = match name {
            // GSM8K's chain-of-thought form is taught by the same round as its plain one.
            "gsm8k_cot" => round_of("gsm8k_cot").or(round_of("gsm8k")),
            name => round_of(canonical(name)),
        };
        Column::new(name, group, round.filter(|_| group == Group::New))
    };
    scored.iter().map(|t| t.name.as_str()).enumerate().map(column).collect()
}

fn canonical(name: &str) -> &str {
    TaskSpec::find(name).map_or(name, |t| t.name)
}

fn round_dir(out: &Path, round: usize, task: &str) -> PathBuf {
    out.join(format!("rounds/{round}-{task}"))
}

/// The last round whose model stands; 0 is the base.
fn latest_model(config: &SequenceConfig, out: &Path) -> usize {
    let stands = |round: &usize| {
        let dir = round_dir(out, *round, &config.tasks[round - 1]);
        dir.join("model/manifest.json").exists()
    };
    (1..=config.tasks.len()).rev().find(stands).unwrap_or(0)
}

/// What a round left that is done with: its model may be gone by now.
fn past(config: &SequenceConfig, dir: &Path, tasks: &[Box<dyn Task>]) -> Option<RoundOutput> {
    let adapter = config.train.lora.is_some().then(|| dir.join("adapter"));
    let trained = adapter.as_ref().is_none_or(|a| a.join("manifest.json").exists());
    (trained && standing_scores(dir, tasks).is_some()).then(|| RoundOutput {
        adapter,
        model: dir.join("model"),
        report: None,
    })
}

fn claim(
    config: &SequenceConfig,
    base: &ModelRef,
    datasets: &[Dataset],
    out: &Path,
    resume: bool,
) -> Result<File, LabError> {
    let settings = toml::to_string(config)
        .map_err(|e| LabError::Config { path: out.join("config.toml"), message: e.to_string() })?;
    let sources = [base_source(base), data_sources(datasets, &config.train)?];
    let tasks: Vec<PathBuf> = config.tasks.iter().map(|task| config.data.join(task)).collect();
    let inputs = inputs(&config.model, &config.train, tasks.iter().map(PathBuf::as_path));
    let marker = "config.toml";
    Claim { out, what: "sequence", marker, settings: &settings, sources: &sources, inputs: &inputs, resume }.take()
}

/// Scores a model on every task, or reads the scores that stand.
fn score_round(
    model: &Path,
    tasks: &[Box<dyn Task>],
    config: &SequenceConfig,
    dir: &Path,
    device: Device,
    observer: &mut Observer<'_>,
) -> Result<Vec<Scores>, LabError> {
    if let Some(scores) = standing_scores(dir, tasks) {
        observer(Event::Skipped("scoring"));
        return Ok(scores);
    }
    let loaded = LoadedModel::open(model, None, config.eval.precision, device)?;
    let scores = score_model(&loaded, tasks, &config.eval, &dir.join("scores"), observer)?;
    write_scores(&dir.join("scores.json"), &scores)?;
    Ok(scores)
}

/// The scores of a round that stand, if they still follow from its predictions and the tasks' documents.
fn standing_scores(dir: &Path, tasks: &[Box<dyn Task>]) -> Option<Vec<Scores>> {
    let text = std::fs::read(dir.join("scores.json")).ok()?;
    let saved: Vec<Scores> = serde_json::from_slice(&text).ok()?;
    let names = file_names(tasks).ok()?;
    let again = tasks.iter().zip(names).map(|(t, name)| rescore(t.as_ref(), &dir.join("scores").join(name)));
    let again = again.collect::<Result<Vec<Scores>, _>>().ok()?;
    (saved == again).then_some(saved)
}

/// The score of each column: a task's own, or that of a group's documents together.
fn main(columns: &[TaskGroup], scores: &[Scores]) -> Result<Vec<Option<f64>>, LabError> {
    let score = |column: &TaskGroup| match column.members.as_slice() {
        [only] => Ok(scores.iter().find(|s| s.task == *only).map(Scores::main)),
        _ => Ok(Some(aggregate_group(column, scores)?.main())),
    };
    columns.iter().map(score).collect()
}

fn report(config: &SequenceConfig, matrix: &ScoreMatrix, out: &Path) -> Result<(), LabError> {
    let path = out.join("matrix.json");
    let mut json =
        serde_json::to_vec_pretty(matrix).map_err(|e| LabError::Io { path: path.clone(), source: e.into() })?;
    json.push(b'\n');
    write_file(&path, &json)?;
    let tables = tables_of(matrix, method_name(config), config.profile);
    let markdown: Vec<String> = tables.iter().map(cl_eval::Table::markdown).collect();
    Ok(write_file(&out.join("tables.md"), markdown.join("\n").as_bytes())?)
}
