//! Whole rounds: killed and resumed, rejected, with values that are not finite, and started from an adapter on disk.

#[path = "../../cl-model/tests/common/mod.rs"]
mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use cl_adapters::{InitLoraWeights, LoraConfig, Mode, TargetModules, save_lora};
use cl_checkpoint::{Adapter, Interrupt, Manifest};
use cl_data::{Encoded, RowRef};
use cl_model::{Decoder, PackedBatch};
use cl_torch::Quantization;
use cl_torch::tch::{self, Device, Tensor};
use cl_train::{
    Full, Keep, Plan, Precision, Ranks, Schedule, States, StepLog, TrainConfig, TrainContext, TrainData, TrainError,
    TrainReport, Validation, ValidationConfig, read_log, train,
};
use serde_json::json;

/// Serializes runs with dropout, which seeds the process-wide random generator.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// Seven examples of eight tokens.
fn examples() -> Vec<Encoded> {
    common::sequences(&[8; 7], 61, 9).into_iter().map(|input_ids| Encoded::new(input_ids, 3)).collect()
}

/// Eight steps of two micro-batches over seven rows: epochs of two steps, the second of which is smaller.
fn config() -> TrainConfig {
    TrainConfig {
        epochs: 4,
        micro_batch_size: 2,
        gradient_accumulation_steps: 2,
        learning_rate: 1e-2,
        lr_scheduler_type: Schedule::Cosine,
        warmup_steps: 2,
        weight_decay: 0.1,
        save_steps: 3,
        ..TrainConfig::default()
    }
}

fn lora() -> TrainConfig {
    TrainConfig { lora: Some(LoraConfig { r: 2, lora_dropout: 0.2, ..Default::default() }), ..config() }
}

fn full() -> TrainConfig {
    TrainConfig { full: Some(Full {}), ..config() }
}

/// An adapter with trained parameters besides its factors: biases and whole modules of several kinds.
fn whole(more: &str) -> TrainConfig {
    let keys = format!(r#"{{"r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj", "up_proj"], {more}}}"#);
    TrainConfig { lora: Some(serde_json::from_str(&keys).unwrap()), ..config() }
}

const WHOLE: [&str; 4] = [
    r#""bias": "all", "modules_to_save": ["embed_tokens", "norm"]"#,
    r#""modules_to_save": ["embed_tokens"], "ensure_weight_tying": true"#,
    r#""lora_bias": true, "trainable_token_indices": [5, 3, 44], "embedding_learning_rate": 0.003"#,
    r#""bias": "lora_only", "trainable_token_indices": {"lm_head": [7], "embed_tokens": [9, 20]}"#,
];

fn bare(config: &TrainConfig) -> Decoder {
    let json = common::llama(json!({"tie_word_embeddings": true, "attention_bias": true}));
    common::model(&json, config.load_options(Device::Cpu))
}

fn model(config: &TrainConfig) -> Decoder {
    let mut model = bare(config);
    match &config.lora {
        Some(lora) => model.add_lora(lora, 5).unwrap(),
        None => model.set_requires_grad(true),
    }
    model
}

/// Trains into `out`; `observe` may panic to simulate the end of the process.
fn run_with(
    model: &mut Decoder,
    examples: Vec<Encoded>,
    config: &TrainConfig,
    seed: u64,
    out: &Path,
    observe: &mut dyn FnMut(&StepLog),
) -> Result<TrainReport, TrainError> {
    run_validated(model, examples, config, None, seed, out, observe)
}

/// Like [`run_with`], with validation.
fn run_validated(
    model: &mut Decoder,
    examples: Vec<Encoded>,
    config: &TrainConfig,
    validation: Option<Validation<'_>>,
    seed: u64,
    out: &Path,
    observe: &mut dyn FnMut(&StepLog),
) -> Result<TrainReport, TrainError> {
    let n = examples.len();
    let rows = |epoch: u64| -> Vec<RowRef> {
        cl_data::shuffled(n, epoch, 3).into_iter().map(|row| RowRef { dataset: 0, row }).collect()
    };
    let data = TrainData { datasets: &[examples], epoch_rows: &rows, orthogonality: None, validation };
    let plan = Plan::new(n, config, false).unwrap();
    let context = TrainContext {
        finish: false,
        at_checkpoint: None,
        seed,
        out,
        interrupt: &Interrupt::default(),
        ranks: &Ranks::alone(),
    };
    train(model, &data, config, &plan, &context, None, &mut |p| observe(p.step))
}

fn run(config: &TrainConfig, out: &Path) -> TrainReport {
    run_with(&mut model(config), examples(), config, 11, out, &mut |_| {}).unwrap()
}

/// Simulates a process that is killed right after `step`.
fn killed_after(step: u64, config: &TrainConfig, out: &Path) {
    let died = catch_unwind(AssertUnwindSafe(|| {
        let mut die = |log: &StepLog| {
            if log.step == step {
                resume_unwind(Box::new("killed"));
            }
        };
        run_with(&mut model(config), examples(), config, 11, out, &mut die)
    }));
    assert!(died.is_err());
}

/// The parameters and moments in `out`, and the log without its times.
fn left_behind(out: &Path) -> (Vec<u8>, Vec<StepLog>) {
    let mut log = read_log(&out.join("log.jsonl")).unwrap();
    log.iter_mut().for_each(|l| l.seconds = 0.0);
    (std::fs::read(out.join("state/model.safetensors")).unwrap(), log)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap().path();
        std::fs::copy(&entry, to.join(entry.file_name().unwrap())).unwrap();
    }
}

