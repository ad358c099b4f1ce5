use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tfrecord::{EventWriter, EventWriterConfig};

use crate::{StepLog, TrainError};

/// Formats of the step log in addition to `log.jsonl`, named after Transformers' `report_to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportTo {
    /// `log.csv`: a header, then one line per step.
    Csv,
    /// `events.out.tfevents.cl` for TensorBoard: the scalars `train/loss`, `train/grad_norm`, …, by step.
    Tensorboard,
}

/// An open file of the step log.
pub(crate) enum Report {
    Csv { path: PathBuf, file: File, validates: bool },
    Tensorboard(PathBuf, EventWriter<File>),
}

impl ReportTo {
    /// Opens the file and rewrites the earlier steps. Their times are reconstructed backwards from the current time.
    /// With `validates`, the CSV file has a column for the validation loss.
    pub(crate) fn open(self, dir: &Path, before: &[StepLog], validates: bool) -> Result<Report, TrainError> {
        let path = dir.join(match self {
            ReportTo::Csv => "log.csv",
            ReportTo::Tensorboard => "events.out.tfevents.cl",
        });
        let mut file = File::create(&path).map_err(TrainError::io(&path))?;
        let mut report = match self {
            ReportTo::Csv => {
                let eval_loss = if validates { ",eval_loss" } else { "" };
                writeln!(file, "{}{eval_loss}", CSV_HEADER.join(",")).map_err(TrainError::io(&path))?;
                Report::Csv { path, file, validates }
            }
            ReportTo::Tensorboard => {
                let writer = EventWriter::from_writer(file, EventWriterConfig::default()).map_err(other(&path))?;
                Report::Tensorboard(path, writer)
            }
        };
        let mut time = now() - before.iter().map(|step| step.seconds).sum::<f64>();
        for step in before {
            time += step.seconds;
            report.write_at(step, time)?;
        }
        Ok(report)
    }
}

const CSV_HEADER: [&str; 11] = [
    "step",
    "epoch",
    "loss",
    "penalty",
    "load_balancing",
    "z_loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "supervised_tokens",
    "seconds",
];

impl Report {
    pub(crate) fn write(&mut self, step: &StepLog) -> Result<(), TrainError> {
        self.write_at(step, now())
    }

    fn write_at(&mut self, step: &StepLog, time: f64) -> Result<(), TrainError> {
        match self {
            Report::Csv { path, file, validates } => writeln!(
                file,
                "{},{},{},{},{},{},{},{},{},{},{}{}",
                step.step,
                step.epoch,
                step.loss,
                optional(step.penalty),
                optional(step.load_balancing),
                optional(step.z_loss),
                step.grad_norm,
                step.learning_rate,
                step.tokens,
                step.supervised_tokens,
                step.seconds,
                if *validates { format!(",{}", optional(step.eval_loss)) } else { String::new() }
            )
            .map_err(TrainError::io(path)),
            Report::Tensorboard(path, writer) => {
                let number = i64::try_from(step.step).unwrap_or(i64::MAX);
                let scalars = [
                    ("train/loss", Some(step.loss)),
                    ("train/penalty", step.penalty),
                    ("train/load_balancing", step.load_balancing),
                    ("train/z_loss", step.z_loss),
                    ("eval/loss", step.eval_loss),
                    ("train/grad_norm", Some(step.grad_norm)),
                    ("train/learning_rate", Some(step.learning_rate)),
                    ("train/epoch", Some(step.epoch as f64)),
                    ("train/tokens_per_second", Some(step.tokens as f64 / step.seconds.max(1e-9))),
                ];
                for (tag, value) in scalars.into_iter().filter_map(|(tag, value)| Some((tag, value?))) {
                    writer.write_scalar(tag, (number, time), value as f32).map_err(other(path))?;
                }
                Ok(())
            }
        }
    }
}

fn optional(value: Option<f64>) -> String {
    value.map(|v| v.to_string()).unwrap_or_default()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn other(path: &Path) -> impl FnOnce(tfrecord::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Io { path, source: std::io::Error::other(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> StepLog {
        StepLog {
            step,
            epoch: 0,
            loss: 0.5 / step as f64,
            penalty: (step == 2).then_some(0.25),
            load_balancing: None,
            z_loss: None,
            eval_loss: (step == 2).then_some(0.75),
            grad_norm: 1.0,
            learning_rate: 1e-4,
            tokens: 40,
            supervised_tokens: 4,
            seconds: 0.5,
        }
    }

    #[test]
    fn a_resumed_csv_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut report = ReportTo::Csv.open(folder.path(), &[step(1)], false).unwrap();
        report.write(&step(2)).unwrap();
        let text = std::fs::read_to_string(folder.path().join("log.csv")).unwrap();
        let expected = "step,epoch,loss,penalty,load_balancing,z_loss,grad_norm,learning_rate,tokens,supervised_tokens,\
                        seconds\n1,0,0.5,,,,1,0.0001,40,4,0.5\n2,0,0.25,0.25,,,1,0.0001,40,4,0.5\n";
        assert_eq!(text, expected);
        let mut report = ReportTo::Csv.open(folder.path(), &[step(1)], true).unwrap();
        report.write(&step(2)).unwrap();
        let text = std::fs::read_to_string(folder.path().join("log.csv")).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].ends_with(",seconds,eval_loss") && lines[1].ends_with(",0.5,") && lines[2].ends_with(",0.5,0.75")
        );
    }

    #[test]
    fn tensorboard_gets_every_scalar_by_step() {
        let folder = tempfile::tempdir().unwrap();
        let mut report = ReportTo::Tensorboard.open(folder.path(), &[step(1)], true).unwrap();
        report.write(&step(2)).unwrap();
        let path = folder.path().join("events.out.tfevents.cl");
        let reader = std::io::BufReader::new(File::open(&path).unwrap());
        let events = tfrecord::EventIter::from_reader(reader, tfrecord::RecordReaderConfig::default());
        let mut read = Vec::new();
        for event in events {
            let event = event.unwrap();
            let Some(tfrecord::protobuf::event::What::Summary(summary)) = event.what else { continue };
            for value in summary.value {
                if let Some(tfrecord::protobuf::summary::value::Value::SimpleValue(number)) = value.value {
                    read.push((event.step, value.tag, number));
                }
            }
        }
        assert_eq!(read.len(), 12, "five scalars, then seven with the penalty and the validation loss");
        assert!(read.contains(&(2, "eval/loss".to_owned(), 0.75)));
        assert!(read.contains(&(1, "train/loss".to_owned(), 0.5)));
        assert!(read.contains(&(2, "train/penalty".to_owned(), 0.25)));
        assert!(read.contains(&(2, "train/tokens_per_second".to_owned(), 80.0)));
    }
}
