use cl_checkpoint::{Checkpoint, Dtype, Interrupt, Manifest, TensorSource};
use cl_lab::run_train;
use cl_torch::tch::Kind;

use crate::world::{World, silent};

#[test]
fn full_fine_tuning_keeps_the_bases_dtype_and_tokenizer() {
    let world = World::new(Kind::BFloat16);
    let config = world.train(&["train={full={}, epochs=2, learning_rate=1e-2}"]);
    let output = run_train(&config, &world.path("r"), false, &Interrupt::default(), &mut silent).unwrap();
    assert_eq!((output.adapter, output.model.clone()), (None, world.path("r/model")));
    let (base, model) = (Checkpoint::open(&config.model).unwrap(), Checkpoint::open(&output.model).unwrap());
    for name in base.names() {
        let (before, after) = (base.info(name).unwrap(), model.info(name).unwrap());
        assert_eq!((after.dtype, &after.shape), (Dtype::BF16, &before.shape), "{name}");
        assert_ne!(base.bytes(name).unwrap(), model.bytes(name).unwrap(), "{name} did not move");
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let read = |dir: &std::path::Path| std::fs::read(dir.join(file)).unwrap();
        assert_eq!(read(&config.model), read(&output.model));
    }
}

#[test]
fn a_manifest_says_what_a_round_was_made_from() {
    let world = World::new(Kind::Float);
    let replay = format!("data.earlier=['{}']", world.path("data/last").display());
    let config = world.train(&[&replay, "replay.fraction=0.5", "seed=5"]);
    let output = run_train(&config, &world.path("r"), false, &Interrupt::default(), &mut silent).unwrap();
    let adapter = Manifest::read(&output.adapter.unwrap()).unwrap();
    let roles: Vec<&str> = adapter.sources.iter().map(|s| s.role.as_str()).collect();
    assert_eq!((adapter.kind.as_str(), roles), ("adapter", vec!["base", "data", "data"]));
    let settings = adapter.config.unwrap();
    assert_eq!((&settings["seed"], &settings["train"]["lora"]["r"]), (&5.into(), &2.into()));
    assert_eq!(settings["mixture"]["replay"]["fraction"], 0.5);
    let model = Manifest::read(&output.model).unwrap();
    assert_eq!(model.sources[1].path, world.path("r/adapter").display().to_string());
    assert_eq!(Manifest::verify(&output.model).unwrap(), []);
}

#[test]
fn what_a_killed_process_left_beside_the_state_is_removed() {
    let world = World::new(Kind::Float);
    let config = world.train(&["train.save_steps=2"]);
    run_train(&config, &world.path("r"), false, &Interrupt::default(), &mut silent).unwrap();
    for left in [".state.cl-a1b2c3.old", ".state.cl-a1b2c3.part", ".adapter.cl-a1b2c3.part", ".model.cl-a1b2c3.part"] {
        std::fs::create_dir(world.path("r").join(left)).unwrap();
    }
    run_train(&config, &world.path("r"), true, &Interrupt::default(), &mut silent).unwrap();
    let mut names: Vec<String> = std::fs::read_dir(world.path("r"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["adapter", "base.blake3", "config.toml", "data.blake3", "log.jsonl", "model", "rows.json"]);
}

#[test]
fn a_seed_decides_everything() {
    let world = World::new(Kind::Float);
    let weights = |name: &str, set: &[&str]| {
        let output =
            run_train(&world.train(set), &world.path(name), false, &Interrupt::default(), &mut silent).unwrap();
        std::fs::read(output.model.join("model.safetensors")).unwrap()
    };
    let dropout = "train.lora.lora_dropout=0.1";
    let first = weights("a", &[dropout, "seed=1"]);
    assert_eq!(first, weights("b", &[dropout, "seed=1"]));
    assert_ne!(first, weights("c", &[dropout, "seed=2"]));
}

#[test]
fn a_base_that_is_replaced_while_a_round_trains_is_noticed_and_nothing_is_published() {
    let world = World::new(Kind::Float);
    let config = world.train(&[]);
    let other = world.path("other");
    let keys = cl_lab::toy::model_config(16);
    let model = cl_model::random_weights(&keys, 77, cl_model::LoadOptions::cpu(Kind::Float)).unwrap();
    let files = cl_lab::toy::tokenizer_files();
    model.save(&other, Kind::Float, &keys, &files, Manifest::new("model"), false).unwrap();
    let base = config.model.clone();
    let mut swapped = false;
    let error = run_train(&config, &world.path("r"), false, &Interrupt::default(), &mut |event| {
        if matches!(event, cl_lab::Event::Step(_)) && !swapped {
            std::fs::rename(&base, world.path("old")).unwrap();
            std::fs::rename(&other, &base).unwrap();
            swapped = true;
        }
    })
    .unwrap_err();
    assert!(matches!(error, cl_lab::LabError::Changed { .. }), "{error}");
    assert!(!world.path("r/adapter").exists() && !world.path("r/model").exists());
    // After the original base is restored, the round finishes normally.
    std::fs::remove_dir_all(&base).unwrap();
    std::fs::rename(world.path("old"), &base).unwrap();
    run_train(&config, &world.path("r"), true, &Interrupt::default(), &mut silent).unwrap();
}

#[test]
fn what_is_trained_beside_factors_is_in_the_folded_model() {
    let world = World::new(Kind::Float);
    let ids: [&[u32]; 2] = [&[3, 14, 15, 9, 2, 6], &[5, 35, 8]];
    for (name, set) in [
        ("head", "train.lora.modules_to_save=['lm_head']"),
        ("table", "train.lora.modules_to_save=['embed_tokens']"),
        ("rows", "train.lora.trainable_token_indices=[3, 5, 9]"),
    ] {
        let config = world.train(&[set, "train.learning_rate=0.05"]);
        let output = run_train(&config, &world.path(name), false, &Interrupt::default(), &mut silent).unwrap();
        let options = cl_model::LoadOptions::cpu(Kind::Float);
        let load = |dir: &std::path::Path| cl_model::Decoder::load(&Checkpoint::open(dir).unwrap(), options).unwrap();
        let mut beside = load(&config.model);
        let plain = cl_model::token_log_probs(&beside, &ids).unwrap();
        beside.load_lora(&cl_checkpoint::Adapter::open(&output.adapter.unwrap()).unwrap(), 0.0).unwrap();
        let beside = cl_model::token_log_probs(&beside, &ids).unwrap();
        let folded = cl_model::token_log_probs(&load(&output.model), &ids).unwrap();
        let difference = |a: &[Vec<(f64, bool)>], b: &[Vec<(f64, bool)>]| {
            a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a.0 - b.0).abs()).fold(0.0, f64::max)
        };
        // f32 sums in a different order.
        assert!(difference(&beside, &folded) < 1e-5, "{name}: {}", difference(&beside, &folded));
        assert!(difference(&plain, &folded) > 1e-3, "{name}: nothing was learned");
    }
}
