//! Validation data of a round: a held-out part of its training data, or a file.

use std::path::Path;

use cl_data::{Columns, Dataset, Format, Split, load_as, load_split_as};
use cl_train::{TrainError, ValidationConfig};

use crate::{Finding, LabError};

/// Number of validation rows below which a warning is issued.
const FEW: usize = 10;

/// Splits the validation data off a round's own data sets, or loads it from a file.
pub(crate) fn take_validation(
    config: &ValidationConfig,
    own: &mut [Dataset],
    seed: u64,
    format: Format,
    columns: &Columns,
) -> Result<Vec<Dataset>, LabError> {
    config.validate()?;
    match (config.fraction, &config.data) {
        (Some(fraction), _) => Ok(own.iter_mut().map(|data| data.hold_out(fraction, seed)).collect()),
        (None, Some(path)) => Ok(vec![load(path, format, columns)?]),
        (None, None) => Ok(Vec::new()),
    }
}

fn load(path: &Path, format: Format, columns: &Columns) -> Result<Dataset, LabError> {
    Ok(if path.is_dir() { load_split_as(path, Split::Eval, format, columns)? } else { load_as(path, format, columns)? })
}

/// Reports the size of the validation data.
pub(crate) fn check_size(
    what: &str,
    config: &ValidationConfig,
    data: &[Dataset],
    own: &[Dataset],
    findings: &mut Vec<Finding>,
) {
    let rows = |sets: &[Dataset]| sets.iter().map(|d| d.examples.len()).sum::<usize>();
    let held = rows(data);
    let from = match config.fraction {
        Some(_) => format!("{held} of {} rows held out for validation", held + rows(own)),
        None => format!("{held} rows for validation"),
    };
    let every = config.every.map_or("each epoch".to_owned(), |steps| format!("every {steps} steps"));
    findings.push(Finding::Fact(format!("{what}: {from}, evaluated {every}")));
    if held == 0 {
        findings.push(Finding::Problem(TrainError::NoValidationData { examples: 0 }.into()));
    } else if held < FEW {
        let few = format!("warning: {what}: only {held} validation rows; their loss says little, use at least {FEW}");
        findings.push(Finding::Fact(few));
    }
}
