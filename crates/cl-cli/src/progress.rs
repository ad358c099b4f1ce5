//! Progress bars, shown below the log messages.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;

use cl_checkpoint::logging::LogArgs;
use cl_lab::{Event, StudyEvent};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// All progress bars of the process; they are hidden while a message is printed.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Displays progress events.
pub struct Progress {
    bar: Option<ProgressBar>,
    wanted: bool,
    tokens: u64,
    seconds: f64,
    scoring: String,
}

impl Progress {
    /// Creates a progress display on stderr. There are no bars if stderr is not a terminal, or with --quiet or JSON
    /// messages.
    pub fn new(log: LogArgs) -> Progress {
        let wanted = io::stderr().is_terminal() && !log.is_quiet() && !log.is_json();
        Progress { bar: None, wanted, tokens: 0, seconds: 0.0, scoring: String::new() }
    }

    /// Handles an event.
    pub fn observe(&mut self, event: Event<'_>) {
        match event {
            Event::Stage(_) => self.clear(),
            Event::Skipped(_) | Event::Warning(_) => {}
            Event::Step(progress) => {
                self.tokens += progress.step.tokens;
                self.seconds += progress.step.seconds;
                let rate = self.tokens as f64 / self.seconds.max(1e-9);
                let message = format!(
                    "loss {:.4}  grad norm {:.3}  {rate:.0} tokens/s",
                    progress.step.loss, progress.step.grad_norm
                );
                self.draw("steps", progress.step.step, progress.total_steps, message);
                if progress.step.step == progress.total_steps {
                    self.clear();
                    (self.tokens, self.seconds) = (0, 0.0);
                }
            }
            Event::Scored { task, done, all } => {
                if self.scoring != task {
                    self.clear();
                    task.clone_into(&mut self.scoring);
                }
                self.draw(task, done as u64, all as u64, String::new());
                if done == all {
                    self.clear();
                    self.scoring.clear();
                }
            }
        }
    }

    fn draw(&mut self, what: &str, done: u64, all: u64, message: String) {
        if !self.wanted {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("  {prefix} {bar:30} {pos}/{len}  {msg}  eta {eta}")
                .expect("a constant template");
            BARS.add(ProgressBar::new(all).with_style(style).with_prefix(what.to_owned()))
        });
        bar.set_length(all);
        bar.set_position(done);
        bar.set_message(message);
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Writes messages to stderr, above the progress bars. Errors are ignored: a closed stderr should not stop a long run.
pub struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = BARS.suspend(|| io::stderr().write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Displays the events of a study: one bar for all stages, and one for each running stage. Without a terminal, it
/// prints a line for each stage that ends.
pub struct StudyProgress {
    all: Option<ProgressBar>,
    running: BTreeMap<usize, (String, Option<ProgressBar>)>,
    wanted: bool,
    stages: usize,
    /// Number of stages completed earlier.
    done: usize,
    /// Stages completed since then; a stage whose removed model is needed again is completed twice.
    completed: BTreeSet<usize>,
}

impl StudyProgress {
    /// Creates a display on this process's stderr.
    pub fn new(log: LogArgs) -> StudyProgress {
        let wanted = io::stderr().is_terminal() && !log.is_quiet() && !log.is_json();
        StudyProgress { all: None, running: BTreeMap::new(), wanted, stages: 0, done: 0, completed: BTreeSet::new() }
    }

    /// Handles an event.
    pub fn observe(&mut self, event: StudyEvent) {
        match event {
            StudyEvent::Begun { stages, done } => {
                (self.stages, self.done) = (stages, done);
                tracing::info!("{stages} stages, {done} of them completed earlier");
                self.all = self.wanted.then(|| {
                    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} stages  {elapsed}  eta {eta}")
                        .expect("a constant template");
                    let bar = BARS.add(ProgressBar::new(stages as u64).with_style(style));
                    bar.set_position(done as u64);
                    bar.reset_eta();
                    bar
                });
            }
            StudyEvent::Started { stage, name } => {
                let bar = self.wanted.then(|| {
                    let style =
                        ProgressStyle::with_template("  {bar:20} {prefix}  {msg}").expect("a constant template");
                    BARS.add(ProgressBar::new(100).with_style(style).with_prefix(name.clone()))
                });
                self.running.insert(stage, (name, bar));
            }
            StudyEvent::Progress { stage, what, share } => {
                if let Some((_, Some(bar))) = self.running.get(&stage) {
                    bar.set_position((share * 100.0) as u64);
                    bar.set_message(what);
                }
            }
            StudyEvent::Warning { stage, message } => tracing::warn!("{}: {message}", self.name(stage)),
            StudyEvent::Finished { stage, seconds } => {
                let done = self.count(stage);
                tracing::info!("{done} of {}: {}, {seconds:.1} s", self.stages, self.name(stage));
                self.end(stage);
            }
            StudyEvent::Elsewhere { name, .. } => tracing::debug!("{name}: another process runs it"),
            StudyEvent::FinishedElsewhere { stage, name } => {
                let done = self.count(stage);
                tracing::info!("{done} of {}: {name}, by another process", self.stages);
                self.end(stage);
            }
            StudyEvent::NotRemoved { error } => {
                tracing::warn!("models that are not needed anymore were not removed: {error}");
            }
            StudyEvent::Failed { stage, error } => {
                tracing::error!("{}: {error}", self.name(stage));
                self.end(stage);
            }
        }
    }

    /// Notes that a stage is complete, and returns how many are.
    fn count(&mut self, stage: usize) -> usize {
        self.completed.insert(stage);
        self.completed()
    }

    fn completed(&self) -> usize {
        (self.done + self.completed.len()).min(self.stages)
    }

    fn name(&self, stage: usize) -> &str {
        self.running.get(&stage).map_or("stage", |(name, _)| name)
    }

    fn end(&mut self, stage: usize) {
        if let Some((_, Some(bar))) = self.running.remove(&stage) {
            bar.finish_and_clear();
        }
        if let Some(all) = &self.all {
            all.set_position(self.completed() as u64);
        }
    }
}

impl Drop for StudyProgress {
    fn drop(&mut self) {
        for bar in self.running.values_mut().filter_map(|(_, bar)| bar.take()).chain(self.all.take()) {
            bar.finish_and_clear();
        }
    }
}
