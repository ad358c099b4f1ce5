//! Adapters against PEFT: logits, folded weights, files, and rejected adapters. `fixtures/make_peft.py` made the
//! expected values.

#[path = "../../cl-model/tests/common/mod.rs"]
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cl_adapters::{Linear, Lora, LoraConfig, Site, TargetModules, save_lora};
use cl_checkpoint::{Adapter, Checkpoint, Dtype, Manifest, TensorSource, write_adapter};
use cl_merge::adapter::fold;
use cl_model::{Decoder, LoadOptions, ModelError, PackedBatch};
use cl_torch::load_tensor;
use cl_torch::tch;
use cl_torch::tch::{Device, Kind, Tensor};
use common::{largest_difference, stored, write_model};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Fixture {
    sequences: Vec<Vec<u32>>,
    cases: Vec<Case>,
    folded: Map<String, Value>,
    bf16_layers: Vec<LayerCase>,
}

/// One bf16 layer with f32 factors: the output in bf16 and the gradients of the factors in f32, both in hexadecimal.
#[derive(Deserialize)]
struct LayerCase {
    name: String,
    lora: Map<String, Value>,
    y: String,
    grads: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Map<String, Value>,
    /// Names and shapes of the base model's tensors.
    tensors_of_base: Map<String, Value>,
    /// Keys given to PEFT's `LoraConfig`.
    lora: Value,
    logits: Vec<Vec<Vec<f64>>>,
    /// What PEFT's `save_pretrained` wrote: dtype and shape of every tensor, and the configuration.
    tensors: Map<String, Value>,
    adapter_config: Value,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/peft.json")).unwrap()
}

fn case(name: &str) -> Case {
    fixture().cases.into_iter().find(|c| c.name == name).unwrap()
}

/// Writes the case's base model to a directory, and its adapter with weights from the formula under `prefix`.
fn write_case(dir: &Path, case: &Case, base: Dtype, prefix: &str) -> (Checkpoint, Adapter) {
    write_model(&dir.join("model"), &case.config, &case.tensors_of_base, base);
    let adapter = write_peft(&dir.join("adapter"), case, prefix, &|config| config);
    (Checkpoint::open(&dir.join("model")).unwrap(), adapter)
}

/// Writes the files that PEFT wrote for the case, with `change` applied to the configuration.
fn write_peft(dir: &Path, case: &Case, prefix: &str, change: &dyn Fn(Value) -> Value) -> Adapter {
    let tensors: Vec<_> = case
        .tensors
        .iter()
        .map(|(name, entry)| {
            let (_, shape): (String, Vec<usize>) = serde_json::from_value(entry.clone()).unwrap();
            let source = source(name, case, prefix);
            let (mut spec, bytes) = stored(&source, &shape, Dtype::F32);
            spec.name = name.clone();
            (spec, bytes)
        })
        .collect();
    let config = serde_json::from_value(change(case.adapter_config.clone())).unwrap();
    write_adapter(dir, &config, &tensors, Manifest::new("adapter"), true).unwrap();
    Adapter::open(dir).unwrap()
}

/// The name for which the formula gives a tensor's values: for trained tensors, `prefix` and the name in the file. PEFT
/// stores a copy of the base's weight together with an adapter on embedding or head.
fn source(name: &str, case: &Case, prefix: &str) -> String {
    let own = name.strip_prefix("base_model.model.").unwrap().replace(".base_layer", "");
    let copied = own.ends_with("weight") && !own.contains("lora_") && case.adapter_config["modules_to_save"].is_null();
    if copied && own == "lm_head.weight" && !case.tensors_of_base.contains_key(&own) {
        "model.embed_tokens.weight".to_owned()
    } else if copied {
        own
    } else if case.adapter_config["ensure_weight_tying"] == true && own == "lm_head.weight" {
        format!("{prefix}base_model.model.model.embed_tokens.weight")
    } else {
        format!("{prefix}{name}")
    }
}

fn load(checkpoint: &Checkpoint, kind: Kind) -> Decoder {
    Decoder::load(checkpoint, LoadOptions::cpu(kind)).unwrap()
}

