use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{mixture_hint, run_hint};
use crate::files::{FileStamp, MAX_CONFIG, MAX_TOKENIZER, check_unchanged, is_file_name, read_file};
use crate::problem::{IndexProblem, TensorProblem};
use crate::source::outside;
use crate::{Error, HubSnapshot, SafetensorsFile, TensorInfo, TensorSource, convert, fused_checkpoint, ordered_map};

/// A Hugging Face model directory, opened lazily.
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
    files: Vec<SafetensorsFile>,
    home: BTreeMap<String, Home>,
    stamps: Vec<(PathBuf, FileStamp)>,
}

/// Where a tensor is.
struct Home {
    /// Index of its file.
    file: usize,
    /// The stored tensor of which it is a part, with its own dtype and shape and the position of its first byte.
    part: Option<(String, TensorInfo, usize)>,
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Files of a model other than its weights and config.
pub(crate) const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "LICENSE",
];

impl Checkpoint {
    /// Opens `config.json` and `model.safetensors`, or the shards listed in `model.safetensors.index.json`, and checks
    /// all headers. No tensor is read. Fused experts of Mixtral, Qwen2-MoE and Qwen3-MoE (`mlp.experts.gate_up_proj`
    /// and `down_proj`) are replaced by the tensors of each expert, such as `mlp.experts.0.up_proj.weight`.
    ///
    /// # Errors
    /// Returns an error if a file is missing or damaged, or if the index contradicts its shards or refers to files
    /// outside the directory.
    pub fn open(dir: &Path) -> Result<Checkpoint, Error> {
        if !dir.is_dir() {
            return Err(Error::NotFound {
                path: dir.to_owned(),
                hint: match dir.to_str().is_some_and(HubSnapshot::is_name) {
                    true => "add --hub to download a model of the Hugging Face hub by this name",
                    false => "a model is a directory that contains config.json",
                },
            });
        }
        let config = read_config(&dir.join("config.json"))?;
        let index = dir.join(INDEX);
        let single = dir.join(SINGLE);
        // As in Transformers, the single file takes precedence over shards.
        if single.exists() {
            let file = SafetensorsFile::open(&single)?;
            let home = file.names().into_iter().map(|n| (n.to_owned(), 0)).collect();
            return Checkpoint::of(dir, config, vec![file], home).stamped();
        }
        if !index.exists() {
            let hint = if dir.join("pytorch_model.bin").exists() {
                "this model has only pytorch_model.bin; convert it to safetensors first (save_pretrained does)"
            } else {
                "a model directory contains model.safetensors, or shards and model.safetensors.index.json"
            };
            return Err(Error::NotFound { path: single, hint });
        }
        let weight_map = read_index(&index)?;
        let (files, home) = open_shards(dir, &index, &weight_map)?;
        Checkpoint::of(dir, config, files, home).stamped()
    }

    /// Replaces fused experts by their parts, unless there are tensors with the names of the parts.
    fn of(
        dir: &Path,
        config: Map<String, Value>,
        files: Vec<SafetensorsFile>,
        stored: BTreeMap<String, usize>,
    ) -> Checkpoint {
        let layout = fused_checkpoint::layout(&config);
        let any_fused = stored.keys().any(|name| name.ends_with(".mlp.experts.down_proj"));
        let mut home = BTreeMap::new();
        for (name, &file) in &stored {
            let parts = match (layout, files[file].info(name)) {
                (Some(layout), Some(info)) if any_fused => fused_checkpoint::parts(layout, name, info),
                _ => Vec::new(),
            };
            if parts.is_empty() || parts.iter().any(|part| part.name != *name && stored.contains_key(&part.name)) {
                home.insert(name.clone(), Home { file, part: None });
            } else {
                home.extend(
                    parts
                        .into_iter()
                        .map(|part| (part.name, Home { file, part: Some((name.clone(), part.info, part.start)) })),
                );
            }
        }
        Checkpoint { dir: dir.to_owned(), config, files, home, stamps: Vec::new() }
    }

    fn stamped(mut self) -> Result<Checkpoint, Error> {
        let mut files: Vec<PathBuf> = self.files().map(Path::to_owned).collect();
        files.push(self.dir.join("config.json"));
        files.extend(self.companion_files()?);
        self.stamps = FileStamp::of_all(files)?;
        Ok(self)
    }

    /// Returns the model's files, with their stamps from when it was opened: weights, config.json, tokenizer and
    /// related files.
    pub fn stamps(&self) -> &[(PathBuf, FileStamp)] {
        &self.stamps
    }

    /// Checks that none of its files has changed since it was opened. Reading a file while it is being written would
    /// give a mixture of two contents.
    ///
    /// # Errors
    /// Returns [`Error::Changed`] for the first file that has changed.
    pub fn check_unchanged(&self) -> Result<(), Error> {
        check_unchanged(&self.stamps)
    }

