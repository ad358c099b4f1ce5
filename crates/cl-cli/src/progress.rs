//! Progress on stderr: bars on a terminal, a line a stage otherwise.

use std::io::IsTerminal;

use cl_lab::Event;
use indicatif::{ProgressBar, ProgressStyle};

use crate::output::say;

/// Draws the events of a study.
pub struct Progress {
    bar: Option<ProgressBar>,
    terminal: bool,
    tokens: u64,
    seconds: f64,
    scoring: String,
}

impl Progress {
    /// For this process's stderr.
    pub fn new() -> Progress {
        let terminal = std::io::stderr().is_terminal();
        Progress { bar: None, terminal, tokens: 0, seconds: 0.0, scoring: String::new() }
    }

    /// Takes an event.
    pub fn observe(&mut self, event: Event<'_>) {
        match event {
            Event::Stage(name) => {
                self.clear();
                say(name);
            }
            Event::Skipped(name) => {
                self.clear();
                say(format_args!("  {name}: done before"));
            }
            Event::Warning(message) => {
                self.clear();
                say(format_args!("warning: {message}"));
            }
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
                    say(format_args!(
                        "  {} steps, {:.0} s, {rate:.0} tokens/s, last loss {:.4}",
                        progress.total_steps, self.seconds, progress.step.loss
                    ));
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
                    say(format_args!("  scored {task}: {all} documents"));
                }
            }
        }
    }

    fn draw(&mut self, what: &str, done: u64, all: u64, message: String) {
        if !self.terminal {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("  {prefix} {bar:30} {pos}/{len}  {msg}  eta {eta}")
                .expect("a constant template");
            ProgressBar::new(all).with_style(style).with_prefix(what.to_owned())
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
