//! Checkpoints that are kept as adapters or models (`keep_checkpoints`), in `checkpoints/step-<step>` of a round.

use std::path::{Path, PathBuf};

use cl_checkpoint::OutputDir;
use cl_model::Decoder;
use cl_train::TrainError;

use crate::LabError;
use crate::output::remove;
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
        remove(dir).map_err(io(dir))?;
    }
    Ok(())
}

/// Removes what a killed process has left.
pub(crate) fn clean_up(round: &Path) -> Result<(), LabError> {
    let folder = folder(round);
    if !folder.exists() {
        return Ok(());
    }
    Ok(OutputDir::clean_up_all(&folder)?)
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
