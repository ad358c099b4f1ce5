//! Conversion between bytes of floating-point dtypes and f32, rounding to nearest even.

use half::{bf16, f16};
use safetensors::Dtype;

/// Converts f64, f32, f16 or bf16 bytes (little endian) to f32; returns `None` for other dtypes.
///
/// ```
/// use cl_checkpoint::{Dtype, convert::to_f32};
/// assert_eq!(to_f32(Dtype::BF16, &[0x80, 0x3f]), Some(vec![1.0]));
/// assert_eq!(to_f32(Dtype::I64, &[0; 8]), None);
/// ```
pub fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.chunks_exact(N).map(|c| read(c.try_into().expect("chunks of N"))).collect()
    }
    Some(match dtype {
        Dtype::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        Dtype::F32 => each(bytes, f32::from_le_bytes),
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => return None,
    })
}

/// Converts eight-bit floats to f32: `F8_E4M3` (as PyTorch's `float8_e4m3fn`, without infinities) or `F8_E5M2`; returns
/// `None` for other dtypes. Quantized models store a scale with each weight, which is not applied here.
///
/// ```
/// use cl_checkpoint::{Dtype, convert::f8_to_f32};
/// assert_eq!(f8_to_f32(Dtype::F8_E4M3, &[0x38, 0xfe]), Some(vec![1.0, -448.0]));
/// assert_eq!(f8_to_f32(Dtype::F8_E5M2, &[0x3c, 0x01]), Some(vec![1.0, 2f32.powi(-16)]));
/// ```
pub fn f8_to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    match dtype {
        Dtype::F8_E4M3 => Some(bytes.iter().map(|&b| e4m3(b)).collect()),
        // The upper byte of an f16.
        Dtype::F8_E5M2 => Some(bytes.iter().map(|&b| f16::from_bits(u16::from(b) << 8).to_f32()).collect()),
        _ => None,
    }
}

fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2f32.powi(-9),
        _ => (8.0 + fraction) * 2f32.powi(exponent - 10),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Converts f32 values to f32, f16 or bf16 bytes (little endian), rounded to nearest even; returns `None` for other
/// dtypes.
pub fn from_f32(dtype: Dtype, values: &[f32]) -> Option<Vec<u8>> {
    Some(match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        _ => return None,
    })
}

/// Returns the first element that is NaN or infinite, with its flat index; `None` if there is none, or if the dtype is
/// not floating point.
///
/// ```
/// use cl_checkpoint::{Dtype, convert::first_not_finite};
/// assert_eq!(first_not_finite(Dtype::F16, &[0, 0x3c, 0, 0xfc]), Some((1, f32::NEG_INFINITY)));
/// ```
pub fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    fn first<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Option<(usize, f32)> {
        let values = bytes.chunks_exact(N).map(|c| read(c.try_into().expect("chunks of N")));
        values.enumerate().find(|(_, value)| !value.is_finite())
    }
    let nan_if = |nan: bool| if nan { f32::NAN } else { 0.0 };
    match dtype {
        // A finite f64 may exceed the range of f32.
        Dtype::F64 => first(bytes, |b| {
            let value = f64::from_le_bytes(b);
            if value.is_finite() { 0.0 } else { value as f32 }
        }),
        Dtype::F32 => first(bytes, f32::from_le_bytes),
        Dtype::F16 => first(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => first(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        // The upper byte of an f16.
        Dtype::F8_E5M2 => first(bytes, |[b]| f16::from_bits(u16::from(b) << 8).to_f32()),
        Dtype::F8_E4M3 => first(bytes, |[b]| nan_if(b & 0x7f == 0x7f)),
        Dtype::F8_E8M0 => first(bytes, |[b]| nan_if(b == 0xff)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_nearest_even() {
        // 1 + 2⁻⁸ is halfway between two bf16 values, 1 and 1 + 2⁻⁷; the even one is 1.
        let tie = 1.0 + 1.0 / 256.0;
        let above = 1.0 + 3.0 / 256.0;
        let bytes = from_f32(Dtype::BF16, &[tie, above, f32::INFINITY, -0.0]).unwrap();
        let back = to_f32(Dtype::BF16, &bytes).unwrap();
        assert_eq!(back[..3], [1.0, 1.0 + 2.0 / 128.0, f32::INFINITY]);
        assert!(back[3].is_sign_negative());
    }
}
