use std::path::Path;

use cl_adapters::{Lambda, LoraConfig};
use cl_checkpoint::LayerKind;
use cl_data::{ChatTemplate, Dataset, Encoding, Mixture, Profile, Prompts, Split, Tokenizer, inspect, load_split_as};
use cl_eval::{Task, TaskGroup};
use cl_model::ModelConfig;
use cl_torch::pick_device;
use cl_torch::tch::Device;
use cl_train::{Plan, TrainConfig, TrainError};

use crate::check_model::{check_base_of_initial_adapter, check_model, targeted};
use crate::check_routers::check_routers;
use crate::columns::load_each_task;
use crate::findings::{note, note_all};
use crate::model_dir::open_checkpoint;
use crate::round_data::load_each;
use crate::rounds::{is_stack, load_round, load_round_test};
use crate::scoring::{beyond_the_model, check_room, file_names};
use crate::validation::{check_size, take_validation};
use crate::{Finding, LabError, Round, RouterRun, SequenceConfig, TrainRun};

/// The checked inputs of a run.
pub(crate) struct Checked {
    /// Device to compute on.
    pub(crate) device: Device,
    /// The rounds of a sequence.
    pub(crate) rounds: Vec<Round>,
    /// Training data of each round; the last entry for `cl train`.
    pub(crate) datasets: Vec<Vec<Dataset>>,
    /// Validation data of each round; the last entry for `cl train`. Empty without `[validation]`.
    pub(crate) validation: Vec<Vec<Dataset>>,
    /// Tasks to score.
    pub(crate) tasks: Vec<Box<dyn Task>>,
    /// Columns of the score matrix; each is a task or a group of tasks.
    pub(crate) columns: Vec<TaskGroup>,
}

/// Checks a sequence without running it: model, tokenizer, data, tasks, adapter targets and device. Returns all
/// problems at once.
pub fn check_sequence(config: &SequenceConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    let checked = examine_sequence(config, &mut findings);
    let test = checked.rounds.iter().flat_map(load_round_test);
    let supervision = inspect_data(&config.model, &config.train, &checked.datasets, test, &mut findings);
    for round in 0..supervision.len() {
        let first = if config.replay.is_some() { 0 } else { round };
        check_supervision(&supervision[first..=round], &mut findings);
    }
    findings
}

/// Checks a single training round (`cl train`) without running it.
pub fn check_train(config: &TrainRun) -> Vec<Finding> {
    let mut findings = Vec::new();
    let checked = examine_train(config, &mut findings);
    let test = config
        .data
        .train
        .iter()
        .filter_map(|path| load_split_as(path, Split::Test, config.data.format, &config.data.columns).ok());
    let supervision = inspect_data(&config.model, &config.train, &checked.datasets, test, &mut findings);
    check_supervision(&supervision, &mut findings);
    check_base_of_initial_adapter(&config.model, &config.train, &mut findings);
    findings
}

/// Checks a router training run without running it.
pub fn check_router(config: &RouterRun) -> Vec<Finding> {
    let mut findings = Vec::new();
    let checked = examine_router(config, &mut findings);
    let none = std::iter::empty();
    let supervision = inspect_data(&config.model, &config.round().train, &checked.datasets, none, &mut findings);
    check_supervision(&supervision, &mut findings);
    findings
}

/// Like [`check_sequence`]; returns an error if there is a problem.
pub(crate) fn require_sequence(config: &SequenceConfig) -> Result<Checked, LabError> {
    let mut findings = Vec::new();
    let checked = examine_sequence(config, &mut findings);
    no_problem(findings).map(|()| checked)
}

/// Like [`check_train`]; returns an error if there is a problem.
pub(crate) fn require_train(config: &TrainRun) -> Result<Checked, LabError> {
    let mut findings = Vec::new();
    let checked = examine_train(config, &mut findings);
    no_problem(findings).map(|()| checked)
}

/// Like [`check_router`]; returns an error if there is a problem.
pub(crate) fn require_router(config: &RouterRun) -> Result<Checked, LabError> {
    let mut findings = Vec::new();
    let checked = examine_router(config, &mut findings);
    no_problem(findings).map(|()| checked)
}

/// Returns the name of a task's main score.
pub(crate) fn main_score(task: &dyn Task) -> String {
    if task.is_empty() { task.metric().main().to_owned() } else { task.metric().main_of(&task.target(0)) }
}

