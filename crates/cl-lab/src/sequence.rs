use std::path::{Path, PathBuf};

use cl_data::{Dataset, Split, load_split};
use cl_eval::{Column, Group, ScoreMatrix, Scores, Task, TaskOptions, load_task};
use cl_torch::pick_device;
use cl_torch::tch::Device;

use crate::error::write_whole;
use crate::hash::model_hash;
use crate::report::{method_name, row_name, tables_of};
use crate::{Event, LabError, LoadedModel, Observer, RoundInput, SequenceConfig, run_round, score_model};

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
/// rounds/0-base/scores/          predictions and scores before the first round
/// rounds/1-<task>/               log.jsonl, rows.jsonl, adapter/, model/, scores/ of each round
/// matrix.json, tables.md         after every round
/// ```
///
/// With `resume` an unfinished sequence goes on where it was: stages that stand are kept.
///
/// # Errors
/// [`LabError::Output`] when `out` holds something already and `resume` is false, or another configuration; anything a round
/// or a scoring raises.
pub fn run_sequence(
    config: &SequenceConfig,
    out: &Path,
    resume: bool,
    observer: &mut Observer<'_>,
) -> Result<SequenceReport, LabError> {
    let device = pick_device(&config.device)?;
    let tasks = load_tasks(config)?;
    let datasets = load_training(config)?;
    prepare(config, out, resume)?;

    let mut matrix = ScoreMatrix::new(columns(config, &tasks));
    let base_dir = out.join("rounds/0-base");
    observer(Event::Stage("round 0: scoring the base model"));
    let scores = score_round(&config.model, &tasks, config, &base_dir, device, observer)?;
    matrix.push("base", scores)?;
    report(config, &matrix, out)?;

    let mut model = config.model.clone();
    let mut adapters: Vec<PathBuf> = Vec::new();
    for (index, task) in config.tasks.iter().enumerate() {
        let round = index + 1;
        let dir = out.join(format!("rounds/{round}-{task}"));
        observer(Event::Stage(&format!("round {round} of {}: {task}", config.tasks.len())));
        // The method composes all adapters with the first base at once; the paper folds one into the last round's model.
        let compose = (config.profile == cl_data::Profile::Method && config.train.lora.is_some())
            .then_some((config.model.as_path(), adapters.as_slice()));
        let input = RoundInput {
            model: &model,
            datasets: if config.replay.is_some() { &datasets[..round] } else { &datasets[index..round] },
            mixture: config.mixture(),
            config: &config.train,
            seed: config.seed.wrapping_add(round as u64),
            profile: config.profile,
            device,
            compose,
        };
        let output = run_round(&input, &dir, observer)?;
        let scores = score_round(&output.model, &tasks, config, &dir, device, observer)?;
        matrix.push(&row_name(method_name(config), round), scores)?;
        report(config, &matrix, out)?;
        adapters.extend(output.adapter);
        if !config.keep_models && round > 1 {
            discard(&model)?;
        }
        model = output.model;
    }
    Ok(SequenceReport { matrix, model })
}

/// The tasks that are scored: new knowledge first, then old.
pub(crate) fn load_tasks(config: &SequenceConfig) -> Result<Vec<Box<dyn Task>>, LabError> {
    let options = TaskOptions {
        limit: config.limit.test,
        max_new_tokens: config.eval.max_new_tokens,
        metric: config.eval.metric,
    };
    let new = config.eval.tasks.as_ref().unwrap_or(&config.tasks);
    new.iter().chain(&config.eval.old).map(|name| Ok(load_task(name, &config.data, options)?)).collect()
}

/// Training rows of every round.
pub(crate) fn load_training(config: &SequenceConfig) -> Result<Vec<Dataset>, LabError> {
    config
        .tasks
        .iter()
        .map(|task| {
            let mut data = load_split(&task_dir(&config.data, task), Split::Train)?;
            data.examples.truncate(config.limit.train.unwrap_or(usize::MAX));
            Ok(data)
        })
        .collect()
}

/// A task's directory by its name, or by the name of the known task that has it as an alias.
fn task_dir(data: &Path, task: &str) -> PathBuf {
    let direct = data.join(task);
    if direct.is_dir() {
        return direct;
    }
    let wanted = task.to_lowercase();
    let known =
        cl_eval::known_tasks().iter().find(|t| t.name.to_lowercase() == wanted || t.aliases.contains(&wanted.as_str()));
    let folder = known.map_or(task, |t| t.name);
    [data.join(folder), data.join("..").join(folder)].into_iter().find(|d| d.is_dir()).unwrap_or(direct)
}

