//! Mixtures of experts against their definitions, computed in NumPy: models in the format of the paper's tool, and
//! adapters with SpectR's routing. Also adapters with Arrow's routing against PEFT, and mixtures that `cl moe mix`
//! writes against Transformers. `fixtures/make_mixtures.py`, `fixtures/make_arrow.py` and `fixtures/make_mixed.py` made
//! the expected values.

mod common;

use std::path::Path;

use cl_checkpoint::{
    AdapterConfig, Checkpoint, CheckpointWriter, Dtype, Interrupt, Manifest, TensorSpec, WriteOptions, convert,
    write_adapter,
};
use cl_model::{Decoder, LoadOptions, token_log_probs};
use cl_moe::{BlendConfig, BlendPlan, MixConfig, MixOptions, Mixture, Plan, blend, mix, router_states_spec};
use cl_torch::tch::Kind;
use common::{weight, write_model};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Fixture {
    sequences: Vec<Vec<u32>>,
    moetify: Vec<Moetify>,
    spectr: Vec<Blended>,
}

#[derive(Deserialize)]
struct Moetify {
    name: String,
    config: Map<String, Value>,
    tensors: Map<String, Value>,
    log_probs: Vec<Vec<f64>>,
}

/// A mixture of adapters whose values come from the formula.
#[derive(Deserialize)]
struct Blended {
    k: usize,
    temperature: Option<f64>,
    config: Map<String, Value>,
    tensors: Map<String, Value>,
    adapters: Vec<Low>,
    log_probs: Vec<Vec<f64>>,
}

/// An adapter whose factors come from the formula.
#[derive(Deserialize)]
struct Low {
    name: String,
    r: usize,
    alpha: f64,
    targets: Vec<String>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/mixtures.json")).unwrap()
}

fn load(dir: &Path) -> Decoder {
    Decoder::load(&Checkpoint::open(dir).unwrap(), LoadOptions::cpu(Kind::Float)).unwrap()
}

fn assert_agrees(what: &str, model: &Decoder, sequences: &[Vec<u32>], expected: &[Vec<f64>]) {
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let ours = token_log_probs(model, &sequences).unwrap();
    let ours: Vec<f64> = ours.into_iter().flatten().map(|p| p.0).collect();
    let expected: Vec<f64> = expected.concat();
    assert_eq!(ours.len(), expected.len());
    let largest = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    eprintln!("{what}: largest difference {largest:.2e}");
    // f32 against f64 with 6 digits in the fixture.
    assert!(largest < 2e-5, "{what}: {largest}");
}

#[test]
fn directories_in_the_format_of_the_papers_tool_compute_what_it_describes() {
    let fixture = fixture();
    for case in &fixture.moetify {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        write_model(&path, &case.config, &case.tensors, Dtype::F32);
        assert_agrees(&case.name, &load(&path), &fixture.sequences, &case.log_probs);
    }
}

#[test]
fn spectr_weights_adapters_as_its_paper_says() {
    let fixture = fixture();
    for case in &fixture.spectr {
        let settings = format!("num_experts_per_tok = {}\nrouter.init = 'spectr'", case.k);
        let model = blended(&settings, case);
        assert_agrees(&format!("SpectR, {} of 3", case.k), &model, &fixture.sequences, &case.log_probs);
    }
}

#[derive(Deserialize)]
struct Arrow {
    sequences: Vec<Vec<u32>>,
    cases: Vec<Blended>,
}

#[test]
fn arrow_weights_adapters_as_peft_does() {
    let fixture: Arrow = serde_json::from_str(include_str!("fixtures/arrow.json")).unwrap();
    for case in &fixture.cases {
        let router = format!("router = {{ init = 'arrow', temperature = {:?} }}", case.temperature.unwrap());
        let settings = format!("num_experts_per_tok = {}\n{router}", case.k);
        let model = blended(&settings, case);
        assert_agrees(&format!("Arrow, {} of 3", case.k), &model, &fixture.sequences, &case.log_probs);
    }
}

/// A model from the formula with a mixture of adapters from the formula.
fn blended(settings: &str, case: &Blended) -> Decoder {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    write_model(&base, &case.config, &case.tensors, Dtype::F32);
    let mut text = format!("base_model = {base:?}\n{settings}\n");
    for adapter in &case.adapters {
        let path = dir.path().join(&adapter.name);
        write_low(&path, adapter, &case.tensors);
        text += &format!("[[experts]]\nadapter = {path:?}\n");
    }
    let config: BlendConfig = toml::from_str(&text).unwrap();
    let out = dir.path().join("mixture");
    blend(&BlendPlan::new(&config, false).unwrap(), &out, false, &Interrupt::default()).unwrap();
    let mut model = load(&base);
    model.load_mixture(&Mixture::open(&out).unwrap()).unwrap();
    model
}

