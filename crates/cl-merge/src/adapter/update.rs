//! The update of one module by one adapter, in the layout of the weight, with entries computed on demand.

use cl_checkpoint::{Dtype, LayerKind, TensorInfo, TensorSource};

use crate::tensor::kernels;

/// `ΔW = left · right`, `[rows, columns]`, of any rank, zero too.
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
    /// Of PEFT's factors: `B·A` of a linear layer, `(B·A)ᵀ` of an embedding.
    pub(super) fn new(kind: LayerKind, shape: [usize; 2], rank: usize, a: Vec<f32>, b: Vec<f32>) -> Update {
        let (left, right) = match kind {
            LayerKind::Linear => (b, a),
            LayerKind::Embedding => (transposed(&a, shape[0]), transposed(&b, rank)),
        };
        Update { shape, rank, left, right, info: TensorInfo { dtype: Dtype::F32, shape: shape.to_vec() } }
    }

    /// No change.
    pub(super) fn zero(shape: [usize; 2]) -> Update {
        Update::new(LayerKind::Linear, shape, 0, Vec::new(), Vec::new())
    }

    /// The same times a factor, rounded to f32.
    pub(super) fn scaled(mut self, factor: f64) -> Update {
        self.left.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
        self
    }

    /// Writes the entries from flat index `start` on. An entry's bits do not depend on what is asked for beside it.
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

    /// All entries, row-major.
    pub(super) fn dense(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape[0] * self.shape[1]];
        self.write(0, &mut out);
        out
    }
}

/// Of a matrix with so many columns, row-major.
fn transposed(x: &[f32], columns: usize) -> Vec<f32> {
    let rows = x.len() / columns.max(1);
    (0..x.len()).map(|i| x[(i % rows) * columns + i / rows]).collect()
}

/// Entries are computed when they are read, so that a merge of many adapters holds their factors only.
impl TensorSource for Update {
    fn names(&self) -> Vec<&str> {
        vec![""]
    }

    fn info(&self, _name: &str) -> Option<&TensorInfo> {
        Some(&self.info)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], cl_checkpoint::Error> {
        let message = "is computed, and can be read by parts only".to_owned();
        Err(cl_checkpoint::Error::Tensor { path: "update".into(), tensor: name.to_owned(), message })
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
