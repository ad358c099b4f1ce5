use std::path::Path;

use cl_data::{Dataset, Split, load, load_split};

use crate::{LabError, TrainRun};

/// Data of one round: earlier sets (for replay), then the round's own.
///
/// # Errors
/// [`LabError::Data`].
pub fn load_train_data(config: &TrainRun) -> Result<Vec<Dataset>, LabError> {
    load_each(config).collect()
}

/// [`load_train_data`], each set by itself.
pub(crate) fn load_each(config: &TrainRun) -> impl Iterator<Item = Result<Dataset, LabError>> {
    config.data.earlier.iter().chain([&config.data.train]).map(|path| {
        let mut data = load_either(path, config)?;
        data.examples.truncate(config.data.limit.unwrap_or(usize::MAX));
        Ok(data)
    })
}

fn load_either(path: &Path, config: &TrainRun) -> Result<Dataset, LabError> {
    if path.is_dir() { Ok(load_split(path, Split::Train)?) } else { Ok(load(path, config.data.format)?) }
}