fn no_problem(findings: Vec<Finding>) -> Result<(), LabError> {
    let mut problems: Vec<LabError> = findings
        .into_iter()
        .filter_map(|finding| match finding {
            Finding::Problem(problem) => Some(problem),
            Finding::Fact(_) => None,
        })
        .collect();
    match problems.len() {
        0 => Ok(()),
        1 => Err(problems.remove(0)),
        _ => Err(LabError::Problems(problems)),
    }
}

fn examine_sequence(config: &SequenceConfig, findings: &mut Vec<Finding>) -> Checked {
    let device = note(pick_device(&config.device), findings).unwrap_or(Device::Cpu);
    let mut checked = Checked {
        device,
        rounds: Vec::new(),
        datasets: Vec::new(),
        validation: Vec::new(),
        tasks: Vec::new(),
        columns: Vec::new(),
    };
    let Some(rounds) = note(config.resolve_rounds().map_err(LabError::from), findings) else { return checked };
    let model = check_model(&config.model, &config.train, findings);
    check_rounds(config, &rounds, findings);
    if !config.data.is_dir() {
        let source = std::io::Error::from(std::io::ErrorKind::NotADirectory);
        findings.push(Finding::Problem(LabError::Io { path: config.data.clone(), source }));
        return checked;
    }
    let loaded = rounds.iter().map(|round| load_round(round, config.limit.train));
    checked.datasets = loaded.filter_map(|data| note(data, findings)).collect();
    if checked.datasets.len() == rounds.len() {
        for (round, own) in rounds.iter().zip(&mut checked.datasets) {
            let taken =
                round.validation.as_ref().map(|v| take_validation(v, own, config.seed, round.format, &round.columns));
            checked.validation.push(note(taken.transpose(), findings).flatten().unwrap_or_default());
        }
        for (i, round) in rounds.iter().enumerate() {
            let earlier = if config.replay.is_some() { &checked.datasets[..i] } else { &[] };
            let what = format!("round {} ({})", i + 1, round.name);
            if let Some(validation) = &round.validation {
                check_size(&what, validation, &checked.validation[i], &checked.datasets[i], findings);
            }
            check_plan(&what, earlier, &checked.datasets[i], &round.mixture, &round.train, config.profile, findings);
        }
    }
    check_rendering(&config.model, &config.train, &checked.datasets, findings);
    (checked.tasks, checked.columns) = check_tasks(config, &rounds, model.as_ref(), findings);
    checked.rounds = rounds;
    checked
}

/// Checks for settings of `[train]` that a single round supports, but a sequence does not.
fn check_rounds(config: &SequenceConfig, rounds: &[Round], findings: &mut Vec<Finding>) {
    let mut wrong = |key, value: String, expected| {
        findings.push(Finding::Problem(TrainError::Config { key, value, expected }.into()));
    };
    let on_embedding = |lora: &LoraConfig| {
        open_checkpoint(&config.model).is_ok_and(|base| {
            targeted(&base, lora).is_ok_and(|layers| layers.iter().any(|(_, kind, _)| *kind == LayerKind::Embedding))
        })
    };
    let adapted = |round: &&Round| round.train.lora.as_ref().is_some_and(on_embedding);
    if is_stack(&config.train) && rounds.iter().any(|round| adapted(&round)) {
        let value = "shape = \"stack\" with an adapter on the embedding".to_owned();
        wrong("olora", value, "shape = \"fold\", or target_modules without embed_tokens");
    }
    if let Some((olora, Lambda::Rounds(list))) = config.train.olora.as_ref().map(|olora| (olora, &olora.lambda)) {
        let most = rounds.len() + olora.earlier.len();
        if list.len() > most {
            let expected =
                "at most one for each round and each adapter in `earlier`; the last number applies to further rounds";
            wrong("olora.lambda", format!("a list of {} numbers for {most}", list.len()), expected);
        }
    }
    if let Some(adapter) = rounds.iter().find_map(|round| round.train.initial_adapter.as_ref()) {
        // Every round would add this adapter again to a model that already contains it.
        let expected =
            "none in a sequence, whose rounds start with new adapters; use `cl train` to continue an adapter";
        wrong("initial_adapter", adapter.display().to_string(), expected);
    }
}

