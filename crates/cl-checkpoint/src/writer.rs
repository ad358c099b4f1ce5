use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use serde_json::{Map, Value, json};

use crate::files::is_file_name;
use crate::header::MAX_HEADER;
use crate::manifest::hash_file;
use crate::platform::{self, write_all_at};
use crate::problem::PlanProblem;
use crate::source::byte_len;
use crate::{Error, FileEntry, Manifest, OutputDir, TensorSpec};

/// Options of a checkpoint writer.
#[derive(Clone, Copy, Debug)]
pub struct WriteOptions {
    /// Maximum size in bytes of the tensors in a shard; a larger tensor gets its own shard.
    pub max_shard_size: u64,
    /// Whether to replace an existing output.
    pub overwrite: bool,
}

impl Default for WriteOptions {
    /// Returns shards of 5 GB, as in Transformers, without overwriting.
    fn default() -> Self {
        WriteOptions { max_shard_size: 5_000_000_000, overwrite: false }
    }
}

/// Writes a model directory. All tensors are declared in advance, and can be written in any order and from any thread.
pub struct CheckpointWriter {
    shards: Vec<File>, // dropped before `out`, because Windows does not remove open files
    out: OutputDir,
    places: BTreeMap<String, Place>,
    missing: Mutex<BTreeMap<String, usize>>, // for each tensor, the number of bytes not written yet
    unsynced: AtomicUsize,
    sync: Mutex<Option<JoinHandle<std::io::Result<()>>>>,
}

/// Number of bytes after which a background sync is started, so that little remains to sync at the end.
const SYNC_EVERY: usize = 32 << 20;

struct Place {
    shard: usize,
    offset: u64,
    length: usize,
}

impl CheckpointWriter {
    /// Checks the plan, lays out the shards and writes their headers.
    ///
    /// # Errors
    /// Returns [`Error::Plan`] if there are no tensors, a name occurs twice or a tensor is too large, [`Error::Exists`]
    /// if the output exists, and [`Error::Io`] if writing fails.
    pub fn create(out_dir: &Path, tensors: &[TensorSpec], options: WriteOptions) -> Result<CheckpointWriter, Error> {
        Self::create_named(out_dir, tensors, options, "model", &BTreeMap::new())
    }

    /// Like [`CheckpointWriter::create`], with a file stem other than `model` and metadata in the headers, for adapters.
    pub(crate) fn create_named(
        out_dir: &Path,
        tensors: &[TensorSpec],
        options: WriteOptions,
        stem: &str,
        metadata: &BTreeMap<String, String>,
    ) -> Result<CheckpointWriter, Error> {
        let shards = layout(out_dir, tensors, options.max_shard_size)?;
        let out = OutputDir::create(out_dir, options.overwrite)?;
        let count = shards.len();
        let mut writer = CheckpointWriter {
            out,
            shards: Vec::new(),
            places: BTreeMap::new(),
            missing: Mutex::default(),
            unsynced: AtomicUsize::new(0),
            sync: Mutex::default(),
        };
        let mut weight_map = Map::new();
        let mut total = 0u64;
        for (i, shard) in shards.iter().enumerate() {
            let file_name = if count == 1 {
                format!("{stem}.safetensors")
            } else {
                format!("{stem}-{:05}-of-{count:05}.safetensors", i + 1)
            };
            let path = writer.out.path().join(&file_name);
            let file = File::create_new(&path).map_err(Error::io(&path))?;
            let header = header(shard, metadata);
            if header.len() as u64 > MAX_HEADER {
                let problem = PlanProblem::Header { file: file_name, limit: MAX_HEADER };
                return Err(Error::Plan { path: out_dir.to_owned(), problem: Box::new(problem) });
            }
            write_all_at(&file, &header, 0).map_err(Error::io(&path))?;
            let mut offset = header.len() as u64;
            for spec in shard {
                let length = byte_len(spec.dtype, &spec.shape).expect("checked by the layout");
                writer.places.insert(spec.name.clone(), Place { shard: i, offset, length });
                weight_map.insert(spec.name.clone(), Value::from(file_name.clone()));
                offset += length as u64;
                total += length as u64;
            }
            file.set_len(offset).map_err(Error::io(&path))?;
            writer.shards.push(file);
        }
        let missing = writer.places.iter().map(|(name, place)| (name.clone(), place.length));
        // Nothing is left to write of a tensor without elements.
        writer.missing = Mutex::new(missing.filter(|(_, length)| *length > 0).collect());
        if count > 1 {
            weight_map.sort_keys();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            writer.put_json(&format!("{stem}.safetensors.index.json"), &index)?;
        }
        Ok(writer)
    }

