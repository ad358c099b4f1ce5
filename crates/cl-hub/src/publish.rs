//! Preparation of a model or adapter directory for the Hub: its files, and a model card from its manifest.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, MAX_TOKENIZER, read_file, read_text};
use cl_checkpoint::{Adapter, Checkpoint, FileEntry, HubSnapshot, Manifest, OutputDir, Source, hash_file};
use serde_json::{Map, Value};

use crate::card::{self, CardData, CardResult, FrontMatter};
use crate::problem::UploadProblem;
use crate::{Content, Hub, HubError, Repo, Upload};

/// Maximum number of manifests that are followed from a directory to its base.
const DEEPEST: usize = 16;
/// Maximum length of settings in a card; longer ones are only in `manifest.json`.
const LONGEST_SETTINGS: usize = 20_000;
/// Maximum number of data sources listed in a card.
const MOST_DATA: usize = 50;

/// Metadata for the card that the directory does not contain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublishOptions {
    /// `organization/name`.
    pub repo: String,
    /// Repositories of the base models, instead of those in manifests.
    pub base_models: Vec<String>,
    /// Licence, instead of the base's.
    pub license: Option<String>,
    /// Repositories of training data, in addition to those in manifests.
    pub datasets: Vec<String>,
    /// Files of scores in lm-eval's layout, such as `results.json` of `cl eval`.
    pub results: Vec<PathBuf>,
}

/// A directory prepared for the Hub.
#[derive(Clone, Debug, PartialEq)]
pub struct Publication {
    /// README.md.
    pub card: String,
    /// All files, including the card.
    pub files: Vec<Upload>,
    /// Notes on missing metadata of the card, and how to add it.
    pub notes: Vec<String>,
}

impl Publication {
    /// Returns the total size of all files in bytes.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read.
    pub fn bytes(&self) -> Result<u64, HubError> {
        self.files.iter().map(|file| file.content.size()).sum()
    }

    /// Writes the files to a new directory.
    ///
    /// # Errors
    /// Returns an error if the directory exists or is not writable, or a file cannot be read.
    pub fn write(&self, out: &Path) -> Result<(), HubError> {
        OutputDir::check(out, false, &[]).map_err(|error| match error {
            // There is no way to ask for overwriting.
            cl_checkpoint::Error::Exists { path } => HubError::Exists { path },
            error => error.into(),
        })?;
        let part = out.with_file_name(format!(".{}.part", out.file_name().unwrap_or_default().to_string_lossy()));
        if part.exists() {
            std::fs::remove_dir_all(&part).map_err(HubError::io(&part))?;
        }
        for file in &self.files {
            let path = part.join(&file.name);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(HubError::io(parent))?;
            }
            match &file.content {
                Content::File(from) => std::fs::copy(from, &path).map(|_| ()),
                Content::Bytes(bytes) => std::fs::write(&path, bytes),
            }
            .map_err(HubError::io(&path))?;
        }
        std::fs::rename(&part, out).map_err(HubError::io(out))
    }
}

/// Prepares a model or adapter directory for the Hub.
///
/// The card has the front matter that the Hub reads, the text of an existing README.md, and sections about lineage,
/// data, settings and scores. Base models are those named by repository in manifests, also through intermediate
/// directories. Values in the front matter of an existing README.md take precedence, except over `options`, and lists
/// are united. An adapter names its base by repository and commit if these are known.
///
/// # Errors
/// Returns an error if the directory is neither a model nor an adapter, or one of its files is damaged, and
/// [`HubError::Name`] if `repo` is not a valid Hub name.
pub fn publish(dir: &Path, hub: &Hub, options: &PublishOptions) -> Result<Publication, HubError> {
    if Repo::parse_model(&options.repo).is_none_or(|repo| repo.revision.is_some()) {
        let expected = "the name of a repository like `organization/name`";
        return Err(HubError::Name { name: options.repo.clone(), expected });
    }
    if dir.join("mixture_config.json").is_file() {
        let problem = UploadProblem::Mixture { path: dir.to_owned() };
        return Err(HubError::Upload { repo: options.repo.clone(), problem });
    }
    let is_adapter = dir.join(ADAPTER_CONFIG).is_file();
    let (named_base, architecture) = if is_adapter {
        (Adapter::open(dir)?.config().base_model_name_or_path.clone(), None)
    } else {
        (None, Checkpoint::open(dir)?.config().get("architectures").and_then(|a| a.get(0)).cloned())
    };
    let manifest = dir.join("manifest.json").is_file().then(|| Manifest::read(dir)).transpose()?;
    let mut notes = Vec::new();
    let lineage = Lineage::of(manifest.as_ref(), named_base.as_deref());
    let readme = Readme::read(dir)?;
    let is_unknown = |a: &Value| a.as_str().is_some_and(|name| UNKNOWN_TO_TRANSFORMERS.contains(&name));
    let kind = Kind { is_adapter, loadable: !architecture.as_ref().is_some_and(is_unknown) };
    let data = card_data(kind, manifest.as_ref(), &lineage, &readme.front_matter, hub, options, &mut notes)?;
    let card = text(&data, &readme, manifest.as_ref());
    let base = options.base_models.first().or(data.base_model.first());
    let changed = match base.filter(|_| is_adapter) {
        Some(base) => adapter_config(dir, base, &lineage)?,
        None => {
            notes.extend(named_base.as_deref().and_then(local_base));
            None
        }
    };
    let files = files(dir, &card, changed, manifest, &options.repo)?;
    Ok(Publication { card, files, notes })
}