#[test]
fn a_killed_run_goes_on_bit_by_bit_as_if_it_had_not_been() {
    let _turn = one_at_a_time();
    let pure = TrainConfig { precision: Precision::Bf16, states: States::Pure, ..full() };
    let bf16_lora = TrainConfig { precision: Precision::Bf16, ..lora() };
    let with = |change: fn(&mut LoraConfig)| {
        let mut config = lora();
        change(config.lora.as_mut().unwrap());
        config
    };
    let dora = with(|lora| (lora.use_dora, lora.loraplus_lr_ratio) = (true, Some(4.0)));
    // The initialization is recomputed from the weights; the factors come from the state.
    let pissa = with(|lora| lora.init_lora_weights = InitLoraWeights::Pissa { niter: Some(2) });
    let tokens = with(|lora| {
        let names = ["q_proj", "embed_tokens", "lm_head"];
        lora.target_modules = TargetModules::Names(names.map(str::to_owned).to_vec());
        lora.embedding_learning_rate = Some(1e-3);
    });
    let whole_in_bf16 = TrainConfig {
        precision: Precision::Bf16,
        adapter_precision: Some(Precision::F32),
        activation_checkpointing: true,
        ..whole(WHOLE[1])
    };
    // Before the first checkpoint, at one, after one, and at the last step.
    let all = &[2, 3, 5, 8][..];
    for (name, config, steps) in [
        ("lora", lora(), all),
        ("lora in bf16", bf16_lora, &[5]),
        ("dora", dora, &[5]),
        ("pissa", pissa, &[5]),
        ("nf4", with(|lora| lora.base = Some(Quantization::Nf4)), &[5]),
        ("embedding and head", tokens, &[5]),
        ("full", full(), all),
        ("pure bf16", pure, &[5]),
        (WHOLE[0], whole(WHOLE[0]), &[5]),
        (WHOLE[1], whole_in_bf16, &[5]),
        (WHOLE[2], whole(WHOLE[2]), &[5]),
        (WHOLE[3], whole(WHOLE[3]), &[5]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let uninterrupted = dir.path().join("whole");
        let report = run(&config, &uninterrupted);
        let expected = left_behind(&uninterrupted);
        assert_eq!(expected.1.len(), 8);
        for &step in steps {
            let out = dir.path().join(format!("killed-{step}"));
            killed_after(step, &config, &out);
            let resumed = run(&config, &out);
            assert_eq!(left_behind(&out), expected, "{name}, killed after step {step}");
            assert_eq!((resumed.steps, resumed.final_loss), (report.steps, report.final_loss), "{name}, {step}");
        }
    }
}

#[test]
fn a_quantized_base_trains_as_the_dense_model_of_its_values() {
    let _turn = one_at_a_time();
    let with = |base, change: fn(&mut TrainConfig, &mut LoraConfig)| {
        let (mut config, mut adapter) = (lora(), lora().lora.unwrap());
        change(&mut config, &mut adapter);
        TrainConfig { lora: Some(LoraConfig { base: Some(base), ..adapter }), ..config }
    };
    let whole = |text: &str| -> LoraConfig { whole(text).lora.unwrap() };
    let beside = LoraConfig { base: Some(Quantization::Nf4), ..whole(WHOLE[0]) };
    for (name, config) in [
        ("nf4", with(Quantization::Nf4, |_, _| {})),
        ("int8", with(Quantization::Int8, |_, _| {})),
        ("without dropout", with(Quantization::Nf4, |_, lora| lora.lora_dropout = 0.0)),
        ("recomputed", with(Quantization::Nf4, |config, _| config.activation_checkpointing = true)),
        ("bf16", with(Quantization::Nf4, |config, _| config.precision = Precision::Bf16)),
        ("dora", with(Quantization::Nf4, |_, lora| lora.use_dora = true)),
        ("pissa", with(Quantization::Int8, |_, lora| lora.init_lora_weights = InitLoraWeights::Pissa { niter: None })),
        ("biases, embedding and norms", TrainConfig { lora: Some(beside), ..config() }),
    ] {
        let quantized = bare(&config);
        assert_eq!(quantized.quantization(), config.lora.as_ref().unwrap().base);
        let plain =
            TrainConfig { lora: config.lora.clone().map(|lora| LoraConfig { base: None, ..lora }), ..config.clone() };
        let mut dense = bare(&plain);
        let parameters = dense.named_parameters();
        let mut changed = 0;
        for layer in quantized.linears().filter(|layer| layer.weight.dense().is_none()) {
            let own = format!("{}.weight", layer.name);
            let mut place = parameters.iter().find(|(n, _)| *n == own).unwrap().1.shallow_clone();
            tch::no_grad(|| place.copy_(&layer.weight.to_kind(place.kind())));
            changed += 1;
        }
        // Seven linear layers in each of two layers.
        assert_eq!(changed, 14);
        dense.add_lora(plain.lora.as_ref().unwrap(), 5).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let [ours, theirs, raw] = ["quantized", "dense", "raw"].map(|name| dir.path().join(name));
        run(&config, &ours);
        run_with(&mut dense, examples(), &plain, 11, &theirs, &mut |_| {}).unwrap();
        // Both compute the same products of the same numbers, so parameters, moments and losses are bit-identical.
        assert_eq!(left_behind(&ours), left_behind(&theirs), "{name}");
        // The base's original weights differ.
        run(&plain, &raw);
        assert_ne!(left_behind(&ours).1, left_behind(&raw).1, "{name}");
    }
}

#[test]
fn quantized_weights_are_not_trained_or_saved() {
    let base = Some(Quantization::Nf4);
    let quantized = |lora: LoraConfig| TrainConfig { lora: Some(LoraConfig { base, ..lora }), ..config() };
    let whole = quantized(LoraConfig { modules_to_save: vec!["up_proj".to_owned()], ..LoraConfig::default() });
    let mut refused = bare(&whole);
    let error = refused.add_lora(whole.lora.as_ref().unwrap(), 5).unwrap_err().to_string();
    assert!(error.contains("modules_to_save") && error.contains("0.mlp.up_proj.weight"), "{error}");
    // An adapter that contains a weight that would be quantized.
    let dir = tempfile::tempdir().unwrap();
    let dense = TrainConfig { lora: whole.lora.clone().map(|lora| LoraConfig { base: None, ..lora }), ..config() };
    let adapted = model(&dense);
    let (at, config) = (dir.path().join("adapter"), dense.lora.as_ref().unwrap());
    save_lora(&at, adapted.sites(), &adapted.trained_whole(), config, "", Manifest::new("adapter"), false).unwrap();
    let error = refused.load_lora(&Adapter::open(&at).unwrap(), 0.0).unwrap_err().to_string();
    assert!(error.contains("up_proj.weight") && error.contains("without `base`"), "{error}");
    let json = serde_json::Map::new();
    let saved = refused.save(&dir.path().join("m"), tch::Kind::Float, &json, &[], Manifest::new("model"), false);
    assert!(saved.unwrap_err().to_string().contains("quantized (nf4)"));
    let error = TrainConfig { zero_stage: 3, activation_checkpointing: true, ..quantized(LoraConfig::default()) };
    let error = error.validate().unwrap_err().to_string();
    assert!(error.contains("zero_stage") && error.contains("base = \"nf4\""), "{error}");
}

#[test]
fn a_kill_between_log_and_state_or_inside_a_line_changes_nothing() {
    let _turn = one_at_a_time();
    let config = lora();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    run(&config, &whole);
    let expected = left_behind(&whole);

    // The log has step 6, but the state is that of step 3.
    let out = dir.path().join("log ahead");
    killed_after(3, &config, &out);
    copy(&out.join("state"), &dir.path().join("state of step 3"));
    killed_after(6, &config, &out);
    std::fs::remove_dir_all(out.join("state")).unwrap();
    copy(&dir.path().join("state of step 3"), &out.join("state"));
    assert_eq!(read_log(&out.join("log.jsonl")).unwrap().len(), 6);
    run(&config, &out);
    assert_eq!(left_behind(&out), expected);

    // After a machine failure, the log may lack steps that the state contains, and its last line may be incomplete.
    let out = dir.path().join("log behind");
    killed_after(6, &config, &out);
    let text = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
    let end = text.match_indices('\n').nth(3).unwrap().0;
    std::fs::write(out.join("log.jsonl"), &text[..end - 20]).unwrap();
    run(&config, &out);
    let (weights, log) = left_behind(&out);
    assert_eq!(weights, expected.0);
    let steps: Vec<u64> = log.iter().map(|l| l.step).collect();
    assert_eq!(steps, [1, 2, 3, 7, 8], "what is lost stays lost, every line is whole");

    // Killed while the state was being replaced: the old one is in a sibling directory with a temporary name.
    let out = dir.path().join("renaming");
    killed_after(3, &config, &out);
    std::fs::rename(out.join("state"), out.join(".state.cl-abc123.old")).unwrap();
    std::fs::create_dir(out.join(".state.cl-abc123.part")).unwrap();
    run(&config, &out);
    assert_eq!(left_behind(&out).0, expected.0);
    assert!(std::fs::read_dir(&out).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().starts_with('.')));
}