    /// Writes one tensor's bytes, row-major and little endian.
    ///
    /// # Errors
    /// Returns [`Error::Plan`] if the tensor was not planned or has a different size, and [`Error::Io`] if writing
    /// fails.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let place = self.place(name)?;
        if bytes.len() != place.length {
            let (tensor, planned) = (name.to_owned(), place.length);
            return Err(self.unplanned(PlanProblem::Size { tensor, planned, found: bytes.len() }));
        }
        self.write_part(name, 0, bytes)
    }

    /// Writes a part of one tensor's bytes, starting at byte `offset`. Each byte must be written once, in any order and
    /// from any thread.
    ///
    /// # Errors
    /// Returns [`Error::Plan`] if the tensor was not planned, the part exceeds it, or bytes were written twice, and
    /// [`Error::Io`] if writing fails.
    pub fn write_part(&self, name: &str, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        let place = self.place(name)?;
        if offset.checked_add(bytes.len()).is_none_or(|end| end > place.length) {
            let (tensor, length, planned) = (name.to_owned(), bytes.len(), place.length);
            return Err(self.unplanned(PlanProblem::Beyond { tensor, offset, length, planned }));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let at = place.offset + offset as u64;
        write_all_at(&self.shards[place.shard], bytes, at).map_err(Error::io(self.out.target()))?;
        let mut missing = self.missing.lock().expect("no panic while held");
        let left = missing.get(name).and_then(|left| left.checked_sub(bytes.len()));
        match left {
            None => return Err(self.unplanned(PlanProblem::WrittenTwice { tensor: name.to_owned() })),
            Some(0) => missing.remove(name),
            Some(left) => missing.insert(name.to_owned(), left),
        };
        drop(missing);
        if self.unsynced.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len() >= SYNC_EVERY {
            self.start_sync(place.shard)?;
        }
        Ok(())
    }

    /// Starts a background sync of a shard, unless an earlier sync is still running.
    fn start_sync(&self, shard: usize) -> Result<(), Error> {
        let Ok(mut running) = self.sync.try_lock() else { return Ok(()) };
        if running.as_ref().is_some_and(|sync| !sync.is_finished()) {
            return Ok(());
        }
        self.unsynced.store(0, Ordering::Relaxed);
        let last = running.take();
        let file = self.shards[shard].try_clone().map_err(Error::io(self.out.target()))?;
        *running = Some(std::thread::spawn(move || file.sync_data()));
        self.synced(last)
    }

    /// Returns the result of a sync, because its error would not be reported again by the next one.
    fn synced(&self, sync: Option<JoinHandle<std::io::Result<()>>>) -> Result<(), Error> {
        let Some(sync) = sync else { return Ok(()) };
        sync.join().expect("syncing does not panic").map_err(Error::io(self.out.target()))
    }

    fn place(&self, name: &str) -> Result<&Place, Error> {
        let problem = || PlanProblem::NotPlanned { tensor: name.to_owned() };
        self.places.get(name).ok_or_else(|| self.unplanned(problem()))
    }

    fn unplanned(&self, problem: PlanProblem) -> Error {
        Error::Plan { path: self.out.target().to_owned(), problem: Box::new(problem) }
    }

    /// Writes an indented JSON file.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read or written.
    pub fn put_json(&self, name: &str, value: &Value) -> Result<(), Error> {
        let mut text = serde_json::to_vec_pretty(value).map_err(Error::json(Path::new(name)))?;
        text.push(b'\n');
        self.put_file(name, &text)
    }

    /// Writes a file.
    ///
    /// # Errors
    /// Returns [`Error::Plan`] if the name contains a directory, and [`Error::Io`] if writing fails.
    pub fn put_file(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = self.inside(name)?;
        std::fs::write(&path, content).map_err(Error::io(&path))
    }

    /// Copies a file.
    ///
    /// # Errors
    /// Returns [`Error::Plan`] if the name contains a directory, and [`Error::Io`] if writing fails.
    pub fn copy_file(&self, from: &Path, name: &str) -> Result<(), Error> {
        platform::copy(from, &self.inside(name)?).map_err(Error::io(from))
    }

    fn inside(&self, name: &str) -> Result<std::path::PathBuf, Error> {
        if !is_file_name(name) {
            return Err(self.unplanned(PlanProblem::FileName { name: name.to_owned() }));
        }
        Ok(self.out.path().join(name))
    }

    /// Completes the directory: writes the manifest, then renames the directory into place.
    ///
    /// # Errors
    /// Returns [`Error::Plan`] if a planned tensor was not written completely, and [`Error::Io`] if writing fails.
    pub fn finish(self, manifest: Manifest) -> Result<(), Error> {
        if let Some((name, left)) = self.missing.lock().expect("no panic while held").first_key_value() {
            let whole = self.places.get(name).is_some_and(|place| place.length == *left);
            let tensor = name.clone();
            return Err(self.unplanned(match whole {
                true => PlanProblem::NeverWritten { tensor },
                false => PlanProblem::PartlyWritten { tensor },
            }));
        }
        let sync = self.sync.lock().expect("no panic while held").take();
        self.synced(sync)?;
        // Windows does not rename a directory with open files.
        drop(self.shards);
        self.out.finish(manifest)
    }
}

