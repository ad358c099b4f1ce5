//! Tasks of a sequence, and the columns of its score matrix.

use cl_eval::{Column, Group, TaskGroup, TaskOptions, TaskSet, TaskSpec, load_tasks};

use crate::{LabError, Round, SequenceConfig};

/// Loads the tasks to score: new knowledge first, then old.
pub(crate) fn load_each_task(
    config: &SequenceConfig,
    rounds: &[Round],
) -> impl Iterator<Item = Result<TaskSet, LabError>> {
    let limits = config.limit;
    let new = TaskOptions {
        limit: limits.test,
        max_new_tokens: config.eval.max_new_tokens,
        most_new_tokens: limits.new_tokens,
        num_fewshot: config.eval.num_fewshot,
        metric: config.eval.metric,
        profile: config.profile,
        lm_eval: config.eval.lm_eval.as_deref(),
        ..TaskOptions::default()
    };
    let limit = limits.old.or(limits.test);
    let old = TaskOptions { limit, group_limit: limit, ..new };
    let names = config.new_tasks(rounds).into_iter().map(move |name| (name, new));
    let names = names.chain(config.eval.old.iter().map(move |name| (name.clone(), old)));
    names.map(|(name, options)| Ok(load_tasks(&name, &config.data, options)?))
}

/// Returns the columns of the score matrix: tasks of new knowledge, each with the round that trains on it, then old
/// knowledge. `scored` has one group per requested task, in the same order.
pub(crate) fn columns(config: &SequenceConfig, rounds: &[Round], scored: &[TaskGroup]) -> Vec<Column> {
    let new = config.new_tasks(rounds);
    let column = |(i, task): (usize, &TaskGroup)| match new.get(i) {
        // Looked up by the requested name: a task loaded from a file has a different name than the file.
        Some(asked) => Column::new(&task.name, Group::New, teaching_round(rounds, asked)),
        None => Column::new(&task.name, Group::Old, None),
    };
    scored.iter().enumerate().map(column).collect()
}

/// Returns the round (from 1) that trains on a task, matched by name or alias; otherwise the round of a task with the
/// same data set, such as the two variants of GSM8K.
pub(crate) fn teaching_round(rounds: &[Round], task: &str) -> Option<usize> {
    let spec = TaskSpec::find(task);
    let same =
        |other: &str| other == task || spec.is_some_and(|s| TaskSpec::find(other).is_some_and(|o| o.name == s.name));
    let shares = |other: &str| {
        let dataset = |spec: &TaskSpec| spec.dataset;
        let other = TaskSpec::find(other).and_then(dataset);
        other.is_some() && other == spec.and_then(dataset)
    };
    let teaching = |matches: &dyn Fn(&str) -> bool| rounds.iter().position(|r| r.scored.iter().any(|t| matches(t)));
    teaching(&same).or_else(|| teaching(&shares)).map(|index| index + 1)
}