#[test]
fn a_finished_round_run_again_takes_no_step_and_reports_the_same_loss() {
    let _turn = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    let config = lora();
    let first = run(&config, dir.path());
    let before = left_behind(dir.path());
    let mut trained = model(&config);
    let again = run_with(&mut trained, examples(), &config, 11, dir.path(), &mut |_| panic!("no step")).unwrap();
    assert_eq!(again, TrainReport { tokens: 0, seconds: 0.0, ..first });
    assert_eq!(left_behind(dir.path()), before);
    assert_ne!(trained.trainable()[1].1.abs().max().double_value(&[]), 0.0, "the trained adapter is in the model");
    std::fs::remove_file(dir.path().join("log.jsonl")).unwrap();
    assert!(run(&config, dir.path()).final_loss.is_nan(), "nothing is known of a loss that nobody logged");
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_one_does_not() {
    let _turn = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    let weights = |name: &str, seed: u64| {
        let out = dir.path().join(name);
        run_with(&mut model(&lora()), examples(), &lora(), seed, &out, &mut |_| {}).unwrap();
        left_behind(&out).0
    };
    assert_eq!(weights("a", 1), weights("b", 1));
    assert_ne!(weights("a again", 1), weights("c", 2), "the dropout masks differ");
}

#[test]
fn a_state_of_another_run_is_refused_and_kept() {
    let _turn = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    killed_after(5, &lora(), dir.path());
    let before = left_behind(dir.path());
    let other_rank = LoraConfig { r: 3, lora_dropout: 0.2, ..Default::default() };
    let mut changed = examples();
    changed[2].input_ids[7] ^= 1;
    let rows: [(&str, TrainConfig, Vec<Encoded>, u64, &str); 6] = [
        ("learning rate", TrainConfig { learning_rate: 1.1e-2, ..lora() }, examples(), 11, "different [train]"),
        ("epochs", TrainConfig { epochs: 5, ..lora() }, examples(), 11, "different [train]"),
        ("rank", TrainConfig { lora: Some(other_rank), ..lora() }, examples(), 11, "different [train]"),
        ("seed", lora(), examples(), 12, "saved with seed 11, but this run has seed 12"),
        ("a token", lora(), changed, 11, "different training data"),
        ("a row less", lora(), examples()[..6].to_vec(), 11, "different training data"),
    ];
    for (what, config, examples, seed, part) in rows {
        let error = run_with(&mut model(&config), examples, &config, seed, dir.path(), &mut |_| panic!("no step"));
        let message = error.unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("remove the directory"), "{what}: {message}");
        assert_eq!(left_behind(dir.path()), before, "{what}");
    }
    run(&lora(), dir.path());
}

