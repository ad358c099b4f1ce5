//! Sharded checkpoints: tensors of which every rank wrote a part, and which any number of ranks can read.
//!
//! With N ranks, there are N files, `rank-00000-of-0000N.safetensors` and so on. A tensor of n elements is divided as
//! in [`sharding`](crate::sharding): rank r has the elements from r⌈n/N⌉ to (r+1)⌈n/N⌉ of the flattened tensor, and
//! fewer or none at its end.

use std::ops::Range;
use std::path::Path;

use cl_checkpoint::{FileEntry, Manifest, SafetensorsFile, TensorSource, TensorSpec, write_safetensors};
use cl_torch::tch::{Kind, Tensor};
use cl_torch::{TorchError, kind_of, tensor_bytes};

use crate::TrainError;
use crate::problem::StateProblem;

const PREFIX: &str = "rank-";

/// File name of a rank's parts.
pub(crate) fn file_name(rank: usize, ranks: usize) -> String {
    format!("{PREFIX}{rank:05}-of-{ranks:05}.safetensors")
}

/// Range of elements of a flattened tensor that a rank has.
pub(crate) fn elements(count: usize, rank: usize, ranks: usize) -> Range<usize> {
    let each = count.div_ceil(ranks);
    (rank * each).min(count)..((rank + 1) * each).min(count)
}

/// Writes a rank's parts, without padding, and returns the file's size and hash.
pub(crate) fn write(path: &Path, parts: &[(String, Tensor)]) -> Result<FileEntry, TrainError> {
    let spec = |(name, part): &(String, Tensor)| TensorSpec {
        name: name.clone(),
        dtype: crate::checkpoint::dtype(part),
        shape: vec![part.numel()],
    };
    let specs: Vec<TensorSpec> = parts.iter().map(spec).collect();
    Ok(write_safetensors(path, &specs, |i| tensor_bytes(&parts[i].1, parts[i].1.kind()))?)
}

/// The files of all ranks.
pub(crate) struct Parts {
    files: Vec<SafetensorsFile>,
}

impl Parts {
    /// Number of ranks that wrote the checkpoint; 0 if its tensors are not sharded.
    pub(crate) fn count(manifest: &Manifest) -> usize {
        manifest.files.keys().filter(|name| name.starts_with(PREFIX)).count()
    }

    /// Opens the files of all ranks that wrote the checkpoint.
    pub(crate) fn open(dir: &Path, ranks: usize) -> Result<Parts, TrainError> {
        let open = |rank| SafetensorsFile::open(&dir.join(file_name(rank, ranks)));
        Ok(Parts { files: (0..ranks).map(open).collect::<Result<_, _>>()? })
    }

    /// Checks that all parts of a tensor exist and have the expected size and dtype.
    pub(crate) fn check(&self, name: &str, kind: Kind, shape: &[i64]) -> Result<(), StateProblem> {
        let count: i64 = shape.iter().product();
        let complete = self.files.iter().enumerate().all(|(rank, file)| {
            let length = elements(count as usize, rank, self.files.len()).len();
            file.info(name).is_some_and(|info| info.shape == [length] && kind_of(info.dtype) == Some(kind))
        });
        let shape = || shape.iter().map(|&d| d as usize).collect();
        if complete { Ok(()) } else { Err(StateProblem::Tensor { tensor: name.to_owned(), shape: shape() }) }
    }

    /// Reads the elements `wanted` of a flattened tensor of `count` elements, from all files that contain some of them.
    pub(crate) fn read(
        &self,
        name: &str,
        kind: Kind,
        count: usize,
        wanted: Range<usize>,
    ) -> Result<Tensor, TrainError> {
        let size = kind.elt_size_in_bytes();
        let mut bytes = vec![0u8; wanted.len() * size];
        for (rank, file) in self.files.iter().enumerate() {
            let there = elements(count, rank, self.files.len());
            let (start, end) = (there.start.max(wanted.start), there.end.min(wanted.end));
            if start < end {
                let to = &mut bytes[(start - wanted.start) * size..(end - wanted.start) * size];
                file.read(name, (start - there.start) * size, to)?;
            }
        }
        let tensor = Tensor::f_from_data_size(&bytes, &[wanted.len() as i64], kind);
        Ok(tensor.map_err(|e| TorchError::from_tch("from_data_size", e))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_ranks_reads_what_any_number_wrote() {
        let folder = tempfile::tempdir().unwrap();
        for (count, writers) in [(10, 1), (10, 3), (10, 4), (3, 5), (1, 4)] {
            let values: Vec<f32> = (0..count).map(|i| i as f32 + 0.5).collect();
            let dir = folder.path().join(format!("{count}-{writers}"));
            std::fs::create_dir(&dir).unwrap();
            for rank in 0..writers {
                let part = Tensor::from_slice(&values[elements(count, rank, writers)]);
                write(&dir.join(file_name(rank, writers)), &[("a".to_owned(), part)]).unwrap();
            }
            let parts = Parts::open(&dir, writers).unwrap();
            assert!(parts.check("a", Kind::Float, &[count as i64]).is_ok());
            assert!(parts.check("a", Kind::Float, &[count as i64 + 1]).is_err());
            assert!(parts.check("a", Kind::BFloat16, &[count as i64]).is_err());
            for readers in 1..6 {
                let read = |rank| {
                    let part = parts.read("a", Kind::Float, count, elements(count, rank, readers)).unwrap();
                    Vec::<f32>::try_from(part).unwrap()
                };
                assert_eq!((0..readers).flat_map(read).collect::<Vec<f32>>(), values, "{writers} to {readers}");
            }
        }
    }
}
