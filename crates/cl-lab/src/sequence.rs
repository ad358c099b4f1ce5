use std::fs::File;
use std::path::{Path, PathBuf};

use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_data::{Dataset, Profile};
use cl_eval::{ScoreMatrix, Scores, Task, TaskGroup, aggregate_group, rescore};
use cl_torch::tch::Device;
use cl_train::Ranks;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::check::{Checked, require_sequence};
use crate::columns::columns;
use crate::model_dir::{ModelRef, verify};
use crate::observe::tell;
use crate::output::{RunDir, discard, to_toml};
use crate::report::{method_name, row_name, tables_of};
use crate::round::{clean_up, stop_together};
use crate::rounds::is_stack;
use crate::scoring::file_names;
use crate::sources::{base_source, data_sources, inputs};
use crate::{
    Event, LabError, LoadedModel, Observer, Round, RoundInput, RoundOutput, RoundValidation, SequenceConfig, run_round,
    score_model_on, write_scores,
};

/// Results of a sequence.
#[derive(Clone, Debug)]
pub struct SequenceReport {
    /// Scores before the first round and after each round.
    pub matrix: ScoreMatrix,
    /// Standard errors of the scores in the matrix, over the documents of each task; `None` for groups of tasks.
    pub standard_errors: Vec<Vec<Option<f64>>>,
    /// Directory of the last round's model.
    pub model: PathBuf,
}

/// Runs the rounds of a sequence. Writes to `out`:
///
/// ```text
/// config.toml                    the resolved configuration
/// base.blake3, data.blake3       hashes of the model it starts from and of the files it trains on
/// rounds/0-base/scores/          predictions and scores before the first round
/// rounds/1-<task>/               log.jsonl, rows.json, adapter/, model/, scores/ of each round
/// matrix.json, tables.md         after every round
/// ```
///
/// With `resume`, an unfinished sequence is continued; completed stages are kept.
///
/// # Errors
/// Returns the problems that [`check_sequence`](crate::check_sequence) finds, before anything is written;
/// [`LabError::Output`] if `out` is not empty and `resume` is false, or belongs to another run; and an error if a round
/// or its evaluation fails.
pub fn run_sequence(
    config: &SequenceConfig,
    out: &Path,
    resume: bool,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<SequenceReport, LabError> {
    run_sequence_on(&Ranks::alone(), config, out, resume, interrupt, observer)
}

/// Like [`run_sequence`], on several ranks. Each rank calls this with the same arguments. All ranks read the model and
/// the data, and the results of earlier rounds from `out`, which must be on a shared file system. Rank 0 writes, and
/// returns the scores.
///
/// # Errors
/// Like [`run_sequence`], and if a rank has exited or has different inputs than rank 0.
pub fn run_sequence_on(
    ranks: &Ranks,
    config: &SequenceConfig,
    out: &Path,
    resume: bool,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<SequenceReport, LabError> {
    run_scored(ranks, config, out, resume, Scoring::default(), interrupt, observer)
}

/// Which parts of a sequence are scored.
#[derive(Clone, Copy, Default)]
pub(crate) struct Scoring<'a> {
    /// A directory that may contain scores of the base model on the same tasks, to be reused.
    pub(crate) base: Option<&'a Path>,
    /// Score only after the last round; the matrix then has no scores for the other rounds.
    pub(crate) last_only: bool,
}

/// Like [`run_sequence_on`], computing only a part of the scores.
pub(crate) fn run_scored(
    ranks: &Ranks,
    config: &SequenceConfig,
    out: &Path,
    resume: bool,
    scoring: Scoring<'_>,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<SequenceReport, LabError> {
    let Checked { device, rounds, datasets, validation, tasks, columns: scored } = require_sequence(config)?;
    let base = ModelRef::take(&config.model)?;
    let first = ranks.is_first();
    let _lock = first.then(|| open_run_dir(config, &rounds, &base, &datasets, &validation, out, resume)).transpose()?;

    // The saved matrix already contains the completed rounds; it is not rewritten until the last of them is reached.
    let latest = as_first(ranks, || latest_model(&rounds, out))?;
    let method = method_name(config);
    let mut matrix = ScoreMatrix::new(columns(config, &rounds, &scored));
    let mut standard_errors = Vec::new();
    let base_dir = out.join("rounds/0-base");
    if let Some(scored) = scoring.base.filter(|_| first && !base_dir.join("scores.json").exists()) {
        copy_scores(scored, &base_dir)?;
    }
    tell(observer, Event::Stage("round 0: scoring the base model"));
    let score = |model: &Path, dir: &Path, observer: &mut Observer<'_>| -> Result<Cells, LabError> {
        match score_round(ranks, model, &tasks, config, dir, device, interrupt, observer)? {
            Some(scores) => cells(&scored, &scores),
            None => Ok(no_cells(&scored)),
        }
    };
    let (main, errors) = score(&config.model, &base_dir, observer)?;
    matrix.push("base", main)?;
    standard_errors.push(errors);
    if latest == 0 && first {
        report(config, &matrix, out)?;
    }

    let mut model = base.clone();
    let mut last = config.model.clone();
    let mut adapters: Vec<PathBuf> = Vec::new();
    let olora = config.train.olora.as_ref();
    let mut earlier: Vec<PathBuf> = olora.map_or_else(Vec::new, |o| o.earlier.clone());
    let before = earlier.len();
    let stack = is_stack(&config.train);
    for (index, Round { name, mixture, train, validation: settings, .. }) in rounds.iter().enumerate() {
        let round = index + 1;
        let dir = round_dir(out, round, name);
        let _span = tracing::info_span!("round", number = round, name = name.as_str()).entered();
        tell(observer, Event::Stage(&format!("round {round} of {}: {name}", rounds.len())));
        // The profile `method` merges all adapters into the base at once; `paper` merges one into the previous round's
        // model. Adapters that scale or replace weights can only be merged one after another.
        let at_once = config.profile == Profile::Method || stack;
        let composed = if stack { earlier.as_slice() } else { adapters.as_slice() };
        let additive = train.lora.as_ref().is_some_and(|lora| lora.beyond_factors().is_none());
        let compose = (at_once && additive).then_some((&base, composed));
        let input = RoundInput {
            model: if stack { &base } else { &model },
            interrupt,
            finish: false,
            ranks,
            data: &datasets[index],
            earlier_data: if config.replay.is_some() { &datasets[..index] } else { &[] },
            mixture,
            config: train,
            validation: settings.as_ref().map(|config| RoundValidation { config, data: &validation[index] }),
            // Rounds of earlier runs count: otherwise the first round would have the same initialization as their
            // first.
            seed: config.seed.wrapping_add((round + before) as u64),
            buffer_seed: config.seed,
            profile: config.profile,
            device,
            compose,
            earlier: if olora.is_some() { &earlier } else { &[] },
        };
        let scores_it = !scoring.last_only || round == rounds.len();
        let past = as_first(ranks, || round < latest && is_past(config, &dir, scores_it.then_some(&tasks)))?;
        let output = match past.then(|| outputs(config, &dir)) {
            Some(output) => {
                if first {
                    clean_up(&dir)?;
                }
                if let Some(adapter) = &output.adapter {
                    verify(adapter)?;
                }
                tell(observer, Event::Skipped("training"));
                output
            }
            None => run_round(&input, &dir, observer)?,
        };
        // This also waits until rank 0 has written the round's model.
        stop_together(ranks, interrupt)?;
        let (main, errors) = if scores_it { score(&output.model, &dir, observer)? } else { no_cells(&scored) };
        stop_together(ranks, interrupt)?;
        matrix.push(&row_name(&method, round), main)?;
        standard_errors.push(errors);
        if round >= latest && first {
            report(config, &matrix, out)?;
        }
        earlier.extend(output.adapter.clone());
        adapters.extend(output.adapter);
        if !config.keep_models && round > 1 && first {
            // Remove the previous round's model, but never the base.
            discard(&last)?;
        }
        // The model of a completed round may have been removed; it is not needed in that case.
        let stands = as_first(ranks, || output.model.join("manifest.json").exists())?;
        model = if stands { ModelRef::take(&output.model)? } else { model };
        last = output.model;
    }
    Ok(SequenceReport { matrix, standard_errors, model: last })
}

