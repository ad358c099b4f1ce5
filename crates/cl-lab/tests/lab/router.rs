//! Routers learn which expert knows a task, and nothing else in a mixture changes.

use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, Interrupt, Manifest, TensorSource};
use cl_data::Example;
use cl_lab::{
    Finding, LoadedModel, RouterOutput, RouterRun, RoutingReport, check_directory, check_router, read_router,
    run_train, run_train_router, toy,
};
use cl_model::{LoadOptions, random_weights};
use cl_moe::{BlendConfig, BlendPlan, MixConfig, MixOptions, Mixture, Plan, blend, mix};
use cl_torch::tch::{self, Device, Kind};
use cl_train::{Precision, StepLog, read_log};

use crate::world::{World, silent};

const TASKS: [&str; 2] = ["homes", "colours"];

/// Two tasks with one answer each: an expert trained on one of them gives its answer to the other's prompts, too.
fn tasks(world: &World) {
    let subjects = ["alba", "bero", "cito", "dana", "elmo", "fira", "gino", "hela", "ivor", "juna", "kato", "lira"];
    for (task, ask, answer) in
        [("homes", "where does # live ?", "rome"), ("colours", "which colour does # like ?", "red")]
    {
        let example = |subject: &&str| Example::pair(ask.replace('#', subject), answer);
        let examples: Vec<Example> = subjects.iter().map(example).collect();
        world.task(task, &examples, &examples);
    }
}

/// A world in which each expert has learned one of the tasks, by training only MLPs or all linear layers. Each expert
/// is available as an adapter and as a model.
fn world_of_experts(mlp_only: bool) -> World {
    let world = World::new(Kind::Float);
    tasks(&world);
    let config = toy::model_config(16);
    let base = random_weights(&config, 1, LoadOptions::cpu(Kind::Float)).unwrap();
    {
        let _no_graph = tch::no_grad_guard();
        // The head is tied to the frozen embedding; with standard deviation 0.02, no input could make an answer likely.
        for (_, mut t) in base.named_parameters().into_iter().filter(|(_, t)| t.dim() > 1) {
            let _ = t.g_mul_scalar_(25.0);
        }
    }
    let (files, manifest) = (toy::tokenizer_files(), Manifest::new("model"));
    base.save(&world.path("model"), Kind::Float, &config, &files, manifest, true).unwrap();
    for task in TASKS {
        let data = format!("data.train='{}'", world.path("data").join(task).display());
        let mut set = vec![data.as_str(), "train.epochs=20", "train.lora.r=4"];
        if mlp_only {
            set.push("train.lora.target_modules=['gate_proj', 'up_proj', 'down_proj']");
        }
        let output =
            run_train(&world.train(&set), &world.path(task), false, &Interrupt::default(), &mut silent).unwrap();
        let loss = output.report.unwrap().final_loss;
        // The loss is 4.5 for an untrained model; with a head of this scale, 0.47 remains.
        assert!(loss < 0.6, "the expert knows its task: {loss}");
    }
    world
}

fn blended(world: &World, out: &str, settings: &str) -> PathBuf {
    let experts: String =
        TASKS.iter().map(|t| format!("[[experts]]\nadapter = {:?}\n", world.path(t).join("adapter"))).collect();
    let text = format!("base_model = {:?}\n{settings}\n{experts}", world.path("model"));
    let plan = BlendPlan::new(&toml::from_str::<BlendConfig>(&text).unwrap(), false).unwrap();
    blend(&plan, &world.path(out), false, &Interrupt::default()).unwrap();
    world.path(out)
}

fn mixed(world: &World, out: &str, experts: &[&str], settings: &str) -> PathBuf {
    let experts: String =
        experts.iter().map(|t| format!("[[experts]]\nmodel = {:?}\n", world.path(t).join("model"))).collect();
    let text = format!("base_model = {:?}\n{settings}\n{experts}", world.path("model"));
    let plan = Plan::new(&toml::from_str::<MixConfig>(&text).unwrap()).unwrap();
    mix(&plan, &world.path(out), &MixOptions::default(), &|_| {}).unwrap();
    world.path(out)
}

fn config(world: &World, model: &Path, adapter: Option<&Path>, set: &[&str]) -> RouterRun {
    let adapter = adapter.map(|dir| format!("adapter = {dir:?}\n")).unwrap_or_default();
    let data = TASKS.map(|task| world.path("data").join(task));
    let text = format!(
        "model = {model:?}\n{adapter}[data]\ntrain = {data:?}\n[train]\nepochs = 30\nlearning_rate = 3e-2\n\
         micro_batch_size = 8\n[router]\n"
    );
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    read_router("memory".as_ref(), &text, &set).unwrap()
}

