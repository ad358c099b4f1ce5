use std::path::Path;

use cl_adapters::{AdapterError, InitLoraWeights, LoraConfig, Targets, check_frozen};
use cl_checkpoint::{Adapter, Checkpoint, Error, LayerKind, Manifest, ManifestProblem, TensorSource, convert};
use cl_data::{Dataset, Mixture, Profile, Prompts, Split, Tokenizer, inspect, load_split, plan};
use cl_eval::{Task, TaskGroup};
use cl_model::{Decoder, ModelConfig};
use cl_torch::pick_device;
use cl_torch::tch::Device;
use cl_train::{Plan, TrainConfig, TrainError};

use crate::model_dir::{check_fits, open_checkpoint};
use crate::round::is_stack;
use crate::round_data::load_each;
use crate::scoring::{check_room, file_names};
use crate::sequence::{load_each_task, load_each_test, load_each_training};
use crate::{LabError, SequenceConfig, TrainRun};

/// Something a check has to say.
#[derive(Debug)]
pub enum Finding {
    /// A fact of the plan: sizes, steps.
    Fact(String),
    /// Something that would stop the run.
    Problem(LabError),
}

/// What a run is made of, read and checked.
pub(crate) struct Checked {
    /// Where to compute.
    pub(crate) device: Device,
    /// Training rows.
    pub(crate) datasets: Vec<Dataset>,
    /// What is scored.
    pub(crate) tasks: Vec<Box<dyn Task>>,
    /// What the columns of a matrix stand for: a task each, or a group's tasks.
    pub(crate) columns: Vec<TaskGroup>,
}

/// Checks a sequence without running it: model, tokenizer, data, tasks, adapter targets, device; all problems at once.
pub fn check_sequence(config: &SequenceConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    let checked = examine_sequence(config, &mut findings);
    let test = load_each_test(config).filter_map(Result::ok);
    inspect_data(&config.model, &config.train, &checked.datasets, test, &mut findings);
    findings
}

/// Checks one round without running it.
pub fn check_train(config: &TrainRun) -> Vec<Finding> {
    let mut findings = Vec::new();
    let checked = examine_train(config, &mut findings);
    let test = load_split(&config.data.train, Split::Test).into_iter();
    inspect_data(&config.model, &config.train, &checked.datasets, test, &mut findings);
    findings
}

/// [`check_sequence`] for a run, which has to have no problem.
pub(crate) fn require_sequence(config: &SequenceConfig) -> Result<Checked, LabError> {
    let mut findings = Vec::new();
    let checked = examine_sequence(config, &mut findings);
    no_problem(findings).map(|()| checked)
}

/// [`check_train`] for a run, which has to have no problem.
pub(crate) fn require_train(config: &TrainRun) -> Result<Checked, LabError> {
    let mut findings = Vec::new();
    let checked = examine_train(config, &mut findings);
    no_problem(findings).map(|()| checked)
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
    let model = check_model(&config.model, &config.train, findings);
    let device = note(pick_device(&config.device), findings).unwrap_or(Device::Cpu);
    if let (Some(lora), true) = (&config.train.lora, is_stack(&config.train))
        && let Ok(base) = open_checkpoint(&config.model)
        && targeted(&base, lora).is_ok_and(|layers| layers.iter().any(|(_, kind, _)| *kind == LayerKind::Embedding))
    {
        let (key, value) = ("olora", "shape = \"stack\" with an adapter on the embedding".to_owned());
        let expected = "shape = \"fold\", or target_modules without embed_tokens";
        findings.push(Finding::Problem(TrainError::Config { key, value, expected }.into()));
    }
    if let Some(adapter) = &config.train.initial_adapter {
        // Every round would start from it on a model that holds it already, and count it once more.
        let expected =
            "none in a sequence, whose rounds start from fresh adapters; `cl train` starts one round from it";
        let (key, value) = ("initial_adapter", adapter.display().to_string());
        findings.push(Finding::Problem(TrainError::Config { key, value, expected }.into()));
    }
    if !config.data.is_dir() {
        let source = std::io::Error::from(std::io::ErrorKind::NotADirectory);
        findings.push(Finding::Problem(LabError::Io { path: config.data.clone(), source }));
        return Checked { device, datasets: Vec::new(), tasks: Vec::new(), columns: Vec::new() };
    }
    let datasets = note_all(load_each_training(config), findings);
    if datasets.len() == config.tasks.len() {
        for (i, task) in config.tasks.iter().enumerate() {
            let used = if config.replay.is_some() { &datasets[..=i] } else { &datasets[i..=i] };
            let what = format!("round {} ({task})", i + 1);
            check_plan(&what, used, &config.mixture(), &config.train, config.profile, findings);
        }
    }
    let (mut tasks, mut columns) = (Vec::new(), Vec::new());
    for set in note_all(load_each_task(config), findings) {
        let one = |t: &dyn Task| TaskGroup { name: t.name().to_owned(), members: vec![t.name().to_owned()] };
        // The first group is the one that was asked for, and the others are its parts.
        columns.extend(set.groups.into_iter().next().or_else(|| set.tasks.first().map(|t| one(t.as_ref()))));
        tasks.extend(set.tasks);
    }
    note(file_names(&tasks), findings);
    for task in &tasks {
        let fact = format!("scored: {}, {} documents, {}", task.name(), task.len(), task.metric().main());
        findings.push(Finding::Fact(fact));
        if let Some(model) = &model {
            note(check_room(task.as_ref(), model.max_position_embeddings), findings);
        }
    }
    Checked { device, datasets, tasks, columns }
}

