use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{open_file, write_file_with};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::report_to::{Report, ReportTo};

/// Record of one optimizer step: a line of `log.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLog {
    /// Number of the step, from 1.
    pub step: u64,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Loss, averaged as set by `loss_norm`.
    pub loss: f64,
    /// O-LoRA's penalty, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub penalty: Option<f64>,
    /// Load-balancing loss of routers, before its coefficient.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancing: Option<f64>,
    /// Router z-loss, before its coefficient.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub z_loss: Option<f64>,
    /// Validation loss after the step, if it was evaluated: the mean over all supervised tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// L2 norm of all gradients, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Number of tokens processed.
    pub tokens: u64,
    /// Number of tokens that the loss covers.
    pub supervised_tokens: u64,
    /// Wall-clock seconds of the step.
    pub seconds: f64,
}

/// Writes the step log. A resumed run continues the log after the last checkpoint.
pub(crate) struct LogWriter {
    path: PathBuf,
    file: File,
    reports: Vec<Report>,
}

impl LogWriter {
    /// Opens `log.jsonl` in `dir` and removes the lines of steps after `last_step`, which will be repeated. Returns the
    /// remaining lines, from which the other formats are rewritten.
    pub(crate) fn open(
        dir: &Path,
        last_step: u64,
        report_to: &[ReportTo],
        validates: bool,
    ) -> Result<(LogWriter, Vec<StepLog>), TrainError> {
        let path = &dir.join("log.jsonl");
        let kept: Vec<StepLog> = if last_step > 0 && path.exists() {
            read_log(path)?.into_iter().filter(|l| l.step <= last_step).collect()
        } else {
            Vec::new()
        };
        write_file_with(path, |file| kept.iter().try_for_each(|line| write_line(file, line)))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::io(path))?;
        let reports = report_to.iter().map(|to| to.open(dir, &kept, validates)).collect::<Result<Vec<_>, _>>()?;
        Ok((LogWriter { path: path.to_owned(), file, reports }, kept))
    }

    pub(crate) fn write(&mut self, line: &StepLog) -> Result<(), TrainError> {
        write_line(&mut self.file, line).map_err(TrainError::io(&self.path))?;
        self.reports.iter_mut().try_for_each(|report| report.write(line))
    }
}

fn write_line(file: &mut File, line: &StepLog) -> std::io::Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    file.write_all(text.as_bytes())
}

/// Mean loss over the last 10% of the steps (at least one); NaN if there are none.
pub fn final_loss(steps: &[StepLog]) -> f64 {
    let last = &steps[steps.len() - steps.len().div_ceil(10)..];
    last.iter().map(|s| s.loss).sum::<f64>() / last.len() as f64
}

/// Reads a `log.jsonl`; damaged or incomplete lines are skipped.
///
/// # Errors
/// Returns [`TrainError::Io`] if the file cannot be read.
pub fn read_log(path: &Path) -> Result<Vec<StepLog>, TrainError> {
    let mut steps = Vec::new();
    // Read as bytes, so that invalid UTF-8 affects only its own line.
    for line in BufReader::new(open_file(path)?).split(b'\n') {
        if let Ok(step) = serde_json::from_slice(&line.map_err(TrainError::io(path))?) {
            steps.push(step);
        }
    }
    Ok(steps)
}
