//! Sequences that keep new adapters orthogonal to those of earlier rounds.

use cl_adapters::Overlap;
use cl_checkpoint::{Adapter, AdapterModule, Dtype, Interrupt, Manifest, TensorSource, convert};
use cl_lab::{read_train, run_train};
use cl_torch::tch::Kind;
use cl_train::read_log;

use crate::world::{World, silent};

const TASKS: &str = "tasks=['first', 'mood', 'last']";

/// Rows of the A factor of one module of an adapter.
fn rows(adapter: &Adapter, module: &AdapterModule) -> Vec<Vec<f64>> {
    let values = convert::to_f32(Dtype::F32, adapter.bytes(&module.factors()[0]).unwrap()).unwrap();
    values.chunks(module.a_shape[1]).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
}

/// Mean over modules of the mean squared cosine between the rows of A of two adapters.
fn overlap(world: &World, a: &str, b: &str) -> f64 {
    let [a, b] = [a, b].map(|dir| Adapter::open(&world.path(dir)).unwrap());
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let of_module = |(m, n): (&AdapterModule, &AdapterModule)| {
        let (x, y) = (rows(&a, m), rows(&b, n));
        let cosine = |x: &[f64], y: &[f64]| dot(x, y).powi(2) / (dot(x, x) * dot(y, y));
        let all: f64 = x.iter().flat_map(|x| y.iter().map(|y| cosine(x, y))).sum();
        all / (x.len() * y.len()) as f64
    };
    let pairs: Vec<f64> = a.modules().into_iter().zip(b.modules()).map(of_module).collect();
    pairs.iter().sum::<f64>() / pairs.len() as f64
}

fn bytes(world: &World, file: &str) -> Vec<u8> {
    std::fs::read(world.path(file)).unwrap()
}

#[test]
fn a_lambda_of_zero_is_plain_training_bit_for_bit() {
    let world = World::new(Kind::Float);
    world.run(&world.sequence(&[]), "plain").unwrap();
    for mode in ["l1", "squared", "cosine"] {
        let set = format!("train.olora={{mode='{mode}', lambda=0.0}}");
        world.run(&world.sequence(&[&set]), mode).unwrap();
        for round in ["1-first", "2-mood"] {
            for file in ["adapter/adapter_model.safetensors", "model/model.safetensors"] {
                let of = |run: &str| bytes(&world, &format!("{run}/rounds/{round}/{file}"));
                assert!(of(mode) == of("plain"), "{mode} {round} {file}");
            }
        }
    }
}

#[test]
fn overlap_between_rounds_falls_as_lambda_grows() {
    let world = World::new(Kind::Float);
    for (mode, lambdas) in [("l1", [0.003, 0.3]), ("squared", [0.01, 3.0]), ("cosine", [1.0, 100.0])] {
        let mut overlaps = Vec::new();
        for lambda in [0.0].into_iter().chain(lambdas) {
            let out = format!("{mode}-{lambda}");
            let set = format!("train.olora={{mode='{mode}', lambda={lambda:?}}}");
            world.run(&world.sequence(&[&set, "train.epochs=4"]), &out).unwrap();
            let adapter = |round: &str| format!("{out}/rounds/{round}/adapter");
            overlaps.push(overlap(&world, &adapter("1-first"), &adapter("2-mood")));
            let log = |round: &str| read_log(&world.path(format!("{out}/rounds/{round}/log.jsonl"))).unwrap();
            assert!(log("1-first").iter().all(|s| s.penalty == Some(0.0)), "the first round has nothing before it");
            let penalties: Vec<f64> = log("2-mood").iter().filter_map(|s| s.penalty).collect();
            assert_eq!(penalties[0] > 0.0, lambda > 0.0);
        }
        eprintln!("{mode}: overlap {overlaps:?} at lambda 0, {lambdas:?}");
        assert!(overlaps[0] > overlaps[1] && overlaps[1] > overlaps[2], "{mode}: {overlaps:?}");
    }
}

/// With frozen adapters or with folded weights, a round starts from the same model except for rounding.
#[test]
fn a_stack_of_frozen_adapters_trains_as_the_folded_model_does() {
    let world = World::new(Kind::Float);
    for shape in ["fold", "stack"] {
        let set = format!("train.olora={{shape='{shape}', lambda=0.1}}");
        world.run(&world.sequence(&[TASKS, &set]), shape).unwrap();
    }
    for round in ["1-first", "2-mood", "3-last"] {
        let losses = |shape: &str| {
            let log = read_log(&world.path(format!("{shape}/rounds/{round}/log.jsonl"))).unwrap();
            log.iter().map(|s| s.loss).collect::<Vec<f64>>()
        };
        let largest = losses("fold").iter().zip(losses("stack")).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
        eprintln!("{round}: losses differ by {largest:.1e} at most");
        // The folded weights are rounded to f32 once; a dozen steps of AdamW amplify this.
        assert!(largest < 1e-3, "{round}: {largest}");
        let base = Manifest::read(&world.path(format!("stack/rounds/{round}/adapter"))).unwrap();
        let source = base.sources.iter().find(|s| s.role == "base").unwrap();
        assert_eq!(
            source.path,
            world.path("model").display().to_string(),
            "a stack is always trained on the first model"
        );
    }
}

