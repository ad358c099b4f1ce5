//! `cl train` as several processes, as started by torchrun and other launchers.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cl_checkpoint::convert::to_f32;
use cl_checkpoint::{SafetensorsFile, TensorSource};
use serde_json::Value;

use crate::killed::wait_for;
use crate::world::{CommandOutput, World, assert_whole};

/// One round of LoRA in 9 steps of six micro-batches; the last step of each epoch has four.
const LORA: &str = r#"
model = "model"
[data]
train = "data/first"
[train]
epochs = 3
micro_batch_size = 1
gradient_accumulation_steps = 6
learning_rate = 1e-2
save_steps = 2
[train.lora]
r = 2
"#;

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts `cl train` as `ranks` processes.
fn start(world: &World, ranks: usize, args: &[&str]) -> Vec<Child> {
    start_ranks(world, ranks, &[&["train"], args].concat())
}

/// Starts a command as `ranks` processes.
pub fn start_ranks(world: &World, ranks: usize, args: &[&str]) -> Vec<Child> {
    let port = free_port();
    let start = |rank: usize| {
        let mut command = world.command(args);
        let variables = [("RANK", rank.to_string()), ("WORLD_SIZE", ranks.to_string())];
        command.envs(variables).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    (0..ranks).map(start).collect()
}

pub fn finish(processes: Vec<Child>) -> Vec<CommandOutput> {
    processes.into_iter().map(CommandOutput::of_child).collect()
}

/// Runs `cl train` as `ranks` processes, all of which must succeed.
fn run(world: &World, ranks: usize, args: &[&str]) -> Vec<CommandOutput> {
    run_ranks(world, ranks, &[&["train"], args].concat())
}

/// Runs a command as `ranks` processes, all of which must succeed.
pub fn run_ranks(world: &World, ranks: usize, args: &[&str]) -> Vec<CommandOutput> {
    let outputs = finish(start_ranks(world, ranks, args));
    for (rank, output) in outputs.iter().enumerate() {
        assert_eq!(output.code, Some(0), "rank {rank} of {ranks}: {}", output.stderr);
    }
    outputs
}

fn tensors(world: &World, name: &str) -> BTreeMap<String, Vec<f32>> {
    let file = SafetensorsFile::open(&world.path(name)).unwrap();
    let values = |name: &str| to_f32(file.info(name).unwrap().dtype, file.bytes(name).unwrap()).unwrap();
    file.names().into_iter().map(|name| (name.to_owned(), values(name))).collect()
}

/// Checks that losses agree within 1e-5, and weights within 1e-4 of the largest: gradients are summed in a different
/// order.
pub fn assert_alike(world: &World, one: &str, other: &str, weights: &str) {
    let values = |run: &str, key: &str| -> Vec<f64> {
        world.lines(&format!("{run}/log.jsonl")).iter().filter_map(|l: &Value| l[key].as_f64()).collect()
    };
    for key in ["loss", "grad_norm", "penalty", "eval_loss", "learning_rate", "tokens", "supervised_tokens"] {
        let (a, b) = (values(one, key), values(other, key));
        assert_eq!(a.len(), b.len(), "{key} of {other}");
        for (step, (a, b)) in a.iter().zip(&b).enumerate() {
            let tolerance = if key == "grad_norm" { 1e-4 } else { 1e-5 };
            assert!((a - b).abs() <= tolerance * a.abs() + 1e-9, "{other}, {key} {step}: {b} instead of {a}");
        }
    }
    let (a, b) = (tensors(world, &format!("{one}/{weights}")), tensors(world, &format!("{other}/{weights}")));
    assert!(a.keys().eq(b.keys()) && !a.is_empty());
    for (name, a) in a {
        let largest = a.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        let worst = a.iter().zip(&b[&name]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst <= 1e-4 * largest, "{other}, {name}: off by {worst} of {largest}");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_ranks() {
    let world = World::new();
    world.write("train.toml", LORA);
    world.write("full.toml", &LORA.replace("[train.lora]\nr = 2", "[train.full]"));
    world.ok(["train", "train.toml", "--out", "earlier", "--set", "data.train='data/mood'"]);
    let olora = "train.olora={earlier=['earlier/adapter']}";
    let adapter = "adapter/adapter_model.safetensors";
    // Name, settings, the file to compare, and pairs of number of ranks and ZeRO stage.
    type Case<'a> = (&'a str, &'a [&'a str], &'a str, &'a [(usize, u8)]);
    let cases: [Case<'_>; 6] = [
        ("lora", &["train.lora.lora_dropout=0.2"], adapter, &[(4, 0), (4, 1), (3, 3)]),
        ("nf4", &["train.lora.base='nf4'"], adapter, &[(2, 0), (3, 2)]),
        ("mean", &["train.loss_norm='microbatch_mean'"], adapter, &[(2, 0)]),
        ("full", &["train.weight_decay=0.1"], "model/model.safetensors", &[(2, 0), (4, 1), (3, 2), (2, 3)]),
        ("olora", &[olora], adapter, &[(2, 0), (3, 2), (2, 3)]),
        (
            "replay",
            &["data.earlier=['data/mood']", "replay.fraction=0.5", "validation.fraction=0.2", "validation.every=2"],
            adapter,
            &[(2, 0), (3, 2), (2, 3)],
        ),
    ];
    for (name, sets, weights, divisions) in cases {
        let args = |out: &str| -> Vec<String> {
            let sets = sets.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]);
            let config = if name == "full" { "full.toml" } else { "train.toml" };
            [config, "--out", out].map(str::to_owned).into_iter().chain(sets).collect()
        };
        let alone = args(name);
        world.ok(["train"].into_iter().chain(alone.iter().map(String::as_str)));
        for &(ranks, zero_stage) in divisions {
            let out = format!("{name}-{ranks}-{zero_stage}");
            let mut args = args(&out);
            args.extend(["--set".to_owned(), format!("train.zero_stage={zero_stage}")]);
            let outputs = run(&world, ranks, &args.iter().map(String::as_str).collect::<Vec<_>>());
            assert!(outputs[0].stdout.contains("model    "), "{}", outputs[0].stdout);
            assert!(outputs[1..].iter().all(|o| o.stdout.is_empty() && o.stderr.is_empty()), "{}", outputs[1].stderr);
            assert_alike(&world, name, &out, weights);
            assert_eq!(world.read(&format!("{name}/rows.json")), world.read(&format!("{out}/rows.json")));
        }
    }
}

