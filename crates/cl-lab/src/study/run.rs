//! Runs the stages of a study, several in parallel, each as soon as its dependencies are complete.

use std::fs::File;
use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use cl_checkpoint::files::write_file;
use cl_checkpoint::{Interrupt, refuse_overlap};
use cl_data::{ChatTemplate, Dataset, Encoding};
use cl_eval::{Column, Task, TaskGroup};
use cl_report::StudyResults;
use cl_torch::tch::Device;
use serde_json::json;

use super::board::{Board, News, Stages, State, Unwinding};
use super::config::{ColumnConfig, StudyConfig};
use super::directory::{StageLock, take_shared};
use super::graph::{Stage, select, stages};
use super::key::{StageKey, World};
use super::plan::{StudyPlan, StudySizes, plan};
use super::results::results;
use super::work::{Inputs, Record, Site, tasks_hash};
use crate::check::{Checked, main_score, require_sequence};
use crate::columns::columns;
use crate::model_dir::open_model;
use crate::problem::StudyProblem;
use crate::{Event, Finding, Gpus, LabError, ModelRef, Observer, Round, SequenceConfig, check_sequence};

/// Options of a study.
#[derive(Clone, Debug, Default)]
pub struct StudyOptions {
    /// Number of stages that run in parallel, each of which needs the memory of a training run; 1 by default.
    pub jobs: Option<NonZero<usize>>,
    /// Run only stages whose names start with one of these, and their dependencies; all stages if empty.
    pub only: Vec<String>,
    /// Keep the models of completed stages; otherwise, only adapters, mixtures of adapters and scores are kept.
    pub keep_models: bool,
    /// GPUs to plan for, one process on each; if not set, the device and threads of the configuration.
    pub gpus: Option<Gpus>,
}

