use std::path::{Path, PathBuf};

use cl_adapters::SequenceShape;
use cl_data::{Columns, Dataset, Format, Mixture, Split, load_as, load_split_as};
use cl_eval::{TaskSpec, task_homes};
use cl_train::{TrainConfig, ValidationConfig};
use serde_json::Value;

use crate::problem::{RoundProblem, RoundsProblem};
use crate::{LabError, RoundConfig, SequenceConfig};

/// A round with all of its settings, including those inherited from the sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Round {
    /// Name of the round.
    pub name: String,
    /// Files, or task directories with a train split.
    pub data: Vec<PathBuf>,
    /// Format of the rows.
    pub format: Format,
    /// Field names of the rows.
    pub columns: Columns,
    /// Tasks that it trains on.
    pub scored: Vec<String>,
    /// How its data sets and replayed rows are combined.
    pub mixture: Mixture,
    /// Training settings.
    pub train: TrainConfig,
    /// Validation during training.
    pub validation: Option<ValidationConfig>,
}

impl SequenceConfig {
    /// Returns the rounds of `[[rounds]]`, or one round per entry of `tasks`.
    ///
    /// # Errors
    /// Returns what is wrong, with the name of the key or of the round.
    pub fn resolve_rounds(&self) -> Result<Vec<Round>, RoundsProblem> {
        let rounds: Vec<RoundConfig> = match (self.tasks.as_slice(), self.rounds.as_slice()) {
            ([], []) => return Err(RoundsProblem::None),
            (tasks, []) => tasks.iter().map(|task| RoundConfig::of_task(task)).collect(),
            ([], rounds) => rounds.to_vec(),
            _ => return Err(RoundsProblem::TasksAndRounds),
        };
        let key = if self.rounds.is_empty() { "tasks" } else { "rounds" };
        for (i, round) in rounds.iter().enumerate() {
            let name = &round.name;
            if Path::new(name).file_name().is_none_or(|last| last != name.as_str()) {
                return Err(RoundsProblem::Name { key, name: name.clone() });
            }
            if rounds[..i].iter().any(|r| r.name == *name) {
                return Err(RoundsProblem::Twice { key, name: name.clone(), entry: i + 1 });
            }
        }
        let wrong = |name: &str, problem| RoundsProblem::Round { name: name.to_owned(), problem: Box::new(problem) };
        rounds.iter().map(|round| self.resolve(round).map_err(|problem| wrong(&round.name, problem))).collect()
    }

    fn resolve(&self, round: &RoundConfig) -> Result<Round, RoundProblem> {
        let named = [PathBuf::from(&round.name)];
        let data: &[PathBuf] = if round.data.is_empty() { &named } else { &round.data };
        let mixture = Mixture { joint: round.joint.clone().unwrap_or(self.mixture.joint.clone()), replay: self.replay };
        mixture.validate(data.len())?;
        round.columns.validate()?;
        let validation = round.validation.clone().or_else(|| self.validation.clone());
        validation.as_ref().map_or(Ok(()), ValidationConfig::validate).map_err(RoundProblem::Validation)?;
        Ok(Round {
            validation,
            name: round.name.clone(),
            data: data.iter().map(|entry| data_path(&self.data, entry)).collect(),
            format: round.format,
            columns: round.columns.clone(),
            scored: round.scored.clone().unwrap_or_else(|| vec![round.name.clone()]),
            mixture,
            train: with_overrides(&self.train, &round.train)?,
        })
    }

    /// Returns the tasks of new knowledge: those of `[eval]`, or else those that the rounds train on, without
    /// duplicates.
    pub(crate) fn new_tasks(&self, rounds: &[Round]) -> Vec<String> {
        let taught = || {
            let mut tasks: Vec<String> = Vec::new();
            for task in rounds.iter().flat_map(|round| &round.scored) {
                if !tasks.contains(task) {
                    tasks.push(task.clone());
                }
            }
            tasks
        };
        self.eval.tasks.clone().unwrap_or_else(taught)
    }
}

/// Whether earlier adapters stay separate and frozen on the base model (O-LoRA's shape `stack`).
pub(crate) fn is_stack(train: &TrainConfig) -> bool {
    train.olora.as_ref().is_some_and(|o| o.shape == SequenceShape::Stack)
}

/// Loads the training data of a round: one data set per entry of its `data`, with at most `limit` rows each.
pub(crate) fn load_round(round: &Round, limit: Option<usize>) -> Result<Vec<Dataset>, LabError> {
    round.data.iter().map(|path| load_rows(path, round, limit)).collect()
}

/// Loads the test splits of a round's data that exist and have a training format.
pub(crate) fn load_round_test(round: &Round) -> impl Iterator<Item = Dataset> {
    round
        .data
        .iter()
        .filter(|path| path.is_dir())
        .filter_map(|path| load_split_as(path, Split::Test, round.format, &round.columns).ok())
}

fn load_rows(path: &Path, round: &Round, limit: Option<usize>) -> Result<Dataset, LabError> {
    let mut data = if path.is_file() {
        load_as(path, round.format, &round.columns)?
    } else {
        load_split_as(path, Split::Train, round.format, &round.columns)?
    };
    data.examples.truncate(limit.unwrap_or(usize::MAX));
    Ok(data)
}

