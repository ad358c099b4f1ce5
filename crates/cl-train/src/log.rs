use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::TrainError;

/// One optimizer step, as a line of `log.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLog {
    /// Number of the step, from 1.
    pub step: u64,
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Loss, normalised as the config says.
    pub loss: f64,
    /// What was added to the loss to stay orthogonal to earlier adapters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub penalty: Option<f64>,
    /// L2 norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Tokens that the loss looked at.
    pub supervised_tokens: u64,
    /// Wall-clock seconds of the step.
    pub seconds: f64,
}

/// Writes the log as the run goes, and after a resume goes on behind the last saved step.
pub(crate) struct LogWriter {
    path: PathBuf,
    file: File,
}

impl LogWriter {
    /// Opens the log and drops the lines of steps after `last_step`, which will be taken again; returns the others.
    pub(crate) fn open(path: &Path, last_step: u64) -> Result<(LogWriter, Vec<StepLog>), TrainError> {
        let kept: Vec<StepLog> = if last_step > 0 && path.exists() {
            read_log(path)?.into_iter().filter(|l| l.step <= last_step).collect()
        } else {
            Vec::new()
        };
        let part = path.with_extension("jsonl.part");
        let mut file = File::create(&part).map_err(TrainError::io(&part))?;
        for line in &kept {
            write_line(&mut file, line).map_err(TrainError::io(&part))?;
        }
        std::fs::rename(&part, path).map_err(TrainError::io(path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::io(path))?;
        Ok((LogWriter { path: path.to_owned(), file }, kept))
    }

    pub(crate) fn write(&mut self, line: &StepLog) -> Result<(), TrainError> {
        write_line(&mut self.file, line).map_err(TrainError::io(&self.path))
    }
}

fn write_line(file: &mut File, line: &StepLog) -> std::io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    file.write_all(text.as_bytes())
}

/// Mean loss of the last tenth of some steps (at least one of them); NaN for none.
pub fn final_loss(steps: &[StepLog]) -> f64 {
    let last = &steps[steps.len() - steps.len().div_ceil(10)..];
    last.iter().map(|s| s.loss).sum::<f64>() / last.len() as f64
}

/// Reads a `log.jsonl`; a last line that a kill cut off is left out.
///
/// # Errors
/// [`TrainError::Io`] when the file cannot be read.
pub fn read_log(path: &Path) -> Result<Vec<StepLog>, TrainError> {
    let file = File::open(path).map_err(TrainError::io(path))?;
    let mut steps = Vec::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(TrainError::io(path))?;
        if let Ok(step) = serde_json::from_str(&line) {
            steps.push(step);
        }
    }
    Ok(steps)
}
