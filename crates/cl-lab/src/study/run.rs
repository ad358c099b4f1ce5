//! Runs the stages of a study, several in parallel, each as soon as those it depends on are complete.

use std::fs::File;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use cl_checkpoint::files::{MAX_CONFIG, read_file, write_file};
use cl_checkpoint::{Interrupt, refuse_overlap};
use cl_data::{ChatTemplate, Dataset, Encoding};
use cl_eval::{Column, Task, TaskGroup};
use cl_report::StudyResults;
use cl_torch::tch::Device;
use serde_json::{Value, json};

use super::config::StudyConfig;
use super::graph::{Stage, Work, select, stages};
use super::plan::{StudyPlan, StudySizes, plan};
use super::results::results;
use super::work::{Inputs, Record, Site, tasks_hash};
use crate::check::{Checked, require_sequence};
use crate::columns::columns;
use crate::model_dir::open_model;
use crate::problem::OutputProblem;
use crate::{Event, LabError, ModelRef, Observer, Round, SequenceConfig};

/// Options of a study.
#[derive(Clone, Debug, Default)]
pub struct StudyOptions {
    /// Number of stages that run in parallel, each with the memory of a training run; 1 by default.
    pub jobs: Option<NonZero<usize>>,
    /// Run only stages whose name starts with one of these, and those they depend on; all if empty.
    pub only: Vec<String>,
    /// Keep the models of completed stages; otherwise only adapters, mixtures of adapters and scores.
    pub keep_models: bool,
}

/// Progress events of a study. Stages are identified by their index.
#[derive(Clone, Debug)]
pub enum StudyEvent {
    /// Number of stages, at the start.
    Begun {
        /// Number of selected stages.
        stages: usize,
        /// Number of stages completed by earlier runs.
        done: usize,
    },
    /// A stage starts.
    Started {
        /// Its index.
        stage: usize,
        /// Its name.
        name: String,
    },
    /// Progress of a stage: the current step, and the completed fraction of it.
    Progress {
        /// Its index.
        stage: usize,
        /// The current step.
        what: String,
        /// Completed fraction, in `[0, 1]`.
        share: f64,
    },
    /// A warning from a stage.
    Warning {
        /// Its index.
        stage: usize,
        /// The warning.
        message: String,
    },
    /// Models that no stage needs anymore cannot be removed.
    NotRemoved {
        /// Index of the stage after which they are not needed.
        stage: usize,
        /// Why.
        error: Arc<LabError>,
    },
    /// A stage is complete.
    Finished {
        /// Its index.
        stage: usize,
        /// Its duration in seconds.
        seconds: f64,
    },
    /// A stage failed.
    Failed {
        /// Its index.
        stage: usize,
        /// Why.
        error: Arc<LabError>,
    },
}

/// A failed stage; stages that depend on it were not started.
#[derive(Debug)]
pub struct StageError {
    /// Its name.
    pub stage: String,
    /// Why.
    pub error: Arc<LabError>,
}

impl std::fmt::Display for StageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stage {}: {}", self.stage, self.error)
    }
}

/// Runs a study. Writes to `out`: `study.json`, `stages/<name>/`, `results.json`, `times.json`.
///
/// Stages completed by earlier runs with the same inputs are reused. If a stage fails, stages that do not depend on it
/// still run, and the results contain those that succeeded.
///
/// # Errors
/// Returns [`LabError::Study`] if the configuration is invalid, [`LabError::Output`] if `out` contains anything else or
/// is used by another process, [`LabError::Stages`] with every failed stage, and [`LabError::StudyInterrupted`] if a
/// stop was requested.
pub fn run_study(
    config: &StudyConfig,
    out: &Path,
    options: &StudyOptions,
    interrupt: &Interrupt,
    observer: &mut dyn FnMut(StudyEvent),
) -> Result<StudyResults, LabError> {
    let study = Study::open(config, out, options)?;
    let _lock = study.claim()?;
    study.run(interrupt, observer)
}

