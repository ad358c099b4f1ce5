//! Block layouts of ggml's element types, and conversion of their values to f32.
//!
//! A quantized row is a sequence of blocks. With half-precision scales `d` (and `m`) stored in the block, and small
//! integers `q`, the blocks of 32 values contain
//!
//! ```text
//! Q8_0  d·q            34 bytes: d, 32 × i8
//! Q4_0  d·(q − 8)      18 bytes: d, 16 × (low nibble: values 0..16, high nibble: values 16..32)
//! Q4_1  d·q + m        20 bytes: d, m, nibbles
//! Q5_0  d·(q − 16)     22 bytes: d, u32 of fifth bits, nibbles
//! Q5_1  d·q + m        24 bytes: d, m, u32 of fifth bits, nibbles
//! ```
//!
//! and the blocks of 256 values contain groups with their own small integer scales `s` (and minima `n`):
//!
//! ```text
//! Q4_K  (d·s)·q − (dmin·n)   144 bytes: d, dmin, 12 bytes of 8 × (6-bit s, 6-bit n), 128 of nibbles; groups of 32
//! Q5_K  (d·s)·q − (dmin·n)   176 bytes: as Q4_K with 32 bytes of fifth bits before the nibbles
//! Q6_K  (d·s)·(q − 32)       210 bytes: 128 of low nibbles, 64 of high bit pairs, 16 × i8 s, d; groups of 16
//! ```
//!
//! Operations are in the order of ggml's reference, so the f32 results are bit-identical.

use half::{bf16, f16};

/// A supported element type of ggml.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the names that the format's own documents use
pub enum GgmlType {
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 4 bits with a scale.
    Q4_0,
    /// 4 bits with a scale and a minimum.
    Q4_1,
    /// 5 bits with a scale.
    Q5_0,
    /// 5 bits with a scale and a minimum.
    Q5_1,
    /// 8 bits with a scale.
    Q8_0,
    /// 4 bits in groups of 32 with 6-bit scales and minima.
    Q4_K,
    /// 5 bits in groups of 32 with 6-bit scales and minima.
    Q5_K,
    /// 6 bits in groups of 16 with 8-bit scales.
    Q6_K,
}

/// Type, its id in files, its name, values per block, bytes per block.
const TYPES: [(GgmlType, u32, &str, usize, usize); 11] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
    (GgmlType::BF16, 30, "BF16", 1, 2),
];

impl GgmlType {
    /// Returns the type with this id in files; `None` if it is not supported.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TYPES.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// Returns its name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Returns the number of values in one block.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Returns the number of bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Lists all names, for error messages.
    pub(super) fn all_names() -> String {
        TYPES.map(|row| row.2).join(", ")
    }

    fn row(self) -> &'static (GgmlType, u32, &'static str, usize, usize) {
        TYPES.iter().find(|row| row.0 == self).expect("every type has a row")
    }
}