/// Logits of each sequence, `(tokens, vocab)`.
fn logits(model: &Decoder, sequences: &[Vec<u32>]) -> Vec<Tensor> {
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let batch = PackedBatch::new(&sequences, model.config.vocab_size, model.device).unwrap();
    let all = model.logits(&model.forward(&batch, cl_adapters::Mode::Eval).unwrap()).detach();
    batch.cu_seqlens.windows(2).map(|w| all.narrow(0, w[0], w[1] - w[0])).collect()
}

fn to_tensor(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).reshape([rows.len() as i64, -1])
}

#[test]
fn logits_agree_with_peft_for_every_kind_of_adapter() {
    let fixture = fixture();
    for case in &fixture.cases {
        let dir = tempfile::tempdir().unwrap();
        let half = case.name == "bf16";
        let (dtype, kind) = if half { (Dtype::BF16, Kind::BFloat16) } else { (Dtype::F32, Kind::Float) };
        let (checkpoint, adapter) = write_case(dir.path(), case, dtype, "");
        // With bf16 weights, PEFT multiplies the f32 factors in f32.
        let options = LoadOptions { adapters: Kind::Float, ..LoadOptions::cpu(kind) };
        let mut model = Decoder::load(&checkpoint, options).unwrap();
        let bare = logits(&model, &fixture.sequences);
        model.load_lora(&adapter, 0.5).unwrap();
        let adapted = logits(&model, &fixture.sequences);
        let (mut largest, mut effect) = (0f64, 0f64);
        for ((ours, expected), bare) in adapted.iter().zip(&case.logits).zip(&bare) {
            largest = largest.max(largest_difference(ours, &to_tensor(expected)));
            effect = effect.max(largest_difference(ours, bare));
        }
        eprintln!("{}: largest difference {largest:.2e}; the adapter moves logits by up to {effect:.2}", case.name);
        // f32: logits near 1.6 summed in another order, and 6 digits in the fixture. bf16: an 8-bit mantissa rounds
        // values near 1.6 by up to 0.004 each time, and PEFT multiplies the factors in f32 where we use bf16.
        assert!(largest < if half { 0.05 } else { 4e-6 }, "{}: {largest}", case.name);
        assert!(effect > 10.0 * largest, "{}: the adapter has to show", case.name);
    }
}

