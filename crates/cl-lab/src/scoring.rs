use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::write_file;
use cl_checkpoint::{Adapter, Interrupt};
use cl_data::Tokenizer;
use cl_eval::{Harness, LanguageModel, Open, Request, ResponseCache, Scores, Task, evaluate_all};
use cl_model::{Decoder, LoadOptions, Scorer};
use cl_moe::Mixture;
use cl_torch::Quantization;
use cl_torch::tch::Device;
use cl_train::{Precision, Ranks};

use crate::model_dir::{mixture_hash, model_hash, open_mixture, open_model, other_base};
use crate::observe::tell;
use crate::problem::TaskNameProblem;
use crate::scoring_ranks::{RankedScorer, serve};
use crate::{EvalConfig, Event, LabError, Observer};

/// A loaded model with its tokenizer.
pub struct LoadedModel {
    /// The model.
    pub model: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Identifies the model: hash of its files, dtype of the computation, and format of quantized weights.
    pub fingerprint: String,
    dir: PathBuf,  // the model directory
    base: String,  // its hash
    dtype: String, // of the computation, and the format of quantized weights
}

impl LoadedModel {
    /// Loads a model directory, optionally with an adapter or a mixture of adapters. With `quantization`, the weights
    /// of the linear layers are kept in that format in memory, as in training with `[train.lora] base`; adapter weights
    /// are not quantized.
    ///
    /// # Errors
    /// Returns an error if either directory is invalid, or if the adapter replaces weights that are quantized.
    pub fn open(
        dir: &Path,
        adapter: Option<&Path>,
        precision: Precision,
        quantization: Option<Quantization>,
        device: Device,
    ) -> Result<LoadedModel, LabError> {
        let (checkpoint, tokenizer) = open_model(dir)?;
        let options = LoadOptions { device, quantization, ..LoadOptions::cpu(cl_torch::kind(precision)) };
        let model = Decoder::load(&checkpoint, options)?;
        let base = model_hash(dir)?;
        let format = quantization.map_or_else(String::new, |format| format!(":{}", format.name()));
        // Answers in the cache were decoded with a penalty of 1, unless their fingerprint says otherwise.
        let penalty = Some(model.config.repetition_penalty).filter(|penalty| *penalty != 1.0);
        let penalty = penalty.map_or_else(String::new, |penalty| format!(":repetition_penalty={penalty}"));
        let dtype = format!("{precision}{format}{penalty}");
        let dir = dir.to_owned();
        let mut loaded = LoadedModel { model, tokenizer, fingerprint: String::new(), dir, base, dtype };
        loaded.set_adapter(adapter)?;
        Ok(loaded)
    }

    /// Replaces the adapter or mixture of adapters; the model itself stays loaded.
    ///
    /// # Errors
    /// Returns an error if the adapter or mixture is invalid, or if the mixture was made for another base; the model is
    /// then unchanged.
    pub fn set_adapter(&mut self, adapter: Option<&Path>) -> Result<(), LabError> {
        let (base, dtype) = (&self.base[..32], &self.dtype);
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
                let adapter = Adapter::open(adapter)?;
                let hash = adapter.content_hash()?;
                if let Some(warning) = other_base(&adapter, &self.dir, &self.base) {
                    tracing::warn!("{warning}");
                }
                self.model.load_lora(&adapter, 0.0)?;
                format!("{base}+{}:{dtype}", &hash[..32])
            }
        };
        Ok(())
    }
}

