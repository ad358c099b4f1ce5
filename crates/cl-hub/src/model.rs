//! Selects the files of a repository that a model or an adapter needs.
//!
//! Weights are selected as in Transformers: `model.safetensors`, or else the shards of `model.safetensors.index.json`.
//! `.bin` duplicates, GGUF, ONNX and files of other frameworks are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use cl_checkpoint::Interrupt;
use cl_checkpoint::files::{MAX_TOKENIZER, read_file};
use serde::Deserialize;

use crate::problem::RepoProblem;
use crate::{Hub, HubError, Repo, Revision};

/// Name of the weights in a single file, and of the index of shards.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Files of models and adapters other than weights.
const COMPANIONS: [&str; 18] = [
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model_info.json",
];

/// Files of a PEFT adapter.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The required part of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A model: configuration, tokenizer, safetensors.
    Model,
    /// A PEFT adapter.
    Adapter,
}

/// A complete model or adapter in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// `organization/name`.
    pub repo: String,
    /// Commit of the repository.
    pub commit: String,
    /// Directory with the files.
    pub dir: PathBuf,
}

/// The plan of a download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Download {
    /// The repository with its revision.
    pub repo: String,
    /// Commit of the repository.
    pub commit: String,
    /// Directory of the files in the cache.
    pub dir: PathBuf,
    /// Number of files that are not in the cache.
    pub files: usize,
    /// Their total size in bytes.
    pub bytes: u64,
}

impl Download {
    /// Returns a one-line summary, for a dry run.
    pub fn summary(&self) -> String {
        let short = self.commit.get(..12).unwrap_or(&self.commit);
        match (self.files, self.bytes) {
            (0, _) => format!("commit {short}, in the cache"),
            (files, bytes) => {
                let plural = if files == 1 { "" } else { "s" };
                format!(
                    "commit {short}, {files} file{plural} to download, {:.1} MB ({bytes} bytes)",
                    bytes as f64 / 1e6
                )
            }
        }
    }
}

impl Hub {
    /// Returns a model or an adapter in the cache, after downloading missing files.
    ///
    /// # Errors
    /// Returns the errors of [`Hub::revision`] and [`Revision::fetch`], and [`HubError::Unusable`] if the repository
    /// contains no safetensors model, or no adapter.
    pub fn model(&self, repo: &Repo, part: Part, interrupt: &Interrupt) -> Result<Snapshot, HubError> {
        let revision = self.revision_interruptible(repo, interrupt)?;
        let mut names = needed(&revision, part)?;
        // Fetch the index first, because it determines which shards there are.
        names.sort_by_key(|name| name != INDEX);
        if names.first().is_some_and(|name| name == INDEX) {
            let paths = revision.fetch(&names[..1], interrupt)?;
            let shards = shards(&revision, &paths[0])?;
            names.retain(|name| !is_shard(name));
            names.extend(shards);
        }
        revision.fetch(&names, interrupt)?;
        Ok(Snapshot { repo: repo.name.clone(), dir: revision.dir(), commit: revision.commit })
    }

    /// Plans the download of [`Hub::model`] without downloading anything.
    ///
    /// # Errors
    /// Returns the same errors as [`Hub::model`].
    pub fn plan_model(&self, repo: &Repo, part: Part) -> Result<Download, HubError> {
        let revision = self.revision(repo)?;
        let names = needed(&revision, part)?;
        let missing = revision.files.iter().filter(|f| names.contains(&f.name) && !revision.is_cached(&f.name));
        let sizes: Vec<u64> = missing.map(|file| file.size.unwrap_or(0)).collect();
        Ok(Download {
            repo: repo.to_string(),
            dir: revision.dir(),
            files: sizes.len(),
            bytes: sizes.iter().sum(),
            commit: revision.commit,
        })
    }
}

/// Returns the needed files, in the order of the repository.
fn needed(revision: &Revision<'_>, part: Part) -> Result<Vec<String>, HubError> {
    let has = |name: &str| revision.files.iter().any(|file| file.name == name);
    let weights: BTreeSet<&str> = match part {
        Part::Model if has("config.json") && has(SINGLE) => [SINGLE].into(),
        Part::Model if has("config.json") && has(INDEX) => {
            let shards = revision.files.iter().map(|f| f.name.as_str()).filter(|name| is_shard(name));
            shards.chain([INDEX]).collect()
        }
        Part::Adapter if ADAPTER.iter().all(|name| has(name)) => ADAPTER.into(),
        _ => return Err(unusable(revision, part)),
    };
    let wanted = |name: &str| weights.contains(name) || COMPANIONS.contains(&name);
    Ok(revision.files.iter().map(|file| file.name.clone()).filter(|name| wanted(name)).collect())
}

/// Returns the reason why a repository is not a model or an adapter.
fn unusable(revision: &Revision<'_>, part: Part) -> HubError {
    let has = |name: &str| revision.files.iter().any(|file| file.name == name);
    let ends = |ending: &str| revision.files.iter().any(|file| file.name.ends_with(ending));
    if !revision.complete {
        let model = ["config.json", SINGLE];
        let needs = if part == Part::Model { model } else { ADAPTER };
        let missing: Vec<&str> = needs.into_iter().filter(|name| !has(name)).collect();
        return revision.offline(&missing.join(", "));
    }
    revision.unusable(match part {
        Part::Model if ADAPTER.iter().all(|name| has(name)) => RepoProblem::Adapter,
        Part::Adapter if has("config.json") => RepoProblem::Model,
        Part::Adapter if ends("adapter_model.bin") => RepoProblem::BinAdapter,
        Part::Adapter => RepoProblem::NoAdapter,
        Part::Model if ends(".bin") => RepoProblem::BinModel,
        Part::Model if ends(".gguf") => RepoProblem::Gguf,
        Part::Model => RepoProblem::NoModel,
    })
}

/// Whether a file is a shard of a model: `model-00001-of-00003.safetensors`.
fn is_shard(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.and_then(|rest| rest.split_once("-of-")).is_some_and(|(a, b)| digits(a) && digits(b))
}

/// Returns the shards listed in an index.
fn shards(revision: &Revision<'_>, index: &std::path::Path) -> Result<Vec<String>, HubError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let invalid = |source| revision.unusable(RepoProblem::Index { index: INDEX, source });
    let index: Index = serde_json::from_slice(&read_file(index, MAX_TOKENIZER)?).map_err(invalid)?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    match names.iter().find(|name| name.contains(['/', '\\', ':']) || name.starts_with('.') || name.is_empty()) {
        Some(name) => Err(revision.unusable(RepoProblem::Shard { index: INDEX, shard: name.clone() })),
        None => Ok(names.into_iter().collect()),
    }
}
