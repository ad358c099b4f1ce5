//! Copies mixtures with other routers; everything else is copied byte for byte.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_file};
use cl_checkpoint::problem::PlanProblem;
use cl_checkpoint::{
    Checkpoint, CheckpointWriter, Manifest, OutputDir, TensorSource, TensorSpec, WriteOptions, convert,
};
use rayon::prelude::*;
use safetensors::tensor::TensorView;

use crate::mix::CONFIG_NAME;
use crate::mixture::{CONFIG, WEIGHTS};
use crate::model_info::INFO;
use crate::problem::MixtureProblem;
use crate::{Error, Mixture};

/// Router weights, `(experts, in)` row-major, by the names of their tensors.
pub type RouterWeights = BTreeMap<String, Vec<f32>>;

/// Copies a mixture of adapters, replacing the given routers and keeping the others. The directory is written
/// atomically, and replaces an existing one.
///
/// # Errors
/// Returns [`Error::Mixture`] for a router that the mixture does not have or that has another shape, and an error if a
/// file cannot be read or written.
pub fn save_mixture_with_routers(
    mixture: &Mixture,
    routers: &RouterWeights,
    out: &Path,
    manifest: Manifest,
) -> Result<(), Error> {
    let replaced = in_stored_dtype(mixture, mixture.dir(), routers)?;
    let dir = OutputDir::create(out, true)?;
    let mut views = Vec::new();
    for name in mixture.names() {
        let info = mixture.info(name).expect("one of its names");
        let bytes = match replaced.get(name) {
            Some(bytes) => bytes.as_slice(),
            None => mixture.bytes(name)?,
        };
        views.push((name, TensorView::new(info.dtype, info.shape.clone(), bytes).expect("as many bytes as it has")));
    }
    safetensors::serialize_to_file(views, None, &dir.path().join(WEIGHTS)).map_err(|source| {
        cl_checkpoint::Error::Plan { path: out.to_owned(), problem: Box::new(PlanProblem::Serialize { source }) }
    })?;
    for name in [CONFIG, INFO].into_iter().filter(|name| mixture.dir().join(name).exists()) {
        let (from, path) = (mixture.dir().join(name), dir.path().join(name));
        cl_checkpoint::files::copy_file(&from, &path)?;
    }
    Ok(dir.finish(manifest)?)
}

/// Copies a model that is a mixture of experts, replacing the given routers, rounded once to their stored dtypes, and
/// keeping the others. The directory is written atomically, and replaces an existing one.
///
/// # Errors
/// Returns the errors of [`save_mixture_with_routers`].
pub fn save_model_with_routers(
    model: &Checkpoint,
    routers: &RouterWeights,
    out: &Path,
    manifest: Manifest,
) -> Result<(), Error> {
    let replaced = in_stored_dtype(model, model.dir(), routers)?;
    let names = model.names();
    let spec = |name: &&str| {
        let info = model.info(name).expect("one of its names");
        TensorSpec { name: (*name).to_owned(), dtype: info.dtype, shape: info.shape.clone() }
    };
    let specs: Vec<TensorSpec> = names.iter().map(spec).collect();
    let options = WriteOptions { overwrite: true, max_shard_size: 5_000_000_000 };
    let writer = CheckpointWriter::create(out, &specs, options)?;
    names.par_iter().try_for_each(|name| -> Result<(), Error> {
        match replaced.get(*name) {
            Some(bytes) => writer.write(name, bytes)?,
            None => writer.write(name, model.bytes(name)?)?,
        }
        Ok(())
    })?;
    let mut files: Vec<PathBuf> = model.companion_files()?;
    files.extend(
        ["config.json", INFO, CONFIG_NAME].map(|name| model.dir().join(name)).into_iter().filter(|f| f.exists()),
    );
    for file in files {
        writer.copy_file(&file, &file.file_name().unwrap_or_default().to_string_lossy())?;
    }
    let card = model.dir().join("README.md");
    if card.exists() {
        let mut text = read_file(&card, MAX_CONFIG)?;
        text.extend_from_slice(
            b"\n## Routers\n\nTrained with `cl moe train-router`; manifest.json names data and settings.\n",
        );
        writer.put_file("README.md", &text)?;
    }
    Ok(writer.finish(manifest)?)
}

/// Converts the routers to the dtypes of the tensors that they replace.
fn in_stored_dtype(
    source: &dyn TensorSource,
    dir: &Path,
    routers: &RouterWeights,
) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    let bytes = |(name, values): (&String, &Vec<f32>)| {
        let wrong = |problem| Error::Mixture { path: dir.to_owned(), problem };
        let router = || name.clone();
        let info = source.info(name).ok_or_else(|| wrong(MixtureProblem::NoRouter { router: router() }))?;
        let dtype = info.dtype;
        if info.elements() != values.len() {
            let (values, shape) = (values.len(), info.shape.clone());
            return Err(wrong(MixtureProblem::RouterSize { router: router(), values, shape }));
        }
        let bytes = convert::from_f32(dtype, values)
            .ok_or_else(|| wrong(MixtureProblem::NotStorable { router: router(), dtype }))?;
        match convert::first_not_finite(dtype, &bytes) {
            Some((index, value)) => Err(wrong(MixtureProblem::NotFinite { router: router(), index, value, dtype })),
            None => Ok((name.clone(), bytes)),
        }
    };
    routers.iter().map(bytes).collect()
}
