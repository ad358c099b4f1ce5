use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::{Error, GgmlType, HeaderItem, HeaderProblem, KeyProblem, TensorProblem};
use crate::files::open_file;

/// A value of a GGUF file's metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// An f64, or an f32 as the f64 nearest to its shortest decimal representation.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<GgufValue>),
}

/// A tensor in a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Its element type.
    pub ggml_type: GgmlType,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A memory-mapped GGUF file whose header has been validated.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Memory-maps the file and checks everything except the values of tensors.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be read, and [`Error::Magic`], [`Error::Version`], [`Error::Header`] or
    /// [`Error::Tensor`] if it is not a valid GGUF file.
    pub fn open(path: &Path) -> Result<GgufFile, Error> {
        let file = open_file(path)?;
        if file.metadata().map_err(Error::io(path))?.len() == 0 {
            return Err(Error::Magic { path: path.to_owned() });
        }
        // SAFETY: read-only, and alive as long as every borrow of it; see `SafetensorsFile::open`.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (metadata, tensors) = parse(path, &map)?;
        Ok(GgufFile { path: path.to_owned(), map, metadata, tensors })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns all metadata values by key.
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// Returns all tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// Returns a tensor's stored bytes.
    pub fn bytes(&self, tensor: &GgufTensor) -> &[u8] {
        &self.map[tensor.start..tensor.end]
    }

    pub(super) fn key_error(&self, key: &str, problem: KeyProblem) -> Error {
        Error::Key { path: self.path.clone(), key: key.to_owned(), problem }
    }

    pub(super) fn tensor_error(&self, tensor: &str, problem: TensorProblem) -> Error {
        Error::Tensor { path: self.path.clone(), tensor: tensor.to_owned(), problem }
    }

    /// Reads a metadata value with `read`; returns `None` if the key is absent, and an error if `read` returns `None`.
    fn value<'f, T>(
        &'f self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'f GgufValue) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.key_error(key, KeyProblem::Expected { expected })),
        }
    }

    pub(super) fn uint(&self, key: &str) -> Result<Option<usize>, Error> {
        self.value(key, "a non-negative integer", |v| match v {
            GgufValue::Unsigned(n) => usize::try_from(*n).ok(),
            GgufValue::Signed(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, Error> {
        self.value(key, "a finite number", |v| {
            if let GgufValue::Float(x) = v { Some(*x).filter(|x| x.is_finite()) } else { None }
        })
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.value(key, "true or false", |v| if let GgufValue::Bool(b) = v { Some(*b) } else { None })
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        self.value(key, "text", |v| if let GgufValue::Text(t) = v { Some(t.as_str()) } else { None })
    }

    fn list<'f, T>(
        &'f self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'f GgufValue) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        self.value(key, expected, |v| if let GgufValue::List(l) = v { l.iter().map(&read).collect() } else { None })
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        self.list(key, "a list of texts", |v| if let GgufValue::Text(t) = v { Some(t.as_str()) } else { None })
    }

    pub(super) fn ints(&self, key: &str) -> Result<Option<Vec<i32>>, Error> {
        self.list(key, "a list of 32-bit integers", |v| match v {
            GgufValue::Signed(n) => i32::try_from(*n).ok(),
            GgufValue::Unsigned(n) => i32::try_from(*n).ok(),
            _ => None,
        })
    }

    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.list(key, "a list of numbers", |v| if let GgufValue::Float(x) = v { Some(*x as f32) } else { None })
    }
}