/// Waits until rank 0 has written `lines` lines of its log.
fn wait_for_steps(world: &World, out: &str, process: &mut Child, lines: usize) {
    let log = world.path(out).join("log.jsonl");
    wait_for(process, || std::fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= lines));
}

/// Arguments of a run that is long enough to be stopped midway, and learns slowly enough that rounding errors do not
/// grow.
const LONG: [&str; 9] = [
    "train.toml",
    "--out",
    "run",
    "--set",
    "train.epochs=60",
    "--set",
    "train.learning_rate=1e-4",
    "--resume",
    "--rank-timeout=5",
];

#[test]
fn a_rank_that_is_killed_or_hangs_ends_the_run_which_goes_on_with_fewer() {
    let world = World::new();
    world.write("train.toml", &LORA.replace("[train.lora]\nr = 2", "zero_stage = 3\n[train.full]"));
    world.ok(["train", "train.toml", "--out", "alone"].iter().chain(&LONG[3..7]));
    for (signal, ranks, victim) in [("-KILL", 4, 2), ("-STOP", 3, 1), ("-KILL", 2, 0)] {
        let mut processes = start(&world, ranks, &LONG);
        let before = std::fs::read_to_string(world.path("run/log.jsonl")).map_or(0, |text| text.lines().count());
        wait_for_steps(&world, "run", &mut processes[0], before + 4);
        let id = processes[victim].id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
        let started = Instant::now();
        let mut stopped = processes.remove(victim);
        for output in finish(processes) {
            assert_eq!(output.code, Some(1), "{}", output.stderr);
            let expected = "another rank has exited or does not respond";
            assert!(output.stderr.contains(expected) && output.stderr.contains("--resume"), "{}", output.stderr);
        }
        // Gloo notices a closed connection at once, and a silent peer after the timeout of 5 s.
        assert!(started.elapsed() < Duration::from_secs(60), "{signal}: {:?}", started.elapsed());
        stopped.kill().unwrap();
        stopped.wait().unwrap();
        assert_whole(&world.path("run"));
    }
    world.ok(["train"].iter().chain(&LONG));
    assert_alike(&world, "alone", "run", "model/model.safetensors");
}