/// Scores a model on all tasks. Predictions are written to `out/<task>.jsonl`; existing predictions are reused, so that
/// an interrupted run can be resumed.
///
/// # Errors
/// Returns an error if the model fails, or if a file cannot be read or written; [`LabError::is_interrupted`] tells
/// whether a stop was requested.
pub fn score_model(
    loaded: &LoadedModel,
    tasks: &[Box<dyn Task>],
    config: &EvalConfig,
    out: &Path,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<Vec<Scores>, LabError> {
    score_model_on(&Ranks::alone(), loaded, tasks, config, out, interrupt, observer)
}

/// Like [`score_model`], on several ranks. Each rank calls this with the same model and configuration. Tasks and `out`
/// are used by rank 0 only, which returns the scores; the other ranks answer a part of its requests and return no
/// scores.
///
/// # Errors
/// Like [`score_model`], and if a rank has exited or holds a different model than rank 0.
pub fn score_model_on(
    ranks: &Ranks,
    loaded: &LoadedModel,
    tasks: &[Box<dyn Task>],
    config: &EvalConfig,
    out: &Path,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<Vec<Scores>, LabError> {
    ranks.check_same("the model", &loaded.fingerprint)?;
    let mut scorer = scorer(loaded, config, observer);
    if !ranks.is_first() {
        serve(&mut scorer, ranks, interrupt)?;
        return Ok(Vec::new());
    }
    for task in tasks {
        check_room(task.as_ref(), scorer.max_length)?;
    }
    let known_failure = scorer.cache.as_ref().is_some_and(|c| c.failure().is_some());
    let mut ranked = RankedScorer { scorer, ranks, interrupt };
    let scores = answer_all(&mut ranked, loaded, tasks, config, out, observer);
    let stopped = scores.is_err() && interrupt.requested();
    if stopped || scores.is_ok() {
        ranked.end(stopped)?;
    }
    let scorer = &ranked.scorer;
    if let Some(cache) = scorer.cache.as_ref().filter(|c| c.failure().is_some() && !known_failure) {
        warn_of(cache, observer);
    }
    if scorer.truncated > 0 {
        let (cut, most) = (scorer.truncated, scorer.max_length);
        let message = format!("{cut} requests were longer than {most} tokens and were truncated on the left");
        tell(observer, Event::Warning(&message));
    }
    if stopped { Err(cl_eval::Error::Interrupted.into()) } else { scores }
}

/// Creates the scorer that answers requests with the model, including the response cache.
fn scorer<'m>(loaded: &'m LoadedModel, config: &EvalConfig, observer: &mut Observer<'_>) -> Scorer<'m> {
    let mut scorer = Scorer::new(&loaded.model, &loaded.tokenizer);
    scorer.batch_tokens = config.batch_tokens;
    scorer.batch_sequences = config.batch_sequences;
    if let Some(message) = beyond_the_model(config, scorer.max_length) {
        tell(observer, Event::Warning(&message));
    }
    scorer.max_length = config.max_length.unwrap_or(scorer.max_length);
    if let Some(dir) = &config.cache {
        // Requests contain tokens, so only model and dtype have to match.
        let cache = ResponseCache::open(dir, &loaded.fingerprint);
        warn_of(&cache, observer);
        if let Some(line) = cache.damaged().first() {
            let (lines, path) = (cache.damaged().len(), cache.path().display());
            let message =
                format!("{path}: {lines} damaged lines (first: line {line}); their answers are computed again");
            tell(observer, Event::Warning(&message));
        }
        scorer.cache = Some(cache);
    }
    scorer
}

/// Returns the scores of all tasks, in order. Tasks with and without BOS are answered separately.
fn answer_all(
    ranked: &mut RankedScorer<'_, '_>,
    loaded: &LoadedModel,
    tasks: &[Box<dyn Task>],
    config: &EvalConfig,
    out: &Path,
    observer: &mut Observer<'_>,
) -> Result<Vec<Scores>, LabError> {
    let names = file_names(tasks)?;
    let interrupt = ranked.interrupt;
    let mut scores: Vec<(usize, Scores)> = Vec::with_capacity(tasks.len());
    for (add_bos_token, of_group) in by_bos(tasks, config) {
        ranked.scorer.add_bos_token = add_bos_token;
        ranked.scorer.fingerprint = Some(fingerprint(loaded, config, add_bos_token));
        let open = |&i: &usize| Open { task: tasks[i].as_ref(), predictions: out.join(&names[i]) };
        let open: Vec<Open<'_>> = of_group.iter().map(open).collect();
        let alone = ranked.ranks.world_size() == 1;
        let model: &mut dyn LanguageModel = if alone { &mut ranked.scorer } else { ranked };
        let of_open = evaluate_all(&open, model, &mut |task, done, all| {
            tell(observer, Event::Scored { task: open[task].task.name(), done, all });
            if interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        scores.extend(of_group.into_iter().zip(of_open));
    }
    scores.sort_by_key(|(i, _)| *i);
    Ok(scores.into_iter().map(|(_, scores)| scores).collect())
}

/// Returns whether BOS is prepended to the texts of a task; `None` is the tokenizer's default.
pub fn add_bos_token(task: &dyn Task, config: &EvalConfig) -> Option<bool> {
    match task.harness() {
        Harness::LmEval => config.lm_eval_add_bos_token.or(config.add_bos_token),
        _ => config.add_bos_token,
    }
}

/// Groups tasks, by index, by whether BOS is prepended.
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

/// Reports a failure of the cache as a warning.
fn warn_of(cache: &ResponseCache, observer: &mut Observer<'_>) {
    if let Some(error) = cache.failure() {
        let message =
            format!("{error}; answers are not cached (set another directory with --cache, or use --no-cache)");
        tell(observer, Event::Warning(&message));
    }
}

/// Returns the fingerprint stored in predictions files: the model, and how texts are tokenized.
fn fingerprint(loaded: &LoadedModel, config: &EvalConfig, add_bos_token: Option<bool>) -> String {
    let bos = match add_bos_token {
        None => "",
        Some(true) => ":bos",
        Some(false) => ":no-bos",
    };
    let most = config.max_length.map_or_else(String::new, |n| format!(":{n}"));
    format!("{}{bos}{most}", loaded.fingerprint)
}

/// Writes scores as JSON, atomically. Creates the directory if needed.
///
/// # Errors
/// Returns [`LabError::Io`] if a file cannot be written.
pub fn write_scores(path: &Path, scores: &[Scores]) -> Result<(), LabError> {
    let dir = path.parent().unwrap_or(path);
    std::fs::create_dir_all(dir).map_err(LabError::io(dir))?;
    let json =
        serde_json::to_vec_pretty(scores).map_err(|e| LabError::Io { path: path.to_owned(), source: e.into() })?;
    Ok(write_file(path, &[json.as_slice(), b"\n"].concat())?)
}

/// Returns the names of the tasks' predictions files. A task given by a path is named after its last component, so that
/// nothing is written outside the directory.
pub(crate) fn file_names(tasks: &[Box<dyn Task>]) -> Result<Vec<String>, LabError> {
    let mut names: Vec<String> = Vec::with_capacity(tasks.len());
    for task in tasks {
        let wrong = |problem| LabError::TaskName { name: task.name().to_owned(), problem };
        let last = Path::new(task.name()).file_name().ok_or_else(|| wrong(TaskNameProblem::NoFileName))?;
        let name = format!("{}.jsonl", last.to_string_lossy());
        if let Some(other) = names.iter().position(|n| *n == name) {
            return Err(wrong(match tasks[other].name() {
                same if same == task.name() => TaskNameProblem::Twice,
                other => TaskNameProblem::SameFile { other: other.to_owned() },
            }));
        }
        names.push(name);
    }
    Ok(names)
}

/// Returns a warning if texts may be longer than the model's maximum length.
pub(crate) fn beyond_the_model(config: &EvalConfig, positions: usize) -> Option<String> {
    let max_length = config.max_length.filter(|n| *n > positions)?;
    Some(format!(
        "max_length {max_length} exceeds the model's maximum length of {positions} tokens (max_position_embeddings in \
         config.json); longer texts reach positions that it was not trained on"
    ))
}

/// Checks that an answer leaves room for a prompt. The harness truncates a prompt on the left until prompt and answer
/// fit, so an answer that fills all positions would leave no prompt.
pub(crate) fn check_room(task: &dyn Task, positions: usize) -> Result<(), LabError> {
    let most = (0..task.len()).filter_map(|d| match task.request(d) {
        Request::Generate(request) => Some(request.max_new_tokens),
        Request::Loglikelihood(_) | Request::Continuation(_) => None,
    });
    match most.max() {
        Some(max_new_tokens) if max_new_tokens >= positions => {
            Err(LabError::NoRoom { task: task.name().to_owned(), max_new_tokens, positions })
        }
        _ => Ok(()),
    }
}