/// Loads the tasks of a sequence and the columns of its score matrix.
fn check_tasks(
    config: &SequenceConfig,
    rounds: &[Round],
    model: Option<&ModelConfig>,
    findings: &mut Vec<Finding>,
) -> (Vec<Box<dyn Task>>, Vec<TaskGroup>) {
    let (mut tasks, mut columns) = (Vec::new(), Vec::new());
    for set in note_all(load_each_task(config, rounds), findings) {
        let one = |t: &dyn Task| {
            let name = t.name().to_owned();
            TaskGroup { members: vec![name.clone()], name, version: 1 }
        };
        // The first group is the requested one; the others are its subgroups, which get no column.
        columns.extend(set.groups.into_iter().next().or_else(|| set.tasks.first().map(|t| one(t.as_ref()))));
        tasks.extend(set.tasks);
    }
    note(file_names(&tasks), findings);
    for task in &tasks {
        let fact = format!("task: {}, {} documents, {}", task.name(), task.len(), main_score(task.as_ref()));
        findings.push(Finding::Fact(fact));
        if let Some(model) = model {
            let max_length = config.eval.max_length.unwrap_or(model.max_position_embeddings);
            note(check_room(task.as_ref(), max_length), findings);
        }
    }
    let positions = model.map(|model| model.max_position_embeddings);
    let beyond = positions.and_then(|n| beyond_the_model(&config.eval, n));
    findings.extend(beyond.map(|message| Finding::Fact(format!("warning: eval.{message}"))));
    (tasks, columns)
}

fn examine_train(config: &TrainRun, findings: &mut Vec<Finding>) -> Checked {
    check_model(&config.model, &config.train, findings);
    let device = note(pick_device(&config.device), findings).unwrap_or(Device::Cpu);
    let before = findings.len();
    let mut datasets: Vec<Vec<Dataset>> = load_each(config).map(|sets| note_all(sets.into_iter(), findings)).collect();
    let mut validation = Vec::new();
    if let (Some(settings), true) = (&config.validation, findings.len() == before) {
        // As in a sequence, rows that were held out for validation in an earlier round are not replayed.
        for sets in &mut datasets {
            let taken = take_validation(settings, sets, config.seed, config.data.format, &config.data.columns);
            validation.push(note(taken, findings).unwrap_or_default());
        }
    }
    if let (Some((own, earlier)), true) = (datasets.split_last(), findings.len() == before) {
        if let (Some(settings), Some(data)) = (&config.validation, validation.last()) {
            check_size("the round", settings, data, own, findings);
        }
        check_plan("the round", earlier, own, &config.mixture(), &config.train, config.profile, findings);
    }
    check_rendering(&config.model, &config.train, &datasets, findings);
    Checked { device, rounds: Vec::new(), datasets, validation, tasks: Vec::new(), columns: Vec::new() }
}

fn examine_router(config: &RouterRun, findings: &mut Vec<Finding>) -> Checked {
    let checked = examine_train(&config.round(), findings);
    check_routers(config, findings);
    checked
}

/// Checks that the first example of each data set can be tokenized; in particular, that a model for conversations has
/// a chat template. The remaining examples are tokenized when their round starts.
fn check_rendering(model: &Path, train: &TrainConfig, datasets: &[Vec<Dataset>], findings: &mut Vec<Finding>) {
    let Some(chat) = note(ChatTemplate::from_dir(model), findings) else { return };
    let Some(tokenizer) = Tokenizer::from_dir(model).ok().filter(|t| t.require_eos().is_ok()) else { return };
    let (max_length, profile) = (train.max_length, Profile::Method);
    let encoding = Encoding { tokenizer: &tokenizer, chat: chat.as_ref(), max_length, profile };
    for data in datasets.iter().flatten() {
        note(first_is_tokenized(encoding, data), findings);
    }
}

fn first_is_tokenized(encoding: Encoding<'_>, data: &Dataset) -> Result<(), LabError> {
    let first = &data.examples[..data.examples.len().min(1)];
    inspect(first, None).count_lengths(encoding, first).map_err(LabError::data(&data.path))
}

/// Numbers of examples of a round's data sets.
struct Supervision {
    examples: usize,
    /// Those without a token that the loss covers.
    unsupervised: usize,
}

/// Checks that there is something to train on in the data of a training, replayed or its own.
fn check_supervision(data: &[Supervision], findings: &mut Vec<Finding>) {
    let examples = data.iter().map(|of| of.examples).sum();
    if examples > 0 && data.iter().map(|of| of.unsupervised).sum::<usize>() == examples {
        findings.push(Finding::Problem(TrainError::NoData { examples }.into()));
    }
}