fn run(world: &World, config: &RouterRun, out: &str) -> (RouterOutput, Vec<StepLog>) {
    let out = world.path(out);
    let output = run_train_router(config, &out, false, &Interrupt::default(), &mut silent).unwrap();
    (output, read_log(&out.join("log.jsonl")).unwrap())
}

/// The loss decreases, and the tokens of each task give larger gates to the expert that knows it.
fn assert_learned(report: &RoutingReport, log: &[StepLog]) {
    let mean = |steps: &[StepLog]| steps.iter().map(|s| s.loss).sum::<f64>() / steps.len() as f64;
    let (before, after) = (mean(&log[..4]), mean(&log[log.len() - 4..]));
    let shares: Vec<&[f64]> = report.tasks.iter().map(|t| t.routing.gate_share.as_slice()).collect();
    eprintln!("loss {before:.3} to {after:.3}; gates {shares:.2?}");
    // A single expert reaches 0.47 on its own task.
    assert!(after < 0.52 && after < before - 0.1, "{before} to {after}");
    // The tasks share prompt words, and half of the routers are in the first layer, which only sees single words. A
    // share above chance is therefore enough to show that the right expert is preferred.
    assert!(shares[0][0] > 0.55 && shares[1][1] > 0.55, "{shares:?}");
}

#[test]
fn routers_of_adapters_learn_which_expert_knows_a_task() {
    let world = world_of_experts(false);
    let (base, mixture) = (world.path("model"), blended(&world, "mix", "router.norm = 'softmax'"));
    let before: Vec<Vec<u8>> =
        files(&base).into_iter().chain(files(&mixture)).map(|f| std::fs::read(f).unwrap()).collect();
    let config = config(&world, &base, Some(&mixture), &[]);
    let (output, log) = run(&world, &config, "r");
    assert_learned(&output.routing.unwrap(), &log);
    assert!(log.iter().all(|s| s.load_balancing.is_none()), "no auxiliary loss was asked for");

    // Inputs are unchanged, and so is everything in the output except its routers.
    let after: Vec<Vec<u8>> =
        files(&base).into_iter().chain(files(&mixture)).map(|f| std::fs::read(f).unwrap()).collect();
    assert!(before == after);
    let [old, new] = [&mixture, &output.mixture].map(|dir| Mixture::open(dir).unwrap());
    assert_eq!(old.config(), new.config());
    assert_only_routers_differ(&old, &new);
    let manifest = Manifest::read(&output.mixture).unwrap();
    let roles: Vec<&str> = manifest.sources.iter().map(|s| s.role.as_str()).collect();
    assert_eq!((manifest.kind.as_str(), roles), ("mixture", vec!["base", "mixture", "data", "data"]));
    assert_eq!(Manifest::verify(&output.mixture).unwrap(), []);
    assert!(problems(&check_directory(&output.mixture)).is_empty());
    LoadedModel::open(&base, Some(&output.mixture), Precision::F32, None, Device::Cpu).unwrap();

    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(world.path("r/routing.json")).unwrap()).unwrap();
    assert_eq!(json["experts"], serde_json::json!(TASKS));
    let routers = json["routers"].as_array().unwrap();
    assert_eq!((routers.len(), &routers[0]["layer"]), (14, &0.into()));
    for routing in routers.iter().flat_map(|r| [r, &r["by_task"]["colours"]]) {
        let sum = |key: &str| routing[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).sum::<f64>();
        assert!((sum("load") - 2.0).abs() < 1e-9 && (sum("gate_share") - 1.0).abs() < 1e-5);
        assert!((0.0..=1.0).contains(&routing["entropy"].as_f64().unwrap()));
    }
    let svg = std::fs::read_to_string(world.path("r/routing.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("layer 1") && svg.contains(">homes<"));
}

#[test]
fn routers_of_a_mixture_of_models_learn_which_expert_knows_a_task() {
    let world = world_of_experts(true);
    let mixture = mixed(&world, "mix", &TASKS, "num_experts_per_tok = 2");
    let (output, log) = run(&world, &config(&world, &mixture, None, &[]), "r");
    assert_learned(&output.routing.unwrap(), &log);
    let [old, new] = [&mixture, &output.mixture].map(|dir| Checkpoint::open(dir).unwrap());
    assert_only_routers_differ(&old, &new);
    for file in ["config.json", "tokenizer.json", "model_info.json", "moe_config.toml"] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
        assert!(read(&mixture) == read(&output.mixture), "{file}");
    }
    assert!(std::fs::read_to_string(output.mixture.join("README.md")).unwrap().contains("cl moe train-router"));
    assert_eq!(Manifest::read(&output.mixture).unwrap().sources[0].role, "mixture");
    assert!(problems(&check_directory(&output.mixture)).is_empty());
}

