use std::path::Path;

use cl_train::TrainConfig;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::problem::{ConfigProblem, SetProblem};
use crate::{LabError, SequenceConfig, StudyConfig, TrainRun};

/// Reads the configuration of a sequence. `set` are overrides such as `train.learning_rate=1e-4`, applied in order.
///
/// # Errors
/// Returns [`LabError::Config`] with line and column if the configuration is invalid, and [`LabError::Set`] if an
/// override is.
pub fn read_sequence(path: &Path, text: &str, set: &[String]) -> Result<SequenceConfig, LabError> {
    let config: SequenceConfig =
        read(path, text, set).map_err(|e| of_another_command(Kind::Sequence, path, text, e))?;
    check_sequence_keys(path, &config)?;
    Ok(config)
}

/// Reads the configuration of a study; see [`read_sequence`] for `set`.
///
/// # Errors
/// Returns [`LabError::Config`] with line and column if the configuration is invalid, and [`LabError::Set`] if an
/// override is.
pub fn read_study(path: &Path, text: &str, set: &[String]) -> Result<StudyConfig, LabError> {
    let config: StudyConfig = read(path, text, set).map_err(|e| of_another_command(Kind::Study, path, text, e))?;
    for sequence in config.sequences().map_err(|e| LabError::config(path, e))? {
        check_sequence_keys(path, &sequence)?;
    }
    Ok(config)
}

fn check_sequence_keys(path: &Path, config: &SequenceConfig) -> Result<(), LabError> {
    check_train(path, &config.train)?;
    config.resolve_rounds().map_err(|e| LabError::config(path, e))?;
    at_least_one(path, "limit.train", config.limit.train)?;
    at_least_one(path, "limit.test", config.limit.test)?;
    at_least_one(path, "limit.old", config.limit.old)?;
    at_least_one(path, "limit.new_tokens", config.limit.new_tokens)?;
    at_least_one(path, "eval.max_new_tokens", config.eval.max_new_tokens)?;
    for (key, value, most) in [
        ("eval.batch_tokens", config.eval.batch_tokens, 1 << 24),
        ("eval.batch_sequences", config.eval.batch_sequences, 1 << 16),
        ("eval.max_new_tokens", config.eval.max_new_tokens.unwrap_or(1), 1 << 24),
        ("eval.max_length", config.eval.max_length.unwrap_or(1), 1 << 24),
    ] {
        if !(1..=most).contains(&value) {
            return Err(LabError::config(path, ConfigProblem::OutOfRange { key, value, most }));
        }
    }
    if config.eval.metric.is_some_and(|metric| !metric.is_for_texts()) {
        return Err(LabError::config(path, ConfigProblem::NotForTexts));
    }
    Ok(())
}

/// Kind of configuration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Train,
    Sequence,
    Study,
    Other,
}

