use std::collections::BTreeMap;

use super::scores::{PERPLEXITY, Scores};
use crate::error::Error;
use crate::task::TaskGroup;

/// Computes the scores of a group: the mean of each metric, weighted by number of documents. The standard error is
/// pooled as in lm-eval, √(Σ nᵢ(nᵢ−1)sᵢ² / (Σnᵢ − k) / Σnᵢ) over k tasks with nᵢ documents and standard errors sᵢ.
///
/// # Errors
/// Returns [`Error::NoMember`] if the scores of a member are missing, or lack a metric that others have.
pub fn aggregate_group(group: &TaskGroup, scores: &[Scores]) -> Result<Scores, Error> {
    let missing = |task: &str| Error::NoMember { group: group.name.clone(), task: task.to_owned() };
    let found = |name: &String| scores.iter().find(|s| s.task == *name).ok_or_else(|| missing(name));
    let members: Vec<&Scores> = group.members.iter().map(found).collect::<Result<_, _>>()?;
    let Some(first) = members.first() else { return Err(missing("")) };
    let documents: usize = members.iter().map(|s| s.documents).sum();
    let (mut metrics, mut stderr) = (BTreeMap::new(), BTreeMap::new());
    for name in first.metrics.keys() {
        // An infinite perplexity is left out.
        if name == PERPLEXITY && members.iter().any(|member| !member.metrics.contains_key(name)) {
            continue;
        }
        let (mut sum, mut squares) = (0.0, Some(0.0));
        for member in &members {
            let n = member.documents as f64;
            sum += n * member.metrics.get(name).ok_or_else(|| missing(&member.task))?;
            squares = squares.zip(member.stderr.get(name)).map(|(all, s)| all + (n - 1.0) * s * s * n);
        }
        metrics.insert(name.clone(), sum / documents as f64);
        if let Some(squares) = squares {
            let variance = squares / (documents - members.len()) as f64;
            stderr.insert(name.clone(), (variance / documents as f64).sqrt());
        }
    }
    let main_metric = first.main_metric.clone();
    Ok(Scores { task: group.name.clone(), documents, main_metric, metrics, stderr })
}