    /// Returns the path of the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the content of `config.json`.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// Returns the weight files, in the order of the index.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(SafetensorsFile::path)
    }

    /// Reads a floating-point tensor as f32, row-major.
    ///
    /// # Errors
    /// Returns [`Error::TensorNotFound`] if there is no such tensor, and [`Error::Tensor`] if its dtype is not floating
    /// point.
    pub fn load_f32(&self, name: &str) -> Result<Vec<f32>, Error> {
        let missing = || Error::TensorNotFound { path: self.dir.clone(), tensor: name.to_owned() };
        let dtype = self.info(name).ok_or_else(missing)?.dtype;
        convert::to_f32(dtype, self.bytes(name)?).ok_or_else(|| Error::Tensor {
            path: self.path_of(name),
            tensor: name.to_owned(),
            problem: Box::new(TensorProblem::NotFloat { dtype }),
        })
    }

    /// Checks that a floating-point tensor (including 8-bit formats) has no NaN and no infinity.
    ///
    /// # Errors
    /// Returns [`Error::NotFinite`] for the first such element.
    pub fn check_finite(&self, name: &str) -> Result<(), Error> {
        let bytes = self.bytes(name)?;
        match self.info(name).and_then(|i| convert::first_not_finite(i.dtype, bytes)) {
            None => Ok(()),
            Some((index, value)) => {
                Err(Error::NotFinite { path: self.path_of(name), tensor: name.to_owned(), index, value })
            }
        }
    }

    /// Calls [`Checkpoint::check_finite`] for every tensor, in parallel.
    ///
    /// # Errors
    /// Returns the error of the first invalid tensor by name.
    pub fn check_all_finite(&self) -> Result<(), Error> {
        let results: Vec<Result<(), Error>> = self.names().par_iter().map(|n| self.check_finite(n)).collect();
        results.into_iter().collect()
    }

    /// Returns the tokenizer, generation and template files, which are copied along with the model.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read or written.
    pub fn companion_files(&self) -> Result<Vec<PathBuf>, Error> {
        Ok(COMPANIONS.iter().map(|n| self.dir.join(n)).filter(|p| p.is_file()).collect())
    }

    fn home_of(&self, name: &str) -> Result<(&SafetensorsFile, &Home), Error> {
        let home = self
            .home
            .get(name)
            .ok_or_else(|| Error::TensorNotFound { path: self.dir.clone(), tensor: name.to_owned() })?;
        Ok((&self.files[home.file], home))
    }

    fn path_of(&self, name: &str) -> PathBuf {
        self.home_of(name).map_or(self.dir.clone(), |(file, _)| file.path().to_owned())
    }
}

impl TensorSource for Checkpoint {
    fn names(&self) -> Vec<&str> {
        self.home.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        let (file, home) = self.home_of(name).ok()?;
        home.part.as_ref().map_or_else(|| file.info(name), |(_, info, _)| Some(info))
    }

    fn bytes(&self, name: &str) -> Result<&[u8], Error> {
        let (file, home) = self.home_of(name)?;
        match &home.part {
            None => file.bytes(name),
            Some((stored, info, start)) => Ok(&file.bytes(stored)?[*start..*start + info.byte_len()]),
        }
    }

    fn read(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        let (file, home) = self.home_of(name)?;
        let Some((stored, info, start)) = &home.part else { return file.read(name, offset, out) };
        let length = info.byte_len();
        if offset.checked_add(out.len()).is_none_or(|end| end > length) {
            return Err(outside(file.path(), name, offset, out.len(), length));
        }
        file.read(stored, start + offset, out)
    }
}

fn read_config(path: &Path) -> Result<Map<String, Value>, Error> {
    if !path.exists() {
        let dir = path.parent().unwrap_or(Path::new(""));
        let run = || run_hint(dir, "model/config.json", "this is a run; its model is its directory model");
        let hint = mixture_hint(dir).or_else(run).unwrap_or("a model directory contains config.json and the weights");
        return Err(Error::NotFound { path: path.to_owned(), hint });
    }
    let text = read_file(path, MAX_CONFIG)?;
    match serde_json::from_slice(&text).map_err(Error::json(path))? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::NotAnObject { path: path.to_owned() }),
    }
}

/// Reads the index: a map from tensors to file names, all of which are checked to be in the directory.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    #[derive(Deserialize)]
    struct Index {
        #[serde(with = "ordered_map")]
        weight_map: Vec<(String, String)>,
    }
    let text = read_file(path, MAX_TOKENIZER)?;
    let wrong = |problem| Error::Index { path: path.to_owned(), problem: Box::new(problem) };
    let index: Index = serde_json::from_slice(&text).map_err(|source| wrong(IndexProblem::Json { source }))?;
    if index.weight_map.is_empty() {
        return Err(wrong(IndexProblem::NoTensors));
    }
    if let Some((tensor, file)) = index.weight_map.iter().find(|(_, file)| !is_file_name(file)) {
        return Err(wrong(IndexProblem::FileName { tensor: tensor.clone(), file: file.clone() }));
    }
    Ok(index.weight_map.into_iter().collect())
}

type Shards = (Vec<SafetensorsFile>, BTreeMap<String, usize>);

fn open_shards(dir: &Path, index: &Path, weight_map: &BTreeMap<String, String>) -> Result<Shards, Error> {
    let wrong = |problem| Error::Index { path: index.to_owned(), problem: Box::new(problem) };
    let mut names: Vec<&String> = weight_map.values().collect();
    names.sort();
    names.dedup();
    let mut files = Vec::new();
    let mut home = BTreeMap::new();
    for name in names {
        let path = dir.join(name);
        if !path.exists() {
            let hint = "the index names this shard; the download or copy is incomplete";
            return Err(Error::NotFound { path, hint });
        }
        let file = SafetensorsFile::open(&path)?;
        for tensor in file.names() {
            let (shard, owned) = (name.clone(), tensor.to_owned());
            match weight_map.get(tensor) {
                Some(named) if named == name => {}
                Some(named) => {
                    return Err(wrong(IndexProblem::Elsewhere { shard, tensor: owned, named: named.clone() }));
                }
                None => return Err(wrong(IndexProblem::Unnamed { shard, tensor: owned })),
            }
            home.insert(tensor.to_owned(), files.len());
        }
        files.push(file);
    }
    if let Some((tensor, file)) = weight_map.iter().find(|(t, _)| !home.contains_key(*t)) {
        return Err(wrong(IndexProblem::NotInShard { tensor: tensor.clone(), shard: file.clone() }));
    }
    Ok((files, home))
}
