use std::path::Path;

use cl_checkpoint::Adapter;
use cl_data::Tokenizer;
use cl_eval::{Request, Scores, Task, evaluate};
use cl_model::{Decoder, LoadOptions, ModelConfig, Scorer};
use cl_torch::tch::{Device, Kind};
use cl_train::Precision;

use crate::error::write_whole;
use crate::model_dir::{adapter_hash, model_hash, open_model};
use crate::{EvalConfig, Event, LabError, Observer};

/// A model with its tokenizer, ready to be asked.
pub struct LoadedModel {
    /// The model.
    pub model: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Hash of the files it was made from, and the dtype it computes in.
    pub fingerprint: String,
}

impl LoadedModel {
    /// Loads a model directory, with an adapter beside it when one is given.
    ///
    /// # Errors
    /// Anything wrong with either directory.
    pub fn open(
        dir: &Path,
        adapter: Option<&Path>,
        precision: Precision,
        device: Device,
    ) -> Result<LoadedModel, LabError> {
        let kind = match precision {
            Precision::F32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let (checkpoint, tokenizer) = open_model(dir)?;
        let mut model = Decoder::load(&checkpoint, LoadOptions { weights: kind, compute: kind, device })?;
        let mut fingerprint = model_hash(dir)?[..32].to_owned();
        if let Some(adapter) = adapter {
            model.load_lora(&Adapter::open(adapter)?, 0.0)?;
            fingerprint += &format!("+{}", &adapter_hash(adapter)?[..32]);
        }
        fingerprint += match precision {
            Precision::F32 => ":f32",
            Precision::Bf16 => ":bf16",
        };
        Ok(LoadedModel { model, tokenizer, fingerprint })
    }
}

/// Scores a model on every task; predictions go to `out/<task>.jsonl`, and those that are there already are kept.
///
/// # Errors
/// Anything the model or the files raise.
pub fn score_model(
    loaded: &LoadedModel,
    tasks: &[Box<dyn Task>],
    config: &EvalConfig,
    out: &Path,
    observer: &mut Observer<'_>,
) -> Result<Vec<Scores>, LabError> {
    let names = file_names(tasks)?;
    for task in tasks {
        check_room(task.as_ref(), &loaded.model.config)?;
    }
    let mut scorer = Scorer::new(&loaded.model, &loaded.tokenizer);
    scorer.batch_tokens = config.batch_tokens;
    scorer.batch_sequences = config.batch_sequences;
    scorer.fingerprint = Some(loaded.fingerprint.clone());
    tasks
        .iter()
        .zip(&names)
        .map(|(task, name)| {
            let mut progress = |done, all| observer(Event::Scored { task: task.name(), done, all });
            Ok(evaluate(task.as_ref(), &mut scorer, &out.join(name), &mut progress)?)
        })
        .collect()
}

/// Writes scores as JSON, whole or not at all; makes the directory.
///
/// # Errors
/// [`LabError::Io`].
pub fn write_scores(path: &Path, scores: &[Scores]) -> Result<(), LabError> {
    let dir = path.parent().unwrap_or(path);
    std::fs::create_dir_all(dir).map_err(LabError::io(dir))?;
    let json =
        serde_json::to_vec_pretty(scores).map_err(|e| LabError::Io { path: path.to_owned(), source: e.into() })?;
    write_whole(path, &[json.as_slice(), b"\n"].concat())
}

/// Names of the tasks' files of predictions. A task that is named by a path has its file called after the last part, so that
/// nothing is written outside the folder of scores.
pub(crate) fn file_names(tasks: &[Box<dyn Task>]) -> Result<Vec<String>, LabError> {
    let mut names: Vec<String> = Vec::with_capacity(tasks.len());
    for task in tasks {
        let wrong = |message| LabError::TaskName { name: task.name().to_owned(), message };
        let last = Path::new(task.name()).file_name().ok_or_else(|| wrong("not the name of a directory".to_owned()))?;
        let name = format!("{}.jsonl", last.to_string_lossy());
        if let Some(other) = names.iter().position(|n| *n == name) {
            let message = match tasks[other].name() {
                same if same == task.name() => "named twice; every task is scored once".to_owned(),
                other => format!("its predictions would go to the same file as those of `{other}`; rename one of them"),
            };
            return Err(wrong(message));
        }
        names.push(name);
    }
    Ok(names)
}

/// The harness cuts a prompt on its left until prompt and answer fit; an answer that fills all positions leaves nothing of it.
pub(crate) fn check_room(task: &dyn Task, model: &ModelConfig) -> Result<(), LabError> {
    let positions = model.max_position_embeddings;
    let most = (0..task.len()).filter_map(|d| match task.request(d) {
        Request::Generate(request) => Some(request.max_new_tokens),
        Request::Loglikelihood(_) => None,
    });
    match most.max() {
        Some(max_new_tokens) if max_new_tokens >= positions => {
            Err(LabError::NoRoom { task: task.name().to_owned(), max_new_tokens, positions })
        }
        _ => Ok(()),
    }
}
