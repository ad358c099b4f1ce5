use std::path::Path;

use cl_data::{Dataset, Split, load_as, load_split_as};

use crate::{LabError, TrainRun};

/// Loads the data of `cl train`: one list for each entry of `data.earlier`, then one for the round's own data.
///
/// # Errors
/// Returns [`LabError::Data`] for a file that cannot be read or has no examples.
pub fn load_train_data(config: &TrainRun) -> Result<Vec<Vec<Dataset>>, LabError> {
    load_each(config).map(|sets| sets.into_iter().collect()).collect()
}

/// Like [`load_train_data`], with a result per data set.
pub(crate) fn load_each(config: &TrainRun) -> impl Iterator<Item = Vec<Result<Dataset, LabError>>> {
    let earlier = config.data.earlier.iter().map(|path| vec![load_limited(path, config)]);
    let own = config.data.train.iter().map(|path| load_limited(path, config));
    earlier.chain(std::iter::once_with(move || own.collect()))
}

fn load_limited(path: &Path, config: &TrainRun) -> Result<Dataset, LabError> {
    let (format, columns) = (config.data.format, &config.data.columns);
    let mut data = if path.is_dir() {
        load_split_as(path, Split::Train, format, columns)?
    } else {
        load_as(path, format, columns)?
    };
    data.examples.truncate(config.data.limit.unwrap_or(usize::MAX));
    Ok(data)
}
