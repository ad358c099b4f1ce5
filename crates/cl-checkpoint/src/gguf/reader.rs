use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::GgmlType;
use crate::Error;

/// A value of a GGUF file's metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32, or f64 rounded to it where it was written so.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<GgufValue>),
}

/// A tensor of a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// How it is stored.
    pub kind: GgmlType,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A memory-mapped GGUF file whose descriptions have been checked.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Maps the file and checks everything but the tensors' values.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gguf`], [`Error::Tensor`].
    pub fn open(path: &Path) -> Result<GgufFile, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        if file.metadata().map_err(Error::io(path))?.len() == 0 {
            return Err(Error::Gguf { path: path.to_owned(), message: "the file is empty".to_owned() });
        }
        // SAFETY: read-only, and alive as long as every borrow of it; see `SafetensorsFile::open`.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (metadata, tensors) = parse(path, &map)?;
        Ok(GgufFile { path: path.to_owned(), map, metadata, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value of the metadata.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.metadata.get(key)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// A tensor's stored bytes.
    pub fn bytes(&self, tensor: &GgufTensor) -> &[u8] {
        &self.map[tensor.start..tensor.end]
    }

    pub(crate) fn wrong(&self, message: impl Into<String>) -> Error {
        Error::Gguf { path: self.path.clone(), message: message.into() }
    }

    /// A non-negative integer of the metadata.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<u64>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(GgufValue::Unsigned(n)) => Ok(Some(*n)),
            Some(GgufValue::Signed(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(_) => Err(self.wrong(format!("`{key}` is no non-negative integer"))),
        }
    }

    pub(crate) fn required(&self, key: &str) -> Result<u64, Error> {
        self.integer(key)?.ok_or_else(|| self.wrong(format!("`{key}` is missing")))
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(GgufValue::Float(x)) => Ok(Some(*x)),
            Some(_) => Err(self.wrong(format!("`{key}` is no number"))),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(GgufValue::Text(t)) => Ok(Some(t)),
            Some(_) => Err(self.wrong(format!("`{key}` is no text"))),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(GgufValue::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.wrong(format!("`{key}` is no boolean"))),
        }
    }

    pub(crate) fn list(&self, key: &str) -> Result<Option<&[GgufValue]>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(GgufValue::List(l)) => Ok(Some(l)),
            Some(_) => Err(self.wrong(format!("`{key}` is no list"))),
        }
    }
}

type Parsed = (BTreeMap<String, GgufValue>, BTreeMap<String, GgufTensor>);

