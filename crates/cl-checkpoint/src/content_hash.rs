//! Content hashes of models and adapters. A copy has the same hash as the original; manifests are not included.

use std::path::{Path, PathBuf};

use crate::{Adapter, Checkpoint, Error, Manifest, hash_file};

impl Checkpoint {
    /// Returns the blake3 hash of everything that determines what the model computes: weights, config.json, tokenizer
    /// and related files.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read or written.
    pub fn content_hash(&self) -> Result<String, Error> {
        let mut files: Vec<PathBuf> = self.files().map(Path::to_owned).collect();
        files.push(self.dir().join("config.json"));
        files.extend(self.companion_files()?);
        hash(&files)
    }
}

impl Adapter {
    /// Returns the blake3 hash of the adapter's weights and config.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read or written.
    pub fn content_hash(&self) -> Result<String, Error> {
        hash(&["adapter_model.safetensors", "adapter_config.json"].map(|name| self.dir().join(name)))
    }

    /// Returns the hash of the base model that the adapter was trained on, if its manifest contains one.
    pub fn base_hash(&self) -> Option<String> {
        let manifest = Manifest::read(self.dir()).ok()?;
        manifest.sources.into_iter().find(|source| source.role == "base")?.blake3
    }
}

fn hash(files: &[PathBuf]) -> Result<String, Error> {
    let mut manifest = Manifest::new("");
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        manifest.files.insert(name, hash_file(file)?);
    }
    Ok(manifest.content_hash())
}
