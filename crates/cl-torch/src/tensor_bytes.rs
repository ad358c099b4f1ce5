use cl_checkpoint::{Dtype, Precision, TensorSource};
use tch::{Device, Kind, Tensor};

use crate::TorchError;

/// Returns libtorch's dtype for a computation in `precision`.
pub fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::F32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

/// Returns libtorch's dtype for a stored dtype; `None` if libtorch does not have it.
pub fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// Loads a tensor of a checkpoint to `device`, converted to `kind` (rounded to nearest even). The result owns its
/// memory.
///
/// # Errors
/// Returns [`TorchError::Missing`] if there is no such tensor, [`TorchError::Dtype`] if libtorch does not have its
/// dtype, and [`TorchError::Checkpoint`] if reading fails.
pub fn load_tensor(source: &dyn TensorSource, name: &str, kind: Kind, device: Device) -> Result<Tensor, TorchError> {
    let info = source.info(name).ok_or_else(|| TorchError::Missing { tensor: name.to_owned() })?;
    let stored = kind_of(info.dtype)
        .ok_or_else(|| TorchError::Dtype { tensor: name.to_owned(), dtype: format!("{:?}", info.dtype) })?;
    let shape: Vec<i64> = info.shape.iter().map(|&d| d as i64).collect();
    let bytes = source.bytes(name)?;
    if shape.iter().product::<i64>() == 0 {
        return Ok(Tensor::zeros(&shape, (kind, device)));
    }
    let mut strides = vec![1i64; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    // SAFETY: the source checked that `bytes` holds exactly this shape and dtype; the borrowed tensor is dropped at the
    // end of this function, before the memory map can be, because the copy below owns its memory.
    let borrowed = unsafe { Tensor::from_blob(bytes.as_ptr(), &shape, &strides, stored, Device::Cpu) };
    Ok(borrowed.to_device_(device, kind, false, true))
}

/// Returns the elements of a tensor, converted to `kind`, as little-endian bytes in row-major order, as in a
/// checkpoint.
pub fn tensor_bytes(tensor: &Tensor, kind: Kind) -> Vec<u8> {
    let t = tensor.detach().to_device(Device::Cpu).to_kind(kind).contiguous();
    let mut bytes = vec![0u8; t.numel() * kind.elt_size_in_bytes()];
    if !bytes.is_empty() {
        t.copy_data_u8(&mut bytes, t.numel());
    }
    bytes
}