#[test]
fn learning_rates_come_back_from_a_saved_state_as_they_were() {
    let _turn = one_at_a_time();
    // Numbers that a fast decimal parser may read with a wrong last bit.
    for learning_rate in [1.1e-5, 2.225_073_858_507_201e-6, 7.038_531e-26] {
        let dir = tempfile::tempdir().unwrap();
        let config = TrainConfig { learning_rate, save_steps: 1, ..lora() };
        killed_after(1, &config, dir.path());
        run(&config, dir.path());
    }
}

#[test]
fn a_loss_that_is_not_a_number_is_an_error_and_leaves_the_last_state() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { save_steps: 1, ..full() };
    let state = dir.path().join("state");
    let go = |spoil: bool| {
        let mut model = model(&config);
        let (_, norm) = model.named_parameters().into_iter().find(|(n, _)| n == "model.norm.weight").unwrap();
        run_with(&mut model, examples(), &config, 11, dir.path(), &mut |step| {
            if spoil && step.step == 2 {
                // After the state of step 2 was saved, so that step 3 encounters it.
                let _no_graph = tch::no_grad_guard();
                let _ = norm.get(0).fill_(f64::NAN);
            }
        })
    };
    let error = go(true).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { step: 3, what: "loss" | "grad_norm", .. }), "{error}");
    assert!(error.to_string().contains("learning_rate"), "{error}");
    assert_eq!(Manifest::verify(&state).unwrap(), []);
    let saved: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(state.join("state.json")).unwrap()).unwrap();
    assert_eq!(saved["step"], 2);
    assert_eq!(read_log(&dir.path().join("log.jsonl")).unwrap().len(), 2);
    go(false).unwrap();
}