/// Writes a single safetensors file, syncs it, and returns its size and hash. `bytes` is called once for each tensor,
/// with its index in `tensors`.
///
/// This is for a directory that several processes write: each of them writes a file, and one completes the directory
/// with [`OutputDir::finish`].
///
/// # Errors
/// Returns [`Error::Plan`] if there are no tensors, a name occurs twice, or `bytes` returns a different number of bytes
/// than planned, and [`Error::Io`] if the file exists or cannot be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorSpec],
    mut bytes: impl FnMut(usize) -> Vec<u8>,
) -> Result<FileEntry, Error> {
    let shard = layout(path, tensors, u64::MAX)?.remove(0);
    let positions: BTreeMap<&str, usize> = tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    let mut file = File::create_new(path).map_err(Error::io(path))?;
    file.write_all(&header(&shard, &BTreeMap::new())).map_err(Error::io(path))?;
    for spec in shard {
        let content = bytes(positions[spec.name.as_str()]);
        let planned = byte_len(spec.dtype, &spec.shape).expect("checked by the layout");
        if content.len() != planned {
            let problem = PlanProblem::Size { tensor: spec.name.clone(), planned, found: content.len() };
            return Err(Error::Plan { path: path.to_owned(), problem: Box::new(problem) });
        }
        file.write_all(&content).map_err(Error::io(path))?;
    }
    file.sync_all().map_err(Error::io(path))?;
    hash_file(path)
}

/// Splits the tensors into shards, in order.
fn layout<'t>(out: &Path, tensors: &'t [TensorSpec], max: u64) -> Result<Vec<Vec<&'t TensorSpec>>, Error> {
    let plan = |problem| Error::Plan { path: out.to_owned(), problem: Box::new(problem) };
    if tensors.is_empty() {
        return Err(plan(PlanProblem::NoTensors));
    }
    let mut names = std::collections::BTreeSet::new();
    let mut shards: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
    let (mut size, mut total) = (0u64, 0u64);
    for spec in tensors {
        if !names.insert(&spec.name) || spec.name == "__metadata__" {
            return Err(plan(PlanProblem::TensorName { tensor: spec.name.clone() }));
        }
        let too_large = || plan(PlanProblem::TooLarge { tensor: spec.name.clone(), shape: spec.shape.clone() });
        let length = byte_len(spec.dtype, &spec.shape).ok_or_else(too_large)? as u64;
        // Files are limited to 2⁶³ bytes, so no sum below overflows.
        total = total.checked_add(length).filter(|&t| t < 1 << 62).ok_or_else(too_large)?;
        let last = shards.last_mut().expect("starts with one");
        if !last.is_empty() && size + length > max {
            shards.push(vec![spec]);
            size = length;
        } else {
            last.push(spec);
            size += length;
        }
    }
    for shard in &mut shards {
        // Wide elements first, then by name, so that every tensor starts at a multiple of its element size.
        shard.sort_by_key(|s| (std::cmp::Reverse(s.dtype.bitsize()), s.name.clone()));
    }
    Ok(shards)
}

/// Returns the header: its length, and its JSON padded with spaces so that the data starts at a multiple of 8.
fn header(shard: &[&TensorSpec], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut entries = Map::new();
    let format = [("format", "pt")].into_iter();
    let metadata: Map<String, Value> = format
        .chain(metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())))
        .map(|(k, v)| (k.to_owned(), v.into()))
        .collect();
    entries.insert("__metadata__".to_owned(), metadata.into());
    let mut offset = 0;
    for spec in shard {
        let length = byte_len(spec.dtype, &spec.shape).expect("checked by the layout");
        let entry = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + length]});
        entries.insert(spec.name.clone(), entry);
        offset += length;
    }
    let mut text = serde_json::to_vec(&entries).expect("maps of strings and numbers are JSON");
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}
