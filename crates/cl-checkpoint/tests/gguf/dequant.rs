use std::fs;

use cl_checkpoint::gguf::{GgmlType, dequantize};
use cl_checkpoint::{SafetensorsFile, TensorSource};

use super::fixture;

#[test]
fn all_element_types_have_the_values_of_the_reference_to_the_last_bit() {
    let file = SafetensorsFile::open(&fixture("dequant.safetensors")).unwrap();
    let ids = [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30];
    assert_eq!(file.names().len(), 2 * ids.len());
    for id in ids {
        let kind = GgmlType::from_id(id).unwrap();
        let blocks = file.bytes(&format!("{}.blocks", kind.name())).unwrap();
        let expected = file.bytes(&format!("{}.values", kind.name())).unwrap();
        let mut values = vec![0.0; expected.len() / 4];
        assert!(values.len() >= 32 && blocks.len() / kind.block_bytes() * kind.block_len() == values.len());
        dequantize(kind, blocks, &mut values);
        for (i, (value, expected)) in values.iter().zip(expected.chunks_exact(4)).enumerate() {
            let expected = f32::from_le_bytes(expected.try_into().unwrap());
            assert_eq!(value.to_bits(), expected.to_bits(), "{} value {i}: {value} and {expected}", kind.name());
        }
    }
}

#[test]
fn a_scale_that_is_no_number_gives_values_that_are_none() {
    for id in [2, 3, 6, 7, 8, 12, 13, 14] {
        let kind = GgmlType::from_id(id).unwrap();
        let mut block = vec![0x11; kind.block_bytes()];
        let at = if kind == GgmlType::Q6_K { 208 } else { 0 };
        block[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
        let mut values = vec![0.0; kind.block_len()];
        dequantize(kind, &block, &mut values);
        assert!(values.iter().all(|v| v.is_nan()), "{}", kind.name());
    }
}

#[test]
fn type_numbers_are_those_of_the_format_and_no_others() {
    let known: Vec<u32> = (0..64).filter(|&id| GgmlType::from_id(id).is_some()).collect();
    assert_eq!(known, [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30]);
    assert!(fs::metadata(fixture("dequant.safetensors")).unwrap().len() < 100_000);
}