fn columns(config: &SequenceConfig, tasks: &[Box<dyn Task>]) -> Vec<Column> {
    let new = config.eval.tasks.as_ref().unwrap_or(&config.tasks);
    let taught: Vec<String> = config.tasks.iter().map(|t| canonical(t)).collect();
    tasks
        .iter()
        .enumerate()
        .map(|(i, task)| {
            let group = if i < new.len() { Group::New } else { Group::Old };
            // GSM8K's chain-of-thought form is taught by the same round as its plain one.
            let name = canonical(task.name().trim_end_matches("_cot"));
            let round = taught.iter().position(|t| *t == name).map(|r| r + 1).filter(|_| group == Group::New);
            Column::new(task.name(), group, round)
        })
        .collect()
}

fn canonical(name: &str) -> String {
    let wanted = name.to_lowercase();
    let known =
        cl_eval::known_tasks().iter().find(|t| t.name.to_lowercase() == wanted || t.aliases.contains(&wanted.as_str()));
    known.map_or(wanted, |t| t.name.to_lowercase())
}

/// Makes the output directory, or checks that it belongs to this configuration.
fn prepare(config: &SequenceConfig, out: &Path, resume: bool) -> Result<(), LabError> {
    let path = out.join("config.toml");
    let text = toml::to_string(config).map_err(|e| LabError::Config { path: path.clone(), message: e.to_string() })?;
    let wrong = |message: &str| Err(LabError::Output { path: out.to_owned(), message: message.to_owned() });
    let occupied = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
    if occupied {
        if !resume {
            return wrong("is not empty; add --resume to go on with it, or choose another --out");
        }
        let saved = std::fs::read_to_string(&path).map_err(LabError::io(&path))?;
        if saved != text {
            let line = saved.lines().zip(text.lines()).find(|(a, b)| a != b);
            let difference = line.map_or(String::new(), |(a, b)| format!(": it has `{a}`, this run `{b}`"));
            return wrong(&format!("holds a sequence with another configuration{difference}; choose another --out"));
        }
        let base = std::fs::read_to_string(out.join("base.blake3")).unwrap_or_default();
        if base.trim() != model_hash(&config.model)? {
            return wrong("was begun with other weights than the model directory holds now; choose another --out");
        }
        return Ok(());
    }
    let rounds = out.join("rounds");
    let hash = model_hash(&config.model)?;
    std::fs::create_dir_all(&rounds).map_err(LabError::io(&rounds))?;
    write_whole(&out.join("base.blake3"), hash.as_bytes())?;
    write_whole(&path, text.as_bytes())
}

/// Scores a model on every task, or reads the scores that stand.
fn score_round(
    model: &Path,
    tasks: &[Box<dyn Task>],
    config: &SequenceConfig,
    dir: &Path,
    device: Device,
    observer: &mut Observer<'_>,
) -> Result<Vec<Option<f64>>, LabError> {
    let path = dir.join("scores.json");
    let main = |scores: &[Scores]| scores.iter().map(|s| Some(s.main())).collect();
    if let Ok(text) = std::fs::read(&path)
        && let Ok(scores) = serde_json::from_slice::<Vec<Scores>>(&text)
        && scores.len() == tasks.len()
    {
        observer(Event::Skipped("scoring"));
        return Ok(main(&scores));
    }
    let loaded = LoadedModel::open(model, None, config.eval.precision, device)?;
    let scores = score_model(&loaded, tasks, &config.eval, &dir.join("scores"), observer)?;
    let mut text =
        serde_json::to_vec_pretty(&scores).map_err(|e| LabError::Io { path: path.clone(), source: e.into() })?;
    text.push(b'\n');
    write_whole(&path, &text)?;
    Ok(main(&scores))
}

fn report(config: &SequenceConfig, matrix: &ScoreMatrix, out: &Path) -> Result<(), LabError> {
    let path = out.join("matrix.json");
    let mut json =
        serde_json::to_vec_pretty(matrix).map_err(|e| LabError::Io { path: path.clone(), source: e.into() })?;
    json.push(b'\n');
    write_whole(&path, &json)?;
    let tables = tables_of(matrix, method_name(config), config.profile);
    let markdown: Vec<String> = tables.iter().map(cl_eval::Table::markdown).collect();
    write_whole(&out.join("tables.md"), markdown.join("\n").as_bytes())
}

/// Removes a model that is no longer needed; its marker goes first, so that a kill leaves nothing that looks whole.
fn discard(model: &Path) -> Result<(), LabError> {
    let marker = model.join("manifest.json");
    if marker.exists() {
        std::fs::remove_file(&marker).map_err(LabError::io(&marker))?;
        std::fs::remove_dir_all(model).map_err(LabError::io(model))?;
    }
    Ok(())
}
