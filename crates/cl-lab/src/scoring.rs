use std::path::Path;

use cl_checkpoint::Adapter;
use cl_checkpoint::files::write_file;
use cl_data::Tokenizer;
use cl_eval::{Harness, Open, Request, ResponseCache, Scores, Task, evaluate_all};
use cl_model::{Decoder, LoadOptions, Scorer};
use cl_moe::Mixture;
use cl_torch::tch::Device;
use cl_train::Precision;

use crate::model_dir::{adapter_hash, mixture_hash, model_hash, open_mixture, open_model};
use crate::observe::tell;
use crate::{EvalConfig, Event, LabError, Observer};

/// A model with its tokenizer, ready to be asked.
pub struct LoadedModel {
    /// The model.
    pub model: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Hash of the files it was made from, and the dtype it computes in.
    pub fingerprint: String,
    base: String, // hash of the model directory
    precision: Precision,
}

impl LoadedModel {
    /// Loads a model directory, with an adapter or a mixture of adapters beside it when one is given.
    ///
    /// # Errors
    /// Anything wrong with either directory.
    pub fn open(
        dir: &Path,
        adapter: Option<&Path>,
        precision: Precision,
        device: Device,
    ) -> Result<LoadedModel, LabError> {
        let (checkpoint, tokenizer) = open_model(dir)?;
        let model = Decoder::load(&checkpoint, LoadOptions { device, ..LoadOptions::cpu(precision.kind()) })?;
        let base = model_hash(dir)?;
        let mut loaded = LoadedModel { model, tokenizer, fingerprint: String::new(), base, precision };
        loaded.set_adapter(adapter)?;
        Ok(loaded)
    }

    /// Puts another adapter or mixture of adapters beside the model, or none; the model itself stays loaded.
    ///
    /// # Errors
    /// Anything wrong with the adapter or the mixture, and a mixture of another base; the model is then as it was.
    pub fn set_adapter(&mut self, adapter: Option<&Path>) -> Result<(), LabError> {
        let (base, dtype) = (&self.base[..32], self.precision);
        self.fingerprint = match adapter {
            None => {
                self.model.unload_lora();
                format!("{base}:{dtype}")
            }
            Some(dir) if Mixture::is_mixture(dir) => {
                let mixture = open_mixture(dir, &self.base)?;
                let hash = mixture_hash(&mixture)?;
                self.model.load_mixture(&mixture)?;
                format!("{base}+{}:{dtype}", &hash[..32])
            }
            Some(adapter) => {
                let hash = adapter_hash(adapter)?;
                self.model.load_lora(&Adapter::open(adapter)?, 0.0)?;
                format!("{base}+{}:{dtype}", &hash[..32])
            }
        };
        Ok(())
    }
}

/// Scores a model on every task, all of them asked together; predictions go to `out/<task>.jsonl`, and those that are there
/// already are kept.
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
    let mut scorer = Scorer::new(&loaded.model, &loaded.tokenizer);
    scorer.batch_tokens = config.batch_tokens;
    scorer.batch_sequences = config.batch_sequences;
    scorer.max_length = config.max_length.unwrap_or(scorer.max_length);
    for task in tasks {
        check_room(task.as_ref(), scorer.max_length)?;
    }
    if let Some(dir) = &config.cache {
        // Tokens are part of every question, so the model and its dtype are all that is left to tell apart.
        let cache = ResponseCache::open(dir, &loaded.fingerprint);
        warn_of(&cache, observer);
        if let Some(line) = cache.damaged().first() {
            let (lines, path) = (cache.damaged().len(), cache.path().display());
            let message =
                format!("{path}: {lines} damaged lines (line {line} first); what they answered is asked again");
            tell(observer, Event::Warning(&message));
        }
        scorer.cache = Some(cache);
    }
    let known_failure = scorer.cache.as_ref().is_some_and(|c| c.failure().is_some());
    let mut scores: Vec<(usize, Scores)> = Vec::with_capacity(tasks.len());
    for (add_bos_token, of_group) in by_bos(tasks, config) {
        scorer.add_bos_token = add_bos_token;
        scorer.fingerprint = Some(fingerprint(loaded, config, add_bos_token));
        let open = |&i: &usize| Open { task: tasks[i].as_ref(), predictions: out.join(&names[i]) };
        let open: Vec<Open<'_>> = of_group.iter().map(open).collect();
        let of_open = evaluate_all(&open, &mut scorer, &mut |task, done, all| {
            tell(observer, Event::Scored { task: open[task].task.name(), done, all });
        })?;
        scores.extend(of_group.into_iter().zip(of_open));
    }
    scores.sort_by_key(|(i, _)| *i);
    if let Some(cache) = scorer.cache.as_ref().filter(|c| c.failure().is_some() && !known_failure) {
        warn_of(cache, observer);
    }
    if scorer.truncated > 0 {
        let (cut, most) = (scorer.truncated, scorer.max_length);
        let message = format!("{cut} requests were longer than {most} tokens and lost tokens on their left");
        tell(observer, Event::Warning(&message));
    }
    Ok(scores.into_iter().map(|(_, scores)| scores).collect())
}

/// Whether BOS stands in front of a task's texts.
pub fn add_bos_token(task: &dyn Task, config: &EvalConfig) -> Option<bool> {
    match task.harness() {
        Harness::LmEval => config.lm_eval_add_bos_token.or(config.add_bos_token),
        _ => config.add_bos_token,
    }
}

/// Tasks that are asked together: their places, by whether their texts get BOS.
fn by_bos(tasks: &[Box<dyn Task>], config: &EvalConfig) -> Vec<(Option<bool>, Vec<usize>)> {
    let mut groups: Vec<(Option<bool>, Vec<usize>)> = Vec::new();
    for (i, task) in tasks.iter().enumerate() {
        let bos = add_bos_token(task.as_ref(), config);
        match groups.iter_mut().find(|(of_group, _)| *of_group == bos) {
            Some((_, places)) => places.push(i),
            None => groups.push((bos, vec![i])),
        }
    }
    groups
}

/// A cache that fails costs time, and stops nothing.
fn warn_of(cache: &ResponseCache, observer: &mut Observer<'_>) {
    if let Some(error) = cache.failure() {
        let message =
            format!("{error}; answers are not kept for other commands (--cache names another folder, --no-cache none)");
        tell(observer, Event::Warning(&message));
    }
}

/// What tells answers in predictions files apart: the model, and how texts become tokens.
fn fingerprint(loaded: &LoadedModel, config: &EvalConfig, add_bos_token: Option<bool>) -> String {
    let bos = match add_bos_token {
        None => "",
        Some(true) => ":bos",
        Some(false) => ":no-bos",
    };
    let most = config.max_length.map_or_else(String::new, |n| format!(":{n}"));
    format!("{}{bos}{most}", loaded.fingerprint)
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
    Ok(write_file(path, &[json.as_slice(), b"\n"].concat())?)
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
pub(crate) fn check_room(task: &dyn Task, positions: usize) -> Result<(), LabError> {
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
