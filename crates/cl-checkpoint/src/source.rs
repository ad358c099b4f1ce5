use std::path::Path;

use safetensors::Dtype;

use crate::Error;
use crate::problem::TensorProblem;

/// Dtype and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type as stored.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the number of bytes.
    ///
    /// # Panics
    /// Panics if it overflows or is not a whole number, which is not the case for tensors of files.
    pub fn byte_len(&self) -> usize {
        byte_len(self.dtype, &self.shape).expect("checked when the tensor was declared")
    }
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

/// Returns the size of a tensor in bytes; `None` if it overflows or is not a whole number of bytes.
pub(crate) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// A source of named tensors.
pub trait TensorSource: Sync {
    /// Returns all names, sorted.
    fn names(&self) -> Vec<&str>;

    /// Returns dtype and shape of a tensor; `None` if there is no such tensor.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// Returns the tensor's bytes, row-major and little endian, from the memory-mapped file.
    ///
    /// # Errors
    /// Returns [`Error::TensorNotFound`] if there is no such tensor.
    fn bytes(&self, name: &str) -> Result<&[u8], Error>;

    /// Copies a part of the tensor's bytes, starting at byte `offset`, into `out`.
    ///
    /// Unlike [`TensorSource::bytes`], this does not have to map the file into memory, so reading all of a large model
    /// leaves no pages resident.
    ///
    /// # Errors
    /// Returns [`Error::TensorNotFound`] if there is no such tensor, [`Error::Tensor`] if the range exceeds it, and
    /// [`Error::Io`] if reading fails.
    fn read(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        let bytes = self.bytes(name)?;
        let part = offset.checked_add(out.len()).and_then(|end| bytes.get(offset..end));
        out.copy_from_slice(part.ok_or_else(|| outside(Path::new(""), name, offset, out.len(), bytes.len()))?);
        Ok(())
    }

    /// Returns whether two tensors have the same dtype, shape and bytes; `false` if one of them does not exist. Reads
    /// both in pieces.
    ///
    /// # Errors
    /// Returns the errors of [`TensorSource::read`].
    fn same_bytes(&self, a: &str, b: &str) -> Result<bool, Error> {
        const PIECE: usize = 1 << 20;
        let (Some(info), true) = (self.info(a), self.info(a) == self.info(b)) else { return Ok(false) };
        let (length, mut pieces) = (info.byte_len(), [vec![0; PIECE], vec![0; PIECE]]);
        for offset in (0..length).step_by(PIECE) {
            let some = PIECE.min(length - offset);
            for (name, piece) in [a, b].into_iter().zip(&mut pieces) {
                self.read(name, offset, &mut piece[..some])?;
            }
            if pieces[0][..some] != pieces[1][..some] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Returns the error for a range that exceeds its tensor.
pub(crate) fn outside(path: &Path, name: &str, offset: usize, length: usize, bytes: usize) -> Error {
    let problem = Box::new(TensorProblem::Range { offset, length, bytes });
    Error::Tensor { path: path.to_owned(), tensor: name.to_owned(), problem }
}