/// Decodes numbers from their bytes in hexadecimal.
fn floats(hex: &str, dtype: Dtype) -> Vec<f32> {
    let bytes: Vec<u8> = (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
    match dtype {
        Dtype::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        // bf16 is the upper half of f32.
        _ => bytes.chunks(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect(),
    }
}

/// Compares the tensors of `expected` (name to hexadecimal bytes) with those of `dir`; all others must equal the base's
/// bit for bit. Returns the largest difference and the number of folded tensors.
fn compare_folded(base: &Checkpoint, dir: &Path, expected: &Map<String, Value>) -> (f64, usize) {
    let ours = Checkpoint::open(dir).unwrap();
    assert_eq!(ours.names(), base.names());
    let mut largest = 0f64;
    for name in ours.names() {
        assert_eq!(ours.info(name), base.info(name), "{name}: shape and dtype stay");
        let Some(hex) = expected.get(name) else {
            assert_eq!(ours.bytes(name).unwrap(), base.bytes(name).unwrap(), "{name} has no adapter");
            continue;
        };
        let values = floats(hex.as_str().unwrap(), ours.info(name).unwrap().dtype);
        let mine = load_tensor(&ours, name, Kind::Float, Device::Cpu).unwrap();
        largest = largest.max(largest_difference(&mine, &Tensor::from_slice(&values).reshape(mine.size())));
    }
    (largest, expected.len())
}

/// A bf16 layer of a case whose adapter's products are computed in `adapters`.
fn bf16_layer(case: &LayerCase, adapters: Kind) -> Linear {
    let values = |key: &str, shape: &[i64]| {
        let n = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&common::weight(&format!("{}.{key}", case.name), n)).reshape(shape)
    };
    let half = |key, shape| values(key, shape).to_kind(Kind::BFloat16);
    let mut layer = Linear::new("layer", half("layer.weight", &[40, 48]), Some(half("layer.bias", &[40])));
    layer.adapter_kind = Some(adapters);
    let mut config = case.lora.clone();
    config.extend(json!({"r": 4, "lora_alpha": 6}).as_object().unwrap().clone());
    Lora::start(&mut layer, &serde_json::from_value(Value::Object(config)).unwrap(), 1).unwrap();
    let lora = layer.lora.as_mut().unwrap();
    let _no_graph = tch::no_grad_guard();
    lora.a.copy_(&values("lora_A.weight", &[4, 48]));
    lora.b.copy_(&values("lora_B.weight", &[40, 4]));
    lora.bias.iter_mut().for_each(|b| b.copy_(&values("lora_B.bias", &[40])));
    lora.magnitude.iter_mut().for_each(|m| m.vector.copy_(&values("lora_magnitude_vector", &[40])));
    layer
}

#[test]
fn a_bf16_layer_multiplies_f32_factors_as_peft_does() {
    for case in &fixture().bf16_layers {
        let input = |key: &str, width: i64| {
            let values = common::weight(&format!("{}.{key}", case.name), 32 * width as usize);
            Tensor::from_slice(&values).reshape([32, width]).to_kind(Kind::BFloat16)
        };
        let run = |adapters| {
            let layer = bf16_layer(case, adapters);
            let y = layer.forward(&input("x", 48), cl_adapters::Mode::Train { seed: 1 });
            (&y * input("dy", 40)).sum(Kind::Float).backward();
            let expected = Tensor::from_slice(&floats(&case.y, Dtype::BF16)).reshape([32, 40]);
            let others = (y.to_kind(Kind::Float) - expected).ne(0.0).sum(Kind::Int64).int64_value(&[]);
            let lora = layer.lora.as_ref().unwrap();
            let mut largest = 0f64;
            for (key, hex) in &case.grads {
                let grad = match key.as_str() {
                    "lora_A.weight" => lora.a.grad(),
                    "lora_B.weight" => lora.b.grad(),
                    "lora_B.bias" => lora.bias.as_ref().unwrap().grad(),
                    _ => lora.magnitude.as_ref().unwrap().vector.grad(),
                };
                let expected = Tensor::from_slice(&floats(hex, Dtype::F32)).reshape(grad.size());
                largest = largest.max((&grad - &expected).norm().double_value(&[]) / expected.norm().double_value(&[]));
            }
            (others, largest)
        };
        let (wide, half) = (run(Kind::Float), run(Kind::BFloat16));
        eprintln!("{}: other outputs and relative error of gradients: {wide:?}; in bf16 {half:?}", case.name);
        // Of 1,280 outputs; a sum near the midpoint of two bf16 numbers can be rounded either way.
        assert!(wide.0 <= 13 && wide.1 < 1e-5, "{}: {wide:?}", case.name);
        assert!(half.0 > 130 && half.1 > 1e-3, "{}: the switch has to show", case.name);
    }
}

#[test]
fn folding_gives_what_peft_merges_and_copies_the_rest() {
    let fixture = fixture();
    for (name, case_name, dtype) in [
        ("all_linear_float32", "all_linear", Dtype::F32),
        ("all_linear_bfloat16", "all_linear", Dtype::BF16),
        ("patterns_float32", "patterns", Dtype::F32),
        ("patterns_and_second_float32", "patterns", Dtype::F32),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (base, adapter) = write_case(dir.path(), &case(case_name), dtype, "");
        std::fs::write(dir.path().join("model/tokenizer.json"), "{}").unwrap();
        let mut adapters = vec![adapter];
        if name.contains("second") {
            let mut second = case("names_tied");
            second.tensors_of_base = case(case_name).tensors_of_base;
            adapters.push(write_peft(&dir.path().join("second"), &second, "second.", &|config| config));
        }
        let out = dir.path().join("folded");
        let report = fold(&base, &adapters, &out, Manifest::new("model"), false).unwrap();
        let expected = fixture.folded[name].as_object().unwrap();
        let (largest, count) = compare_folded(&base, &out, expected);
        eprintln!("{name}: largest difference {largest:.2e}, rounding error {:.2e}", report.max_rounding_error);
        assert_eq!(report.folded, count, "{name}");
        assert_eq!(report.copied, base.names().len() - count, "{name}");
        assert_eq!(std::fs::read_to_string(out.join("tokenizer.json")).unwrap(), "{}", "companions go along");
        if dtype == Dtype::F32 {
            // Values below 1 have a last bit of 6e-8; products of two factors with four terms may be summed in another
            // order.
            assert!(largest < 2.4e-7, "{name}: {largest}");
            // Summed in f64: half of a last bit.
            assert!(report.max_rounding_error <= 3e-8);
        } else {
            // Both round the f32 sum once. A sum within one f32 bit of the midpoint of two bf16 numbers can be rounded
            // either way; one step of bf16 below 1 is 2^-8.
            assert!(largest <= 2f64.powi(-8), "{name}: {largest}");
            // At most half a step.
            assert!(report.max_rounding_error > 0.0 && report.max_rounding_error <= 2f64.powi(-9));
        }
        let again = fold(&base, &adapters, &out, Manifest::new("model"), false);
        assert!(again.unwrap_err().to_string().contains("already exists"));
    }
}

#[test]
fn a_folded_model_computes_what_base_and_adapter_do() {
    let fixture = fixture();
    for name in ["patterns", "lm_head", "rslora_bias", "dora", "embedding", "tied_head"] {
        let dir = tempfile::tempdir().unwrap();
        let (base, adapter) = write_case(dir.path(), &case(name), Dtype::F32, "");
        let mut beside = load(&base, Kind::Float);
        beside.load_lora(&adapter, 0.0).unwrap();
        fold(&base, &[adapter], &dir.path().join("folded"), Manifest::new("model"), false).unwrap();
        let folded = load(&Checkpoint::open(&dir.path().join("folded")).unwrap(), Kind::Float);
        let pairs = logits(&beside, &fixture.sequences).into_iter().zip(logits(&folded, &fixture.sequences));
        let largest = pairs.map(|(a, b)| largest_difference(&a, &b)).fold(0.0, f64::max);
        eprintln!("{name}: largest difference {largest:.2e}");
        // The same sums in another order; logits are near 1.6.
        assert!(largest < 2e-6, "{name}: {largest}");
    }
}

/// Where the adapters of a case are kept for `fixtures/check_with_peft.py`.
fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("peft").join(name)
}