/// Estimates [`run_study`] without running anything.
///
/// # Errors
/// Returns an error if the configuration is invalid, or does not fit the model and data.
pub fn plan_study(config: &StudyConfig, out: &Path, options: &StudyOptions) -> Result<StudyPlan, LabError> {
    let study = Study::open(config, out, options)?;
    let interrupt = Interrupt::default();
    let site = study.site(&interrupt);
    let records: Vec<Option<Record>> = (0..study.stages.len()).map(|place| study.record(&site, place)).collect();
    let (checkpoint, tokenizer) = open_model(&config.model)?;
    let chat = ChatTemplate::from_dir(&config.model)?;
    let max_length = study.sequence.train.max_length;
    let encoding = Encoding { tokenizer: &tokenizer, chat: chat.as_ref(), max_length, profile: config.profile };
    let longest = study.sequence.eval.max_length;
    let sizes = StudySizes::of(checkpoint.config().clone(), &study.datasets, encoding, &study.tasks, longest)?;
    plan(config, &study.stages, &study.wanted, &records, &sizes, options.keep_models)
}

/// Writes the configuration to the study's directory, which must be empty or belong to a study. No other process can
/// use the directory while the lock exists.
pub(super) fn mark(config: &StudyConfig, out: &Path) -> Result<File, LabError> {
    const MARKER: &str = "study.json";
    let refuse = |problem| Err(LabError::Output { path: out.to_owned(), problem });
    let marker = out.join(MARKER);
    std::fs::create_dir_all(out).map_err(LabError::io(out))?;
    if !is_study(&marker) {
        for entry in std::fs::read_dir(out).map_err(LabError::io(out))? {
            let name = entry.map_err(LabError::io(out))?.file_name().to_string_lossy().into_owned();
            // What a kill right at the start leaves.
            if name != ".study.lock" && !(name.starts_with(".study.json.") && name.ends_with(".part")) {
                return refuse(OutputProblem::NotEmpty { what: "study", marker: MARKER });
            }
        }
    }
    let path = out.join(".study.lock");
    let lock = File::options().create(true).append(true).open(&path).map_err(LabError::io(&path))?;
    if let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
        return refuse(OutputProblem::Busy);
    }
    write_file(&marker, format!("{:#}\n", json!({"cl_study": 1, "config": config})).as_bytes())?;
    Ok(lock)
}

/// Whether a file marks a study's directory, and is not another program's file of this name.
fn is_study(marker: &Path) -> bool {
    let value = read_file(marker, MAX_CONFIG).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    value.is_some_and(|value| value.get("cl_study").is_some())
}

struct Study<'a> {
    config: &'a StudyConfig,
    out: &'a Path,
    options: &'a StudyOptions,
    stages: Vec<Stage>,
    /// Whether each stage is selected.
    wanted: Vec<bool>,
    keys: Vec<String>,
    /// The evaluation of the study, as a sequence.
    sequence: SequenceConfig,
    device: Device,
    rounds: Vec<Round>,
    /// Training data of each round.
    datasets: Vec<Vec<Dataset>>,
    tasks: Vec<Box<dyn Task>>,
    /// The tasks of each column.
    scored: Vec<TaskGroup>,
    columns: Vec<Column>,
    metrics: Vec<String>,
}