#[test]
fn rows_without_anything_to_learn_are_an_error_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let attempt = |examples: Vec<Encoded>, config: &TrainConfig| {
        run_with(&mut model(config), examples, config, 11, &out, &mut |_| {}).unwrap_err().to_string()
    };
    let no_target = Encoded::new(vec![5, 6, 7], 3);
    let lone_token = Encoded::new(vec![5], 0);
    let message = attempt(vec![no_target.clone(), lone_token.clone()], &full());
    assert!(message.starts_with("nothing to train on: none of the 2 examples"), "{message}");
    // One of eight examples, in its own micro-batch.
    let mut mixed = examples();
    mixed.push(lone_token);
    let single = TrainConfig { micro_batch_size: 1, gradient_accumulation_steps: 1, ..full() };
    let message = attempt(mixed.clone(), &single);
    assert!(message.starts_with("step ") && message.contains("none of its 1 examples"), "{message}");
    assert!(!out.exists(), "nothing was begun");
    run_with(&mut model(&full()), mixed, &full(), 11, &out, &mut |_| {}).unwrap();
}

#[test]
fn a_model_that_is_not_ready_for_the_round_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut frozen = model(&full());
    frozen.set_requires_grad(false);
    let bf16 = TrainConfig { precision: Precision::Bf16, ..full() };
    let pure = TrainConfig { states: States::Pure, ..bf16.clone() };
    for (mut model, config, part) in [
        (model(&full()), lora(), "lora = set, but the model has no adapter"),
        (model(&lora()), full(), "full = set, but the model has adapters"),
        (frozen, full(), "all weights are frozen"),
        (model(&full()), bf16.clone(), "precision = Bf16"),
        (model(&pure), bf16, "states = F32"),
        (model(&full()), TrainConfig { lora: lora().lora, ..full() }, "both `lora` and `full`"),
        (model(&full()), config(), "neither `lora` nor `full`"),
    ] {
        let error = run_with(&mut model, examples(), &config, 11, dir.path(), &mut |_| panic!("no step")).unwrap_err();
        assert!(matches!(error, TrainError::Config { .. }) && error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn a_round_starts_from_an_adapter_on_disk_as_from_the_one_in_memory() {
    let _turn = one_at_a_time();
    for config in WHOLE.map(whole).into_iter().chain([lora()]) {
        starts_from_disk_as_from_memory(TrainConfig { save_steps: 0, ..config });
    }
}

fn starts_from_disk_as_from_memory(config: TrainConfig) {
    let dir = tempfile::tempdir().unwrap();
    let lora = config.lora.clone().unwrap();
    let mut first = model(&config);
    run_with(&mut first, examples(), &config, 11, &dir.path().join("first"), &mut |_| {}).unwrap();
    assert!(!dir.path().join("first/state").exists(), "save_steps = 0 saves nothing");
    let saved: PathBuf = dir.path().join("adapter");
    save_lora(&saved, first.sites(), &first.trained_whole(), &lora, "base", Manifest::new("adapter"), false).unwrap();

    let second_config = TrainConfig { initial_adapter: Some(saved.clone()), ..config.clone() };
    let mut from_disk = bare(&config);
    from_disk.load_lora(&Adapter::open(&saved).unwrap(), lora.lora_dropout).unwrap();
    let scores = |m: &Decoder| {
        let _no_graph = tch::no_grad_guard();
        let batch = PackedBatch::new(&[&[1, 2, 3, 4]], 61, Device::Cpu).unwrap();
        m.logits(&m.forward(&batch, Mode::Eval).unwrap())
    };
    assert_eq!(scores(&first), scores(&from_disk));
    let trained = |m: &Decoder| m.trainable().into_iter().map(|(n, t)| (n, t.detach().copy())).collect::<Vec<_>>();
    let start: Vec<(String, Tensor)> = trained(&first);
    assert_eq!(start, trained(&from_disk), "names come in the same order");
    for (model, out) in [(&mut first, "second, in memory"), (&mut from_disk, "second, from disk")] {
        run_with(model, examples(), &second_config, 12, &dir.path().join(out), &mut |_| {}).unwrap();
    }
    assert_eq!(trained(&first), trained(&from_disk));
    let still = start.iter().zip(trained(&first)).find(|((_, a), (_, b))| *a == *b);
    assert!(still.is_none(), "all that is trained moved, but {still:?}");
}

#[test]
fn all_weights_move_in_full_fine_tuning_and_none_but_the_factors_with_adapters() {
    let _turn = one_at_a_time();
    for config in WHOLE.map(whole).into_iter().chain([full(), lora()]) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = model(&config);
        let copies =
            |m: &Decoder| m.named_parameters().into_iter().map(|(n, t)| (n, t.detach().copy())).collect::<Vec<_>>();
        let before = copies(&model);
        run_with(&mut model, examples(), &config, 11, dir.path(), &mut |_| {}).unwrap();
        for ((name, a), (_, b)) in before.iter().zip(copies(&model)) {
            assert_eq!(*a != b, config.full.is_some(), "{name}");
        }
    }
}

/// A model whose output head is not tied to its embedding.
fn untied() -> Decoder {
    let keys = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": false
    });
    let mut model =
        cl_model::random_weights(keys.as_object().unwrap(), 1, cl_model::LoadOptions::cpu(tch::Kind::Float)).unwrap();
    model.set_requires_grad(true);
    model
}