/// The model's layers that an adapter configuration selects, by PEFT's rule.
fn chosen(config: &Value, model: &Decoder) -> BTreeSet<String> {
    let target: TargetModules = serde_json::from_value(config["target_modules"].clone()).unwrap();
    let names: Vec<&str> = model.sites().map(|s| s.name).collect();
    let targets = cl_adapters::Targets::new(&target, &names).unwrap();
    let modules_to_save = serde_json::from_value(config["modules_to_save"].clone()).unwrap_or_default();
    let lora = LoraConfig { modules_to_save, ..Default::default() };
    let names = names.into_iter().filter(|n| targets.contains(n) && !lora.is_saved(n));
    names.map(str::to_owned).collect()
}

#[test]
fn a_saved_adapter_has_the_names_shapes_dtypes_and_keys_of_peft() {
    for case in fixture().cases {
        let dir = kept(&case.name);
        let dtype = if case.name == "bf16" { Dtype::BF16 } else { Dtype::F32 };
        let (checkpoint, theirs) = write_case(&dir, &case, dtype, "");
        let mut model = load(&checkpoint, if dtype == Dtype::BF16 { Kind::BFloat16 } else { Kind::Float });
        let lora: LoraConfig = serde_json::from_value(case.lora.clone()).unwrap();
        model.add_lora(&lora, 5).unwrap();
        let base = case.adapter_config["base_model_name_or_path"].as_str().unwrap_or("base");
        save_lora(
            &dir.join("ours"),
            model.sites(),
            &model.trained_whole(),
            &lora,
            base,
            Manifest::new("adapter"),
            true,
        )
        .unwrap();

        let ours = Adapter::open(&dir.join("ours")).unwrap();
        let mut expected: Vec<(String, String, Vec<usize>)> = Vec::new();
        let copied = |name: &str| !source(name, &case, "").starts_with("base_model.");
        for (name, entry) in case.tensors.iter().filter(|(name, _)| !copied(name)) {
            let (dtype, shape) = serde_json::from_value(entry.clone()).unwrap();
            expected.push((name.clone(), dtype, shape));
        }
        expected.sort();
        let info = |n: &str| ours.info(n).unwrap().clone();
        let got: Vec<(String, String, Vec<usize>)> =
            ours.names().into_iter().map(|n| (n.to_owned(), format!("{:?}", info(n).dtype), info(n).shape)).collect();
        assert_eq!(got, expected, "{}", case.name);

        let text = std::fs::read_to_string(dir.join("ours/adapter_config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        check_keys(&case.name, &config, &case.adapter_config);
        assert_eq!(chosen(&config, &model), chosen(&case.adapter_config, &model), "{}", case.name);
        for module in ours.modules() {
            let (a, b) = (ours.config().scaling(&module.name), theirs.config().scaling(&module.name));
            assert_eq!(a, b, "{}: {}", case.name, module.name);
        }
    }
}

/// Checks that every key that we write is PEFT's with PEFT's value, and that every key that we omit has no effect in
/// PEFT's file.
fn check_keys(name: &str, ours: &Value, theirs: &Value) {
    let compared_elsewhere = ["target_modules", "rank_pattern", "alpha_pattern", "base_model_name_or_path"];
    for (key, value) in ours.as_object().unwrap() {
        let expected = theirs.get(key).unwrap_or_else(|| panic!("{name}: PEFT has no key `{key}`"));
        let equal = match (value.as_f64(), expected.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => value == expected,
        };
        // If the head that shares its weight with the embedding is named, PEFT writes the embedding.
        let as_one = key == "modules_to_save" && ours.get("ensure_weight_tying").is_some();
        assert!(
            equal || as_one || compared_elsewhere.contains(&key.as_str()),
            "{name}: {key} = {value}, PEFT has {expected}"
        );
    }
    let neutral = [json!(null), json!(false), json!([]), json!({})];
    let of_features_that_are_off = ["megatron_core", "peft_version", "qalora_group_size"];
    for (key, value) in theirs.as_object().unwrap() {
        let left_out = ours.get(key).is_none();
        assert!(
            !left_out || neutral.contains(value) || of_features_that_are_off.contains(&key.as_str()),
            "{name}: `{key}` is left out, PEFT has {value}"
        );
    }
}

#[test]
fn a_saved_adapter_comes_back_bit_by_bit() {
    for case in fixture().cases.into_iter().filter(|c| c.name != "bf16") {
        let name = &case.name;
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint, adapter) = write_case(dir.path(), &case, Dtype::F32, "");
        let mut first = load(&checkpoint, Kind::Float);
        first.load_lora(&adapter, 0.0).unwrap();
        // The file must describe the layers, regardless of the given configuration.
        let other = LoraConfig { use_rslora: adapter.config().use_rslora, r: 7, lora_alpha: 5.0, ..Default::default() };
        let out = dir.path().join("again");
        save_lora(&out, first.sites(), &first.trained_whole(), &other, "base", Manifest::new("adapter"), false)
            .unwrap();
        let mut second = load(&checkpoint, Kind::Float);
        second.load_lora(&Adapter::open(&out).unwrap(), 0.0).unwrap();
        for (a, b) in first.sites().zip(second.sites()) {
            let more = |l: &Lora| (l.magnitude.as_ref().map(|m| m.vector.copy()), l.bias.as_ref().map(Tensor::copy));
            let factors = |s: Site<'_>| s.lora.map(|l| (l.a.copy(), l.b.copy(), more(l), l.scaling));
            assert_eq!(factors(a), factors(b), "{name}: {}", a.name);
        }
        let whole = |model: &Decoder| -> Vec<_> {
            model.trained_whole().into_iter().map(|w| (w.name, w.kind, w.tensor.copy())).collect()
        };
        assert_eq!(whole(&first), whole(&second), "{name}");
        let trained =
            |model: &Decoder| model.trainable().into_iter().map(|(n, t)| (n, t.requires_grad())).collect::<Vec<_>>();
        assert_eq!(trained(&first), trained(&second), "{name}");
        assert!(trained(&first).iter().all(|(_, learns)| *learns), "{name}");
        // Without the adapter, the model equals the base again.
        second.unload_lora();
        let bare = load(&checkpoint, Kind::Float);
        assert_eq!(second.named_parameters(), bare.named_parameters(), "{name}");
        let sequences = fixture().sequences;
        assert_eq!(logits(&second, &sequences), logits(&bare, &sequences), "{name}");
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_starts_as_peft_starts_one() {
    let config = common::llama(json!({"hidden_size": 64, "intermediate_size": 96}));
    let mut model = common::model(&config, LoadOptions::cpu(Kind::Float));
    let sequences = common::sequences(&[9, 4], 61, 1);
    // Products that need gradients may be computed by another library, which sums in another order.
    let without_graph = |model: &Decoder| tch::no_grad(|| logits(model, &sequences));
    let bare = without_graph(&model);
    let lora = LoraConfig { r: 16, ..Default::default() };
    model.add_lora(&lora, 3).unwrap();
    assert_eq!(without_graph(&model), bare);
    for layer in model.linears() {
        let Some(lora) = &layer.lora else {
            assert_eq!(layer.name, "lm_head");
            continue;
        };
        let bound = 1.0 / (layer.widths().0 as f64).sqrt();
        let largest = lora.a.abs().max().double_value(&[]);
        assert!(largest <= bound && largest > 0.98 * bound, "{}: {largest} of {bound}", layer.name);
        // At least 1024 numbers with standard deviation bound/√3: five standard errors of the mean.
        let mean = lora.a.mean(Kind::Double).double_value(&[]);
        assert!(mean.abs() < 5.0 * bound / 3f64.sqrt() / 32.0, "{}: mean {mean}", layer.name);
        assert_eq!(lora.b.abs().max().double_value(&[]), 0.0);
        assert!(!layer.weight.dense().unwrap().requires_grad() && lora.a.requires_grad() && lora.b.requires_grad());
    }
    let other_order = {
        let mut model = common::model(&config, LoadOptions::cpu(Kind::Float));
        let names = TargetModules::Names(vec!["down_proj".into()]);
        model.add_lora(&LoraConfig { target_modules: names, ..lora }, 3).unwrap();
        model
    };
    let find = |m: &Decoder| {
        m.linears().find(|l| l.name.ends_with("1.mlp.down_proj")).unwrap().lora.as_ref().unwrap().a.copy()
    };
    assert_eq!(find(&model), find(&other_order), "the numbers depend on seed and name only");
}

/// PEFT's PiSSA and OLoRA subtract the initial update from the weight. Here it is subtracted separately, and the
/// difference is saved.
#[test]
fn an_adapter_started_from_the_weight_changes_nothing_and_is_saved_for_the_original_base() {
    let fixture = fixture();
    for (init, name) in [("pissa", "lm_head"), ("pissa_niter_8", "rslora_bias"), ("olora", "all_linear")] {
        let dir = kept(init);
        let case = case(name);
        let (checkpoint, _) = write_case(&dir, &case, Dtype::F32, "");
        let mut model = load(&checkpoint, Kind::Float);
        let bare = logits(&model, &fixture.sequences);
        let mut lora: LoraConfig = serde_json::from_value(case.lora.clone()).unwrap();
        lora.init_lora_weights = serde_json::from_value(json!(init)).unwrap();
        lora.rank_pattern.insert("[qk]_proj".into(), 2);
        model.add_lora(&lora, 5).unwrap();
        let distance =
            |a: &[Tensor], b: &[Tensor]| a.iter().zip(b).map(|(a, b)| largest_difference(a, b)).fold(0.0, f64::max);
        // Logits near 1.6; the initial update is added and subtracted in f32.
        assert!(distance(&logits(&model, &fixture.sequences), &bare) < 4e-6, "{init}");

        let _no_graph = tch::no_grad_guard();
        for (i, (_, factor)) in model.trainable().into_iter().enumerate() {
            let _ = factor.shallow_clone().g_add_scalar_(0.01 * (1 + i % 3) as f64);
        }
        let moved = logits(&model, &fixture.sequences);
        assert!(distance(&moved, &bare) > 1e-3, "{init}: moving the factors has to show");
        save_lora(
            &dir.join("ours"),
            model.sites(),
            &model.trained_whole(),
            &lora,
            "base",
            Manifest::new("adapter"),
            true,
        )
        .unwrap();
        let saved = Adapter::open(&dir.join("ours")).unwrap();
        assert_eq!(saved.config().init_lora_weights, json!(true));
        assert_eq!(saved.config().r as i64, 2 * lora.r);
        let mut again = load(&checkpoint, Kind::Float);
        again.load_lora(&saved, 0.0).unwrap();
        let apart = distance(&logits(&again, &fixture.sequences), &moved);
        assert!(apart < 4e-6, "{init}: {apart}");
    }
}

/// The errors with which a model and folding reject the adapter.
fn refusals(checkpoint: &Checkpoint, adapter: &Adapter, dir: &Path) -> [String; 2] {
    let mut model = load(checkpoint, Kind::Float);
    model.set_requires_grad(true);
    let message = model.load_lora(adapter, 0.0).unwrap_err().to_string();
    let unchanged = model.linears().all(|l| l.lora.is_none() && l.weight.dense().unwrap().requires_grad());
    assert!(unchanged, "a refused adapter leaves the model as it was");
    let out = dir.join("never");
    let folding = fold(checkpoint, std::slice::from_ref(adapter), &out, Manifest::new("model"), false).unwrap_err();
    assert!(!out.exists(), "nothing is written");
    [message, folding.to_string()]
}

#[test]
fn adapters_that_mean_more_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let case = case("names_tied");
    let (checkpoint, _) = write_case(dir.path(), &case, Dtype::F32, "");
    for (key, value, feature) in [
        ("peft_type", json!("IA3"), "IA3"),
        ("peft_type", json!("LOHA"), "LOHA"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out"),
        ("init_lora_weights", json!("pissa_niter_16"), "pissa_niter_16"),
        ("init_lora_weights", json!("olora"), "olora"),
        ("alora_invocation_tokens", json!([7, 9]), "alora_invocation_tokens"),
        ("layer_replication", json!([[0, 1], [0, 2]]), "layer_replication"),
        ("use_bdlora", json!({"nblocks": 2}), "use_bdlora"),
    ] {
        let change = |mut config: Value| {
            config[key] = value.clone();
            config
        };
        let adapter = write_peft(&dir.path().join("refused"), &case, "", &change);
        for message in refusals(&checkpoint, &adapter, dir.path()) {
            assert!(message.contains(feature) && message.contains("refused: "), "{key}: {message}");
        }
    }
    for (key, value) in [("init_lora_weights", json!("gaussian")), ("loftq_config", json!({}))] {
        let change = |mut config: Value| {
            config[key] = value.clone();
            config
        };
        let adapter = write_peft(&dir.path().join("taken"), &case, "", &change);
        load(&checkpoint, Kind::Float).load_lora(&adapter, 0.0).unwrap();
    }
}

#[test]
fn unknown_modules_wrong_shapes_and_stray_tensors_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, _) = write_case(dir.path(), &case("patterns"), Dtype::F32, "");
    let two_layers = case("names_tied");
    type Row<'a> = (&'a str, &'a [(&'a str, [usize; 2])], &'a [&'a str]);
    let rows: [Row; 5] = [
        (
            "a layer that the model does not have",
            &[
                ("model.layers.7.self_attn.q_proj.lora_A.weight", [2, 16]),
                ("model.layers.7.self_attn.q_proj.lora_B.weight", [16, 2]),
            ],
            &["model.layers.7.self_attn.q_proj", "neither a linear layer nor"],
        ),
        (
            "a norm, which is no linear layer",
            &[("model.norm.lora_A.weight", [2, 16]), ("model.norm.lora_B.weight", [16, 2])],
            &["model.norm"],
        ),
        (
            "another input width",
            &[
                ("model.layers.0.self_attn.q_proj.lora_A.weight", [2, 32]),
                ("model.layers.0.self_attn.q_proj.lora_B.weight", [16, 2]),
            ],
            &["model.layers.0.self_attn.q_proj", "[r, 16]", "[2, 32]"],
        ),
        (
            "another output width, behind a layer that fits",
            &[
                ("model.layers.0.self_attn.q_proj.lora_A.weight", [2, 16]),
                ("model.layers.0.self_attn.q_proj.lora_B.weight", [16, 2]),
                ("model.layers.0.self_attn.v_proj.lora_A.weight", [2, 16]),
                ("model.layers.0.self_attn.v_proj.lora_B.weight", [16, 2]),
            ],
            &["model.layers.0.self_attn.v_proj", "[8, r]", "[16, 2]"],
        ),
        (
            "a head that was trained whole",
            &[
                ("model.layers.0.self_attn.q_proj.lora_A.weight", [2, 16]),
                ("model.layers.0.self_attn.q_proj.lora_B.weight", [16, 2]),
                ("lm_head.weight", [61, 16]),
            ],
            &["base_model.model.lm_head.weight", "does not list `lm_head` as trained"],
        ),
    ];
    for (what, tensors, parts) in rows {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, shape)| stored(&format!("base_model.model.{name}"), shape, Dtype::F32))
            .collect();
        let config = serde_json::from_value(two_layers.adapter_config.clone()).unwrap();
        let path = dir.path().join("refused");
        write_adapter(&path, &config, &tensors, Manifest::new("adapter"), true).unwrap();
        let adapter = Adapter::open(&path).unwrap();
        let [loading, folding] = refusals(&checkpoint, &adapter, dir.path());
        assert!(parts.iter().all(|p| loading.contains(p)) && loading.contains("refused"), "{what}: {loading}");
        // Folding has its own messages, which name the same things.
        assert!(folding.contains(parts[0]) && folding.contains("refused"), "{what}: {folding}");
    }
}