impl<'a> Study<'a> {
    /// Loads and checks the inputs of all stages.
    fn open(config: &'a StudyConfig, out: &'a Path, options: &'a StudyOptions) -> Result<Study<'a>, LabError> {
        let stages = stages(config)?;
        let wanted = select(&stages, &options.only)?;
        let [sequence, full] = config.sequences()?;
        let Checked { device, rounds, datasets, validation, tasks, columns: scored } = require_sequence(&sequence)?;
        let base = ModelRef::take(&config.model)?;
        let data = datasets.iter().chain(&validation).flatten().map(|set| set.hash.as_str()).collect::<Vec<&str>>();
        // How everything is scored, whatever it was made by.
        let (eval, profile) = (&full.eval, config.profile);
        let tasks_hash = tasks_hash(&tasks);
        let world = json!({"format": 3, "base": base.hash(), "data": data, "tasks": tasks_hash, "eval": eval, "profile": profile});
        let mut keys: Vec<String> = Vec::with_capacity(stages.len());
        for stage in &stages {
            let needs: Vec<&str> = stage.needs.iter().map(|&place| keys[place].as_str()).collect();
            let text = json!([world, without_paths(&stage.work), needs]).to_string();
            keys.push(blake3::hash(text.as_bytes()).to_hex().to_string());
        }
        let metric = |group: &TaskGroup| {
            let first = tasks.iter().find(|task| group.members.iter().any(|name| name == task.name()));
            first.map_or_else(String::new, |task| task.metric().main().to_owned())
        };
        let metrics = scored.iter().map(metric).collect();
        let columns = columns(&sequence, &rounds, &scored);
        Ok(Study {
            config,
            out,
            options,
            stages,
            wanted,
            keys,
            sequence,
            device,
            rounds,
            datasets,
            tasks,
            scored,
            columns,
            metrics,
        })
    }

    fn site<'s>(&'s self, interrupt: &'s Interrupt) -> Site<'s> {
        Site {
            config: &self.sequence,
            device: self.device,
            tasks: &self.tasks,
            columns: &self.scored,
            rounds: &self.rounds,
            datasets: &self.datasets,
            out: self.out,
            interrupt,
        }
    }

    /// Makes the directory this study's; the lock lasts as long as the study runs.
    fn claim(&self) -> Result<File, LabError> {
        let out = self.out;
        let inputs = [("the base model", self.config.model.as_path()), ("the data", self.config.data.as_path())];
        refuse_overlap(&out.join("stages"), &inputs)?;
        mark(self.config, out)
    }

    /// The record of a stage, if it was completed with the same key.
    fn record(&self, site: &Site<'_>, place: usize) -> Option<Record> {
        Record::read(&site.dir(&self.stages[place])).filter(|record| record.key == self.keys[place])
    }

    fn run(&self, interrupt: &Interrupt, observer: &mut dyn FnMut(StudyEvent)) -> Result<StudyResults, LabError> {
        let site = self.site(interrupt);
        let states = self.states(&site);
        let (stages, done) = (states.iter().filter(|s| !matches!(s, State::Unwanted)).count(), count_done(&states));
        observer(StudyEvent::Begun { stages, done });
        let jobs = self.options.jobs.map_or(1, NonZero::get).min(stages.saturating_sub(done).max(1));
        let threads = usize::try_from(cl_torch::tch::get_num_threads()).unwrap_or(1);
        let threads = self.config.threads.map_or((threads / jobs).max(1), usize::from);
        let board = Board { states: Mutex::new(states), changed: Condvar::new() };
        let (sender, events) = channel();
        thread::scope(|scope| {
            for _ in 0..jobs {
                let (sender, board, site) = (sender.clone(), &board, &site);
                scope.spawn(move || self.work(board, site, threads, &sender));
            }
            drop(sender);
            for event in events {
                observer(event);
            }
        });
        self.finish(&site, board.states.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Determines the stages to run. A completed stage whose result was removed runs again if another stage needs it.
    fn states(&self, site: &Site<'_>) -> Vec<State> {
        let stages = &self.stages;
        let mut states: Vec<State> = (0..stages.len())
            .map(|place| match self.record(site, place) {
                _ if !self.wanted[place] => State::Unwanted,
                Some(record) => State::Done(record),
                None => State::Waiting,
            })
            .collect();
        for place in (0..stages.len()).rev() {
            if matches!(states[place], State::Waiting) {
                for &need in &stages[place].needs {
                    let gone = site.artifact(&stages[need]).is_some_and(|path| !path.join("manifest.json").exists());
                    if gone && matches!(states[need], State::Done(_)) {
                        states[need] = State::Waiting;
                    }
                }
            }
        }
        states
    }

    /// A worker thread: runs stages until no more can be started.
    fn work(&self, board: &Board, site: &Site<'_>, threads: usize, sender: &Sender<StudyEvent>) {
        // Threads of libtorch are a setting of the thread that asks.
        cl_torch::set_threads(u16::try_from(threads).unwrap_or(u16::MAX));
        // A receiver that is gone is no reason to stop.
        let tell = |event| drop(sender.send(event));
        while let Some(stage) = board.take(&self.stages, site.interrupt) {
            tell(StudyEvent::Started { stage, name: self.stages[stage].id.clone() });
            let _unwinding = Unwinding { board, stage };
            let result = self.run_stage(site, stage, &tell).map_err(Arc::new);
            match &result {
                Ok(record) => tell(StudyEvent::Finished { stage, seconds: record.seconds }),
                Err(error) if error.is_interrupted() => {}
                Err(error) => tell(StudyEvent::Failed { stage, error: error.clone() }),
            }
            let dropped = board.put(stage, result, &self.stages, |over| match self.options.keep_models {
                true => Ok(()),
                false => site.drop_models(&self.stages[over]),
            });
            if let Err(error) = dropped {
                tell(StudyEvent::NotRemoved { stage, error: Arc::new(error) });
            }
        }
    }

    fn run_stage(&self, site: &Site<'_>, stage: usize, tell: &dyn Fn(StudyEvent)) -> Result<Record, LabError> {
        let needs = &self.stages[stage].needs;
        let made = needs.iter().filter_map(|&place| {
            let stage = &self.stages[place];
            Some((site.artifact(stage)?, stage.id.clone()))
        });
        let (dirs, names) = made.unzip();
        let inputs = Inputs { dirs, names, experts: self.experts(stage) };
        let mut what = String::new();
        let observe: &mut Observer<'_> = &mut |event| match event {
            Event::Stage(name) => name.clone_into(&mut what),
            Event::Step(step) => {
                let share = step.step.step as f64 / step.total_steps.max(1) as f64;
                tell(StudyEvent::Progress { stage, what: what.clone(), share });
            }
            Event::Scored { task, done, all } => {
                let share = done as f64 / all.max(1) as f64;
                tell(StudyEvent::Progress { stage, what: format!("scoring {task}"), share });
            }
            Event::Warning(message) => tell(StudyEvent::Warning { stage, message: message.to_owned() }),
            Event::Skipped(_) => {}
        };
        // What a stage tells step by step is no message of a study of hundreds.
        let quiet = tracing::subscriber::NoSubscriber::default();
        tracing::subscriber::with_default(quiet, || site.run(&self.stages[stage], &inputs, &self.keys[stage], observe))
    }

    /// The rounds, from 0, of the models that a stage is built from, directly or through its mixture.
    fn experts(&self, stage: usize) -> Vec<usize> {
        let of = |&need: &usize| match self.stages[need].row.round {
            Some(round) => vec![round - 1],
            None => self.experts(need),
        };
        self.stages[stage].needs.iter().flat_map(of).collect()
    }

    fn finish(&self, site: &Site<'_>, states: Vec<State>) -> Result<StudyResults, LabError> {
        // What earlier calls finished counts as well, whatever this one was limited to.
        let records: Vec<Option<Record>> = states
            .iter()
            .enumerate()
            .map(|(place, state)| match state {
                State::Done(record) => Some(record.clone()),
                State::Unwanted => self.record(site, place),
                _ => None,
            })
            .collect();
        let stages: Vec<(&Stage, &Record)> =
            self.stages.iter().zip(&records).filter_map(|(s, r)| Some((s, r.as_ref()?))).collect();
        let (results, times) = results(self.config, &self.columns, &self.metrics, &stages);
        for (name, value) in [("results.json", json!(without_times(&results))), ("times.json", times)] {
            let path = self.out.join(name);
            let text =
                serde_json::to_vec_pretty(&value).map_err(|e| LabError::Io { path: path.clone(), source: e.into() })?;
            write_file(&path, &[text.as_slice(), b"\n"].concat())?;
        }
        let failed = self.stages.iter().zip(states).filter_map(|(stage, state)| match state {
            State::Failed(error) if !error.is_interrupted() => Some(StageError { stage: stage.id.clone(), error }),
            _ => None,
        });
        let failed: Vec<StageError> = failed.collect();
        if !failed.is_empty() {
            return Err(LabError::Stages(failed));
        }
        if site.interrupt.requested() {
            return Err(LabError::StudyInterrupted);
        }
        Ok(results)
    }
}

fn without_times(results: &StudyResults) -> StudyResults {
    let mut results = results.clone();
    results.rows.iter_mut().for_each(|row| row.seconds = None);
    results
}

/// The part of a stage's work that enters its key: everything but the paths of model and data, whose content is hashed.
fn without_paths(work: &Work) -> Value {
    match work {
        Work::Rounds(config) => {
            let (model, data) = (PathBuf::new(), PathBuf::new());
            json!({"rounds": SequenceConfig { model, data, ..(**config).clone() }})
        }
        other => json!(other),
    }
}

enum State {
    Unwanted,
    Waiting,
    Running,
    Done(Record),
    Failed(Arc<LabError>),
    /// A stage that it depends on failed, or it panicked.
    Cut,
}

fn count_done(states: &[State]) -> usize {
    states.iter().filter(|state| matches!(state, State::Done(_))).count()
}

/// The state of all stages.
struct Board {
    states: Mutex<Vec<State>>,
    changed: Condvar,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next stage that can be started; `None` if there will be no more.
    fn take(&self, stages: &[Stage], interrupt: &Interrupt) -> Option<usize> {
        let mut states = self.lock();
        loop {
            if interrupt.requested() {
                return None;
            }
            cut(&mut states, stages);
            let done = |place: &usize| matches!(states[*place], State::Done(_));
            let ready = |(place, state): (usize, &State)| {
                (matches!(state, State::Waiting) && stages[place].needs.iter().all(done)).then_some(place)
            };
            if let Some(place) = states.iter().enumerate().find_map(ready) {
                states[place] = State::Running;
                return Some(place);
            }
            if !states.iter().any(|state| matches!(state, State::Running)) {
                return None;
            }
            states = self.changed.wait(states).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Records the outcome of a stage; calls `over` for each stage that no other stage needs anymore.
    fn put(
        &self,
        place: usize,
        result: Result<Record, Arc<LabError>>,
        stages: &[Stage],
        mut over: impl FnMut(usize) -> Result<(), LabError>,
    ) -> Result<(), LabError> {
        let mut states = self.lock();
        states[place] = match result {
            Ok(record) => State::Done(record),
            Err(error) => State::Failed(error),
        };
        let waits = |state: &State| matches!(state, State::Waiting | State::Running);
        let needed = |need: usize| (0..stages.len()).any(|p| waits(&states[p]) && stages[p].needs.contains(&need));
        let candidates = stages[place].needs.iter().copied().chain([place]);
        let idle = candidates.filter(|&p| matches!(states[p], State::Done(_)) && !needed(p));
        let result = idle.map(&mut over).find(Result::is_err).unwrap_or(Ok(()));
        self.changed.notify_all();
        result
    }
}

/// Prevents a panicking stage from leaving others waiting. The panic ends the study after they finish.
struct Unwinding<'a> {
    board: &'a Board,
    stage: usize,
}

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.board.lock()[self.stage] = State::Cut;
            self.board.changed.notify_all();
        }
    }
}

/// Marks the stages that depend on a failed one.
fn cut(states: &mut [State], stages: &[Stage]) {
    for place in 0..states.len() {
        let lost = |&need: &usize| matches!(states[need], State::Failed(_) | State::Cut);
        if matches!(states[place], State::Waiting) && stages[place].needs.iter().any(lost) {
            states[place] = State::Cut;
        }
    }
}
