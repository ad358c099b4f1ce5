use std::path::Path;

use cl_checkpoint::{Adapter, Checkpoint, Dtype, Interrupt, TensorSource, convert};
use cl_eval::{Group, ScoreMatrix};
use cl_lab::Event;
use cl_torch::tch::Kind;
use half::bf16;

use crate::world::{World, silent};

const MODULE: &str = "model.layers.1.mlp.down_proj";

/// `scaling · B·A` of an adapter's module in f64, row-major.
fn delta(world: &World, adapter: &str, module: &str) -> Vec<f64> {
    let adapter = Adapter::open(&world.path(adapter)).unwrap();
    let factor = |f: &str| {
        let name = format!("base_model.model.{module}.lora_{f}.weight");
        let shape = adapter.info(&name).unwrap().shape.clone();
        (convert::to_f32(Dtype::F32, adapter.bytes(&name).unwrap()).unwrap(), shape)
    };
    let ((a, a_shape), (b, b_shape)) = (factor("A"), factor("B"));
    let (rank, input, output) = (a_shape[0], a_shape[1], b_shape[0]);
    let scaling = adapter.config().scaling(module);
    let cell = |o: usize, i: usize| -> f64 {
        (0..rank).map(|k| f64::from(b[o * rank + k]) * f64::from(a[k * input + i])).sum::<f64>() * scaling
    };
    (0..output).flat_map(|o| (0..input).map(move |i| (o, i))).map(|(o, i)| cell(o, i)).collect()
}

/// The stored values are the exact sums, rounded once. The library adds in f32; its error of 2⁻²⁴ only matters where a
/// sum is that close to the midpoint between two bf16 numbers.
fn assert_rounded_once(stored: &[f32], exact: &[f64]) {
    for (i, (&stored, &exact)) in stored.iter().zip(exact).enumerate() {
        let slack = 1e-6 * exact.abs().max(0.1);
        let near = [-slack, 0.0, slack].map(|d| bf16::from_f64(exact + d).to_f32());
        assert!(near.contains(&stored), "element {i}: {stored} is stored for {exact}");
    }
}

fn plus(base: &[f32], deltas: &[&[f64]]) -> Vec<f64> {
    base.iter().enumerate().map(|(i, &w)| deltas.iter().fold(f64::from(w), |sum, d| sum + d[i])).collect()
}

#[test]
fn the_method_adds_all_adapters_to_the_first_base_and_rounds_once() {
    let world = World::new(Kind::BFloat16);
    let report = world.run(&world.sequence(&["tasks=['first', 'mood', 'last']"]), "s").unwrap();
    assert_eq!(report.model, world.path("s/rounds/3-last/model"));
    for module in [MODULE, "model.layers.0.self_attn.q_proj"] {
        let weight = format!("{module}.weight");
        let deltas = ["1-first", "2-mood", "3-last"].map(|r| delta(&world, &format!("s/rounds/{r}/adapter"), module));
        let base = world.tensor("model", &weight);
        let parts: Vec<&[f64]> = deltas.iter().map(Vec::as_slice).collect();
        assert!(deltas.iter().flatten().any(|d| d.abs() > 1e-3), "training moved something");
        for (round, name) in ["1-first", "2-mood", "3-last"].iter().enumerate() {
            let stored = world.tensor(&format!("s/rounds/{name}/model"), &weight);
            assert_rounded_once(&stored, &plus(&base, &parts[..=round]));
        }
    }
    // Tensors that no adapter targets are those of the base, byte for byte.
    let norm = "model.layers.0.input_layernorm.weight";
    assert_eq!(world.tensor("s/rounds/3-last/model", norm), world.tensor("model", norm));
}

#[test]
fn the_paper_folds_each_adapter_into_the_last_rounds_model_and_rounds_every_time() {
    let world = World::new(Kind::BFloat16);
    world.run(&world.sequence(&["profile=paper", "train.learning_rate=1e-2"]), "s").unwrap();
    let weight = format!("{MODULE}.weight");
    let deltas = ["1-first", "2-mood"].map(|r| delta(&world, &format!("s/rounds/{r}/adapter"), MODULE));
    let first = world.tensor("s/rounds/1-first/model", &weight);
    let second = world.tensor("s/rounds/2-mood/model", &weight);
    let base = world.tensor("model", &weight);
    assert_rounded_once(&first, &plus(&base, &[&deltas[0]]));
    assert_rounded_once(&second, &plus(&first, &[&deltas[1]]));
    // Rounding twice differs from rounding once, so the profiles differ.
    let once = plus(&base, &[&deltas[0], &deltas[1]]);
    assert!(second.iter().zip(&once).any(|(s, o)| *s != bf16::from_f64(*o).to_f32()));
    let stored = Checkpoint::open(&world.path("s/rounds/2-mood/model")).unwrap();
    assert_eq!(stored.info(&weight).unwrap().dtype, Dtype::BF16);
}

