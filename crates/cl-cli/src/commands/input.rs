use std::io::{BufRead, stdin};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result};

/// Lines of standard input, read by a separate thread so that waiting can be interrupted.
pub struct Lines {
    lines: Receiver<std::io::Result<Vec<u8>>>,
    number: usize,
}

/// Interval between checks for an interrupt.
const LOOK: Duration = Duration::from_millis(50);

impl Lines {
    /// Starts the thread.
    pub fn new() -> Lines {
        // Reads at most one line ahead.
        let (sender, lines) = sync_channel(1);
        std::thread::spawn(move || {
            for line in stdin().lock().split(b'\n') {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Lines { lines, number: 0 }
    }

    /// Returns the next line without its line break; `None` at the end of the input, or if interrupted.
    pub fn next(&mut self, interrupted: &dyn Fn() -> bool) -> Result<Option<String>> {
        let line = loop {
            match self.lines.recv_timeout(LOOK) {
                Ok(line) => break line.context("cannot read standard input")?,
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if interrupted() => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        self.number += 1;
        let text = String::from_utf8(line)
            .ok()
            .with_context(|| format!("line {} of standard input is not valid UTF-8", self.number))?;
        Ok(Some(text.strip_suffix('\r').map_or(text.clone(), str::to_owned)))
    }
}