#[test]
fn routers_of_attention_and_of_parts_of_mlps_learn_too() {
    let world = world_of_experts(false);
    let settings = "modules = ['mlp_fg', 'q_proj', 'k_proj', 'v_proj', 'o_proj']";
    let mixture = mixed(&world, "mix", &TASKS, settings);
    let (output, log) = run(&world, &config(&world, &mixture, None, &["router.z_loss=1e-3"]), "r");
    let report = output.routing.unwrap();
    assert_eq!(report.routers.len(), 14);
    assert!(log[log.len() - 1].loss < log[0].loss - 0.1, "{} {}", log[0].loss, log[log.len() - 1].loss);
    let [old, new] = [&mixture, &output.mixture].map(|dir| Checkpoint::open(dir).unwrap());
    assert_only_routers_differ(&old, &new);
    assert!(problems(&check_directory(&output.mixture)).is_empty());
}

#[test]
fn a_global_router_learns_and_a_mixture_without_a_gate_has_nothing_to_learn() {
    let world = world_of_experts(false);
    let mixture = mixed(&world, "mix", &TASKS, "global_router = true\nmodules = ['mlp', 'q_proj', 'v_proj']");
    for (out, set) in [("plain", ""), ("recomputed", "train.activation_checkpointing=true")] {
        let set: Vec<&str> = std::iter::once(set).filter(|set| !set.is_empty()).collect();
        let (output, log) = run(&world, &config(&world, &mixture, None, &set), out);
        let report = output.routing.unwrap();
        assert_eq!(report.routers.iter().map(|r| r.router.as_str()).collect::<Vec<_>>(), ["model.router"]);
        eprintln!("{out}: {} {}", log[0].loss, log[log.len() - 1].loss);
        assert!(log[log.len() - 1].loss < log[0].loss, "{} {}", log[0].loss, log[log.len() - 1].loss);
        let [old, new] = [&mixture, &output.mixture].map(|dir| Checkpoint::open(dir).unwrap());
        assert_only_routers_differ(&old, &new);
        assert!(problems(&check_directory(&output.mixture)).is_empty());
    }
    let gateless = mixed(&world, "gateless", &TASKS, "gateless = true");
    let say = problems(&check_router(&config(&world, &gateless, None, &[]))).join("\n");
    assert!(say.contains("has no routers"), "{say}");
    assert!(problems(&check_directory(&gateless)).is_empty());
}

#[test]
fn load_balancing_spreads_tokens_over_experts_and_a_z_loss_keeps_logits_small() {
    let world = world_of_experts(true);
    let experts = ["homes", "colours", "homes", "colours"];
    // A router that prefers the first expert whenever the sum of the inputs is positive.
    let mixture = mixed(&world, "mix", &experts, "num_experts_per_tok = 2\nrouter.init = 'base'");
    let spread = |set: &[&str], out: &str| {
        let (output, log) = run(&world, &config(&world, &mixture, None, set), out);
        let report = output.routing.unwrap();
        // The loss is computed over all routers together.
        let mean =
            |e: usize| report.routers.iter().map(|r| r.routing.load[e]).sum::<f64>() / report.routers.len() as f64;
        ((0..4).map(|e| (mean(e) - 0.5).abs()).fold(0.0, f64::max), log)
    };
    let (without, plain) = spread(&["router.load_balancing=1e-9"], "plain");
    let (with, log) = spread(&["router.load_balancing=1.0", "router.z_loss=0.01"], "balanced");
    let of = |f: fn(&StepLog) -> Option<f64>| [f(&log[0]).unwrap(), f(&log[log.len() - 1]).unwrap()];
    let (balance, z) = (of(|s| s.load_balancing), of(|s| s.z_loss));
    eprintln!("largest deviation from an equal load {without:.2} and {with:.2}; {balance:.3?}, z {z:.2?}");
    assert!(with < 0.5 * without, "{without} and {with}");
    let plain = plain[plain.len() - 1].load_balancing.unwrap();
    // The loss is 2 if all experts are used equally.
    assert!(balance[1] < balance[0] && balance[1] < plain && balance[1] < 2.1, "{balance:?}, {plain} without");
    let (_, log) = spread(&["router.z_loss=1.0"], "small");
    let z = [log[0].z_loss.unwrap(), log[log.len() - 1].z_loss.unwrap()];
    assert!(z[1] < 0.5 * z[0], "{z:?}");
}