impl GgufTensor {
    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

type Parsed = (BTreeMap<String, GgufValue>, BTreeMap<String, GgufTensor>);

fn parse(path: &Path, file: &[u8]) -> Result<Parsed, Error> {
    let mut cursor = Cursor { path, file, at: 0, values: 0 };
    if cursor.take(4).ok() != Some(b"GGUF") {
        return Err(Error::Magic { path: path.to_owned() });
    }
    let version = cursor.u32()?;
    if !(2..=3).contains(&version) {
        return Err(Error::Version { path: path.to_owned(), version });
    }
    let (tensor_count, pair_count) = (cursor.u64()?, cursor.u64()?);
    // Every entry takes more than one byte.
    if tensor_count.max(pair_count) > file.len() as u64 {
        return Err(cursor.wrong(HeaderProblem::Counts { tensors: tensor_count, keys: pair_count }));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..pair_count {
        let key = cursor.text()?;
        let value = cursor.pair().map_err(in_item(HeaderItem::Key(key.clone())))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(cursor.wrong(HeaderProblem::KeyTwice { key }));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(GgufValue::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
        Some(_) => {
            let problem = KeyProblem::Expected { expected: "a power of two up to 2^20" };
            return Err(Error::Key { path: path.to_owned(), key: "general.alignment".to_owned(), problem });
        }
    };
    let mut tensors = BTreeMap::new();
    for _ in 0..tensor_count {
        let name = cursor.text()?;
        let tensor = cursor.tensor(&name).map_err(in_item(HeaderItem::Tensor(name.clone())))?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(cursor.wrong(HeaderProblem::TensorTwice { tensor: name }));
        }
    }
    let data = cursor.at.next_multiple_of(alignment);
    place(path, &mut tensors, data, file.len(), alignment)?;
    Ok((metadata, tensors))
}

/// Converts offsets to positions in the file, and checks that tensors are inside it, aligned, and do not overlap.
fn place(
    path: &Path,
    tensors: &mut BTreeMap<String, GgufTensor>,
    data: usize,
    length: usize,
    alignment: usize,
) -> Result<(), Error> {
    let mut taken: Vec<(usize, usize, String)> = Vec::new();
    for (name, tensor) in tensors.iter_mut() {
        let wrong = |problem| Error::Tensor { path: path.to_owned(), tensor: name.clone(), problem };
        let size = tensor.end;
        if tensor.start % alignment != 0 {
            return Err(wrong(TensorProblem::Alignment { offset: tensor.start, alignment }));
        }
        let start = data.checked_add(tensor.start);
        let end = start.and_then(|s| s.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= length => (tensor.start, tensor.end) = (start, end),
            _ => return Err(wrong(TensorProblem::Outside { bytes: size, offset: tensor.start, length })),
        }
        taken.push((tensor.start, tensor.end, name.clone()));
    }
    taken.sort();
    for pair in taken.windows(2) {
        if pair[0].1 > pair[1].0 {
            let problem = TensorProblem::Overlaps { other: pair[0].2.clone() };
            return Err(Error::Tensor { path: path.to_owned(), tensor: pair[1].2.clone(), problem });
        }
    }
    Ok(())
}

/// Maximum number of values: more than any vocabulary needs, but so few that lists of single bytes cannot exhaust
/// memory.
const MAX_VALUES: usize = 1 << 24;

struct Cursor<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
    values: usize, // number of values read so far
}

/// Adds to a structural error which key or tensor was being read.
fn in_item(item: HeaderItem) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Header { path, offset, problem, .. } => Error::Header { path, offset, item: Some(item), problem },
        other => other,
    }
}

impl<'a> Cursor<'a> {
    fn wrong(&self, problem: HeaderProblem) -> Error {
        Error::Header { path: self.path.to_owned(), offset: self.at, item: None, problem }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Error> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.file.len());
        let end = end.ok_or_else(|| self.wrong(HeaderProblem::Truncated { expected: n, end: self.file.len() }))?;
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
        String::from_utf8(bytes.to_vec()).map_err(|_| self.wrong(HeaderProblem::NotUtf8 { at }))
    }

    fn pair(&mut self) -> Result<GgufValue, Error> {
        let kind = self.u32()?;
        self.value(kind, 0)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<GgufValue, Error> {
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(self.wrong(HeaderProblem::TooManyValues { limit: MAX_VALUES }));
        }
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
                // Lists of lists are allowed, but deeply nested ones must not overflow the stack.
                if depth > 4 {
                    return Err(self.wrong(HeaderProblem::TooDeep { at: self.at }));
                }
                let kind = self.u32()?;
                let count = self.u64()?;
                // Every element takes at least one byte, so a count that exceeds the rest of the file is rejected
                // before memory is allocated.
                if count > (self.file.len() - self.at) as u64 {
                    return Err(self.wrong(HeaderProblem::List { count, at: self.at }));
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
            kind => return Err(self.wrong(HeaderProblem::ValueType { kind, at: self.at })),
        })
    }

    /// Reads the description that follows a tensor's name. For now, `start` is the offset and `end` the number of
    /// bytes.
    fn tensor(&mut self, name: &str) -> Result<GgufTensor, Error> {
        let path = self.path;
        let wrong = |problem| Error::Tensor { path: path.to_owned(), tensor: name.to_owned(), problem };
        let dimensions = self.u32()?;
        if !(1..=4).contains(&dimensions) {
            return Err(wrong(TensorProblem::Dimensions { dimensions }));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(self.u64()?).unwrap_or(usize::MAX));
        }
        let (kind, offset) = (self.u32()?, self.u64()?);
        let kind = GgmlType::from_id(kind).ok_or_else(|| wrong(TensorProblem::Type { kind }))?;
        let row = shape[0];
        if row == 0 || row % kind.block_len() != 0 {
            return Err(wrong(TensorProblem::Blocks { row, block: kind.block_len() }));
        }
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let size = elements
            .filter(|&n| n > 0)
            .and_then(|n| (n / kind.block_len()).checked_mul(kind.block_bytes()))
            .ok_or_else(|| wrong(TensorProblem::Size { shape: shape.clone() }))?;
        shape.reverse();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(GgufTensor { ggml_type: kind, shape, start, end: size })
    }
}

/// Converts an f32 to the shortest decimal number that represents it, as f64: 1e-5 instead of 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
