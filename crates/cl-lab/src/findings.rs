use crate::LabError;

/// Something a check has to say.
#[derive(Debug)]
pub enum Finding {
    /// A fact of the plan: sizes, steps.
    Fact(String),
    /// Something that would stop the run.
    Problem(LabError),
}

/// What went well; what did not is a finding.
pub(crate) fn note<T, E: Into<LabError>>(result: Result<T, E>, findings: &mut Vec<Finding>) -> Option<T> {
    result.map_err(|e| findings.push(Finding::Problem(e.into()))).ok()
}

/// What went well of several; the rest are findings.
pub(crate) fn note_all<T>(results: impl Iterator<Item = Result<T, LabError>>, findings: &mut Vec<Finding>) -> Vec<T> {
    results.filter_map(|result| note(result, findings)).collect()
}