#[test]
fn a_weight_that_overflows_in_the_last_step_is_named_and_nothing_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    // No example contains this token, so loss and gradient remain finite; weight decay makes its weight exceed the
    // range of f32.
    let config = TrainConfig {
        max_steps: Some(1),
        warmup_steps: 0,
        learning_rate: 10.0,
        weight_decay: 10.0,
        save_steps: 1,
        ..full()
    };
    let mut model = untied();
    let (_, table) = model.named_parameters().into_iter().find(|(n, _)| n.ends_with("embed_tokens.weight")).unwrap();
    {
        let _no_graph = tch::no_grad_guard();
        let _ = table.get(table.size()[0] - 1).fill_(3e38);
    }
    let few = vec![Encoded::new(vec![5, 6, 7], 1)];
    let error = run_with(&mut model, few, &config, 11, dir.path(), &mut |_| {}).unwrap_err();
    let TrainError::NotFiniteWeight { step: 1, tensor } = &error else { panic!("{error}") };
    assert_eq!(tensor, "model.embed_tokens.weight");
    assert!(!dir.path().join("state").exists());
}

/// Five examples that are not used for training.
fn held_out() -> Vec<Encoded> {
    common::sequences(&[8; 5], 61, 77).into_iter().map(|input_ids| Encoded::new(input_ids, 3)).collect()
}