/// The configuration of an adapter.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Architectures of mixtures that Transformers cannot load.
const UNKNOWN_TO_TRANSFORMERS: [&str; 4] =
    ["MoeLlamaForCausalLM", "MoeMistralForCausalLM", "DeltaMoeLlamaForCausalLM", "DeltaMoeMistralForCausalLM"];

/// What a directory contains.
#[derive(Clone, Copy)]
struct Kind {
    is_adapter: bool,
    /// Whether the libraries of the Hub can load it.
    loadable: bool,
}

/// An existing card, with line feeds only.
struct Readme {
    front_matter: FrontMatter,
    body: String,
}

impl Readme {
    fn read(dir: &Path) -> Result<Readme, HubError> {
        let path = dir.join("README.md");
        let text = if path.is_file() { read_text(&path, MAX_CONFIG)? } else { String::new() };
        let text = text.replace("\r\n", "\n");
        let (front_matter, body) = card::split(&text);
        let front_matter = FrontMatter::parse(front_matter).map_err(|message| HubError::Card { path, message })?;
        Ok(Readme { front_matter, body: body.trim().to_owned() })
    }
}

/// Returns an adapter's configuration that names its base by repository, and by commit if that is known; `None` if it
/// already does.
fn adapter_config(dir: &Path, base: &str, lineage: &Lineage) -> Result<Option<String>, HubError> {
    let path = dir.join(ADAPTER_CONFIG);
    let wrong = |e: serde_json::Error| HubError::Io { path: path.clone(), source: e.into() };
    let mut config: Map<String, Value> = serde_json::from_slice(&read_file(&path, MAX_CONFIG)?).map_err(wrong)?;
    let old = config.clone();
    let base = Repo::parse_model(base).map_or_else(|| (base.to_owned(), None), |repo| (repo.name, repo.revision));
    let same = config.get(BASE).and_then(Value::as_str) == Some(base.0.as_str());
    let own = config.get(REVISION).and_then(Value::as_str).filter(|_| same).map(str::to_owned);
    let of_manifest = || lineage.bases.iter().find(|repo| repo.name == base.0)?.revision.clone();
    let revision = base.1.or(own).or_else(of_manifest);
    config.insert(BASE.to_owned(), base.0.into());
    match revision {
        Some(revision) => {
            config.insert(REVISION.to_owned(), revision.into());
        }
        // The revision of another base.
        None if !same && config.contains_key(REVISION) => {
            config.insert(REVISION.to_owned(), Value::Null);
        }
        None => {}
    }
    Ok((config != old).then(|| serde_json::to_string_pretty(&config).unwrap_or_default() + "\n"))
}

/// PEFT's keys of the base.
const BASE: &str = "base_model_name_or_path";
const REVISION: &str = "revision";

/// Returns a note if an adapter names its base by a path.
fn local_base(base: &str) -> Option<String> {
    let is_path = Repo::parse_model(base).is_none() || Path::new(base).exists();
    is_path.then(|| {
        format!(
            "{ADAPTER_CONFIG}: {BASE} is {base}, which is a path of this machine, and would be published; set the base's \
             repository with --base-model ORG/NAME"
        )
    })
}

/// Where a model comes from.
#[derive(Default)]
struct Lineage {
    /// Repositories, with their commits if known.
    bases: Vec<Repo>,
    /// Local directories whose base is unknown.
    unknown: Vec<String>,
    /// Directories that it was made from, directly or not.
    local: Vec<String>,
    /// Whether it is a mixture of models, or was made from one.
    mixed: bool,
}

