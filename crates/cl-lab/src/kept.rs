//! Checkpoints that are kept as adapters or models (`keep_checkpoints`), in `checkpoints/step-<step>` of a round.

use std::path::{Path, PathBuf};

use cl_checkpoint::OutputDir;
use cl_model::Decoder;
use cl_train::TrainError;

use crate::LabError;
use crate::output::discard;
use crate::trained::Trained;

/// Writes the weights after `step` steps, and removes all but the `count` most recent ones.
pub(crate) fn write(
    round: &Path,
    step: u64,
    count: usize,
    model: &Decoder,
    trained: &Trained<'_>,
) -> Result<(), TrainError> {
    let folder = folder(round);
    std::fs::create_dir_all(&folder).map_err(io(&folder))?;
    trained.save(model, &folder.join(format!("step-{step}")), Some(step))?;
    let mut earlier: Vec<(u64, PathBuf)> = steps(&folder).map_err(io(&folder))?;
    earlier.retain(|(other, _)| *other < step);
    earlier.sort_by_key(|(other, _)| std::cmp::Reverse(*other));
    for (_, dir) in earlier.iter().skip(count - 1) {
        discard(dir).map_err(|source| match source {
            LabError::Io { path, source } => TrainError::Io { path, source },
            _ => unreachable!("only files are removed"),
        })?;
    }
    Ok(())
}

/// Removes what a killed process has left.
pub(crate) fn clean_up(round: &Path) -> Result<(), LabError> {
    let folder = folder(round);
    if !folder.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(&folder).map_err(LabError::io(&folder))? {
        let name = entry.map_err(LabError::io(&folder))?.file_name().to_string_lossy().into_owned();
        // Temporary directories are named after their target: `.step-200.cl-a1b2c3.part`.
        let target = name.strip_prefix('.').and_then(|name| name.split('.').next()).unwrap_or(&name);
        OutputDir::clean_up(&folder.join(target))?;
    }
    Ok(())
}

fn folder(round: &Path) -> PathBuf {
    round.join("checkpoints")
}

fn steps(folder: &Path) -> std::io::Result<Vec<(u64, PathBuf)>> {
    let mut steps = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
        steps.extend(step.map(|step| (step, path)));
    }
    Ok(steps)
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Io { path, source }
}