/// Returns the error, or a clearer one if the text is the configuration of another command: then all keys are unknown.
fn of_another_command(expected: Kind, path: &Path, text: &str, error: LabError) -> LabError {
    let table: Table = toml::from_str(text).unwrap_or_default();
    let has = |keys: &[&'static str]| keys.iter().copied().find(|key| table.contains_key(*key));
    let several = has(&["tasks", "rounds"]);
    let named = several.and_then(|_| has(&["name"]));
    let found = if let Some(key) = has(&["compare", "seeds", "members", "orders"]).or(named) {
        (Kind::Study, "study", key, "run it with `cl study`, and check it with `cl study … --dry-run`")
    } else if let Some(key) = several {
        (Kind::Sequence, "sequence", key, "run it with `cl sequence`")
    } else if let Some(key) = has(&["method", "models", "merge_method"]) {
        (Kind::Other, "merge", key, "run it with `cl merge run`, and check it with `cl merge run … --dry-run`")
    } else if let Some(key) = has(&["experts"]) {
        (
            Kind::Other,
            "mixture",
            key,
            "run it with `cl moe mix` (models) or `cl moe blend` (adapters), and check it with --dry-run",
        )
    } else if let Some(key) = has(&["multiple_choice", "generation", "loglikelihood"]) {
        (Kind::Other, "task", key, "try it with `cl eval MODEL --tasks FILE --limit 1 --out DIR`")
    } else if table.get("data").is_some_and(Value::is_table) {
        (Kind::Train, "train run", "data.train", "run it with `cl train`")
    } else {
        return error;
    };
    let (kind, is, key, hint) = found;
    // A study also has `tasks` or `rounds`.
    let is_expected =
        kind == expected || (expected == Kind::Study && kind == Kind::Sequence && !has_sequence_keys(&table));
    if is_expected { error } else { LabError::config(path, ConfigProblem::Other { is, key, hint }) }
}

/// Whether a table has keys that are valid in a sequence but not in a study.
fn has_sequence_keys(table: &Table) -> bool {
    let in_train = |key| table.get("train").is_some_and(|train| train.get(key).is_some());
    table.contains_key("keep_models") || table.contains_key("mixture") || in_train("lora") || in_train("full")
}

/// Reads the configuration of one round; see [`read_sequence`] for `set`.
///
/// # Errors
/// Returns [`LabError::Config`] with line and column if the configuration is invalid, and [`LabError::Set`] if an
/// override is.
pub fn read_train(path: &Path, text: &str, set: &[String]) -> Result<TrainRun, LabError> {
    let config: TrainRun = read(path, text, set).map_err(|e| of_another_command(Kind::Train, path, text, e))?;
    check_train(path, &config.train)?;
    check_data(path, &config)?;
    Ok(config)
}

/// Checks the data settings of a round without reading the data.
pub(crate) fn check_data(path: &Path, config: &TrainRun) -> Result<(), LabError> {
    if config.data.train.is_empty() {
        return Err(LabError::config(path, ConfigProblem::NoData));
    }
    config.mixture().validate(config.data.train.len()).map_err(|e| LabError::config(path, e))?;
    if config.replay.is_some() && config.data.earlier.is_empty() {
        return Err(LabError::config(path, ConfigProblem::NothingToReplay));
    }
    if let Some(validation) = &config.validation {
        validation.validate().map_err(|e| LabError::config(path, ConfigProblem::Validation(Box::new(e))))?;
    }
    config.data.columns.validate().map_err(|e| LabError::config(path, e))?;
    at_least_one(path, "data.limit", config.data.limit)
}

fn at_least_one(path: &Path, key: &'static str, value: Option<usize>) -> Result<(), LabError> {
    if value == Some(0) { Err(LabError::config(path, ConfigProblem::Zero { key })) } else { Ok(()) }
}

fn check_train(path: &Path, train: &TrainConfig) -> Result<(), LabError> {
    if train.router.is_some() {
        return Err(LabError::config(path, ConfigProblem::RouterInRound));
    }
    train.validate().map_err(|e| LabError::config(path, ConfigProblem::Train(Box::new(e))))
}

pub(crate) fn read<T: DeserializeOwned>(path: &Path, text: &str, set: &[String]) -> Result<T, LabError> {
    let invalid = |e| LabError::config(path, ConfigProblem::Toml(Box::new(e)));
    let mut table: Table = toml::from_str(text).map_err(invalid)?;
    if set.is_empty() && !is_paper(&table) {
        // Parse the text directly, so that errors have line and column.
        return toml::from_str(text).map_err(invalid);
    }
    for entry in set {
        override_key(&mut table, entry)?;
    }
    if is_paper(&table) {
        paper_defaults(&mut table);
    }
    Value::Table(table).try_into().map_err(invalid)
}

fn is_paper(table: &Table) -> bool {
    table.get("profile").and_then(Value::as_str) == Some("paper")
}

/// Sets the defaults of the profile `paper`: the loss is averaged per micro-batch; weights are bf16 without master
/// weights, except for the adapters' products; the learning rate is constant at 2e-5; O-LoRA's penalty is that of its
/// code; lm-eval's tasks are scored without BOS.
fn paper_defaults(table: &mut Table) {
    let train = table.entry("train").or_insert_with(|| Value::Table(Table::new()));
    let Some(train) = train.as_table_mut() else { return };
    for (key, value) in [
        ("loss_norm", Value::from("microbatch_mean")),
        ("states", Value::from("pure")),
        ("precision", Value::from("bf16")),
        ("adapter_precision", Value::from("f32")),
        ("learning_rate", Value::from(2e-5)),
    ] {
        train.entry(key).or_insert(value);
    }
    if let Some(olora) = train.get_mut("olora").and_then(Value::as_table_mut) {
        olora.entry("mode").or_insert(Value::from("l1"));
    }
    if table.contains_key("tasks") || table.contains_key("rounds") {
        let eval = table.entry("eval").or_insert_with(|| Value::Table(Table::new()));
        if let Some(eval) = eval.as_table_mut().filter(|e| !e.contains_key("add_bos_token")) {
            eval.entry("lm_eval_add_bos_token").or_insert(Value::from(false));
        }
    }
}

/// Applies an override `a.b.c=value`; the value is parsed as TOML or, if that fails, taken as a string.
fn override_key(table: &mut Table, entry: &str) -> Result<(), LabError> {
    let wrong = |problem| LabError::Set { text: entry.to_owned(), problem };
    let (key, text) = entry.split_once('=').ok_or_else(|| wrong(SetProblem::NoValue))?;
    if text.trim().parse::<i128>().is_ok_and(|number| i64::try_from(number).is_err()) {
        return Err(wrong(SetProblem::Range));
    }
    let value = toml::from_str::<Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::from(text.trim()));
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|k| !k.is_empty()).ok_or_else(|| wrong(SetProblem::NoKey))?;
    let mut place = table;
    for part in parts {
        place = place
            .entry(part)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| wrong(SetProblem::NotATable))?;
    }
    place.insert(last.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use cl_data::Buffer;

    use cl_train::Precision;

    use super::*;
    use crate::Replay;

    const MINIMAL: &str = "model = 'm'\ndata = 'd'\ntasks = ['a', 'b']\n[train.lora]\nr = 4\n";

    fn sequence(text: &str, set: &[&str]) -> Result<SequenceConfig, LabError> {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        read_sequence(Path::new("c.toml"), text, &set)
    }

    #[test]
    fn overrides_and_profiles() {
        let set = ["train.lora.r=2", "limit.train=9", "replay.fraction=0.1", "model=some/where"];
        let config = sequence(MINIMAL, &set).unwrap();
        assert_eq!(config.train.lora.as_ref().unwrap().r, 2);
        assert_eq!(
            (config.limit.train, config.replay),
            (Some(9), Some(Replay { fraction: 0.1, buffer: Buffer::Redrawn }))
        );
        assert_eq!(config.model, Path::new("some/where"));
        let paper = sequence(MINIMAL, &["profile=paper", "train.precision=f32"]).unwrap();
        assert_eq!(paper.train.loss_norm, cl_train::LossNorm::MicrobatchMean);
        assert_eq!((paper.train.precision, paper.train.learning_rate), (Precision::F32, 2e-5));
        assert_eq!((paper.eval.lm_eval_add_bos_token, paper.eval.add_bos_token), (Some(false), None));
        let all = sequence(MINIMAL, &["profile=paper", "eval.add_bos_token=true"]).unwrap();
        assert_eq!((all.eval.lm_eval_add_bos_token, all.eval.add_bos_token), (None, Some(true)));
    }

    #[test]
    fn errors_say_what_and_where() {
        let rows: [(&str, &[&str], &str); 10] = [
            ("model = 'm'\ntask = []", &[], "line 2"),
            (MINIMAL, &["replay.fraction=-1"], "replay.fraction = -1"),
            (MINIMAL, &["tasks=['a', 'a']"], "`a` occurs again"),
            (MINIMAL, &["tasks=['a', '../b']"], "`../b` is not a valid directory name"),
            (MINIMAL, &["limit.train=0"], "limit.train = 0: expected at least 1"),
            (MINIMAL, &["eval.max_new_tokens=0"], "eval.max_new_tokens = 0"),
            (MINIMAL, &["train.full={}"], "exactly one of"),
            (MINIMAL, &["train.epochs=0"], "epochs = 0"),
            (MINIMAL, &["=3"], "expected a key"),
            (MINIMAL, &["train.learning_rat=3"], "learning_rat"),
        ];
        for (text, set, part) in rows {
            let message = sequence(text, set).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn configurations_of_other_commands_are_recognized() {
        let train = "model = 'm'\ndata = { train = 'a.jsonl' }\ntrain = { lora = {} }\n";
        let study = "name = 's'\nmodel = 'm'\ndata = 'd'\ntasks = ['a']\nseeds = [1]\n";
        let path = Path::new("c.toml");
        let messages = |text: &str| {
            [read_train(path, text, &[]).err(), read_sequence(path, text, &[]).err(), read_study(path, text, &[]).err()]
                .map(|error| error.map(|e| e.to_string()).unwrap_or_default())
        };
        for (text, own, is) in [(train, 0, "a train run"), (MINIMAL, 1, "a sequence"), (study, 2, "a study")] {
            for (i, message) in messages(text).iter().enumerate() {
                assert_eq!(i == own, message.is_empty(), "{message}");
                assert!(i == own || message.contains(&format!("is the configuration of {is}")), "{message}");
            }
        }
        // If the command is right, a misspelt key is reported as such.
        let misspelt = |text: &str, i: usize| messages(&text.replacen("model", "modle", 1))[i].clone();
        for (text, own) in [(train, 0), (MINIMAL, 1), (study, 2)] {
            let message = misspelt(text, own);
            assert!(message.contains("unknown key `modle` (did you mean `model`?)"), "{message}");
        }
    }

    #[test]
    fn replay_of_nothing_and_metrics_of_choices_are_refused() {
        let train = "model = 'm'\ndata = { train = 'a.jsonl' }\ntrain = { lora = {} }\nreplay = { fraction = 0.1 }\n";
        let message = read_train(Path::new("c.toml"), train, &[]).unwrap_err().to_string();
        assert!(message.contains("data.earlier"), "{message}");
        read_train(Path::new("c.toml"), train, &["data.earlier=['b.jsonl']".to_owned()]).unwrap();
        let message = sequence(MINIMAL, &["eval.metric=acc"]).unwrap_err().to_string();
        assert!(message.contains("multiple choice"), "{message}");
    }

    #[test]
    fn the_resolved_configuration_reads_back() {
        let rounds =
            "rounds=[{name='a', data=['x', 'y'], joint='uniform', train={epochs=6}}, {name='b', scored=['c']}]";
        for set in [&["replay.fraction=0.1"][..], &["tasks=[]", rounds, "mixture.joint={temperature=2.0}"]] {
            let config = sequence(MINIMAL, set).unwrap();
            let text = toml::to_string(&config).unwrap();
            assert_eq!(sequence(&text, &[]).unwrap(), config);
        }
    }
}
