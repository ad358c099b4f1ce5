use cl_data::Packed;
use cl_torch::tch::{Device, Kind, Tensor};

use crate::ModelError;

/// A batch of packed sequences: concatenated to one row without padding, with attention within each sequence.
pub struct PackedBatch {
    /// Token ids, `(tokens)`, int64.
    pub input_ids: Tensor,
    /// Positions, `(tokens)`, int64, starting at 0 in each sequence.
    pub position_ids: Tensor,
    /// Boundaries of the sequences: `sequences + 1` numbers from 0 to `tokens`.
    pub cu_seqlens: Vec<i64>,
    /// The boundaries as an int32 tensor on the device, for kernels that need them there.
    pub(crate) cu_tensor: Tensor,
}

impl PackedBatch {
    /// Packs token sequences.
    ///
    /// # Errors
    /// [`ModelError::EmptySequence`], [`ModelError::TokenId`].
    pub fn new(sequences: &[&[u32]], vocab_size: i64, device: Device) -> Result<PackedBatch, ModelError> {
        let mut ids = Vec::new();
        let mut positions = Vec::new();
        let mut cu_seqlens = vec![0];
        for (index, sequence) in sequences.iter().enumerate() {
            if sequence.is_empty() {
                return Err(ModelError::EmptySequence { index });
            }
            ids.extend(sequence.iter().map(|&id| i64::from(id)));
            positions.extend(0..sequence.len() as i64);
            cu_seqlens.push(ids.len() as i64);
        }
        Self::build(&ids, &positions, cu_seqlens, vocab_size, device)
    }

    /// Converts a micro-batch that was packed for training.
    ///
    /// # Errors
    /// [`ModelError::TokenId`].
    pub fn from_packed(packed: &Packed, vocab_size: i64, device: Device) -> Result<PackedBatch, ModelError> {
        Self::build(&packed.input_ids, &packed.position_ids, packed.cu_seqlens.clone(), vocab_size, device)
    }

    fn build(
        ids: &[i64],
        positions: &[i64],
        cu_seqlens: Vec<i64>,
        vocab_size: i64,
        device: Device,
    ) -> Result<PackedBatch, ModelError> {
        if let Some(&id) = ids.iter().find(|id| !(0..vocab_size).contains(*id)) {
            return Err(ModelError::TokenId { id, vocab_size });
        }
        Ok(PackedBatch {
            input_ids: Tensor::from_slice(ids).to_device(device),
            position_ids: Tensor::from_slice(positions).to_device(device),
            cu_tensor: Tensor::from_slice(&cu_seqlens).to_kind(Kind::Int).to_device(device),
            cu_seqlens,
        })
    }

    /// Total number of tokens.
    pub fn tokens(&self) -> i64 {
        self.cu_seqlens.last().copied().unwrap_or(0)
    }
}