fn round_dir(out: &Path, round: usize, name: &str) -> PathBuf {
    out.join(format!("rounds/{round}-{name}"))
}

/// Returns the last round whose model is complete, or 0 for the base.
fn latest_model(rounds: &[Round], out: &Path) -> usize {
    let stands = |round: &usize| {
        let dir = round_dir(out, *round, &rounds[round - 1].name);
        dir.join("model/manifest.json").exists()
    };
    (1..=rounds.len()).rev().find(stands).unwrap_or(0)
}

/// Whether a round is complete and, if tasks are given, scored on them. Its model may have been removed.
fn is_past(config: &SequenceConfig, dir: &Path, tasks: Option<&Vec<Box<dyn Task>>>) -> bool {
    let trained = outputs(config, dir).adapter.is_none_or(|a| a.join("manifest.json").exists());
    trained && tasks.is_none_or(|tasks| standing_scores(dir, tasks).is_some())
}

/// Returns the output paths of a completed round.
fn outputs(config: &SequenceConfig, dir: &Path) -> RoundOutput {
    let adapter = config.train.lora.is_some().then(|| dir.join("adapter"));
    RoundOutput { adapter, model: dir.join("model"), report: None }
}

/// Computes a value on rank 0 and sends it to all ranks, since a shared file system may show new files late to others.
fn as_first<T: Serialize + DeserializeOwned>(ranks: &Ranks, find: impl FnOnce() -> T) -> Result<T, LabError> {
    let found = if ranks.is_first() { json!(find()).to_string() } else { String::new() };
    serde_json::from_str(&ranks.text_from_first(&found)?).map_err(|_| LabError::RankVersions)
}

