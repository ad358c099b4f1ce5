use safetensors::Dtype;

use crate::Error;

/// What is known of a tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type as stored.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes.
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

/// Bytes that a tensor takes; `None` when that overflows or is no whole number.
pub(crate) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// Something that holds named tensors.
pub trait TensorSource: Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<&str>;

    /// Dtype and shape; `None` for a name that is not there.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// The tensor's bytes, row-major and little endian, straight from the file's map.
    ///
    /// # Errors
    /// [`Error::TensorNotFound`].
    fn bytes(&self, name: &str) -> Result<&[u8], Error>;
}