/// Dequantizes whole blocks to f32.
///
/// # Panics
/// Panics if `bytes` is not a whole number of blocks, or if the length of `out` differs from the number of values.
///
/// ```
/// use cl_checkpoint::gguf::{GgmlType, dequantize};
/// let mut block = vec![0x00, 0x38]; // 0.5 as f16
/// block.extend([3u8; 32]);
/// let mut values = [0.0; 32];
/// dequantize(GgmlType::Q8_0, &block, &mut values);
/// assert_eq!(values, [1.5; 32]);
/// ```
pub fn dequantize(ggml_type: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let (len, size) = (ggml_type.block_len(), ggml_type.block_bytes());
    assert!(bytes.len().is_multiple_of(size) && bytes.len() / size * len == out.len(), "whole blocks");
    let block: fn(&[u8], &mut [f32]) = match ggml_type {
        GgmlType::F32 => |b, out| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        GgmlType::F16 => |b, out| out[0] = half(b),
        GgmlType::BF16 => |b, out| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q4_1 => q4_1,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q5_1 => q5_1,
        GgmlType::Q4_K => q4_k,
        GgmlType::Q5_K => q5_k,
        GgmlType::Q6_K => q6_k,
    };
    for (bytes, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(len)) {
        block(bytes, out);
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn q8_0(b: &[u8], out: &mut [f32]) {
    let d = half(b);
    for (out, &q) in out.iter_mut().zip(&b[2..]) {
        *out = f32::from(q as i8) * d;
    }
}

fn q4_0(b: &[u8], out: &mut [f32]) {
    let d = half(b);
    for (i, &q) in b[2..].iter().enumerate() {
        out[i] = d * (f32::from(q & 15) - 8.0);
        out[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

fn q4_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half(b), half(&b[2..]));
    for (i, &q) in b[4..].iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Reads 5-bit integers: bit `i` of the first four bytes is the high bit of value `i`; the nibbles follow.
fn five_bits(b: &[u8], out: &mut [f32], value: impl Fn(f32) -> f32) {
    let high = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let fifth = |i: usize| ((high >> i & 1) << 4) as u8;
    for (i, &q) in b[4..].iter().enumerate() {
        out[i] = value(f32::from(q & 15 | fifth(i)));
        out[i + 16] = value(f32::from(q >> 4 | fifth(i + 16)));
    }
}

fn q5_0(b: &[u8], out: &mut [f32]) {
    let d = half(b);
    five_bits(&b[2..], out, |q| d * (q - 16.0));
}

fn q5_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half(b), half(&b[2..]));
    five_bits(&b[4..], out, |q| d * q + m);
}

/// Returns scale and minimum of group `g` from the 12 packed bytes. For the first four groups, they are the low 6 bits
/// of bytes `g` and `g + 4`; for the last four, the nibbles of byte `g + 4`, with their upper two bits stored above
/// those of the first four groups.
fn scale_and_min(packed: &[u8], g: usize) -> (f32, f32) {
    let (scale, min) = if g < 4 {
        (packed[g] & 63, packed[g + 4] & 63)
    } else {
        (packed[g + 4] & 15 | packed[g - 4] >> 6 << 4, packed[g + 4] >> 4 | packed[g] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// Groups `2·c` and `2·c + 1` are the low and high nibbles of the `c`-th 32 bytes, with `fifth(g, i)` added as high
/// bits.
fn k_groups(b: &[u8], nibbles: &[u8], out: &mut [f32], fifth: impl Fn(usize, usize) -> u8) {
    let (d, dmin, packed) = (half(b), half(&b[2..]), &b[4..16]);
    for (g, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(packed, g);
        let (scale, min) = (d * scale, dmin * min);
        for (i, (out, &q)) in out.iter_mut().zip(&nibbles[g / 2 * 32..]).enumerate() {
            let q = q >> (g % 2 * 4) & 15 | fifth(g, i);
            *out = scale * f32::from(q) - min;
        }
    }
}

fn q4_k(b: &[u8], out: &mut [f32]) {
    k_groups(b, &b[16..], out, |_, _| 0);
}

fn q5_k(b: &[u8], out: &mut [f32]) {
    k_groups(b, &b[48..], out, |g, i| (b[16 + i] >> g & 1) << 4);
}

/// Each half of 128 values uses 64 bytes of nibbles and 32 bytes of bit pairs; its four runs of 32 values take the low
/// nibbles of the first and second 32 bytes, then the high nibbles, with bit pairs 0 to 3.
fn q6_k(b: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(&b[208..]));
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let (part, r) = (run / 4, run % 4);
        for (i, out) in out.iter_mut().enumerate() {
            let nibble = low[part * 64 + r % 2 * 32 + i] >> (r / 2 * 4) & 15;
            let pair = high[part * 32 + i] >> (r * 2) & 3;
            let scale = d * f32::from(scales[run * 2 + i / 16] as i8);
            *out = scale * (f32::from(nibble | pair << 4) - 32.0);
        }
    }
}