fn open_run_dir(
    config: &SequenceConfig,
    rounds: &[Round],
    base: &ModelRef,
    datasets: &[Vec<Dataset>],
    validation: &[Vec<Dataset>],
    out: &Path,
    resume: bool,
) -> Result<File, LabError> {
    let settings = to_toml(&out.join("config.toml"), config)?;
    let from_file = |round: &Round| round.validation.as_ref().is_some_and(|v| v.data.is_some());
    let of_files = rounds.iter().zip(validation).filter(|(round, _)| from_file(round)).flat_map(|(_, sets)| sets);
    let sources = [base_source(base), data_sources(datasets.iter().flatten().chain(of_files), &config.train)?];
    let held_out = rounds.iter().filter_map(|round| round.validation.as_ref()?.data.as_ref());
    let data = rounds.iter().flat_map(|round| &round.data).chain(held_out);
    let inputs = inputs(&config.model, &config.train, data.map(PathBuf::as_path));
    let marker = "config.toml";
    RunDir { out, what: "sequence", marker, settings: &settings, sources: &sources, inputs: &inputs, resume }.open()
}

/// Scores a model on all tasks, or reads the saved scores. Only rank 0 returns scores.
#[expect(clippy::too_many_arguments, reason = "the sequence's own, once")]
fn score_round(
    ranks: &Ranks,
    model: &Path,
    tasks: &[Box<dyn Task>],
    config: &SequenceConfig,
    dir: &Path,
    device: Device,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<Option<Vec<Scores>>, LabError> {
    let saved = if ranks.is_first() { standing_scores(dir, tasks) } else { None };
    if ranks.any(saved.is_some())? {
        tell(observer, Event::Skipped("scoring"));
        return Ok(saved);
    }
    let loaded = LoadedModel::open(model, None, config.eval.precision, config.eval.quantize, device)?;
    let scores = score_model_on(ranks, &loaded, tasks, &config.eval, &dir.join("scores"), interrupt, observer)?;
    if !ranks.is_first() {
        return Ok(None);
    }
    write_scores(&dir.join("scores.json"), &scores)?;
    Ok(Some(scores))
}

/// Returns the saved scores of a round if they still match its predictions and the tasks' documents.
fn standing_scores(dir: &Path, tasks: &[Box<dyn Task>]) -> Option<Vec<Scores>> {
    let text = std::fs::read(dir.join("scores.json")).ok()?;
    let saved: Vec<Scores> = serde_json::from_slice(&text).ok()?;
    let names = file_names(tasks).ok()?;
    let again = tasks.iter().zip(names).map(|(t, name)| rescore(t.as_ref(), &dir.join("scores").join(name)));
    let again = again.collect::<Result<Vec<Scores>, _>>().ok()?;
    (saved == again).then_some(saved)
}

/// Scores by column, and their standard errors.
type Cells = (Vec<Option<f64>>, Vec<Option<f64>>);

/// Returns cells without scores.
fn no_cells(columns: &[TaskGroup]) -> Cells {
    (vec![None; columns.len()], vec![None; columns.len()])
}

/// Returns the score of each column, of a single task or over all documents of a group, and the standard error for
/// single tasks.
pub(crate) fn cells(columns: &[TaskGroup], scores: &[Scores]) -> Result<Cells, LabError> {
    let cell = |column: &TaskGroup| match column.members.as_slice() {
        [only] => {
            let own = scores.iter().find(|s| s.task == *only);
            Ok((own.map(Scores::main), own.and_then(|s| s.stderr.get(&s.main_metric).copied())))
        }
        _ => Ok((Some(aggregate_group(column, scores)?.main()), None)),
    };
    let cells = columns.iter().map(cell).collect::<Result<Vec<_>, LabError>>()?;
    Ok(cells.into_iter().unzip())
}

/// Copies predictions and scores. `scores.json` is copied last, since it marks the scores as complete.
fn copy_scores(from: &Path, to: &Path) -> Result<(), LabError> {
    let (source, target) = (from.join("scores"), to.join("scores"));
    std::fs::create_dir_all(&target).map_err(LabError::io(&target))?;
    for entry in std::fs::read_dir(&source).map_err(LabError::io(&source))? {
        let path = entry.map_err(LabError::io(&source))?.path();
        let name = path.file_name().unwrap_or_default();
        write_file(&target.join(name), &std::fs::read(&path).map_err(LabError::io(&path))?)?;
    }
    let scores = from.join("scores.json");
    Ok(write_file(&to.join("scores.json"), &std::fs::read(&scores).map_err(LabError::io(&scores))?)?)
}

fn report(config: &SequenceConfig, matrix: &ScoreMatrix, out: &Path) -> Result<(), LabError> {
    let path = out.join("matrix.json");
    let mut json =
        serde_json::to_vec_pretty(matrix).map_err(|e| LabError::Io { path: path.clone(), source: e.into() })?;
    json.push(b'\n');
    write_file(&path, &json)?;
    let tables = tables_of(matrix, &method_name(config), config.profile);
    let markdown: Vec<String> = tables.iter().map(cl_eval::Table::markdown).collect();
    Ok(write_file(&out.join("tables.md"), markdown.join("\n").as_bytes())?)
}
