//! Progress bars, below the log messages.

use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;

use cl_checkpoint::logging::LogArgs;
use cl_lab::Event;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// All bars of the process, which are hidden while a message is printed.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Draws progress events.
pub struct Progress {
    bar: Option<ProgressBar>,
    wanted: bool,
    tokens: u64,
    seconds: f64,
    scoring: String,
}

impl Progress {
    /// Draws to stderr. There are no bars if stderr is not a terminal, or with --quiet or JSON messages.
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

/// Standard error for messages, above the bars. Errors are ignored: a closed stderr should not stop a long run.
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
