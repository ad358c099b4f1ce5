//! Opens and hashes model and adapter directories. Hashes are always computed from the files; a manifest only records
//! what they contained when it was written.

use std::path::{Path, PathBuf};

use cl_adapters::{AdapterError, check_dora};
use cl_checkpoint::files::FileStamp;
use cl_checkpoint::{Adapter, Checkpoint, LayerKind, Manifest, ManifestProblem, TensorSource};
use cl_data::Tokenizer;
use cl_moe::Mixture;

use crate::LabError;

/// Opens a model directory. Errors of the directory are reported before those of its tokenizer.
pub(crate) fn open_model(dir: &Path) -> Result<(Checkpoint, Tokenizer), LabError> {
    Ok((open_checkpoint(dir)?, Tokenizer::from_dir(dir)?))
}

pub(crate) fn open_checkpoint(dir: &Path) -> Result<Checkpoint, LabError> {
    if dir.is_file() {
        return Err(LabError::NotADirectory { path: dir.to_owned() });
    }
    Ok(Checkpoint::open(dir)?)
}

/// Opens an adapter for a base: fused experts get the base's names.
pub(crate) fn open_adapter(dir: &Path, base: &Checkpoint) -> Result<Adapter, LabError> {
    let adapter = Adapter::open(dir)?;
    Ok(adapter.named_in(base).unwrap_or(adapter))
}

/// Checks that an adapter is supported and fits a model, without reading tensors.
pub(crate) fn check_fits(base: &Checkpoint, adapter: &Adapter) -> Result<(), LabError> {
    adapter.check_built()?;
    for module in adapter.modules() {
        let (path, name) = (adapter.dir().to_owned(), module.name.clone());
        // A tied output head uses the embedding's weight.
        let own = base.info(&format!("{name}.weight"));
        let weight = own.or_else(|| base.info("model.embed_tokens.weight").filter(|_| name == "lm_head"));
        let embedding = module.kind == LayerKind::Embedding;
        let Some(weight) = weight.filter(|_| embedding == name.ends_with("embed_tokens")) else {
            return Err(AdapterError::UnknownModule { path, module: name }.into());
        };
        let &[rows, columns] = weight.shape.as_slice() else {
            return Err(AdapterError::UnknownModule { path, module: name }.into());
        };
        if module.weight_shape() != [rows, columns] {
            let (a, b) = (module.a_shape.clone(), module.b_shape.clone());
            let (output, input) = if embedding { (columns as i64, rows as i64) } else { (rows as i64, columns as i64) };
            return Err(AdapterError::Shape { path, module: name, input, output, a, b }.into());
        }
        check_dora(adapter, module)?;
    }
    Ok(())
}

/// Returns the blake3 hash of everything that determines what a model computes.
pub(crate) fn model_hash(dir: &Path) -> Result<String, LabError> {
    Ok(open_checkpoint(dir)?.content_hash()?)
}

/// A model directory and its hash at the start of a run. The hash is recorded in manifests, and is checked again before
/// a result is published.
#[derive(Clone, Debug)]
pub struct ModelRef {
    dir: PathBuf,
    hash: String,
    stamps: Vec<(PathBuf, FileStamp)>,
}