/// Resolves an entry of a round's data: a directory in the sequence's `data`; or the directory of a known task, by name
/// or alias, where `cl-eval` also finds it; or else a path.
fn data_path(data: &Path, entry: &Path) -> PathBuf {
    let direct = data.join(entry);
    let name = entry.to_string_lossy();
    let names = TaskSpec::find(&name).into_iter().flat_map(|t| std::iter::once(&t.name).chain(t.aliases));
    let homes = task_homes(data);
    let known = names.flat_map(|name| homes.iter().map(move |home| home.join(name))).filter(|d| d.is_dir());
    let candidates = std::iter::once(direct.clone()).chain(known).chain([entry.to_owned()]);
    candidates.into_iter().find(|path| path.exists()).unwrap_or(direct)
}

/// Applies a round's overrides to the sequence's `[train]`.
fn with_overrides(train: &TrainConfig, overrides: &toml::Table) -> Result<TrainConfig, RoundProblem> {
    if overrides.is_empty() {
        return Ok(train.clone());
    }
    let mut merged = serde_json::to_value(train).map_err(RoundProblem::TrainTable)?;
    overlay(&mut merged, serde_json::to_value(overrides).map_err(RoundProblem::TrainTable)?);
    let round: TrainConfig = serde_json::from_value(merged).map_err(RoundProblem::TrainTable)?;
    round.validate().map_err(RoundProblem::Train)?;
    let shape = |config: &TrainConfig| config.olora.as_ref().map(|o| (o.shape, o.earlier.clone()));
    if shape(train) != shape(&round) {
        return Err(RoundProblem::Olora);
    }
    Ok(round)
}

/// Merges one JSON value into another, recursively for objects; values of `with` take precedence.
pub(crate) fn overlay(value: &mut Value, with: Value) {
    match (value, with) {
        (Value::Object(below), Value::Object(above)) => {
            for (key, value) in above {
                overlay(below.entry(key).or_insert(Value::Null), value);
            }
        }
        (place, value) => *place = value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::columns::teaching_round;
    use crate::read_sequence;

    fn rounds(text: &str) -> Result<Vec<Round>, String> {
        let head = "model = 'm'\ndata = 'd'\n[train]\nepochs = 3\nlearning_rate = 1e-4\n[train.lora]\nr = 4\n";
        let read = read_sequence(Path::new("c.toml"), &format!("{head}{text}"), &[]).map_err(|e| e.to_string())?;
        read.resolve_rounds().map_err(|e| e.to_string())
    }

    #[test]
    fn a_round_takes_from_the_sequence_what_it_does_not_say() {
        let text = "[[rounds]]\nname = 'a'\n[[rounds]]\nname = 'math'\ndata = 'x/train.json'\nscored = ['gsm8k']\n\
                    train = { epochs = 6, lora = { r = 8 } }\n";
        let rounds = rounds(text).unwrap();
        assert_eq!((rounds[0].train.epochs, rounds[1].train.epochs), (3, 6));
        assert_eq!(rounds[1].train.lora.as_ref().unwrap().r, 8);
        assert_eq!(rounds[1].train.learning_rate, 1e-4);
        assert_eq!(
            (rounds[0].scored.as_slice(), rounds[1].scored.as_slice()),
            (&["a".to_owned()][..], &["gsm8k".to_owned()][..])
        );
        assert_eq!(teaching_round(&rounds, "gsm8k_cot"), Some(2), "it shares gsm8k's data set");
        assert_eq!((teaching_round(&rounds, "a"), teaching_round(&rounds, "FOMC")), (Some(1), None));
    }

    #[test]
    fn wrong_rounds_are_named() {
        for (text, part) in [
            ("", "neither `tasks` nor"),
            ("[[rounds]]\nname = 'a'\n[[rounds]]\nname = 'a'\n", "`a` occurs again as entry 2"),
            ("[[rounds]]\nname = '../a'\n", "`../a` is not a valid directory name"),
            (
                "[[rounds]]\nname = 'a'\ntrain = { epoch = 3 }\n",
                "round `a`: train: unknown key `epoch` (did you mean `epochs`?)",
            ),
            ("[[rounds]]\nname = 'a'\ntrain = { epochs = 0 }\n", "round `a`: train: epochs = 0"),
            ("[[rounds]]\nname = 'a'\ntrain = { full = {} }\n", "exactly one of"),
            ("[[rounds]]\nname = 'a'\ntrain = { olora = { lambda = 0.5 } }\n", "apply to the whole sequence"),
            ("[[rounds]]\nname = 'a'\ndata = 3\n", "expected a path or a list of paths"),
            ("[[rounds]]\nname = 'a'\ndata = ['b', 'c']\njoint = { weights = [1.0] }\n", "1 for 2 data sets"),
            ("[[rounds]]\nname = 'a'\njoint = 'unifrom'\n", "unifrom"),
        ] {
            let message = rounds(text).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
