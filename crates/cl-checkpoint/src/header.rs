//! The header of a safetensors file, read with every number checked.
//!
//! The `safetensors` crate reads headers too, but its errors do not say which tensor is wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::Error;
use crate::source::{TensorInfo, byte_len};

/// The specification's limit.
const MAX_HEADER: u64 = 100_000_000;

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
    let wrong = |message: String| Error::Header { path: path.to_owned(), message };
    let length = file.get(..8).ok_or_else(|| wrong(format!("{} bytes, a header needs at least 8", file.len())))?;
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let room = file.len() as u64 - 8;
    if length > room || length > MAX_HEADER {
        return Err(wrong(format!(
            "the header claims {length} bytes, the file has {room} after its first 8 (a header may have {MAX_HEADER}); \
             truncated or another format"
        )));
    }
    let (text, data) = file[8..].split_at(length as usize);
    let text = std::str::from_utf8(text).map_err(|e| wrong(format!("the header is not UTF-8: {e}")))?;
    let entries: Entries =
        serde_json::from_str(text).map_err(|e| wrong(format!("the header is not valid JSON: {e}")))?;
    let mut header = Header { tensors: BTreeMap::new(), metadata: BTreeMap::new() };
    for (name, value) in entries.0 {
        if name == "__metadata__" {
            header.metadata = serde_json::from_value(value)
                .map_err(|e| wrong(format!("__metadata__ is not a map of strings: {e}")))?;
            continue;
        }
        let (info, range) = check(&value, data.len()).map_err(|message| Error::Tensor {
            path: path.to_owned(),
            tensor: name.clone(),
            message,
        })?;
        header.tensors.insert(name, (info, range));
    }
    covers(path, &header, data.len())?;
    Ok(header)
}

fn check(value: &Value, data: usize) -> Result<(TensorInfo, Range<usize>), String> {
    let entry = Entry::deserialize(value).map_err(|e| e.to_string())?;
    let (start, end) = entry.data_offsets;
    let length = byte_len(entry.dtype, &entry.shape).ok_or_else(|| {
        format!("shape {:?} of {:?} is no whole number of bytes, or too many", entry.shape, entry.dtype)
    })?;
    if start > end || end > data {
        return Err(format!("data_offsets [{start}, {end}] lie outside the file's {data} bytes of data"));
    }
    if end - start != length {
        return Err(format!(
            "shape {:?} of {:?} takes {length} bytes, data_offsets [{start}, {end}] hold {}",
            entry.shape,
            entry.dtype,
            end - start
        ));
    }
    Ok((TensorInfo { dtype: entry.dtype, shape: entry.shape }, start..end))
}

/// Tensors neither overlap nor leave bytes that belong to none.
fn covers(path: &Path, header: &Header, data: usize) -> Result<(), Error> {
    let mut order: Vec<(&String, &Range<usize>)> = header.tensors.iter().map(|(n, t)| (n, &t.1)).collect();
    order.sort_by_key(|(_, r)| (r.start, r.end));
    let mut end = 0;
    let mut before = "the start of the data";
    for (name, range) in order {
        if range.start != end {
            let what = if range.start < end { "overlaps" } else { "leaves a hole after" };
            let message =
                format!("data_offsets [{}, {}]: {what} {before}, which ends at {end}", range.start, range.end);
            return Err(Error::Tensor { path: path.to_owned(), tensor: name.clone(), message });
        }
        end = range.end;
        before = name;
    }
    if end != data {
        let message =
            format!("the tensors end at byte {end} of {data} bytes of data; truncated header or trailing bytes");
        return Err(Error::Header { path: path.to_owned(), message });
    }
    Ok(())
}

/// A JSON object whose keys are all different; serde would silently keep the last of two.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut pairs = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("`{key}` appears twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(Entries(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