fn examine_train(config: &TrainRun, findings: &mut Vec<Finding>) -> Checked {
    check_model(&config.model, &config.train, findings);
    let device = note(pick_device(&config.device), findings).unwrap_or(Device::Cpu);
    let datasets = note_all(load_each(config), findings);
    if datasets.len() == config.data.earlier.len() + 1 {
        check_plan("the round", &datasets, &config.mixture(), &config.train, config.profile, findings);
    }
    Checked { device, datasets, tasks: Vec::new(), columns: Vec::new() }
}

/// Checks a model or adapter directory: every header, names and shapes against the config, the tokenizer, every value for NaN
/// and infinities, and every file against the manifest when there is one.
pub fn check_directory(dir: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let has = |name: &str| dir.join(name).exists();
    if has("adapter_config.json") {
        check_adapter(dir, &mut findings);
    } else if has("config.json") || has("model.safetensors") || has("manifest.json") {
        check_whole_model(dir, &mut findings);
    } else {
        findings.push(Finding::Problem(LabError::NothingToCheck { path: dir.to_owned() }));
    }
    if has("manifest.json")
        && let Some(differences) = note(Manifest::verify(dir), &mut findings)
    {
        let wrong = |path, what| Finding::Problem(LabError::Manifest { path, what });
        findings.extend(differences.into_iter().map(|difference| match difference {
            ManifestProblem::Missing(path) => wrong(path, "named in manifest.json, but missing"),
            ManifestProblem::Changed(path) => wrong(path, "has another content than manifest.json says"),
            ManifestProblem::Unlisted(path) => Finding::Fact(format!("{}: not named in manifest.json", path.display())),
        }));
    }
    findings
}

fn check_whole_model(dir: &Path, findings: &mut Vec<Finding>) {
    let tokenizer = note(Tokenizer::from_dir(dir), findings);
    let Some(checkpoint) = note(Checkpoint::open(dir), findings) else { return };
    if let Some(config) = note(Decoder::check(&checkpoint), findings) {
        findings.push(Finding::Fact(format!(
            "model: {:?} family, {} layers, hidden size {}, {:.1} M parameters, vocabulary {}",
            config.family,
            config.num_hidden_layers,
            config.hidden_size,
            parameters(&checkpoint) as f64 / 1e6,
            config.vocab_size
        )));
        let tokens = tokenizer.map_or(0, |t| t.vocab_size());
        if tokens as i64 > config.vocab_size {
            let (path, rows) = (dir.to_owned(), config.vocab_size);
            findings.push(Finding::Problem(LabError::Vocabulary { path, tokens, rows }));
        }
    }
    note(checkpoint.check_all_finite(), findings);
}

fn check_adapter(dir: &Path, findings: &mut Vec<Finding>) {
    let Some(adapter) = note(Adapter::open(dir), findings) else { return };
    note(adapter.check_built(), findings);
    let config = adapter.config();
    findings.push(Finding::Fact(format!(
        "adapter: {} on {} modules, r {}, lora_alpha {}, base {}",
        config.peft_type,
        adapter.modules().len(),
        config.r,
        config.lora_alpha,
        config.base_model_name_or_path.as_deref().unwrap_or("not named")
    )));
    for name in adapter.names() {
        let values = adapter.info(name).zip(adapter.bytes(name).ok()).and_then(|(i, b)| convert::to_f32(i.dtype, b));
        let bad = values.iter().flatten().enumerate().find(|(_, v)| !v.is_finite());
        if let Some((index, &value)) = bad {
            let (path, tensor) = (dir.join("adapter_model.safetensors"), name.to_owned());
            findings.push(Finding::Problem(Error::NotFinite { path, tensor, index, value }.into()));
        }
    }
}