/// Warns about rows that are probably mistakes.
fn inspect_data(
    model: &Path,
    train: &TrainConfig,
    datasets: &[Vec<Dataset>],
    test: impl Iterator<Item = Dataset>,
    findings: &mut Vec<Finding>,
) -> Vec<Supervision> {
    let mut prompts = Prompts::default();
    test.for_each(|data| prompts.extend(&data.examples));
    let tokenizer = Tokenizer::from_dir(model).ok().filter(|t| t.require_eos().is_ok());
    let chat = ChatTemplate::from_dir(model).ok().flatten();
    let mut inspect = |data: &Dataset| inspect_set(data, train, tokenizer.as_ref(), chat.as_ref(), &prompts, findings);
    let supervision = |sets: &Vec<Dataset>| Supervision {
        examples: sets.iter().map(|data| data.examples.len()).sum(),
        unsupervised: sets.iter().map(&mut inspect).sum(),
    };
    datasets.iter().map(supervision).collect()
}

/// Warns about rows of a data set, and returns the number of those without a token that the loss covers.
fn inspect_set(
    data: &Dataset,
    train: &TrainConfig,
    tokenizer: Option<&Tokenizer>,
    chat: Option<&ChatTemplate>,
    prompts: &Prompts,
    findings: &mut Vec<Finding>,
) -> usize {
    let mut report = inspect(&data.examples, Some(prompts));
    if let Some(tokenizer) = tokenizer {
        let (max_length, profile) = (train.max_length, Profile::Method);
        let encoding = Encoding { tokenizer, chat, max_length, profile };
        // If the first example cannot be tokenized, `check_rendering` has already reported it.
        if first_is_tokenized(encoding, data).is_ok() {
            let counted = report.count_lengths(encoding, &data.examples);
            note(counted.map_err(LabError::data(&data.path)), findings);
        }
    }
    report.of_file(data);
    let line = |found: &str| Finding::Fact(format!("warning: {}: {found}", data.path.display()));
    findings.extend(report.to_string().lines().map(line));
    report.unsupervised.rows
}

fn check_plan(
    what: &str,
    earlier: &[Vec<Dataset>],
    own: &[Dataset],
    mixture: &Mixture,
    train: &TrainConfig,
    profile: Profile,
    findings: &mut Vec<Finding>,
) {
    let sizes = |sets: &[Dataset]| sets.iter().map(|d| d.examples.len()).collect::<Vec<usize>>();
    let earlier_sizes: Vec<Vec<usize>> = earlier.iter().map(|sets| sizes(sets)).collect();
    let lengths = mixture.rows_per_epoch(&earlier_sizes, &sizes(own));
    let steps = Plan::new(lengths.iter().sum(), train, profile == Profile::Paper);
    if let Some(steps) = note(steps, findings) {
        let sets = earlier.iter().flatten().chain(own).zip(&lengths).filter(|(_, rows)| **rows > 0);
        let rows: Vec<String> = sets.map(|(data, rows)| format!("{rows} of {}", data.name)).collect();
        let empty = earlier.iter().flatten().zip(&lengths).filter(|(_, rows)| **rows == 0).map(|(data, _)| &data.name);
        let empty: Vec<&str> = empty.map(String::as_str).collect();
        if !empty.is_empty() {
            findings.push(Finding::Fact(format!(
                "warning: {what}: no row of {} is replayed: replay.fraction of {} rows is less than one row of each",
                empty.join(", "),
                sizes(own).iter().sum::<usize>()
            )));
        }
        findings.push(Finding::Fact(format!(
            "{what}: rows per epoch: {}; {} steps per epoch, {} in total",
            rows.join(", "),
            steps.steps_per_epoch,
            steps.total_steps
        )));
        if train.warmup_steps > 0 && train.warmup_steps >= steps.total_steps {
            findings.push(Finding::Fact(format!(
                "warning: {what}: warmup_steps = {}, but there are {} steps: the learning rate does not reach {}",
                train.warmup_steps, steps.total_steps, train.learning_rate
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_without_a_supervised_token_is_a_problem_unless_other_data_has_some() {
        let problems = |data: &[(usize, usize)]| {
            let of = |&(examples, unsupervised): &(usize, usize)| Supervision { examples, unsupervised };
            let mut findings = Vec::new();
            check_supervision(&data.iter().map(of).collect::<Vec<_>>(), &mut findings);
            findings.len()
        };
        for (data, expected) in
            [(&[(4, 4)][..], 1), (&[(4, 3)], 0), (&[(4, 4), (2, 0)], 0), (&[(4, 4), (2, 2)], 1), (&[], 0)]
        {
            assert_eq!(problems(data), expected, "{data:?}");
        }
    }
}
