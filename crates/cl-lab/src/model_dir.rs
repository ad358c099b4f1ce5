//! Model and adapter directories: opened with one order of errors, and what they hold as one number. The number always comes
//! from the files themselves: a manifest says what they held when it was written.

use std::path::{Path, PathBuf};

use cl_adapters::{AdapterError, check_supported};
use cl_checkpoint::{Adapter, Checkpoint, Manifest, TensorSource, hash_file};
use cl_data::Tokenizer;

use crate::LabError;

/// Opens a model directory. What is wrong with the directory as a whole comes first, its tokenizer last.
pub(crate) fn open_model(dir: &Path) -> Result<(Checkpoint, Tokenizer), LabError> {
    Ok((open_checkpoint(dir)?, Tokenizer::from_dir(dir)?))
}

pub(crate) fn open_checkpoint(dir: &Path) -> Result<Checkpoint, LabError> {
    if dir.is_file() {
        return Err(LabError::NotADirectory { path: dir.to_owned() });
    }
    Ok(Checkpoint::open(dir)?)
}

/// Whether an adapter is of a kind that is built and fits beside a model, without reading a tensor.
pub(crate) fn check_fits(base: &Checkpoint, adapter: &Adapter) -> Result<(), LabError> {
    check_supported(adapter)?;
    for module in adapter.modules() {
        let (path, module) = (adapter.dir().to_owned(), module.clone());
        let Some(weight) = base.info(&format!("{}.weight", module.name)) else {
            return Err(AdapterError::UnknownModule { path, module: module.name }.into());
        };
        let &[output, input] = weight.shape.as_slice() else {
            return Err(AdapterError::UnknownModule { path, module: module.name }.into());
        };
        if (module.a_shape.get(1), module.b_shape.first()) != (Some(&input), Some(&output)) {
            let (a, b) = (module.a_shape, module.b_shape);
            let (input, output) = (input as i64, output as i64);
            return Err(AdapterError::Shape { path, module: module.name, input, output, a, b }.into());
        }
    }
    Ok(())
}

/// blake3 over everything that decides what a model computes: weights, config.json, tokenizer.
pub(crate) fn model_hash(dir: &Path) -> Result<String, LabError> {
    let checkpoint = open_checkpoint(dir)?;
    let mut files: Vec<PathBuf> = checkpoint.files().map(Path::to_owned).collect();
    files.push(dir.join("config.json"));
    files.extend(checkpoint.companion_files()?);
    hash(&files)
}

/// blake3 over an adapter's weights and config.
pub(crate) fn adapter_hash(dir: &Path) -> Result<String, LabError> {
    hash(&["adapter_model.safetensors", "adapter_config.json"].map(|name| dir.join(name)))
}

fn hash(files: &[PathBuf]) -> Result<String, LabError> {
    let mut manifest = Manifest::new("");
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        manifest.files.insert(name, hash_file(file)?);
    }
    Ok(manifest.content_hash())
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
}