fn write_low(dir: &Path, adapter: &Low, base: &Map<String, Value>) {
    let mut tensors = Vec::new();
    for (tensor, shape) in base {
        let module = tensor.trim_end_matches(".weight");
        if !adapter.targets.iter().any(|target| module.ends_with(target)) {
            continue;
        }
        let [out, input]: [usize; 2] = serde_json::from_value(shape.clone()).unwrap();
        for (part, shape) in [("lora_A", [adapter.r, input]), ("lora_B", [out, adapter.r])] {
            let name = format!("base_model.model.{module}.{part}.weight");
            let values = weight(&format!("{} {module}.{part}", adapter.name), shape[0] * shape[1]);
            let spec = TensorSpec { name, dtype: Dtype::F32, shape: shape.to_vec() };
            tensors.push((spec, convert::from_f32(Dtype::F32, &values).unwrap()));
        }
    }
    let config = AdapterConfig { r: adapter.r, lora_alpha: adapter.alpha, ..Default::default() };
    write_adapter(dir, &config, &tensors, Manifest::new("adapter"), false).unwrap();
}

#[derive(Deserialize)]
struct Mixed {
    experts: Vec<String>,
    sequences: Vec<Vec<u32>>,
    cases: Vec<MixedCase>,
}

#[derive(Deserialize)]
struct MixedCase {
    name: String,
    architecture: String,
    config: Map<String, Value>,
    tensors: Map<String, Value>,
    settings: String,
    log_probs: Vec<Vec<f64>>,
}

#[test]
fn mixtures_of_standard_architectures_compute_what_transformers_does() {
    let fixture: Mixed = serde_json::from_str(include_str!("fixtures/mixed.json")).unwrap();
    for case in &fixture.cases {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut text = format!("base_model = {:?}\n", path("base"));
        let (shared, states) = (path("shared"), path("states").join("model.safetensors"));
        let settings = case.settings.replace("\"shared\"", &format!("{shared:?}"));
        text += &settings.replace("\"states.safetensors\"", &format!("{states:?}"));
        for name in ["base", "shared"] {
            write_named(&path(name), name, case);
        }
        for name in &fixture.experts {
            write_named(&path(name), name, case);
            text += &format!("\n[[experts]]\nmodel = {:?}", path(name));
        }
        let config: MixConfig = toml::from_str(&text).unwrap();
        if config.router.states.is_some() {
            write_states(&path("states"), &config, case);
        }
        mix(&Plan::new(&config).unwrap(), &path("mixture"), &MixOptions::default(), &|_| {}).unwrap();
        let architecture = Checkpoint::open(&path("mixture")).unwrap().config()["architectures"][0].clone();
        assert_eq!(architecture, case.architecture, "{}", case.name);
        assert_agrees(&case.name, &load(&path("mixture")), &fixture.sequences, &case.log_probs);
    }
}

/// Writes hidden states that come from the formula instead of prompts.
fn write_states(dir: &Path, config: &MixConfig, case: &MixedCase) {
    let number = |key: &str| case.config[key].as_u64().unwrap() as usize;
    let specs = router_states_spec(config, number("num_hidden_layers"), number("hidden_size"));
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions::default()).unwrap();
    for spec in &specs {
        let values = weight(&format!("states {}", spec.name), spec.shape.iter().product());
        writer.write(&spec.name, &convert::from_f32(Dtype::F32, &values).unwrap()).unwrap();
    }
    writer.finish(Manifest::new("states")).unwrap();
}

/// Writes a dense model whose weights come from the formula, keyed also by the name of the model.
fn write_named(dir: &Path, model: &str, case: &MixedCase) {
    let spec = |(name, shape): (&String, &Value)| {
        let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
        TensorSpec { name: name.clone(), dtype: Dtype::F32, shape }
    };
    let specs: Vec<TensorSpec> = case.tensors.iter().map(spec).collect();
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions::default()).unwrap();
    for spec in &specs {
        let values = weight(&format!("{model} {}", spec.name), spec.shape.iter().product());
        writer.write(&spec.name, &convert::from_f32(Dtype::F32, &values).unwrap()).unwrap();
    }
    writer.put_json("config.json", &Value::Object(case.config.clone())).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
}
