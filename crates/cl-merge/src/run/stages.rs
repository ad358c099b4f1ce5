//! Merge files with several stages: each one is a merge whose models can be earlier stages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{FileStamp, write_file};
use cl_checkpoint::{Manifest, OutputDir};

use super::engine::{Summary, merge};
use super::options::MergeOptions;
use super::provenance;
use crate::Error;
use crate::plan::inputs::STATE_NAME;
use crate::plan::{Plan, problems_without_stages};
use crate::problem::{ConfigProblem, Place, Problem};
use crate::recipe::config::{ExtraTensors, MergeConfig, MergeFile, Vocabulary, model_and_adapter};
use crate::recipe::registry::MethodRegistry;

/// Progress events of [`run_file`] and [`run_file_with`].
pub enum Event<'e> {
    /// A stage starts: its name, and the number of tensor bytes that it writes.
    Stage(&'e str, u64),
    /// A stage was completed by an earlier run and is reused.
    Kept(&'e str),
    /// Number of bytes of the stage written so far.
    Written(u64),
    /// A note of a plan; each is reported once. It describes something unusual that does not prevent the merge.
    Note(&'e str),
}

/// Runs all stages and writes the last one's result to `out`.
///
/// Earlier stages are written to `.NAME.stages` next to it, one directory each, and removed at the end. After an
/// interrupted run, completed stages are reused unless the file or the inputs have changed.
///
/// # Errors
/// Returns [`Error::Problems`] with the problems of all stages before anything is written, or an error if merging fails.
pub fn run_file(
    file: &MergeFile,
    out: &Path,
    options: &MergeOptions,
    observe: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Summary, Error> {
    run_file_with(file, &MethodRegistry::builtin(), out, options, observe)
}

/// Like [`run_file`], with methods that are not built in; see [`MethodRegistry`] for an example.
///
/// # Errors
/// Returns the errors of [`run_file`].
pub fn run_file_with(
    file: &MergeFile,
    methods: &MethodRegistry,
    out: &Path,
    options: &MergeOptions,
    observe: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Summary, Error> {
    check(file)?;
    check_output(file, out, options.overwrite)?;
    if file.stages.len() > 1 {
        check_all(file, methods, options)?;
    }
    let folder = folder(out);
    let mut done = BTreeMap::new();
    let mut noted = BTreeSet::new();
    let mut planned = |stage: &MergeConfig, done: &BTreeMap<String, PathBuf>| {
        let plan = Plan::of_stage(stage, methods, done).map_err(|error| match error {
            Error::Problems(problems) if !done.is_empty() => {
                Error::StageProblems { stage: title(stage).to_owned(), problems, kept: folder.clone() }
            }
            other => other,
        })?;
        for note in &plan.notes {
            if noted.insert(note.clone()) {
                observe(Event::Note(note));
            }
        }
        Ok::<Plan, Error>(plan)
    };
    let (last, earlier) = file.stages.split_last().expect("checked");
    for stage in earlier {
        let name = stage.name.as_deref().expect("checked");
        let dir = folder.join(name);
        let plan = planned(stage, &done)?;
        let fingerprint = fingerprint(&plan);
        if Manifest::read(&dir).is_ok() && std::fs::read_to_string(note(&folder, name)).is_ok_and(|f| f == fingerprint)
        {
            observe(Event::Kept(name));
        } else {
            observe(Event::Stage(name, plan.bytes_written()));
            let _span = tracing::info_span!("stage", name).entered();
            let options = MergeOptions { overwrite: true, ..options.clone() };
            merge(&plan, &dir, &options, &|bytes| observe(Event::Written(bytes)))?;
            write_file(&note(&folder, name), fingerprint.as_bytes())?;
        }
        done.insert(name.to_owned(), dir);
    }
    let mut plan = planned(last, &done)?;
    plan.stages = earlier.to_vec();
    observe(Event::Stage(title(last), plan.bytes_written()));
    let span = tracing::info_span!("stage", name = title(last)).entered();
    let summary = merge(&plan, out, options, &|bytes| observe(Event::Written(bytes)))?;
    drop(span);
    drop(plan);
    for (name, dir) in &done {
        remove_stage(&folder, name, dir).map_err(|source| Error::Io { path: dir.clone(), source })?;
    }
    // The folder is removed only if it is empty: other files in it are not ours.
    let _ = std::fs::remove_dir(&folder);
    Ok(summary)
}

/// Removes a stage's directory. If the process is killed in the meantime, the next run repeats the stage: without the
/// note, it is not reused, and with its manifest, what is left of the directory can be overwritten.
fn remove_stage(folder: &Path, name: &str, dir: &Path) -> std::io::Result<()> {
    std::fs::remove_file(note(folder, name))?;
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_file() && !path.ends_with("manifest.json") {
            std::fs::remove_file(path)?;
        }
    }
    std::fs::remove_dir_all(dir)
}

/// Checks the output path before any work; see [`OutputDir::check`].
///
/// # Errors
/// Returns an error if the output exists, contains anything other than a model, or overlaps with an input.
pub fn check_output(file: &MergeFile, out: &Path, overwrite: bool) -> Result<(), Error> {
    let stages: Vec<&str> = file.stages.iter().filter_map(|s| s.name.as_deref()).collect();
    let written = file.stages.iter().flat_map(MergeConfig::written_models);
    let parts = written.flat_map(|written| {
        let (model, adapter) = model_and_adapter(written);
        std::iter::once(model).chain(adapter)
    });
    let models = parts.filter(|model| !stages.contains(model));
    let inputs: Vec<(&str, &Path)> = models.map(|model| ("a model to be merged", Path::new(model))).collect();
    Ok(OutputDir::check(out, overwrite, &inputs)?)
}

/// Checks that stages have distinct names and precede their uses.
pub(crate) fn check(file: &MergeFile) -> Result<(), Error> {
    let mut problems = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    let Some((last, earlier)) = file.stages.split_last() else {
        return Err(Problem::whole(ConfigProblem::NoMerge).into());
    };
    let of_stage = |i: usize, kind: ConfigProblem| Problem::new(Place::Stage(i + 1), kind);
    for (i, stage) in earlier.iter().enumerate() {
        match stage.name.as_deref() {
            None => problems.push(of_stage(i, ConfigProblem::UnnamedStage)),
            Some(name) if seen.contains(&name) => {
                problems.push(Problem::whole(ConfigProblem::StageNamedTwice { name: name.to_owned() }));
            }
            Some(name) if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') => {
                problems.push(Problem::whole(ConfigProblem::StageName { name: name.to_owned() }));
            }
            Some(name) => seen.push(name),
        }
    }
    let names: Vec<&str> = file.stages.iter().filter_map(|s| s.name.as_deref()).collect();
    for (i, stage) in file.stages.iter().enumerate() {
        for model in stage.written_models() {
            if let Some(at) = names.iter().position(|n| *n == model_and_adapter(model).0)
                && at >= i
            {
                problems.push(of_stage(i, ConfigProblem::LaterStage { stage: model.to_owned() }));
            }
        }
    }
    let used =
        |name: &str| file.stages.iter().any(|s| s.written_models().iter().any(|m| model_and_adapter(m).0 == name));
    let unused =
        seen.iter().filter(|name| !used(name)).map(|name| ConfigProblem::UnusedStage { name: (*name).to_owned() });
    problems.extend(unused.map(Problem::whole));
    let _ = last;
    if problems.is_empty() { Ok(()) } else { Err(Error::Problems(problems)) }
}

/// Returns the name of a stage in messages.
pub(crate) fn title(stage: &MergeConfig) -> &str {
    stage.name.as_deref().unwrap_or("result")
}

/// Plans every stage before the first one runs. The result of an earlier stage does not exist yet. If it will have the
/// tensors of one of its models, that model is used in its place; otherwise only checks that do not need it are made.
///
/// # Errors
/// Returns [`Error::Problems`] with the problems of all stages.
pub(crate) fn check_all(file: &MergeFile, methods: &MethodRegistry, options: &MergeOptions) -> Result<(), Error> {
    let names: Vec<&str> = file.stages.iter().filter_map(|s| s.name.as_deref()).collect();
    let mut stand_ins: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut problems = Vec::new();
    for stage in &file.stages {
        let is_stage = |written: &&str| names.contains(&model_and_adapter(written).0);
        let written = stage.written_models();
        let uses: Vec<&str> =
            written.into_iter().filter(is_stage).map(|written| model_and_adapter(written).0).collect();
        // The state that a method continues from is written together with the output.
        let goes_on = stage.method.parameters.previous.as_deref().is_some_and(|written| is_stage(&written));
        let found = if goes_on || uses.iter().any(|name| !stand_ins.contains_key(*name)) {
            problems_without_stages(stage, methods, &names)
        } else {
            let planned = Plan::of_stage(stage, methods, &stand_ins).and_then(|plan| {
                // The model used in place of a stage may have another dtype.
                if uses.is_empty() { plan.peak_memory(options).map(drop) } else { Ok(()) }
            });
            match planned {
                Ok(()) => {
                    let stand_in = stand_in(stage, &stand_ins);
                    stand_ins.extend(stage.name.clone().zip(stand_in));
                    Vec::new()
                }
                Err(Error::Problems(found)) => found,
                Err(other) => return Err(other),
            }
        };
        problems.extend(found.into_iter().map(|problem| problem.in_stage(title(stage))));
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Problems(problems)) }
}

/// Returns a model with the same config, tokenizer and tensors, apart from their values, as the result of a stage.
fn stand_in(stage: &MergeConfig, stand_ins: &BTreeMap<String, PathBuf>) -> Option<PathBuf> {
    let same_tensors = stage.slices.is_empty()
        && stage.vocabulary == Vocabulary::Error
        && stage.extra_tensors == ExtraTensors::Error
        && stage.tokenizer.is_none()
        && stage.tokenizer_source.is_none();
    let first = || stage.models.first().map(|model| &model.model);
    let written = stage.base_model.as_ref().or_else(first).filter(|_| same_tensors)?;
    let directories = stage.directories(stand_ins);
    let (model, adapter) = model_and_adapter(written);
    // An adapter may add tokens.
    adapter.is_none().then(|| directories.get(model).cloned().unwrap_or_else(|| PathBuf::from(model)))
}

/// Returns the folder in which results of stages are kept until the last one is done.
fn folder(out: &Path) -> PathBuf {
    let absolute = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    let name = absolute.file_name().unwrap_or_default().to_string_lossy().into_owned();
    absolute.with_file_name(format!(".{name}.stages"))
}

fn note(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.made-from"))
}

/// Returns a fingerprint of a stage's inputs: the settings, and every input file that it reads or copies, with inode,
/// size and time of change.
fn fingerprint(plan: &Plan) -> String {
    let mut text = provenance::to_toml(plan);
    for input in &plan.inputs.models {
        let of_adapter = input.folded.iter().flat_map(|folded| folded.adapter().stamps());
        for (file, stamp) in input.checkpoint.stamps().iter().chain(of_adapter) {
            text += &format!("{} {stamp:?}\n", file.display());
        }
        // The state of an earlier merge, which the method may continue from.
        let state = input.path.join(STATE_NAME);
        text += &format!("{} {:?}\n", state.display(), FileStamp::of(&state).ok());
    }
    text
}