impl Lineage {
    fn of(manifest: Option<&Manifest>, named: Option<&str>) -> Lineage {
        let mut lineage = Lineage::default();
        lineage.follow(manifest, DEEPEST);
        let of_hub = |name: &str| {
            let cached = HubSnapshot::of(Path::new(name)).map(|snapshot| snapshot.to_string());
            let name = cached.or_else(|| (!Path::new(name).exists()).then(|| name.to_owned()))?;
            Repo::parse_model(&name)
        };
        let named = named.and_then(of_hub);
        if let Some(repo) = named.filter(|_| lineage.bases.is_empty()) {
            lineage.bases.push(repo);
            lineage.unknown.clear();
        }
        lineage
    }

    fn follow(&mut self, manifest: Option<&Manifest>, depth: usize) {
        self.mixed |= manifest.and_then(|m| m.config.as_ref()).is_some_and(|config| config.get("mix").is_some());
        for source in manifest.iter().flat_map(|m| &m.sources).filter(|s| is_model(s)) {
            let repo = Repo::parse_model(&source.path).filter(|repo| repo.revision.is_some());
            if let Some(repo) = repo {
                if self.bases.iter().all(|known| known.name != repo.name) {
                    self.bases.push(repo);
                }
                continue;
            }
            self.local.push(source.path.clone());
            match Manifest::read(Path::new(&source.path)) {
                Ok(earlier) if depth > 0 && earlier.sources.iter().any(is_model) => {
                    self.follow(Some(&earlier), depth - 1);
                }
                _ => self.unknown.push(source.path.clone()),
            }
        }
    }
}

fn is_model(source: &Source) -> bool {
    matches!(source.role.as_str(), "base" | "model" | "tuned" | "expert" | "shared_expert" | "mixture")
}

fn card_data(
    kind: Kind,
    manifest: Option<&Manifest>,
    lineage: &Lineage,
    old: &FrontMatter,
    hub: &Hub,
    options: &PublishOptions,
    notes: &mut Vec<String>,
) -> Result<CardData, HubError> {
    let config = manifest.and_then(|m| m.config.as_ref());
    let has = |key: &str| config.is_some_and(|c| c.get(key).is_some());
    let (relation, own_tags): (_, &[&str]) = match kind {
        Kind { is_adapter: true, .. } => ("adapter", &["lora"]),
        _ if lineage.mixed => ("merge", &["moe", "merge"]),
        _ if has("train_router") => ("finetune", &["moe"]),
        _ if has("merge") => ("merge", &["merge"]),
        _ => ("finetune", &[]),
    };
    let name = |written: &String| Repo::parse_model(written).map_or_else(|| written.clone(), |repo| repo.name);
    let mut base_model: Vec<String> = options.base_models.iter().map(name).collect();
    if base_model.is_empty() {
        base_model = old.list("base_model");
        // Cards of our own commands name models as the configuration did.
        let is_path = |name: &String| Path::new(name).exists() || lineage.local.contains(name);
        base_model.retain(|name| Repo::parse_model(name).is_some() && !is_path(name));
    }
    if base_model.is_empty() {
        base_model.extend(lineage.bases.iter().map(|repo| repo.name.clone()));
        if let Some(path) = lineage.unknown.first() {
            notes.push(format!("{}: its Hub repository is unknown; set it with --base-model", shown(path)));
        }
    }
    if base_model.is_empty() {
        notes.push("the card has no base model; set it with --base-model ORG/NAME".to_owned());
    }
    let of_user = options.license.clone().or_else(|| old.word("license").map(str::to_owned));
    let license = of_user.or_else(|| license(hub, &lineage.bases).filter(|_| !old.has("license")));
    if license.is_none() && !old.has("license") {
        notes.push("the licence is unknown; set it with --license ID, such as apache-2.0".to_owned());
    }
    let mut own_datasets: BTreeSet<String> = options.datasets.iter().cloned().collect();
    own_datasets.extend(manifest.iter().flat_map(|m| &m.sources).filter_map(|source| dataset(&source.path)));
    let with = |key: &str, own: &mut dyn Iterator<Item = String>| {
        let mut all = old.list(key);
        own.for_each(|value| {
            if !all.contains(&value) {
                all.push(value)
            }
        });
        all
    };
    let mut results: Vec<CardResult> = Vec::new();
    for path in &options.results {
        let value: Value = serde_json::from_slice(&read_file(path, MAX_TOKENIZER)?)
            .map_err(|e| HubError::Io { path: path.clone(), source: e.into() })?;
        let of_file = card::results(&value);
        if of_file.is_empty() {
            notes.push(format!("{}: no scores; expected results.json as `cl eval` writes it", path.display()));
        }
        results.extend(of_file);
    }
    let library_name = match old.word("library_name") {
        Some("transformers") | None if !kind.loadable => None,
        Some(of_user) => Some(of_user.to_owned()),
        None => Some(if kind.is_adapter { "peft" } else { "transformers" }.to_owned()),
    };
    Ok(CardData {
        license,
        base_model_relation: Some(relation),
        base_model,
        datasets: with("datasets", &mut own_datasets.into_iter()),
        tags: with("tags", &mut own_tags.iter().map(|tag| (*tag).to_owned())),
        library_name,
        pipeline_tag: Some("text-generation"),
        name: options.repo.rsplit('/').next().unwrap_or_default().to_owned(),
        results,
    })
}