fn parameters(checkpoint: &Checkpoint) -> usize {
    checkpoint.names().iter().filter_map(|n| checkpoint.info(n)).map(|i| i.elements()).sum()
}

fn note<T, E: Into<LabError>>(result: Result<T, E>, findings: &mut Vec<Finding>) -> Option<T> {
    result.map_err(|e| findings.push(Finding::Problem(e.into()))).ok()
}

fn note_all<T>(results: impl Iterator<Item = Result<T, LabError>>, findings: &mut Vec<Finding>) -> Vec<T> {
    results.filter_map(|result| note(result, findings)).collect()
}

fn check_model(dir: &Path, train: &TrainConfig, findings: &mut Vec<Finding>) -> Option<ModelConfig> {
    let checkpoint = note(open_checkpoint(dir), findings)?;
    if let Some(tokenizer) = note(Tokenizer::from_dir(dir), findings) {
        note(tokenizer.require_eos(), findings);
    }
    let model = note(Decoder::check(&checkpoint), findings);
    let millions = parameters(&checkpoint) as f64 / 1e6;
    findings.push(Finding::Fact(format!("model: {} with {millions:.1} M parameters", dir.display())));
    check_adapters(&checkpoint, train, findings);
    model
}

/// Adapters that the run makes, starts from, or stays away from.
fn check_adapters(base: &Checkpoint, train: &TrainConfig, findings: &mut Vec<Finding>) {
    let stack = is_stack(train);
    if let Some(dir) = &train.initial_adapter {
        // It decides the modules; `target_modules` is not looked at.
        if let Some(adapter) = note(Adapter::open(dir), findings) {
            note(check_fits(base, &adapter), findings);
            note(check_continued(&adapter, train), findings);
            if stack && adapter.config().use_dora {
                // What it makes could not be added to the base together with the others.
                note(check_frozen(&adapter), findings);
            }
        }
    } else if let Some(lora) = &train.lora {
        let plain = LoraConfig { use_dora: false, ..lora.clone() };
        if let (true, Some(key)) = (lora.use_dora, plain.beyond_factors()) {
            // The round's model could not be made of it.
            let (value, expected) = ("beside use_dora".to_owned(), "one of the two");
            findings.push(Finding::Problem(AdapterError::Parameter { key, value, expected }.into()));
        }
        note(check_targets(base, lora), findings);
    }
    let Some(olora) = &train.olora else { return };
    findings.push(Finding::Fact(format!(
        "o-lora: {:?}, lambda {:?}, earlier adapters {:?}, {} of them from before this run",
        olora.mode,
        olora.lambda.values(),
        olora.shape,
        olora.earlier.len()
    )));
    for dir in &olora.earlier {
        if let Some(adapter) = note(Adapter::open(dir), findings) {
            note(check_fits(base, &adapter), findings);
            if stack {
                note(check_frozen(&adapter), findings);
            }
        }
    }
}

/// An adapter that is continued decides what it is; settings that say otherwise would not be heeded.
fn check_continued(adapter: &Adapter, train: &TrainConfig) -> Result<(), AdapterError> {
    let Some(lora) = &train.lora else { return Ok(()) };
    let wrong = |key, value: String| {
        Err(AdapterError::Parameter { key, value, expected: "nothing beside initial_adapter, which decides it" })
    };
    if lora.use_dora && !adapter.config().use_dora {
        return wrong("use_dora", "true".to_owned());
    }
    if lora.init_lora_weights != InitLoraWeights::default() {
        return wrong("init_lora_weights", format!("{:?}", lora.init_lora_weights));
    }
    if let Some(key) = lora.beyond_factors().filter(|key| *key != "use_dora") {
        return wrong(key, "set".to_owned());
    }
    if let Some(pattern) = lora.rank_pattern.keys().chain(lora.alpha_pattern.keys()).next() {
        return wrong("rank_pattern, alpha_pattern", pattern.clone());
    }
    let of_tokens = |m: &&cl_checkpoint::AdapterModule| m.kind == LayerKind::Embedding || m.name == "lm_head";
    match lora.embedding_learning_rate {
        Some(rate) if !adapter.modules().iter().any(of_tokens) && adapter.whole_tensors().is_empty() => {
            let expected = "an initial adapter on embed_tokens or lm_head";
            Err(AdapterError::Parameter { key: "embedding_learning_rate", value: rate.to_string(), expected })
        }
        _ => Ok(()),
    }
}

fn check_targets(base: &Checkpoint, lora: &LoraConfig) -> Result<(), AdapterError> {
    let mut layers = targeted(base, lora)?;
    layers.retain(|(name, ..)| !lora.is_saved(name));
    lora.check_layers(&layers)?;
    let adapted: Vec<&str> = layers.iter().map(|(name, ..)| *name).collect();
    check_whole(base, lora, &adapted)
}

