//! The update of one module by one adapter, in the layout of the weight, with entries computed on demand.

use cl_checkpoint::problem::TensorProblem;
use cl_checkpoint::{Dtype, LayerKind, TensorInfo, TensorSource};

use crate::tensor::kernels;

/// An update `ΔW = left · right`, of shape `[rows, columns]` and any rank, including zero.
pub(super) struct Update {
    pub(super) shape: [usize; 2],
    pub(super) rank: usize,
    /// `[rows, rank]`, row-major.
    pub(super) left: Vec<f32>,
    /// `[rank, columns]`, row-major.
    pub(super) right: Vec<f32>,
    info: TensorInfo,
}

impl Update {
    /// Creates an update from PEFT's factors: `B·A` for a linear layer, `(B·A)ᵀ` for an embedding.
    pub(super) fn new(kind: LayerKind, shape: [usize; 2], rank: usize, a: Vec<f32>, b: Vec<f32>) -> Update {
        let (left, right) = match kind {
            LayerKind::Linear => (b, a),
            LayerKind::Embedding => (transposed(&a, shape[0]), transposed(&b, rank)),
        };
        Update { shape, rank, left, right, info: TensorInfo { dtype: Dtype::F32, shape: shape.to_vec() } }
    }

    /// Creates an update of zeros.
    pub(super) fn zero(shape: [usize; 2]) -> Update {
        Update::new(LayerKind::Linear, shape, 0, Vec::new(), Vec::new())
    }

    /// Multiplies the update by a factor, rounded to f32.
    pub(super) fn scaled(mut self, factor: f64) -> Update {
        self.left.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
        self
    }

    /// Writes the entries from flat index `start` on. The bits of an entry do not depend on which others are requested.
    pub(super) fn write(&self, start: usize, out: &mut [f32]) {
        let columns = self.shape[1];
        let (mut at, end) = (start, start + out.len());
        while at < end {
            let (row, from) = (at / columns, at % columns);
            let length = (columns - from).min(end - at);
            let part = &mut out[at - start..][..length];
            part.fill(0.0);
            for k in 0..self.rank {
                kernels::add_scaled(part, self.left[row * self.rank + k], &self.right[k * columns + from..][..length]);
            }
            at += length;
        }
    }

    /// Returns all entries, row-major.
    pub(super) fn dense(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape[0] * self.shape[1]];
        self.write(0, &mut out);
        out
    }
}

/// Transposes a row-major matrix with the given number of columns.
fn transposed(x: &[f32], columns: usize) -> Vec<f32> {
    let rows = x.len() / columns.max(1);
    (0..x.len()).map(|i| x[(i % rows) * columns + i / rows]).collect()
}

/// Entries are computed when they are read, so that a merge of many adapters only holds their factors.
impl TensorSource for Update {
    fn names(&self) -> Vec<&str> {
        vec![""]
    }

    fn info(&self, _name: &str) -> Option<&TensorInfo> {
        Some(&self.info)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], cl_checkpoint::Error> {
        let problem = Box::new(TensorProblem::Computed);
        Err(cl_checkpoint::Error::Tensor { path: "update".into(), tensor: name.to_owned(), problem })
    }

    fn read(&self, _name: &str, offset: usize, out: &mut [u8]) -> Result<(), cl_checkpoint::Error> {
        let mut values = vec![0.0; out.len() / 4];
        self.write(offset / 4, &mut values);
        for (bytes, value) in out.chunks_exact_mut(4).zip(values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }
}