fn parse(path: &Path, file: &[u8]) -> Result<Parsed, Error> {
    let wrong = |message: String| Error::Gguf { path: path.to_owned(), message };
    let mut cursor = Cursor { path, file, at: 0 };
    if cursor.take(4).ok() != Some(b"GGUF") {
        return Err(wrong("not a GGUF file (it does not start with `GGUF`)".to_owned()));
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(wrong(format!("GGUF version {version} is not supported; expected 2 or 3")));
    }
    let (tensor_count, pair_count) = (cursor.u64()?, cursor.u64()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..pair_count {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(wrong(format!("key `{key}` appears twice")));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(GgufValue::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
        Some(_) => return Err(wrong("`general.alignment` is no power of two below 2^20".to_owned())),
    };
    let mut tensors = BTreeMap::new();
    for _ in 0..tensor_count {
        let (name, tensor) = cursor.tensor()?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(wrong(format!("tensor `{name}` appears twice")));
        }
    }
    let data = cursor.at.next_multiple_of(alignment);
    place(path, &mut tensors, data, file.len(), alignment)?;
    Ok((metadata, tensors))
}

/// Turns offsets into places of the file: inside it, aligned, and apart from each other.
fn place(
    path: &Path,
    tensors: &mut BTreeMap<String, GgufTensor>,
    data: usize,
    length: usize,
    alignment: usize,
) -> Result<(), Error> {
    let mut taken: Vec<(usize, usize, String)> = Vec::new();
    for (name, tensor) in tensors.iter_mut() {
        let wrong = |message: String| Error::Tensor { path: path.to_owned(), tensor: name.clone(), message };
        let size = tensor.end;
        if tensor.start % alignment != 0 {
            return Err(wrong(format!("offset {} is no multiple of the alignment {alignment}", tensor.start)));
        }
        let start = data.checked_add(tensor.start);
        let end = start.and_then(|s| s.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= length => (tensor.start, tensor.end) = (start, end),
            _ => {
                return Err(wrong(format!(
                    "its {size} bytes at offset {} lie outside the file of {length} bytes; the file is truncated",
                    tensor.start
                )));
            }
        }
        taken.push((tensor.start, tensor.end, name.clone()));
    }
    taken.sort();
    for pair in taken.windows(2) {
        if pair[0].1 > pair[1].0 {
            let message = format!("overlaps tensor `{}`", pair[0].2);
            return Err(Error::Tensor { path: path.to_owned(), tensor: pair[1].2.clone(), message });
        }
    }
    Ok(())
}

struct Cursor<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn wrong(&self, message: String) -> Error {
        Error::Gguf { path: self.path.to_owned(), message }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Error> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.file.len());
        let end = end.ok_or_else(|| {
            self.wrong(format!("{n} bytes wanted at byte {} of {}; the file is truncated", self.at, self.file.len()))
        })?;
        let bytes = &self.file[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        Ok(self.take(N)?.try_into().expect("as many as asked for"))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, Error> {
        let at = self.at;
        let length = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.wrong(format!("the text at byte {at} is not UTF-8")))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<GgufValue, Error> {
        Ok(match kind {
            0 => GgufValue::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => GgufValue::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => GgufValue::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => GgufValue::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => GgufValue::Unsigned(u64::from(self.u32()?)),
            5 => GgufValue::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => GgufValue::Float(shortest(f32::from_le_bytes(self.array()?))),
            7 => GgufValue::Bool(self.array::<1>()?[0] != 0),
            8 => GgufValue::Text(self.text()?),
            9 => {
                // Lists of lists are allowed; a file made of nothing else must not exhaust the stack.
                if depth > 4 {
                    return Err(self.wrong(format!("lists nested too deeply at byte {}", self.at)));
                }
                let kind = self.u32()?;
                let count = self.u64()?;
                // Every element takes a byte at least, so a count beyond the file is refused before anything is made.
                if count > (self.file.len() - self.at) as u64 {
                    return Err(self.wrong(format!("a list of {count} at byte {}; the file is truncated", self.at)));
                }
                let mut list = Vec::new();
                for _ in 0..count {
                    list.push(self.value(kind, depth + 1)?);
                }
                GgufValue::List(list)
            }
            10 => GgufValue::Unsigned(self.u64()?),
            11 => GgufValue::Signed(i64::from_le_bytes(self.array()?)),
            12 => GgufValue::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.wrong(format!("value type {other} at byte {} is not known", self.at))),
        })
    }

    /// Name and description; `start` is the offset for now, `end` the number of bytes.
    fn tensor(&mut self) -> Result<(String, GgufTensor), Error> {
        let name = self.text()?;
        let wrong = |message: String| Error::Tensor { path: self.path.to_owned(), tensor: name.clone(), message };
        let dimensions = u32::from_le_bytes(
            self.file.get(self.at..self.at + 4).and_then(|b| b.try_into().ok()).ok_or_else(|| wrong("truncated".into()))?,
        );
        if !(1..=4).contains(&dimensions) {
            return Err(wrong(format!("{dimensions} dimensions; expected 1 to 4")));
        }
        self.at += 4;
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(self.u64()?).unwrap_or(usize::MAX));
        }
        let (kind, offset) = (self.u32()?, self.u64()?);
        let wrong = |message: String| Error::Tensor { path: self.path.to_owned(), tensor: name.clone(), message };
        let kind = GgmlType::from_id(kind).ok_or_else(|| {
            wrong(format!("type {kind} is not supported; supported: {}", GgmlType::NAMES.join(", ")))
        })?;
        let row = shape[0];
        if row == 0 || row % kind.block_elements() != 0 {
            return Err(wrong(format!("rows of {row} elements do not divide into blocks of {}", kind.block_elements())));
        }
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let size = elements
            .filter(|&n| n > 0)
            .and_then(|n| (n / kind.block_elements()).checked_mul(kind.block_bytes()))
            .ok_or_else(|| wrong(format!("shape {shape:?} is empty or too large")))?;
        shape.reverse();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok((name, GgufTensor { kind, shape, start, end: size }))
    }
}

/// The shortest decimal number that is this f32, as f64: 1e-5 and not 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
