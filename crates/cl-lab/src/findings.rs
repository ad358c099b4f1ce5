use crate::LabError;

/// One result of a check.
#[derive(Debug)]
pub enum Finding {
    /// Information, such as a size or a number of steps.
    Fact(String),
    /// A problem that would stop the run.
    Problem(LabError),
}

/// Returns the value; an error is added to the findings.
pub(crate) fn note<T, E: Into<LabError>>(result: Result<T, E>, findings: &mut Vec<Finding>) -> Option<T> {
    result.map_err(|e| findings.push(Finding::Problem(e.into()))).ok()
}

/// Returns the values; errors are added to the findings.
pub(crate) fn note_all<T>(results: impl Iterator<Item = Result<T, LabError>>, findings: &mut Vec<Finding>) -> Vec<T> {
    results.filter_map(|result| note(result, findings)).collect()
}