/// Evaluates every third step and after the last one; epochs have two steps.
fn every_third() -> ValidationConfig {
    ValidationConfig { fraction: Some(0.5), every: Some(3), ..ValidationConfig::default() }
}

fn weights(model: &Decoder) -> Vec<Vec<f32>> {
    model.trainable().iter().map(|(_, t)| Vec::try_from(t.flatten(0, -1)).unwrap()).collect()
}

#[test]
fn validation_changes_no_step_and_keeps_the_best_weights() {
    let _turn = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    // A learning rate so high that the loss on other examples soon rises.
    let config = TrainConfig { learning_rate: 0.1, warmup_steps: 0, ..lora() };
    let plain = run(&config, &dir.path().join("plain"));
    let (_, plain_log) = left_behind(&dir.path().join("plain"));
    let examples_held = held_out();
    let train_with = |name: &str, settings: &ValidationConfig| {
        let mut trained = model(&config);
        let validation = Some(Validation { config: settings, examples: &examples_held });
        let out = dir.path().join(name);
        let report = run_validated(&mut trained, examples(), &config, validation, 11, &out, &mut |_| {}).unwrap();
        (report, left_behind(&out).1, weights(&trained))
    };
    let (report, log, best) = train_with("best", &every_third());
    let evaluated: Vec<u64> = log.iter().filter(|l| l.eval_loss.is_some()).map(|l| l.step).collect();
    assert_eq!(evaluated, [3, 6, 8]);
    let without: Vec<StepLog> = log.iter().map(|l| StepLog { eval_loss: None, ..l.clone() }).collect();
    assert_eq!(without, plain_log, "evaluation draws no random number and moves no weight");
    assert_eq!(report.final_loss, plain.final_loss);
    let outcome = report.validation.unwrap();
    let lowest = log.iter().filter_map(|l| Some((l.step, l.eval_loss?))).min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!((outcome.best_step, outcome.best_loss, outcome.evaluations), (lowest.0, lowest.1, 3));
    // Seven random examples are unrelated to five others: while they are memorized, the loss on the others rises.
    assert!(outcome.best_step < 8, "{log:?}");
    // The weights are those of a run that ends at the best step, which has the same validation loss.
    let (_, _, last) = train_with("last", &ValidationConfig { keep: Keep::Last, ..every_third() });
    assert_ne!(best, last);
    let mut again = model(&config);
    let stop = outcome.best_step;
    let died = catch_unwind(AssertUnwindSafe(|| {
        let mut die = |log: &StepLog| {
            if log.step == stop {
                resume_unwind(Box::new("stopped"));
            }
        };
        run_with(&mut again, examples(), &config, 11, &dir.path().join("stopped"), &mut die)
    }));
    assert!(died.is_err());
    assert_eq!(weights(&again), best);
}

