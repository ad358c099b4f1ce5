//! Checks for NaN and infinities.

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Manifest, WriteOptions};
use serde_json::json;

use super::{assert_error, spec};

#[test]
fn every_floating_dtype_is_searched_and_no_other() {
    let (inf, nan) = ("inf", "NaN");
    let rows: Vec<(Dtype, Vec<u8>, Option<&str>)> = vec![
        (Dtype::F64, f64::MAX.to_le_bytes().to_vec(), None),
        (Dtype::F64, f64::INFINITY.to_le_bytes().to_vec(), Some(inf)),
        (Dtype::F32, f32::MAX.to_le_bytes().to_vec(), None),
        (Dtype::F32, f32::NAN.to_le_bytes().to_vec(), Some(nan)),
        (Dtype::F16, vec![0xff, 0x7b], None),
        (Dtype::F16, vec![0x00, 0xfc], Some("-inf")),
        (Dtype::BF16, vec![0x7f, 0x7f], None),
        (Dtype::BF16, vec![0x81, 0x7f], Some(nan)),
        (Dtype::F8_E5M2, vec![0x7b], None),
        (Dtype::F8_E5M2, vec![0x7c], Some(inf)),
        (Dtype::F8_E5M2, vec![0xfd], Some(nan)),
        (Dtype::F8_E4M3, vec![0x7e], None),
        (Dtype::F8_E4M3, vec![0xff], Some(nan)),
        (Dtype::I16, vec![0xff, 0xff], None),
        (Dtype::U8, vec![0xff], None),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (i, (dtype, bytes, found)) in rows.into_iter().enumerate() {
        let case = format!("{dtype:?} {bytes:x?}");
        let dir = folder.path().join(i.to_string());
        let plan = [spec("good", dtype, &[1]), spec("w", dtype, &[1, 2])];
        let writer = CheckpointWriter::create(&dir, &plan, WriteOptions::default()).unwrap();
        writer.write("good", &vec![0; bytes.len()]).unwrap();
        writer.write("w", &[vec![0; bytes.len()], bytes].concat()).unwrap();
        writer.put_json("config.json", &json!({})).unwrap();
        writer.finish(Manifest::new("model")).unwrap();
        let model = Checkpoint::open(&dir).unwrap();
        model.check_finite("good").unwrap();
        match found {
            None => model.check_all_finite().unwrap(),
            Some(value) => {
                let text = format!("element 1 is {value}");
                assert_error(&case, model.check_all_finite(), &["model.safetensors", "`w`", &text]);
            }
        }
        assert_error(&case, model.check_finite("x"), &["`x` not found"]);
    }
}