/// Somebody else can continue a sequence with only the published directories: the base or folded model, and adapters.
#[test]
fn a_sequence_can_be_continued_from_published_directories() {
    for (shape, model) in [("stack", "model"), ("fold", "all/rounds/2-mood/model")] {
        let world = World::new(Kind::Float);
        let set = format!("train.olora={{shape='{shape}', lambda=[0.1, 0.2, 0.3]}}");
        world.run(&world.sequence(&[TASKS, &set]), "all").unwrap();
        let published = ["1-first", "2-mood"].map(|r| world.path(format!("all/rounds/{r}/adapter")));
        let published = published.map(|p| format!("'{}'", p.display())).join(", ");
        let config = world.train(&[
            &format!("model={}", world.path(model).display()),
            &format!("data.train={}", world.path("data/last").display()),
            &format!("train.olora={{shape='{shape}', lambda=[0.1, 0.2, 0.3], earlier=[{published}]}}"),
        ]);
        run_train(&config, &world.path("last"), false, &Interrupt::default(), &mut silent).unwrap();
        let file = "adapter/adapter_model.safetensors";
        assert!(
            bytes(&world, &format!("last/{file}")) == bytes(&world, &format!("all/rounds/3-last/{file}")),
            "{shape}"
        );
        if shape == "stack" {
            let model = "model/model.safetensors";
            assert!(bytes(&world, &format!("last/{model}")) == bytes(&world, &format!("all/rounds/3-last/{model}")));
        }
        let manifest = Manifest::read(&world.path("last/adapter")).unwrap();
        assert_eq!(manifest.sources.iter().filter(|s| s.role == "earlier_adapter").count(), 2);
        // A resumed run recognizes the earlier adapters.
        run_train(&config, &world.path("last"), true, &Interrupt::default(), &mut silent).unwrap();
    }
}

#[test]
fn earlier_adapters_that_do_not_fit_are_found_before_anything_is_written() {
    let world = World::new(Kind::Float);
    let config = world.train(&["train.olora={earlier=['nowhere']}"]);
    let message =
        run_train(&config, &world.path("r"), false, &Interrupt::default(), &mut silent).unwrap_err().to_string();
    assert!(message.contains("nowhere"), "{message}");
    assert!(!world.path("r").exists());
    // Unsupported combinations are found before the run starts.
    run_train(
        &world.train(&["train.lora.use_dora=true"]),
        &world.path("dora"),
        false,
        &Interrupt::default(),
        &mut silent,
    )
    .unwrap();
    let dora = world.path("dora/adapter");
    for (set, part) in [
        (format!("train.olora={{shape='stack', earlier=['{}']}}", dora.display()), "frozen DoRA"),
        ("train.lora={use_dora=true, target_modules=['lm_head']}".to_owned(), "use_dora = set for `lm_head`"),
        ("train.lora={init_lora_weights='pissa', target_modules=['embed_tokens']}".to_owned(), "model.embed_tokens"),
        ("train.lora={init_lora_weights='pissa', r=64}".to_owned(), "r = 64 for `model.layers.0"),
        ("train.lora.rank_pattern={nothing_here=2}".to_owned(), "rank_pattern = `nothing_here`"),
        ("train.lora.embedding_learning_rate=1e-5".to_owned(), "embedding_learning_rate"),
    ] {
        let message = run_train(&world.train(&[&set]), &world.path("r"), false, &Interrupt::default(), &mut silent)
            .unwrap_err()
            .to_string();
        assert!(message.contains(part), "{set}: {message}");
        assert!(!world.path("r").exists());
    }
    // The check applies from the start, not only in the second round.
    let set = ["train.olora={shape='stack'}", "train.lora.target_modules=['embed_tokens', 'q_proj']"];
    let message = world.run(&world.sequence(&set), "r").unwrap_err().to_string();
    assert!(message.contains("shape = \"stack\" with an adapter on the embedding"), "{message}");
    // An adapter that is continued determines its own settings.
    run_train(&world.train(&["train.lora.r=3"]), &world.path("plain"), false, &Interrupt::default(), &mut silent)
        .unwrap();
    let initial = format!("train.initial_adapter='{}'", world.path("plain/adapter").display());
    for (set, part) in [
        ("train.lora.use_dora=true", "use_dora"),
        ("train.lora.init_lora_weights='gaussian'", "init_lora_weights"),
        ("train.lora.rank_pattern={q_proj=4}", "rank_pattern"),
        ("train.lora.embedding_learning_rate=1e-4", "embedding_learning_rate"),
    ] {
        let config = world.train(&[&initial, set]);
        let message =
            run_train(&config, &world.path("r"), false, &Interrupt::default(), &mut silent).unwrap_err().to_string();
        assert!(message.contains(part), "{set}: {message}");
    }
    assert!(!world.path("r").exists());
    let text = toml::to_string(&world.train(&[])).unwrap();
    for (set, part) in [
        ("train.olora={lambda=-1.0}", "olora.lambda = [-1.0]"),
        ("train.olora={mode='l3'}", "l3"),
        ("train={full={}, olora={}}", "olora = set without `lora`"),
        ("train={lora={use_dora=true}, olora={shape='stack'}}", "use_dora"),
    ] {
        let message = read_train("memory".as_ref(), &text, &[set.to_owned()]).unwrap_err().to_string();
        assert!(message.contains(part), "{set}: {message}");
    }
}

#[test]
fn the_paper_has_its_own_definition() {
    let world = World::new(Kind::Float);
    let mode = |set: &[&str]| world.sequence(set).train.olora.unwrap().mode;
    assert_eq!(mode(&["train.olora={}"]), Overlap::Cosine);
    assert_eq!(mode(&["train.olora={}", "profile=paper"]), Overlap::L1);
    assert_eq!(mode(&["train.olora={mode='squared'}", "profile=paper"]), Overlap::Squared);
}