#[test]
fn a_signal_to_one_rank_stops_all_after_the_same_step() {
    let world = World::new();
    world.write("train.toml", LORA);
    let mut processes = start(&world, 2, &LONG);
    wait_for_steps(&world, "run", &mut processes[0], 3);
    let id = processes[1].id().to_string();
    // The signal arrives twice, as with Ctrl-C, from the terminal and from torchrun.
    for _ in 0..2 {
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    }
    let outputs = finish(processes);
    let stopped = |o: &CommandOutput| o.stderr.lines().find(|l| l.contains("stopped after step")).map(str::to_owned);
    assert!(stopped(&outputs[0]).is_some(), "{}", outputs[0].stderr);
    assert_eq!(stopped(&outputs[0]), stopped(&outputs[1]));
    assert_eq!((outputs[0].code, outputs[1].code), (Some(130), Some(143)));
    assert!(world.exists("run/state/manifest.json"));
    // A single process resumes from this state; two processes give the same result.
    let whole = World::new();
    whole.write("train.toml", LORA);
    whole.ok(["train"].iter().chain(&LONG));
    run(&world, 2, &LONG);
    std::fs::rename(world.path("run"), whole.path("two")).unwrap();
    assert_alike(&whole, "run", "two", "adapter/adapter_model.safetensors");
}

#[test]
fn checkpoints_that_every_rank_wrote_a_part_of_are_read_by_any_number() {
    let world = World::new();
    let sharded = "zero_stage = 3\nsharded_checkpoints = true\n[train.full]";
    let validation = "\n[validation]\nfraction = 0.2\nevery = 2\nkeep = \"best\"\n";
    world.write("train.toml", &(LORA.replace("[train.lora]\nr = 2", sharded) + validation));
    world.ok(["train", "train.toml", "--out", "alone"].iter().chain(&LONG[3..7]));
    for ranks in [3usize, 2, 4] {
        let mut processes = start(&world, ranks, &LONG);
        let before = std::fs::read_to_string(world.path("run/log.jsonl")).map_or(0, |text| text.lines().count());
        wait_for_steps(&world, "run", &mut processes[0], before + 4);
        let id = processes[ranks - 1].id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        for output in finish(processes) {
            assert!(output.stderr.contains("stopped after step"), "{}", output.stderr);
        }
        let files =
            |ranks: usize| (0..ranks).map(move |rank| format!("run/state/rank-{rank:05}-of-{ranks:05}.safetensors"));
        assert!(files(ranks).all(|file| world.exists(&file)) && !world.exists("run/state/model.safetensors"));
        assert_whole(&world.path("run"));
    }
    // A damaged shard is reported by the rank that verifies it.
    let part = world.path("run/state/rank-00001-of-00004.safetensors");
    let intact = std::fs::read(&part).unwrap();
    let mut damaged = intact.clone();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&part, damaged).unwrap();
    let outputs = finish(start(&world, 2, &LONG));
    let says = |text: &str| outputs.iter().any(|output| output.stderr.contains(text));
    assert!(says("`rank-00001-of-00004.safetensors` has changed since it was saved"), "{}", outputs[1].stderr);
    std::fs::write(&part, intact).unwrap();

    // How the state is sharded and saved may change between runs. Two ranks read shards and write unsharded tensors.
    let whole = ["--set", "train.zero_stage=1", "--set", "train.sharded_checkpoints=false"];
    let mut processes = start(&world, 2, &[&LONG[..], &whole].concat());
    let before = std::fs::read_to_string(world.path("run/log.jsonl")).unwrap().lines().count();
    wait_for_steps(&world, "run", &mut processes[0], before + 4);
    let id = processes[0].id().to_string();
    let signalled = Command::new("kill").args(["-TERM", &id]).status().unwrap().success();
    let outputs = finish(processes);
    assert!(signalled, "{}", outputs[0].stderr);
    assert!(world.exists("run/state/model.safetensors") && !world.exists("run/state/rank-00000-of-00004.safetensors"));

    world.ok(["train"].iter().chain(&LONG));
    assert_alike(&world, "alone", "run", "model/model.safetensors");
}