/// Returns the licence stated in the cards of all bases in the cache; `None` if one is missing or they differ.
fn license(hub: &Hub, bases: &[Repo]) -> Option<String> {
    let of = |repo: &Repo| {
        let folder = hub.cache.join(format!("models--{}", repo.name.replace('/', "--"))).join("snapshots");
        let card = read_text(&folder.join(repo.revision.as_deref()?).join("README.md"), MAX_CONFIG).ok()?;
        let front_matter = FrontMatter::parse(card::split(&card).0).ok()?;
        front_matter.word("license").map(str::to_owned)
    };
    let all: BTreeSet<Option<String>> = bases.iter().map(of).collect();
    if all.len() == 1 { all.into_iter().next().flatten() } else { None }
}

/// Returns the Hub data set that a file in the Hub's cache belongs to.
fn dataset(path: &str) -> Option<String> {
    let folder = path.split(['/', '\\']).find_map(|part| part.strip_prefix("datasets--"))?;
    path.contains("snapshots").then(|| folder.replacen("--", "/", 1))
}

/// Formats a source without the directories of this machine.
fn shown(path: &str) -> String {
    if Repo::parse_model(path).is_some_and(|repo| repo.revision.is_some()) {
        return path.to_owned();
    }
    let parts: Vec<&str> = path.split(['/', '\\']).filter(|part| !matches!(*part, "" | "." | "..")).collect();
    parts[parts.len().saturating_sub(2)..].join("/")
}

/// Returns the text of the card: front matter, existing text, and the contents of the manifest.
fn text(data: &CardData, readme: &Readme, manifest: Option<&Manifest>) -> String {
    let body = &readme.body;
    let mut out = data.united(&readme.front_matter);
    out += &if body.is_empty() { format!("# {}\n", data.name) } else { format!("{body}\n") };
    let cell = |text: &str| text.replace('|', "\\|");
    if let Some(manifest) = manifest {
        let (data, models): (Vec<&Source>, Vec<&Source>) =
            manifest.sources.iter().partition(|s| matches!(s.role.as_str(), "data" | "validation"));
        let row = |s: &&Source| {
            let hash = s.blake3.as_ref().map_or(String::new(), |hash| format!("`{hash}`"));
            format!("| {} | {} | {hash} |\n", cell(&s.role), cell(&shown(&s.path)))
        };
        for (title, sources) in [("Lineage", models), ("Training data", data)] {
            if !sources.is_empty() {
                out += &format!("\n## {title}\n\n| role | source | blake3 |\n| --- | --- | --- |\n");
                out.extend(sources.iter().take(MOST_DATA).map(row));
                if sources.len() > MOST_DATA {
                    out += &format!("\n{} more are in `manifest.json`.\n", sources.len() - MOST_DATA);
                }
            }
        }
        let has_settings = body.contains("## Settings") || body.contains("## Configuration");
        if let Some(config) = manifest.config.as_ref().filter(|_| !has_settings) {
            let settings = serde_json::to_string_pretty(config).unwrap_or_default();
            out += "\n## Settings\n\n";
            out += &if settings.len() <= LONGEST_SETTINGS {
                format!("```json\n{settings}\n```\n")
            } else {
                "All settings are in `manifest.json`.\n".to_owned()
            };
        }
    }
    if !data.results.is_empty() {
        out +=
            "\n## Scores\n\n| task | metric | value | standard error | documents |\n| --- | --- | --- | --- | --- |\n";
        for r in &data.results {
            let stderr = r.stderr.map_or(String::new(), |e| format!("{e:.4}"));
            let documents = r.documents.map_or(String::new(), |n| n.to_string());
            let (task, metric) = (cell(&r.task), cell(&r.metric));
            out += &format!("| {task} | {metric} | {:.4} | {stderr} | {documents} |\n", r.value);
        }
    }
    if let Some(manifest) = manifest {
        out += &format!("\nMade with {} {}.\n", manifest.tool.name, manifest.tool.version);
    }
    out
}

