//! Quantized matrices against bitsandbytes. `fixtures/make_quantized.py` made the expected values.

use cl_torch::tch::{Kind, Tensor};
use cl_torch::{Quantization, Quantized, tensor_bytes};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    shape: [i64; 2],
    dtype: String,
    nf4: Nf4,
    int8: Int8,
}

/// Bytes in hexadecimal, and hashes of dequantized matrices.
#[derive(Deserialize)]
struct Nf4 {
    packed: String,
    /// The nearest codes.
    absmax: String,
    /// Codes of bitsandbytes' f32 kernel, which it used for dequantization.
    absmax_f32: String,
    nested: String,
    f32: String,
    bf16: String,
}

#[derive(Deserialize)]
struct Int8 {
    values: String,
    absmax: String,
    f32: String,
}

/// The weights that `make_quantized.py` uses.
fn weight(case: &Case) -> Tensor {
    let cube = |i: i64| {
        let bits = (i as u64 * 2_654_435_761 % (1 << 32)) >> 8;
        let v = bits as f32 / (1 << 24) as f32 - 0.5;
        v * v * v
    };
    let values: Vec<f32> = (0..case.shape.iter().product()).map(cube).collect();
    let kind = if case.dtype == "bfloat16" { Kind::BFloat16 } else { Kind::Float };
    Tensor::from_slice(&values).reshape(case.shape).to_kind(kind)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn stored(t: &Tensor) -> String {
    hex(&tensor_bytes(t, t.kind()))
}

/// 64-bit FNV-1a of a matrix.
fn hash(t: &Tensor) -> String {
    let step = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", tensor_bytes(t, t.kind()).into_iter().fold(0xcbf2_9ce4_8422_2325, step))
}

#[test]
fn nf4_has_bitsandbytes_bytes_and_values() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/quantized.json")).unwrap();
    assert_eq!(fixture.cases.len(), 4);
    let mut other_codes = 0;
    for case in &fixture.cases {
        let (ours, expected) = (Quantized::new(&weight(case), Quantization::Nf4).unwrap(), &case.nf4);
        let nested = ours.nested.as_ref().unwrap();
        assert_eq!(stored(&ours.values), expected.packed, "{:?}", case.shape);
        assert_eq!(stored(nested), expected.nested, "{:?}", case.shape);
        assert_eq!(stored(&ours.absmax), expected.absmax, "{:?}", case.shape);
        // bitsandbytes' state, dequantized by us: the same f32 operations in the same order, so the results are
        // bit-identical.
        let codes = bytes(&expected.absmax_f32);
        let theirs = Quantized { absmax: Tensor::from_slice(&codes), ..ours.shallow_clone() };
        assert_eq!(hash(&theirs.dequantize(Kind::Float)), expected.f32, "{:?}", case.shape);
        assert_eq!(hash(&theirs.dequantize(Kind::BFloat16)), expected.bf16, "{:?}", case.shape);
        let nearest = bytes(&expected.absmax);
        assert!(nearest.iter().zip(&codes).all(|(a, b)| a.abs_diff(*b) <= 1));
        other_codes += nearest.iter().zip(&codes).filter(|(a, b)| a != b).count();
    }
    // One of 294 codes is next to the nearest.
    assert_eq!(other_codes, 1);
}

#[test]
fn int8_has_bitsandbytes_bytes_and_values() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/quantized.json")).unwrap();
    for case in &fixture.cases {
        let ours = Quantized::new(&weight(case), Quantization::Int8).unwrap();
        assert_eq!(stored(&ours.values), case.int8.values, "{:?}", case.shape);
        assert_eq!(stored(&ours.absmax), case.int8.absmax, "{:?}", case.shape);
        assert_eq!(hash(&ours.dequantize(Kind::Float)), case.int8.f32, "{:?}", case.shape);
    }
}