#[test]
fn patience_ends_training_early() {
    let _turn = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    let settings = ValidationConfig { every: Some(1), patience: Some(2), ..every_third() };
    let examples_held = held_out();
    let validation = Some(Validation { config: &settings, examples: &examples_held });
    let config = TrainConfig { learning_rate: 0.1, warmup_steps: 0, ..lora() };
    let report =
        run_validated(&mut model(&config), examples(), &config, validation, 11, dir.path(), &mut |_| {}).unwrap();
    let outcome = report.validation.unwrap();
    assert_eq!((outcome.best_step + 2, outcome.without_improvement), (report.steps, 2));
    assert!(report.steps < 8, "{outcome:?}");
    assert_eq!(left_behind(dir.path()).1.len() as u64, report.steps);
    let again =
        run_validated(&mut model(&config), examples(), &config, validation, 11, dir.path(), &mut |_| panic!("no step"));
    assert_eq!(again.unwrap().steps, report.steps, "a stopped run is finished");
}

#[test]
fn a_killed_run_with_validation_goes_on_bit_by_bit() {
    let _turn = one_at_a_time();
    let dir = tempfile::tempdir().unwrap();
    let examples_held = held_out();
    let settings = ValidationConfig { every: Some(2), patience: Some(3), ..every_third() };
    let validation = Some(Validation { config: &settings, examples: &examples_held });
    let pure = TrainConfig { precision: Precision::Bf16, states: States::Pure, ..full() };
    for (name, config) in [("lora", lora()), ("pure bf16", pure)] {
        let go = |out: &Path, observe: &mut dyn FnMut(&StepLog)| {
            let mut trained = model(&config);
            let report = run_validated(&mut trained, examples(), &config, validation, 11, out, observe);
            report.map(|r| (r.validation, r.steps, weights(&trained)))
        };
        let whole = dir.path().join(name);
        let expected = go(&whole, &mut |_| {}).unwrap();
        // Saved after steps 3, 6 and 8; evaluated after steps 2, 4, 6 and 8.
        for step in [2, 3, 4, 5, 7, 8] {
            let out = dir.path().join(format!("{name}, killed after {step}"));
            let died = catch_unwind(AssertUnwindSafe(|| {
                go(&out, &mut |log| {
                    if log.step == step {
                        resume_unwind(Box::new("killed"));
                    }
                })
            }));
            assert!(died.is_err() || step >= expected.1, "{name}, {step}");
            assert_eq!(go(&out, &mut |_| {}).unwrap(), expected, "{name}, killed after step {step}");
            assert_eq!(left_behind(&out), left_behind(&whole), "{name}, killed after step {step}");
        }
        let other = ValidationConfig { patience: None, ..settings.clone() };
        let other = Some(Validation { config: &other, examples: &examples_held });
        let refused = run_validated(&mut model(&config), examples(), &config, other, 11, &whole, &mut |_| {});
        assert!(refused.unwrap_err().to_string().contains("different [validation]"));
    }
}