#[test]
fn targets_that_match_nothing_are_an_error_and_leave_the_model_as_it_was() {
    let mut model = common::model(&common::llama(json!({"tie_word_embeddings": true})), LoadOptions::cpu(Kind::Float));
    model.set_requires_grad(true);
    let names = |n: &[&str]| TargetModules::Names(n.iter().map(|s| (*s).to_owned()).collect());
    for (target, part) in [
        (names(&["q_proj", "input_layernorm"]), "`input_layernorm`"),
        // A string is a regular expression for the whole name.
        (TargetModules::Pattern("q_proj".into()), "`q_proj`"),
        (TargetModules::Pattern("(".into()), "not a regular expression"),
    ] {
        let config = LoraConfig { target_modules: target, ..Default::default() };
        let error = model.add_lora(&config, 1).unwrap_err();
        assert!(matches!(error, ModelError::Adapter(_)) && error.to_string().contains(part), "{error}");
        assert!(model.linears().all(|l| l.lora.is_none() && l.weight.dense().unwrap().requires_grad()));
    }
}

#[test]
fn factors_stored_in_half_precision_are_read_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, f32_adapter) = write_case(dir.path(), &case("names_tied"), Dtype::F32, "");
    for dtype in [Dtype::F16, Dtype::BF16] {
        let tensors: Vec<_> =
            f32_adapter.names().into_iter().map(|n| stored(n, &f32_adapter.info(n).unwrap().shape, dtype)).collect();
        let path = dir.path().join("half");
        write_adapter(&path, f32_adapter.config(), &tensors, Manifest::new("adapter"), true).unwrap();
        let mut model = load(&checkpoint, Kind::Float);
        model.load_lora(&Adapter::open(&path).unwrap(), 0.0).unwrap();
        let lora = model.linears().find_map(|l| l.lora.as_ref()).unwrap();
        assert_eq!(lora.a.kind(), Kind::Float, "factors are kept in f32 whatever the file has");
        let kind = cl_torch::kind_of(dtype).unwrap();
        let exact =
            Tensor::from_slice(&common::weight("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 32));
        assert_eq!(lora.a.detach().flatten(0, 1), exact.to_kind(kind).to_kind(Kind::Float));
    }
}
