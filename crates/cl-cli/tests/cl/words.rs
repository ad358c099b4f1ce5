//! Error messages say what is wrong, where, and what to do, in our own words and not in those of a library.

use crate::world::World;

/// Texts of libraries and of the operating system that do not help users.
const FOREIGN: [&str; 8] = [
    "stream did not contain valid UTF-8",
    "failed to fill whole buffer",
    "os error",
    "Some(",
    "invalid type: string",
    "DuplicateKeyPolicy",
    "weak recursion",
    ".part/",
];

fn told(world: &World, args: &[&str], parts: &[&str]) {
    // `check` prints its findings to stdout.
    let run = world.run(args);
    assert_eq!(run.code, Some(1), "{args:?}: {}{}", run.stdout, run.stderr);
    let message = run.stdout + &run.stderr;
    assert!(!message.contains("panicked"), "{args:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "{args:?}: {part}: {message}");
    }
    for foreign in FOREIGN {
        assert!(!message.contains(foreign), "{args:?}: {foreign}: {message}");
    }
    assert!(message.len() < 4000, "{args:?}: {} bytes", message.len());
}

#[test]
fn every_number_has_a_bound_that_check_knows() {
    let world = World::new();
    for (key, value) in [
        ("train.lora.r", "9000000000000000000"),
        ("train.lora.r", "100000000"),
        ("train.lora.r", "1000"),
        ("train.lora.r", "0"),
        ("train.lora.lora_alpha", "1e300"),
        ("train.lora.lora_dropout", "1.0"),
        ("train.lora.rank_pattern", "{q_proj = 100000000}"),
        ("train.lora.loraplus_lr_ratio", "1e300"),
        ("train.epochs", "0"),
        ("train.epochs", "99999999999"),
        ("train.max_steps", "0"),
        ("train.max_steps", "99999999999999"),
        ("train.micro_batch_size", "999999999"),
        ("train.gradient_accumulation_steps", "99999999999"),
        ("train.learning_rate", "1e38"),
        ("train.learning_rate", "-1.0"),
        ("train.adam_beta1", "1.0"),
        ("train.adam_beta2", "-0.1"),
        ("train.adam_epsilon", "0.0"),
        ("train.weight_decay", "1e300"),
        ("train.max_grad_norm", "inf"),
        ("train.warmup_steps", "99999999999999"),
        ("train.save_steps", "99999999999999"),
        ("train.max_length", "1"),
        ("train.max_length", "99999999999"),
        ("replay.fraction", "1e9"),
        ("data.limit", "0"),
    ] {
        let name = key.rsplit('.').next().unwrap();
        told(&world, &["check", "train.toml", "--set", &format!("{key}={value}")], &[name, "expected"]);
    }
    for (key, value) in [("eval.batch_tokens", "99999999999"), ("eval.batch_sequences", "0"), ("eval.max_length", "0")]
    {
        told(&world, &["check", "lora.toml", "--set", &format!("{key}={value}")], &[key, "expected 1 to"]);
    }
    told(
        &world,
        &["check", "train.toml", "--set", "train.epochs=18446744073709551615"],
        &["outside the range of TOML"],
    );
}

#[test]
fn messages_say_what_and_where() {
    let world = World::new();
    // A line of 100 KB is not quoted in the message.
    world.write("long.toml", &format!("model = [{}", "1, ".repeat(40_000)));
    told(&world, &["check", "long.toml"], &["long.toml", "line 1"]);
    // Truncated weights.
    let whole = std::fs::read(world.path("model/model.safetensors")).unwrap();
    world.copy_dir("model", "cut");
    std::fs::write(world.path("cut/model.safetensors"), &whole[..whole.len() - 100]).unwrap();
    told(&world, &["check", "cut"], &["cut/model.safetensors"]);
    // A file that does not exist.
    told(&world, &["check", "train.toml", "--set", "data.train=nowhere.json"], &["nowhere.json: not found"]);
    // YAML of an unexpected kind.
    world.write("twice.yaml", "merge_method: linear\nmerge_method: ties\nmodels: []\n");
    told(&world, &["merge", "run", "twice.yaml", "--out", "m"], &["twice.yaml", "merge_method"]);
    world.write("loop.yaml", "merge_method: &a\n  x: *a\n");
    told(&world, &["merge", "run", "loop.yaml", "--out", "m"], &["loop.yaml"]);
}