/// Progress events of a study. Stages are identified by their index.
#[derive(Clone, Debug)]
pub enum StudyEvent {
    /// The study starts.
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
    /// Models that no stage needs anymore could not be removed.
    NotRemoved {
        /// Why.
        error: Arc<LabError>,
    },
    /// Another process is running a stage.
    Elsewhere {
        /// Its index.
        stage: usize,
        /// Its name.
        name: String,
    },
    /// Another process completed a stage.
    FinishedElsewhere {
        /// Its index.
        stage: usize,
        /// Its name.
        name: String,
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
/// Several processes may run the same study in the same directory, also on different machines that share it: each stage
/// is run by one of them, and each process returns when all stages are complete. The file system has to support locks,
/// as local ones, NFS and Lustre do.
///
/// Stages completed by earlier runs with the same inputs are reused. If a stage fails, stages that do not depend on it
/// still run, and the results contain those that succeeded.
///
/// # Errors
/// Returns [`LabError::Study`] if the configuration is invalid, [`LabError::Output`] if `out` contains anything else or
/// is used by another process, [`LabError::Stages`] with all failed stages, and [`LabError::StudyInterrupted`] if a
/// stop was requested.
pub fn run_study(
    config: &StudyConfig,
    out: &Path,
    options: &StudyOptions,
    interrupt: &Interrupt,
    observer: &mut dyn FnMut(StudyEvent),
) -> Result<StudyResults, LabError> {
    let study = Study::open(config, out, options)?;
    let _lock = study.take_directory()?;
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
    let plan = plan(config, &study.stages, &study.wanted, &records, &sizes, options)?;
    let findings = check_sequence(&study.sequence).into_iter();
    let warnings = findings.filter_map(|finding| match finding {
        Finding::Fact(fact) if fact.starts_with("warning: ") => Some(fact),
        _ => None,
    });
    Ok(StudyPlan { warnings: warnings.collect(), ..plan })
}

struct Study<'a> {
    config: &'a StudyConfig,
    out: &'a Path,
    options: &'a StudyOptions,
    stages: Vec<Stage>,
    /// Whether each stage is selected.
    wanted: Vec<bool>,
    keys: Vec<StageKey>,
    /// Configuration with which all models are evaluated, as a sequence.
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
        let world = World {
            base: base.hash(),
            profile: config.profile,
            rounds: &rounds,
            datasets: &datasets,
            validation: &validation,
            scoring: json!([tasks_hash(&tasks), full.eval]),
        };
        let keys = world.keys(&stages);
        let metric = |group: &TaskGroup| {
            let first = tasks.iter().find(|task| group.members.iter().any(|name| name == task.name()));
            first.map_or_else(String::new, |task| main_score(task.as_ref()))
        };
        let metrics = scored.iter().map(metric).collect();
        let columns = columns(&sequence, &rounds, &scored);
        check_columns(config, &columns)?;
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

    /// Takes the directory for this study; the lock must be held while the study runs.
    fn take_directory(&self) -> Result<File, LabError> {
        let out = self.out;
        let inputs = [("the base model", self.config.model.as_path()), ("the data", self.config.data.as_path())];
        refuse_overlap(&out.join("stages"), &inputs)?;
        take_shared(self.config, out)
    }

    /// Returns the record of a stage if it was completed with the same cache key.
    fn record(&self, site: &Site<'_>, place: usize) -> Option<Record> {
        Record::read(&site.dir(&self.stages[place])).filter(|record| record.key == self.keys[place].scored)
    }

    fn run(&self, interrupt: &Interrupt, observer: &mut dyn FnMut(StudyEvent)) -> Result<StudyResults, LabError> {
        let site = self.site(interrupt);
        let states = self.states(&site);
        let stages = states.iter().filter(|state| !matches!(state, State::Unwanted)).count();
        let done = states.iter().filter(|state| matches!(state, State::Done(_))).count();
        observer(StudyEvent::Begun { stages, done });
        let jobs = self.options.jobs.map_or(1, NonZero::get).min(stages.saturating_sub(done).max(1));
        let threads = usize::try_from(cl_torch::tch::get_num_threads()).unwrap_or(1);
        let threads = self.config.threads.map_or((threads / jobs).max(1), usize::from);
        let of_site = AtSite { study: self, site: &site };
        let board = Board::new(&of_site, states);
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
        // Remove models that other processes were still using before.
        let removed = if self.options.keep_models { Ok(()) } else { board.remove_models() };
        if let Err(error) = removed {
            observer(StudyEvent::NotRemoved { error: Arc::new(error) });
        }
        self.finish(&site, board.into_states())
    }

    /// Determines which stages to run. A completed stage whose result was removed runs again if another stage needs it.
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
                    if site.is_gone(&stages[need]) && matches!(states[need], State::Done(_)) {
                        states[need] = State::Waiting;
                    }
                }
            }
        }
        states
    }

    /// Body of a worker thread: runs stages until no more can be started.
    fn work(&self, board: &Board<'_>, site: &Site<'_>, threads: usize, sender: &Sender<StudyEvent>) {
        // libtorch's number of threads is set per calling thread.
        cl_torch::set_threads(u16::try_from(threads).unwrap_or(u16::MAX));
        // The work goes on even if nobody receives its events.
        let tell = |event| drop(sender.send(event));
        let name = |stage: usize| self.stages[stage].id.clone();
        let news = |news| match news {
            News::Elsewhere(stage) => tell(StudyEvent::Elsewhere { stage, name: name(stage) }),
            News::Done(stage) => tell(StudyEvent::FinishedElsewhere { stage, name: name(stage) }),
        };
        while let Some((stage, lock)) = board.take(&news) {
            tell(StudyEvent::Started { stage, name: name(stage) });
            let _unwinding = Unwinding { board, stage };
            let result = self.run_stage(site, stage, &tell).map_err(Arc::new);
            match &result {
                Ok(record) => tell(StudyEvent::Finished { stage, seconds: record.seconds }),
                Err(error) if error.is_interrupted() => {}
                Err(error) => tell(StudyEvent::Failed { stage, error: error.clone() }),
            }
            drop(lock); // release it first, since models in use are not removed
            board.put(stage, result);
            let removed = if self.options.keep_models { Ok(()) } else { board.remove_models() };
            if let Err(error) = removed {
                tell(StudyEvent::NotRemoved { error: Arc::new(error) });
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
        // Step-by-step messages of a stage are not logged; a study can have hundreds of stages.
        let quiet = tracing::subscriber::NoSubscriber::default();
        let run = || site.run(&self.stages[stage], &inputs, &self.keys[stage], observe);
        let record = tracing::subscriber::with_default(quiet, run);
        // The next stage may run on another thread, which could not reuse the memory freed by this one.
        cl_torch::release_memory();
        record
    }

    /// Returns the rounds, from 0, of the models that a stage is built from, directly or through its mixture.
    fn experts(&self, stage: usize) -> Vec<usize> {
        let of = |&need: &usize| match self.stages[need].row.round {
            Some(round) => vec![round - 1],
            None => self.experts(need),
        };
        self.stages[stage].needs.iter().flat_map(of).collect()
    }

    fn finish(&self, site: &Site<'_>, states: Vec<State>) -> Result<StudyResults, LabError> {
        // Stages completed by earlier runs are included, even if they are not selected in this one.
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

/// The stages of a study, in its directory.
struct AtSite<'a> {
    study: &'a Study<'a>,
    site: &'a Site<'a>,
}

impl Stages for AtSite<'_> {
    fn all(&self) -> &[Stage] {
        &self.study.stages
    }

    fn lock(&self, place: usize) -> Result<Option<StageLock>, LabError> {
        let stage = &self.study.stages[place];
        StageLock::try_new(self.study.out, stage, stage.needs.iter().map(|&need| &self.study.stages[need]))
    }

    fn record(&self, place: usize) -> Option<Record> {
        self.study.record(self.site, place)
    }

    fn is_gone(&self, place: usize) -> bool {
        self.site.is_gone(&self.study.stages[place])
    }

    fn remove_models(&self, place: usize) -> Result<bool, LabError> {
        let stage = &self.study.stages[place];
        let Some(_lock) = StageLock::try_new(self.study.out, stage, std::iter::empty())? else { return Ok(false) };
        self.site.drop_models(stage)?;
        Ok(true)
    }

    fn is_stopped(&self) -> bool {
        self.site.interrupt.requested()
    }
}

/// Checks what the configuration says about columns.
fn check_columns(config: &StudyConfig, columns: &[Column]) -> Result<(), StudyProblem> {
    for ColumnConfig { name, chance, .. } in &config.columns {
        if columns.iter().all(|column| column.name != *name) {
            let scored = columns.iter().map(|column| column.name.clone()).collect();
            return Err(StudyProblem::NoColumn { name: name.clone(), scored });
        }
        if let Some(chance) = chance.filter(|chance| !(0.0..=1.0).contains(chance)) {
            return Err(StudyProblem::Chance { name: name.clone(), chance });
        }
    }
    Ok(())
}

fn without_times(results: &StudyResults) -> StudyResults {
    let mut results = results.clone();
    results.rows.iter_mut().for_each(|row| row.seconds = None);
    results
}