#[test]
fn ranks_that_do_not_share_the_output_are_told_before_the_first_step() {
    let world = World::new();
    world
        .write("train.toml", &LORA.replace("[train.lora]", "zero_stage = 1\nsharded_checkpoints = true\n[train.lora]"));
    let port = free_port().to_string();
    let start = |rank: &str, out: &str| {
        let mut command = world.command(["train", "train.toml", "--out", out, "--rank-timeout=20"]);
        command.envs([("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", &port)]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for output in finish(vec![start("0", "a"), start("1", "b")]) {
        assert_eq!(output.code, Some(1));
        assert!(output.stderr.contains("must be on a shared file system"), "{}", output.stderr);
    }
    assert!(!world.exists("a/log.jsonl"));
    let stage = ["--set", "train.zero_stage=0"];
    let output = CommandOutput::of(&mut world.command(["train", "train.toml", "--out", "c"].iter().chain(&stage)));
    assert!(output.stderr.contains("sharded_checkpoints = true with zero_stage = 0"), "{}", output.stderr);
}

#[test]
fn what_does_not_fit_together_is_an_error_of_every_rank() {
    let world = World::new();
    world.write("train.toml", LORA);
    let few = finish(start(&world, 2, &["train.toml", "--out", "a", "--set", "train.gradient_accumulation_steps=1"]));
    for output in &few {
        assert_eq!(output.code, Some(1));
        assert!(
            output.stderr.contains("gradient_accumulation_steps = 1 with 2 ranks: expected at least"),
            "{}",
            output.stderr
        );
    }
    let port = free_port().to_string();
    let start = |rank: &str, seed: &str| {
        let mut command = world.command(["train", "train.toml", "--out", "b", "--rank-timeout=20", "--set", seed]);
        command.envs([("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", &port)]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let outputs = finish(vec![start("0", "seed=1"), start("1", "seed=2")]);
    assert!(
        outputs[1].stderr.contains("rank 1: the training data, its order or the random seed differs"),
        "{}",
        outputs[1].stderr
    );
    assert!(outputs.iter().all(|o| o.code == Some(1)));
    // Without its peers, a rank reports where it waited.
    let mut command = world.command(["train", "train.toml", "--out", "c", "--rank-timeout=1"]);
    command.envs([("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)]);
    let output = CommandOutput::of(&mut command);
    assert!(
        output.stderr.contains(&format!("could not connect to the other ranks at 127.0.0.1:{port}")),
        "{}",
        output.stderr
    );
    let mut command = world.command(["generate", "model", "--prompt", "a"]);
    let output = CommandOutput::of(command.envs([
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "a"),
        ("MASTER_PORT", "1"),
    ]));
    assert!(output.stderr.contains("run as several processes, but this is one of 2"), "{}", output.stderr);
}

#[test]
fn torchrun_starts_it() {
    let torchrun = std::env::var("CL_TORCHRUN").unwrap_or_else(|_| "torchrun".to_owned());
    if Command::new(&torchrun).arg("--help").output().is_err() {
        eprintln!("left out: no torchrun; set CL_TORCHRUN to that of PyTorch");
        return;
    }
    let world = World::new();
    world.write("train.toml", LORA);
    world.ok(["train", "train.toml", "--out", "alone"]);
    let launcher = ["--standalone", "--nproc-per-node=2", "--no-python", env!("CARGO_BIN_EXE_cl")];
    let mut command = Command::new(&torchrun);
    command.args(launcher).args(["train", "train.toml", "--out", "run"]).current_dir(world.path(""));
    let output = CommandOutput::of(&mut command);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    assert_alike(&world, "alone", "run", "adapter/adapter_model.safetensors");
}
