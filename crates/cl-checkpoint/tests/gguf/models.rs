//! Whole files written by the `gguf` package, compared with what Transformers reads from the same files.

use cl_checkpoint::gguf::{FloatDtype, GgufFile, import};
use cl_checkpoint::{Checkpoint, Dtype, Manifest, TensorSource, hash_file};
use serde_json::{Value, json};

use super::{fixture, json, options};

/// FNV-1a, computed as in the script.
fn checksum(bytes: &[u8]) -> String {
    let start = 14_695_981_039_346_656_037_u64;
    bytes.iter().fold(start, |h, &b| (h ^ u64::from(b)).wrapping_mul(1_099_511_628_211)).to_string()
}

#[test]
fn tensors_and_config_are_what_transformers_makes_of_the_same_file() {
    let expected = json(&fixture("models.json"));
    let models = expected["models"].as_object().unwrap();
    assert_eq!(models.len(), 5);
    let folder = tempfile::tempdir().unwrap();
    for (name, expected) in models {
        let file = fixture(&format!("{name}.gguf"));
        for (key, dtype, stored) in [
            ("f32", FloatDtype::F32, Dtype::F32),
            ("bf16", FloatDtype::Bf16, Dtype::BF16),
            ("f16", FloatDtype::F16, Dtype::F16),
        ] {
            let out = folder.path().join(format!("{name}-{key}"));
            let report = import(&file, &out, &options(dtype)).unwrap();
            let model = Checkpoint::open(&out).unwrap();
            let tensors = expected["tensors"].as_object().unwrap();
            assert_eq!(model.names().len(), tensors.len(), "{name}");
            assert_eq!(report.tensors, tensors.len());
            for (tensor, expected) in tensors {
                let info = model.info(tensor).unwrap_or_else(|| panic!("{name}: no {tensor}"));
                assert_eq!(info.dtype, stored);
                assert_eq!(json!(info.shape), expected["shape"], "{name} {tensor}");
                assert_eq!(checksum(model.bytes(tensor).unwrap()), expected[key], "{name} {tensor} {key}");
            }
            assert_config(name, model.config(), &expected["config"], dtype);
            assert_eq!(Manifest::verify(&out).unwrap(), []);
            let manifest = Manifest::read(&out).unwrap();
            let source = &manifest.sources[0];
            assert_eq!((source.role.as_str(), &source.blake3), ("gguf", &Some(hash_file(&file).unwrap().blake3)));
        }
    }
}

fn assert_config(name: &str, config: &serde_json::Map<String, Value>, expected: &Value, dtype: FloatDtype) {
    for (key, value) in expected.as_object().unwrap() {
        // Transformers ignores the sliding window, and therefore that the model is a Mistral.
        let value = if name == "mistral_window" && key == "model_type" { &json!("mistral") } else { value };
        assert_eq!(&config[key], value, "{name} {key}");
    }
    assert_eq!(config["rms_norm_eps"], 1e-5);
    assert_eq!(config["dtype"], dtype.torch_name());
    // Transformers also ignores these two; the expected values are those that the script wrote to the file.
    let window = if name == "mistral_window" { json!(64) } else { Value::Null };
    assert_eq!(config.get("sliding_window").unwrap_or(&Value::Null), &window, "{name}");
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let scaling = if name == "llama3_rope" { scaling } else { Value::Null };
    assert_eq!(config["rope_scaling"], scaling, "{name}");
}

#[test]
fn metadata_is_read_as_the_gguf_package_wrote_it() {
    let file = GgufFile::open(&fixture("llama.gguf")).unwrap();
    let mut names: Vec<&str> = file.tensors().values().map(|t| t.ggml_type.name()).collect();
    names.sort_unstable();
    names.dedup();
    let all = ["BF16", "F16", "F32", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"];
    assert_eq!(names, all, "the fixture has every type");
    let embedding = &file.tensors()["token_embd.weight"];
    assert_eq!((embedding.shape.as_slice(), embedding.elements()), (&[440, 256][..], 440 * 256));
    assert_eq!(file.bytes(embedding).len(), 440 * 144);
}
