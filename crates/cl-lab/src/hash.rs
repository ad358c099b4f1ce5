//! What directories hold, as one number. Always from the files themselves: a manifest says what they held when it was written.

use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, Manifest, hash_file};

use crate::LabError;

/// blake3 over everything that decides what a model computes: weights, config.json, tokenizer.
pub(crate) fn model_hash(dir: &Path) -> Result<String, LabError> {
    let checkpoint = Checkpoint::open(dir)?;
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
