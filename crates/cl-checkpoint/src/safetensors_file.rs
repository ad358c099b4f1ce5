use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::files::open_file;
use crate::header::{self, Header};
use crate::platform::read_exact_at;
use crate::problem::HeaderProblem;
use crate::source::outside;
use crate::{Error, TensorInfo, TensorSource};

/// A memory-mapped safetensors file whose header has been validated.
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    data: usize, // where the tensors' bytes start
    header: Header,
}

impl SafetensorsFile {
    /// Maps the file to memory and checks its header; no tensor is read.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be read, and [`Error::Header`] or [`Error::Tensor`] if its header is
    /// invalid.
    pub fn open(path: &Path) -> Result<SafetensorsFile, Error> {
        let file = open_file(path)?;
        if file.metadata().map_err(Error::io(path))?.len() == 0 {
            return Err(Error::Header { path: path.to_owned(), problem: HeaderProblem::Empty });
        }
        // SAFETY: the map is read-only and lives as long as every borrow of it. If another process truncated the file
        // meanwhile, this process would crash; our own writers never do that, since they rename finished files into
        // place.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let header = header::parse(path, &map)?;
        let data = 8 + u64::from_le_bytes(map[..8].try_into().expect("the header was parsed")) as usize;
        Ok(SafetensorsFile { path: path.to_owned(), file, map, data, header })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Returns the byte range of a tensor in the file.
    fn range(&self, name: &str) -> Result<std::ops::Range<usize>, Error> {
        let (_, range) = self
            .header
            .tensors
            .get(name)
            .ok_or_else(|| Error::TensorNotFound { path: self.path.clone(), tensor: name.to_owned() })?;
        Ok(self.data + range.start..self.data + range.end)
    }
}

impl TensorSource for SafetensorsFile {
    fn names(&self) -> Vec<&str> {
        self.header.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(name).map(|t| &t.0)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], Error> {
        let range = self.range(name)?;
        Ok(&self.map[range])
    }

    fn read(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        let range = self.range(name)?;
        if offset.checked_add(out.len()).is_none_or(|end| end > range.len()) {
            return Err(outside(&self.path, name, offset, out.len(), range.len()));
        }
        read_exact_at(&self.file, out, (range.start + offset) as u64).map_err(Error::io(&self.path))
    }
}
