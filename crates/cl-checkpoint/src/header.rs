//! Parses and validates the header of a safetensors file.
//!
//! The `safetensors` crate also reads headers, but its errors do not name the invalid tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};

use crate::Error;
use crate::problem::{HeaderProblem, TensorProblem};
use crate::source::{TensorInfo, byte_len};

/// Maximum size of a header, from the specification.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// Start of a Git LFS pointer
/// (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>).
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

pub(crate) struct Header {
    pub(crate) tensors: BTreeMap<String, (TensorInfo, Range<usize>)>,
    pub(crate) metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<Header, Error> {
    let wrong = |problem| Error::Header { path: path.to_owned(), problem };
    let in_tensor = |tensor: &str, problem| Error::Tensor {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        problem: Box::new(problem),
    };
    let length = file.get(..8).ok_or_else(|| wrong(HeaderProblem::TooShort { bytes: file.len() }))?;
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let room = file.len() as u64 - 8;
    if length > room || length > MAX_HEADER {
        if file.starts_with(LFS_POINTER) {
            return Err(wrong(HeaderProblem::LfsPointer));
        }
        return Err(wrong(HeaderProblem::Length { declared: length, available: room, limit: MAX_HEADER }));
    }
    let (text, data) = file[8..].split_at(length as usize);
    let text = std::str::from_utf8(text).map_err(|source| wrong(HeaderProblem::NotUtf8 { source }))?;
    let mut entries = Entries::default();
    let mut json = serde_json::Deserializer::from_str(text);
    if let Err(source) = entries.deserialize(&mut json).and_then(|()| json.end()) {
        return Err(match entries.at {
            Some(name) if name == METADATA => wrong(HeaderProblem::Metadata { source }),
            Some(name) => in_tensor(&name, TensorProblem::Entry { source }),
            None => wrong(HeaderProblem::Json { source }),
        });
    }
    let mut header = Header { tensors: BTreeMap::new(), metadata: entries.metadata.unwrap_or_default() };
    for (name, entry) in entries.tensors {
        let range = check(&entry, data.len()).map_err(|problem| in_tensor(&name, problem))?;
        header.tensors.insert(name, (TensorInfo { dtype: entry.dtype, shape: entry.shape }, range));
    }
    covers(path, &header, data.len())?;
    Ok(header)
}

fn check(entry: &Entry, data: usize) -> Result<Range<usize>, TensorProblem> {
    let (dtype, shape) = (entry.dtype, || entry.shape.clone());
    let (start, end) = entry.data_offsets;
    let expected = byte_len(dtype, &entry.shape).ok_or_else(|| TensorProblem::Size { dtype, shape: shape() })?;
    let offsets = [start, end];
    if start > end || end > data {
        return Err(TensorProblem::Outside { offsets, data });
    }
    if end - start != expected {
        return Err(TensorProblem::Length { dtype, shape: shape(), expected, offsets });
    }
    Ok(start..end)
}

/// Checks that tensors neither overlap nor leave gaps.
fn covers(path: &Path, header: &Header, data: usize) -> Result<(), Error> {
    let mut order: Vec<(&String, &Range<usize>)> = header.tensors.iter().map(|(n, t)| (n, &t.1)).collect();
    order.sort_by_key(|(_, r)| (r.start, r.end));
    let mut end = 0;
    let mut before: Option<&String> = None;
    for (name, range) in order {
        if range.start != end {
            let (offsets, before) = ([range.start, range.end], before.cloned());
            let problem = match range.start < end {
                true => TensorProblem::Overlaps { offsets, before, end },
                false => TensorProblem::Hole { offsets, before, end },
            };
            return Err(Error::Tensor { path: path.to_owned(), tensor: name.clone(), problem: Box::new(problem) });
        }
        end = range.end;
        before = Some(name);
    }
    if end != data {
        return Err(Error::Header { path: path.to_owned(), problem: HeaderProblem::End { end, data } });
    }
    Ok(())
}

const METADATA: &str = "__metadata__";

/// The header's JSON object. Duplicate keys are an error; serde alone would keep the last one.
#[derive(Default)]
struct Entries {
    tensors: BTreeMap<String, Entry>,
    metadata: Option<BTreeMap<String, String>>,
    at: Option<String>, // the key being read, for error messages
}

impl<'de> DeserializeSeed<'de> for &mut Entries {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Entries {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            self.at = Some(key.clone());
            let twice = if key == METADATA {
                self.metadata.replace(map.next_value()?).is_some()
            } else {
                self.tensors.insert(key, map.next_value()?).is_some()
            };
            if twice {
                return Err(serde::de::Error::custom("appears twice"));
            }
            self.at = None;
        }
        Ok(())
    }
}