/// What is trained beside factors is there, and can be folded into the base.
fn check_whole(base: &Checkpoint, lora: &LoraConfig, adapted: &[&str]) -> Result<(), AdapterError> {
    let shape = |name: &str| base.info(name).map_or(Vec::new(), |i| i.shape.iter().map(|&d| d as i64).collect());
    let mut shapes: Vec<(&str, Vec<i64>)> = base.names().into_iter().map(|name| (name, shape(name))).collect();
    let tied = base.info("lm_head.weight").is_none() || base.config().get("tie_word_embeddings") == Some(&true.into());
    if base.info("lm_head.weight").is_none() {
        shapes.push(("lm_head.weight", shape("model.embed_tokens.weight")));
    }
    let tensors: Vec<(&str, &[i64])> = shapes.iter().map(|(name, shape)| (*name, shape.as_slice())).collect();
    lora.whole_plan(&tensors, adapted, tied)?;
    let bare = |layer: &&&str| base.info(&format!("{layer}.bias")).is_none();
    match adapted.iter().find(bare).filter(|_| lora.lora_bias) {
        Some(layer) => {
            let value = format!("true for `{layer}`, which has no bias that the adapter's could be folded into");
            Err(AdapterError::Parameter { key: "lora_bias", value, expected: "target_modules that have a bias" })
        }
        None => Ok(()),
    }
}

/// A layer's name, what it is, and its weight's shape.
type Layer<'n> = (&'n str, LayerKind, [i64; 2]);

/// The layers that get an adapter: matrices of the layers, the embedding, and the head, which may share the embedding's weight.
fn targeted<'n>(base: &'n Checkpoint, lora: &LoraConfig) -> Result<Vec<Layer<'n>>, AdapterError> {
    let layer = |name: &'_ str, weight: &str| {
        let &[rows, columns] = base.info(weight)?.shape.as_slice() else { return None };
        let table = name.ends_with("embed_tokens");
        let kind = if table { LayerKind::Embedding } else { LayerKind::Linear };
        Some((kind, [rows as i64, columns as i64]))
    };
    let matrices = base.names().into_iter().filter_map(|weight| {
        let name = weight.strip_suffix(".weight")?;
        let (kind, shape) = layer(name, weight)?;
        Some((name, kind, shape))
    });
    let mut layers: Vec<Layer<'n>> = matrices.collect();
    if !layers.iter().any(|(name, ..)| *name == "lm_head")
        && let Some((kind, shape)) = layer("lm_head", "model.embed_tokens.weight")
    {
        layers.push(("lm_head", kind, shape));
    }
    let names: Vec<&str> = layers.iter().map(|(name, ..)| *name).collect();
    let targets = Targets::new(&lora.target_modules, &names)?;
    layers.retain(|(name, ..)| targets.contains(name));
    Ok(layers)
}

/// Rows that are probably not meant as they are: warnings, which stop nothing.
fn inspect_data(
    model: &Path,
    train: &TrainConfig,
    datasets: &[Dataset],
    test: impl Iterator<Item = Dataset>,
    findings: &mut Vec<Finding>,
) {
    let mut prompts = Prompts::default();
    test.for_each(|data| prompts.extend(&data.examples));
    let tokenizer = Tokenizer::from_dir(model).ok().filter(|t| t.require_eos().is_ok());
    for data in datasets {
        let mut report = inspect(&data.examples, Some(&prompts));
        if let Some(tokenizer) = &tokenizer {
            note(report.count_lengths(tokenizer, &data.examples, train.max_length), findings);
        }
        let line = |found: &str| Finding::Fact(format!("warning: {}: {found}", data.path.display()));
        findings.extend(report.to_string().lines().map(line));
    }
}

fn check_plan(
    what: &str,
    datasets: &[Dataset],
    mixture: &Mixture,
    train: &TrainConfig,
    profile: Profile,
    findings: &mut Vec<Finding>,
) {
    let sizes: Vec<usize> = datasets.iter().map(|d| d.examples.len()).collect();
    let lengths = plan(&sizes, mixture);
    let steps = Plan::new(lengths.iter().sum(), train, profile == Profile::Paper);
    if let Some(steps) = note(steps, findings) {
        let rows: Vec<String> =
            datasets.iter().zip(&lengths).filter(|(_, l)| **l > 0).map(|(d, l)| format!("{l} of {}", d.name)).collect();
        findings.push(Finding::Fact(format!(
            "{what}: rows an epoch: {}; {} steps an epoch, {} in all",
            rows.join(", "),
            steps.steps_per_epoch,
            steps.total_steps
        )));
    }
}