#[test]
fn mistakes_in_configurations_are_told_in_the_words_of_the_file() {
    let world = World::new();
    world.write("study.toml", "name = 's'\nmodel = 'model'\ndata = 'data'\ntasks = ['first']\nseeds = [1]\n");
    let check = |set: &str, part: &str| told(&world, &["check", "train.toml", "--set", set], &[part]);
    check("train.learning_rate='1e-3'", "expected a number, got the text");
    check("train.epochs=1.5", "expected an integer, 0 or more, got 1.5");
    check("mixture.joint={temperature=2, weights=[1]}", "expected a table with exactly one key");
    check("mixture.joint=uniforn", "did you mean `uniform`?");
    check("replay.fraction=0.5", "data.earlier");
    told(&world, &["check", "lora.toml", "--set", "train.olora={lambda=[1,2,3,4,5,6,7,8,9]}"], &["olora.lambda", "9"]);
    told(&world, &["check", "lora.toml", "--set", "eval.metric=acc"], &["eval.metric"]);
    told(&world, &["check", "study.toml"], &["is the configuration of a study", "cl study"]);
    world
        .write("routed.toml", "name = 's'\nmodel = 'model'\ndata = 'data'\ntasks = ['first']\nseeds = [1]\n[router]\n");
    told(&world, &["check", "routed.toml"], &["is the configuration of a study", "cl study"]);
    told(&world, &["train", "lora.toml", "--out", "r"], &["is the configuration of a sequence", "cl sequence"]);
    told(&world, &["sequence", "train.toml", "--out", "r"], &["is the configuration of a train run", "cl train"]);
    let facts = world.ok(["check", "lora.toml", "--set", "train.olora={lambda=[1, 2.5]}"]);
    assert!(facts.contains("o-lora: mode cosine, lambda [1.0, 2.5], shape fold, 0 earlier adapters"), "{facts}");
    let zero = world.run(["eval", "model", "--tasks", "first", "--out", "e", "--batch-tokens", "0"]);
    assert!(zero.code == Some(2) && zero.stderr.contains("expected an integer of at least 1"), "{}", zero.stderr);
    assert!(!world.exists("r") && !world.exists("e"));
    let facts = world.ok(["check", "train.toml", "--set", "train.warmup_steps=1000"]);
    assert!(facts.contains("warmup_steps = 1000, but there are"), "{facts}");
    world.write("p.jsonl", "{\"prompt\": \"a\"}\n");
    let args = ["generate", "model", "--prompts", "p.jsonl", "--out", "none/x.jsonl"];
    told(&world, &args, &["none/x.jsonl", "create it first"]);
}

#[test]
fn directories_of_runs_are_recognized() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r"]);
    told(&world, &["generate", "r", "--prompt", "a"], &["r/config.json", "its model is its directory model"]);
    told(
        &world,
        &["generate", "model", "--adapter", "r", "--prompt", "a"],
        &["its adapter is in the directory `adapter`"],
    );
    for dir in ["s/rounds/1-a/scores", "s/rounds/1-a/model"] {
        std::fs::create_dir_all(world.path(dir)).unwrap();
    }
    world.write("s/matrix.json", "{}");
    told(&world, &["generate", "s", "--prompt", "a"], &["this is a sequence"]);
    told(&world, &["data", "rows", "s"], &["s/rounds/1-"]);
    told(&world, &["eval", "compare", "s", "s"], &["rounds/<number>-<name>/scores"]);
}

#[test]
fn a_damaged_log_is_no_obstacle() {
    let world = World::new();
    let set = ["--set", "train.save_steps=2"];
    world.ok([&["train", "train.toml", "--out", "r"][..], &set].concat());
    let mut log = std::fs::read(world.path("r/log.jsonl")).unwrap();
    log[10] = 0xff;
    std::fs::write(world.path("r/log.jsonl"), log).unwrap();
    world.ok([&["train", "train.toml", "--out", "r", "--resume"][..], &set].concat());
}