impl ModelRef {
    /// Hashes the model.
    ///
    /// # Errors
    /// Returns [`LabError::Checkpoint`] if the directory is not a model.
    pub fn take(dir: &Path) -> Result<ModelRef, LabError> {
        // Take the file stamps first, so that a change during hashing is noticed.
        let stamps = stamps(&open_checkpoint(dir)?)?;
        Ok(ModelRef { dir: dir.to_owned(), hash: model_hash(dir)?, stamps })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Hexadecimal blake3 hash of weights, config.json, tokenizer and related files.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Checks that the directory is unchanged: compares file stamps and, if one differs, the hash.
    ///
    /// # Errors
    /// Returns [`LabError::Changed`] if it has changed.
    pub fn check(&self) -> Result<(), LabError> {
        let same = |(path, stamp): &(PathBuf, FileStamp)| FileStamp::of(path).is_ok_and(|now| now == *stamp);
        let Some((path, _)) = self.stamps.iter().find(|entry| !same(entry)) else { return Ok(()) };
        match model_hash(&self.dir) {
            Ok(hash) if hash == self.hash => Ok(()),
            _ => Err(LabError::Changed { path: path.clone() }),
        }
    }
}

fn stamps(checkpoint: &Checkpoint) -> Result<Vec<(PathBuf, FileStamp)>, LabError> {
    let mut files: Vec<PathBuf> = checkpoint.files().map(Path::to_owned).collect();
    files.push(checkpoint.dir().join("config.json"));
    files.extend(checkpoint.companion_files()?);
    files.into_iter().map(|file| Ok((file.clone(), FileStamp::of(&file)?))).collect()
}

/// Checks that a directory completed by an earlier process is unchanged.
///
/// # Errors
/// Returns [`LabError::Damaged`] for the first file that is missing or has changed.
pub(crate) fn verify(dir: &Path) -> Result<(), LabError> {
    let damaged = |path, what| Err(LabError::Damaged { path, what, dir: dir.to_owned() });
    for problem in Manifest::verify(dir)? {
        match problem {
            ManifestProblem::Missing(path) => return damaged(path, "is missing"),
            ManifestProblem::Changed(path) => return damaged(path, "has changed since it was written"),
            // Additional files are allowed.
            ManifestProblem::Unlisted(_) => {}
        }
    }
    Ok(())
}

/// Returns the blake3 hash of an adapter's weights and config.
pub(crate) fn adapter_hash(dir: &Path) -> Result<String, LabError> {
    Ok(Adapter::open(dir)?.content_hash()?)
}

/// Returns a warning if an adapter's manifest names another base than `model` with the hash `model_hash`. PEFT's adapters
/// have no manifest.
pub(crate) fn other_base(adapter: &Adapter, model: &Path, model_hash: &str) -> Option<String> {
    let recorded = adapter.base_hash().filter(|hash| hash != model_hash)?;
    let name = adapter.config().base_model_name_or_path.as_deref().unwrap_or(&recorded);
    Some(format!(
        "{}: was trained on {name}, not on {} (or one of them has changed since): results may be meaningless",
        adapter.dir().display(),
        model.display()
    ))
}

/// Returns the blake3 hash of a mixture's tensors and configuration.
pub(crate) fn mixture_hash(mixture: &Mixture) -> Result<String, LabError> {
    mixture.content_hash().map_err(mixture_error(mixture.dir()))
}

/// Converts an error of a mixture to a [`LabError`].
pub(crate) fn mixture_error(dir: &Path) -> impl FnOnce(cl_moe::Error) -> LabError {
    let dir = dir.to_owned();
    move |error| match error {
        cl_moe::Error::Checkpoint(error) => error.into(),
        cl_moe::Error::Mixture { path, problem } => LabError::Mixture { path, problem },
        other => LabError::WriteMixture { path: dir, source: Box::new(other) },
    }
}

/// Opens a mixture of adapters, and checks that it was made for the base with this hash.
pub(crate) fn open_mixture(dir: &Path, base: &str) -> Result<Mixture, LabError> {
    let mixture = Mixture::open(dir).map_err(mixture_error(dir))?;
    let config = mixture.config();
    if config.base_model_blake3 != base {
        return Err(LabError::MixtureBase {
            path: dir.to_owned(),
            base: config.base_model_name_or_path.clone(),
            base_hash: config.base_model_blake3.clone(),
            model_hash: base.to_owned(),
        });
    }
    Ok(mixture)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edited_file_changes_the_hash_whatever_the_manifest_says() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("m");
        let config = crate::toy::model_config(16);
        let options = cl_model::LoadOptions::cpu(cl_torch::tch::Kind::Float);
        let model = cl_model::random_weights(&config, 1, options).unwrap();
        let files = crate::toy::tokenizer_files();
        model.save(&dir, cl_torch::tch::Kind::Float, &config, &files, Manifest::new("model"), false).unwrap();
        let before = model_hash(&dir).unwrap();
        assert_eq!(before, model_hash(&dir).unwrap());
        let text = std::fs::read_to_string(dir.join("tokenizer_config.json")).unwrap();
        std::fs::write(dir.join("tokenizer_config.json"), text + " ").unwrap();
        assert_ne!(before, model_hash(&dir).unwrap());
    }

    #[test]
    fn a_model_that_is_replaced_is_noticed_and_a_copy_in_its_place_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let save = |name: &str, seed| {
            let (config, dir) = (crate::toy::model_config(16), folder.path().join(name));
            let model = cl_model::random_weights(&config, seed, cl_model::LoadOptions::cpu(cl_torch::tch::Kind::Float));
            let files = crate::toy::tokenizer_files();
            let manifest = Manifest::new("model");
            model.unwrap().save(&dir, cl_torch::tch::Kind::Float, &config, &files, manifest, false).unwrap();
            dir
        };
        let (dir, other) = (save("m", 1), save("other", 2));
        let taken = ModelRef::take(&dir).unwrap();
        taken.check().unwrap();
        let weights = dir.join("model.safetensors");
        let content = std::fs::read(&weights).unwrap();
        std::fs::rename(other.join("model.safetensors"), &weights).unwrap();
        let message = taken.check().unwrap_err().to_string();
        assert!(message.contains("model.safetensors") && message.contains("changed"), "{message}");
        std::fs::write(&weights, content).unwrap();
        taken.check().unwrap();
        verify(&dir).unwrap();
        std::fs::write(dir.join("config.json"), "{}").unwrap();
        assert!(matches!(verify(&dir), Err(LabError::Damaged { .. })));
    }
}