#[test]
fn without_keep_models_only_the_last_model_and_all_adapters_stay() {
    for method in ["train.lora.r=2", "train={full={}, epochs=2, learning_rate=1e-3}"] {
        let world = World::new(Kind::Float);
        let kept = world.run(&world.sequence(&["tasks=['first', 'mood', 'last']", method]), "kept").unwrap();
        let config = world.sequence(&["tasks=['first', 'mood', 'last']", method, "keep_models=false"]);
        let last = world.run(&config, "last").unwrap();
        assert_eq!(last.matrix.scores, kept.matrix.scores);
        let weights = |model: &Path| std::fs::read(model.join("model.safetensors")).unwrap();
        assert_eq!(weights(&last.model), weights(&kept.model));
        for round in ["1-first", "2-mood"] {
            assert!(world.path(format!("kept/rounds/{round}/model")).exists());
            assert!(!world.path(format!("last/rounds/{round}/model")).exists());
        }
        let adapter = world.path("last/rounds/1-first/adapter/manifest.json");
        assert_eq!(adapter.exists(), config.train.lora.is_some());
        assert!(world.path("model/model.safetensors").exists(), "the base is never removed");
    }
}

#[test]
fn a_finished_sequence_makes_nothing_again() {
    let world = World::new(Kind::Float);
    let config = world.sequence(&["keep_models=false"]);
    let first = world.run(&config, "s").unwrap();
    let mut events = Vec::new();
    let rows = || matrix(&world.path("s/matrix.json")).rows.len();
    let again = cl_lab::run_sequence(&config, &world.path("s"), true, &Interrupt::default(), &mut |event| {
        assert_eq!(rows(), 3, "the matrix does not shrink meanwhile");
        match event {
            Event::Skipped(name) => events.push(name.to_owned()),
            Event::Stage(name) => assert!(name.starts_with("round "), "{name}"),
            Event::Step(_) | Event::Warning(_) | Event::Scored { .. } => panic!("create it again"),
        }
    })
    .unwrap();
    assert_eq!(events, ["scoring", "training", "scoring", "training", "scoring"]);
    assert_eq!(again.matrix.scores, first.matrix.scores);
}

fn matrix(path: &Path) -> ScoreMatrix {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn tasks_are_found_under_every_name_that_scoring_knows() {
    let world = World::new(Kind::Float);
    std::fs::rename(world.path("data/first"), world.path("data/science")).unwrap();
    std::fs::rename(world.path("data/mood"), world.path("FOMC")).unwrap();
    let report = world.run(&world.sequence(&["tasks=['ScienceQA', 'fomc']"]), "s").unwrap();
    let columns: Vec<(&str, Option<usize>)> =
        report.matrix.columns.iter().map(|c| (c.name.as_str(), c.round)).collect();
    assert_eq!(columns, [("ScienceQA", Some(1)), ("FOMC", Some(2))]);
}

#[test]
fn a_column_belongs_to_the_round_of_its_own_task() {
    let world = World::new(Kind::Float);
    std::fs::rename(world.path("data/mood"), world.path("data/first_cot")).unwrap();
    let config = world.sequence(&["tasks=['first', 'first_cot']", "eval.old=['last']"]);
    let report = world.run(&config, "s").unwrap();
    let rounds: Vec<(Group, Option<usize>)> = report.matrix.columns.iter().map(|c| (c.group, c.round)).collect();
    assert_eq!(rounds, [(Group::New, Some(1)), (Group::New, Some(2)), (Group::Old, None)]);
    // Tasks that are scored but not trained on have no round.
    let config = world.sequence(&["tasks=['first']", "eval.tasks=['last', 'first']"]);
    let report = world.run(&config, "t").unwrap();
    assert_eq!(report.matrix.columns.iter().map(|c| c.round).collect::<Vec<_>>(), [None, Some(1)]);
}

#[test]
fn a_sequence_may_score_nothing() {
    let world = World::new(Kind::Float);
    let report = world.run(&world.sequence(&["tasks=['first']", "eval.tasks=[]"]), "s").unwrap();
    assert_eq!((report.matrix.rows.len(), report.matrix.columns.len()), (2, 0));
    assert!(report.model.join("manifest.json").exists());
}

#[test]
fn another_run_is_not_written_over() {
    let world = World::new(Kind::Float);
    let config = world.sequence(&["tasks=['first']"]);
    cl_lab::run_train(&world.train(&[]), &world.path("r"), false, &Interrupt::default(), &mut silent).unwrap();
    let message = cl_lab::run_sequence(&config, &world.path("r"), true, &Interrupt::default(), &mut silent)
        .unwrap_err()
        .to_string();
    assert!(message.contains("contains a sequence with a different configuration"), "{message}");
}