#[test]
fn stopped_after_any_step_and_gone_on_with_it_has_the_same_bytes() {
    let world = world_of_experts(false);
    let (base, mixture) = (world.path("model"), blended(&world, "mix", ""));
    let set = ["train.epochs=2", "train.save_steps=3", "router.z_loss=0.01"];
    let config = config(&world, &base, Some(&mixture), &set);
    let (whole, log) = run(&world, &config, "whole");
    for stop in 1..log.len() as u64 {
        let out = world.path(format!("stopped{stop}"));
        let interrupt = Interrupt::default();
        if stop == 1 {
            interrupt.request();
        }
        let error = run_train_router(&config, &out, false, &interrupt, &mut |event| {
            if matches!(event, cl_lab::Event::Step(p) if p.step.step + 1 == stop) {
                interrupt.request();
            }
        });
        assert!(error.unwrap_err().is_interrupted());
        assert_eq!(read_log(&out.join("log.jsonl")).unwrap().len() as u64, stop);
        let output = run_train_router(&config, &out, true, &Interrupt::default(), &mut silent).unwrap();
        for file in ["mixture_config.json", "mixture_model.safetensors", "manifest.json"] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(&whole.mixture) == read(&output.mixture), "{file} after {stop} steps");
        }
        let read = |run: &str| std::fs::read(world.path(run).join("routing.json")).unwrap();
        assert!(read("whole") == read(&format!("stopped{stop}")));
    }
}

#[test]
fn a_check_says_what_would_leave_routers_as_they_are() {
    let world = world_of_experts(false);
    let base = world.path("model");
    let say = |config: &RouterRun| problems(&check_router(config)).join("\n");
    let one = blended(&world, "one", "num_experts_per_tok = 1\nrouter.norm = 'softmax'");
    assert!(say(&config(&world, &base, Some(&one), &[])).contains("its gate is always 1"));
    let sigmoid = blended(&world, "sigmoid", "num_experts_per_tok = 1");
    assert_eq!(say(&config(&world, &base, Some(&sigmoid), &[])), "");
    let spectr = blended(&world, "spectr", "router.init = 'spectr'");
    assert!(say(&config(&world, &base, Some(&spectr), &[])).contains("no router weight to train"));
    assert!(say(&config(&world, &base, None, &[])).contains("has no routers"));
    let adapter = world.path("homes/adapter");
    assert!(say(&config(&world, &base, Some(&adapter), &[])).contains("is not a mixture of adapters"));
    let all = config(&world, &base, Some(&blended(&world, "all", "")), &["router.load_balancing=0.1"]);
    let facts: Vec<String> = check_router(&all).iter().filter_map(fact).collect();
    assert!(facts.iter().any(|f| f.contains("load-balancing loss is constant")), "{facts:?}");
    assert!(facts.iter().any(|f| f == "14 routers of 2 experts, 2 for each token"), "{facts:?}");

    let wrong = |set: &str| {
        let text = "model = 'm'\n[data]\ntrain = 'd'\n[router]\n";
        read_router("r.toml".as_ref(), text, &[set.to_owned()]).unwrap_err().to_string()
    };
    assert!(wrong("router.z_loss=-1").contains("z_loss = -1"));
    assert!(wrong("train.lora.r=2").contains("set together with `router`"));
    assert!(wrong("train.router.z_loss=1").contains("[router]"));
    assert!(wrong("router.zloss=1").contains("zloss"));
    let set = ["train.activation_checkpointing=true".to_owned(), "router.z_loss=1".to_owned()];
    let text = "model = 'm'\n[data]\ntrain = 'd'\n";
    assert!(read_router("r.toml".as_ref(), text, &set).unwrap_err().to_string().contains("activation_checkpointing"));
    read_router("r.toml".as_ref(), text, &set[..1]).unwrap();
}

fn problems(findings: &[Finding]) -> Vec<String> {
    findings.iter().filter_map(|f| if let Finding::Problem(p) = f { Some(p.to_string()) } else { None }).collect()
}

fn fact(finding: &Finding) -> Option<String> {
    if let Finding::Fact(text) = finding { Some(text.clone()) } else { None }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

fn assert_only_routers_differ(old: &dyn TensorSource, new: &dyn TensorSource) {
    assert_eq!(old.names(), new.names());
    for name in old.names() {
        assert_eq!(old.info(name).unwrap().dtype, new.info(name).unwrap().dtype);
        let is_router =
            name.contains("lora_router") || name.contains("block_sparse_moe.gate.") || name.contains(".router.");
        assert_eq!(old.bytes(name).unwrap() == new.bytes(name).unwrap(), !is_router, "{name}");
    }
}