/// Shortens paths of sources, and absolute paths in settings, to what a card should show: where files are on this
/// machine is private, and hashes identify them.
fn without_directories(manifest: &mut Manifest) {
    for source in &mut manifest.sources {
        source.path = shown(&source.path);
    }
    manifest.config.iter_mut().for_each(shorten_all);
}

fn shorten_all(value: &mut Value) {
    match value {
        Value::String(text) => shorten(text),
        Value::Array(values) => values.iter_mut().for_each(shorten_all),
        Value::Object(fields) => fields.values_mut().for_each(shorten_all),
        _ => {}
    }
}

fn shorten(text: &mut String) {
    if Path::new(text.as_str()).is_absolute() {
        *text = shown(text);
    }
}

/// Returns all files of the directory with the new card and a changed configuration of an adapter, and a manifest that
/// lists them.
fn files(
    dir: &Path,
    card: &str,
    adapter_config: Option<String>,
    manifest: Option<Manifest>,
    repo: &str,
) -> Result<Vec<Upload>, HubError> {
    let mut names = Vec::new();
    walk(dir, "", &mut names)?;
    names.retain(|name| name != "README.md" && name != "manifest.json");
    names.sort();
    let file = |name: String| match &adapter_config {
        Some(text) if name == ADAPTER_CONFIG => Upload { name, content: Content::Bytes(text.clone().into_bytes()) },
        _ => Upload { content: Content::File(dir.join(&name)), name },
    };
    let mut files = vec![Upload { name: "README.md".to_owned(), content: Content::Bytes(card.as_bytes().to_vec()) }];
    files.extend(names.into_iter().map(file));
    if let Some(mut manifest) = manifest {
        for (name, entry) in manifest.files.iter().filter(|(name, _)| *name != "README.md") {
            let path = dir.join(name);
            if hash_file(&path)? != *entry {
                return Err(HubError::Upload { repo: repo.to_owned(), problem: UploadProblem::Changed { path } });
            }
        }
        let written = [("README.md", Some(card)), (ADAPTER_CONFIG, adapter_config.as_deref())];
        for (name, text) in written.into_iter().filter_map(|(name, text)| Some((name, text?))) {
            let blake3 = blake3::hash(text.as_bytes()).to_hex().to_string();
            manifest.files.insert(name.to_owned(), FileEntry { bytes: text.len() as u64, blake3 });
        }
        without_directories(&mut manifest);
        let text = serde_json::to_string_pretty(&manifest).unwrap_or_default() + "\n";
        files.push(Upload { name: "manifest.json".to_owned(), content: Content::Bytes(text.into_bytes()) });
    }
    Ok(files)
}

fn walk(dir: &Path, prefix: &str, names: &mut Vec<String>) -> Result<(), HubError> {
    for entry in std::fs::read_dir(dir).map_err(HubError::io(dir))? {
        let entry = entry.map_err(HubError::io(dir))?;
        let own = entry.file_name().to_string_lossy().into_owned();
        // Hidden files belong to a client or to the system.
        if own.starts_with('.') {
            continue;
        }
        let name = format!("{prefix}{own}");
        if entry.path().is_dir() {
            walk(&entry.path(), &format!("{name}/"), names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_shown() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(shown(&format!("o/m@{commit}")), format!("o/m@{commit}"));
        assert_eq!(shown("/home/somebody/runs/law/adapter"), "law/adapter");
        assert_eq!(shown("../base"), "base");
        let file = "/c/datasets--openai--gsm8k/snapshots/01/main/train.parquet";
        assert_eq!(dataset(file).as_deref(), Some("openai/gsm8k"));
        assert_eq!(dataset("data/train.jsonl"), None);
    }

    #[test]
    fn a_published_manifest_names_no_directory_of_this_machine() {
        let config = serde_json::json!({"train": {"initial_adapter": "/home/somebody/a/adapter", "epochs": 2}, "data": ["/srv/x.jsonl", "b/c"]});
        let mut manifest =
            Manifest::new("adapter").with_source("base", Path::new("/home/somebody/models/base"), "77".to_owned());
        manifest.config = Some(config);
        without_directories(&mut manifest);
        let text = serde_json::to_string(&manifest).unwrap();
        assert!(!text.contains("/home") && !text.contains("/srv"), "{text}");
        assert!(
            text.contains("a/adapter") && text.contains("x.jsonl") && text.contains("b/c") && text.contains("77"),
            "{text}"
        );
    }
}
