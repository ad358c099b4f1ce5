use crate::world::{World, edit_header, set_value};

/// Runs a check that must find problems, and returns their number and stdout.
fn problems(world: &World, args: &[&str]) -> (usize, String) {
    let run = world.run(["check"].iter().chain(args));
    assert_eq!(run.code, Some(1), "{}{}", run.stdout, run.stderr);
    let count = run.stdout.lines().filter(|l| l.starts_with("problem: ")).count();
    let plural = if count == 1 { "" } else { "s" };
    assert_eq!(run.stderr, format!("error: {}: {count} problem{plural} found\n", args[0]), "{}", run.stdout);
    (count, run.stdout)
}

#[test]
fn a_good_configuration_lists_what_it_would_do() {
    let world = World::new();
    let facts = world.ok(["check", "lora.toml", "--set", "replay.fraction=0.25", "--set", "limit.test=5"]);
    for line in [
        "model: model with 0.0 M parameters",
        "round 1 (first): rows per epoch: 16 of first; 4 steps per epoch, 12 in total",
        "round 2 (mood): rows per epoch: 4 of first, 16 of mood; 5 steps per epoch, 15 in total",
        "task: first, 5 documents, exact_match",
        "task: homes, 5 documents, acc",
        "lora.toml: no problems found",
    ] {
        assert!(facts.lines().any(|l| l == line), "{line} is not in\n{facts}");
    }
    let facts = world.ok(["check", "train.toml"]);
    assert!(facts.contains("the round: rows per epoch: 16 of first; 4 steps per epoch, 12 in total"), "{facts}");
    assert!(!world.exists("rounds"));
}

#[test]
fn warnings_of_replay_without_rows_and_of_adapters_of_another_base() {
    let world = World::new();
    let facts = world.ok(["check", "lora.toml", "--set", "replay.fraction=0.02"]);
    assert!(facts.contains("warning: round 2 (mood): no row of first is replayed"), "{facts}");

    world.ok(["train", "train.toml", "--out", "r"]);
    world.model("other", 2);
    let told = |model: &str| {
        let model = format!("model={model}");
        world.ok(["check", "train.toml", "--set", "train.initial_adapter=r/adapter", "--set", &model])
    };
    let warning = "r/adapter: was trained on model, not on other";
    assert!(told("other").contains(&format!("warning: {warning}")), "{}", told("other"));
    assert!(!told("model").contains("was trained on"), "{}", told("model"));
    let generate =
        |model| world.run(["generate", model, "--adapter", "r/adapter", "--prompt", "a", "--max-new-tokens", "1"]);
    assert!(generate("other").stderr.contains(warning) && !generate("model").stderr.contains("was trained on"));
    let refused = world.fails(["eval", "model", "--tasks", "first", "--data", "data", "--out", "model/scores"]);
    assert!(refused.contains("lies inside the model") && !world.exists("model/scores"), "{refused}");
}

#[test]
fn all_mistakes_of_a_configuration_are_told_at_once() {
    let world = World::new();
    let set = [
        "lora.toml",
        "--set",
        "tasks=['first', 'nowhere', 'nor_here']",
        "--set",
        "train.lora.target_modules=['q_porj']",
        "--set",
        "eval.old=['missing.jsonl']",
        "--set",
        "device=tpu",
        "--set",
        "eval.max_new_tokens=99",
    ];
    let (count, text) = problems(&world, &set);
    for part in [
        "target_modules: `q_porj` matches no layer",
        "device `tpu`",
        "data/nowhere: no train.json",
        "data/nor_here: no train.json",
        "task `nowhere`",
        "task `nor_here`",
        "data/missing.jsonl: not found",
        "task `first`: 99 new tokens leave no room",
    ] {
        assert!(text.contains(&format!("problem: {part}")), "{part} is not in\n{text}");
    }
    assert_eq!(count, 8, "{text}");
    let wrong = ["--set", "model=gone", "--set", "data.train=gone.json", "--set", "data.earlier=['lost']"];
    let (count, text) = problems(&world, &[&["train.toml"], &wrong[..]].concat());
    assert_eq!(count, 3, "{text}");
}

#[test]
fn what_is_no_configuration_says_where() {
    let world = World::new();
    world.write("broken.toml", "model = \"m\"\ntasks = [\n");
    world.write("other.toml", "model = \"m\"\ndata = \"data\"\n[train.lora]\n");
    for (args, part) in [
        (&["broken.toml"] as &[&str], "broken.toml: TOML parse error at line 2"),
        (&["other.toml"], "neither `tasks` nor `[[rounds]]`"),
        (&["nowhere.toml"], "nowhere.toml: not found"),
        (&["model/model.safetensors"], "is not valid UTF-8; the file is damaged or not a text file"),
        (&["lora.toml", "--set", "train.lora.rank=4"], "unknown key `rank`"),
        (&["model", "--set", "seed=3"], "--set applies to configurations; model is a directory"),
    ] {
        let message = world.fails(["check"].iter().chain(args));
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn good_directories_say_what_they_hold() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r"]);
    let text = world.ok(["check", "r/model"]);
    assert!(text.starts_with("model: Llama family, 2 layers, hidden size 16, "), "{text}");
    assert!(text.ends_with("r/model: no problems found\n"), "{text}");
    let text = world.ok(["check", "r/adapter"]);
    assert!(text.starts_with("adapter: LORA on 14 modules, r 2, lora_alpha 16, base model\n"), "{text}");
    world.write("r/model/notes.txt", "mine");
    assert!(world.ok(["check", "r/model"]).contains("r/model/notes.txt: not listed in manifest.json"));
    let (count, text) = problems(&world, &["r"]);
    assert!(count == 1 && text.contains("r: contains neither a model (config.json) nor an adapter"), "{text}");
}

const WEIGHTS: &str = "m/model.safetensors";
const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn damaged_models_name_file_and_tensor() {
    let world = World::new();
    let damages: [(&dyn Fn(), &[&str]); 6] = [
        (&|| set_value(&world.path(WEIGHTS), TENSOR, 7, f32::NAN), &[WEIGHTS, TENSOR, "element 7 is NaN"]),
        (&|| set_value(&world.path(WEIGHTS), TENSOR, 0, f32::INFINITY), &[WEIGHTS, TENSOR, "element 0 is inf"]),
        (&|| cut(&world, WEIGHTS, 100), &[WEIGHTS, "lie outside the file's"]),
        (&|| cut(&world, WEIGHTS, 30_000), &[WEIGHTS, "truncated or another format"]),
        (&|| shard(&world), &["m/model-00001-of-00002.safetensors: not found", "the index names this shard"]),
        (&|| world.write("m/tokenizer.json", "{"), &["m/tokenizer.json: "]),
    ];
    for (damage, parts) in damages {
        world.copy_dir("model", "m");
        damage();
        let (_, text) = problems(&world, &["m"]);
        for part in parts {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        // The manifest lists all of these files.
        assert!(text.contains("differs from manifest.json") || text.contains("but missing"), "{text}");
        std::fs::remove_dir_all(world.path("m")).unwrap();
    }
}

fn cut(world: &World, name: &str, bytes: usize) {
    let file = std::fs::read(world.path(name)).unwrap();
    std::fs::write(world.path(name), &file[..file.len().saturating_sub(bytes).max(20)]).unwrap();
}

/// Writes half of a sharded model.
fn shard(world: &World) {
    std::fs::remove_file(world.path(WEIGHTS)).unwrap();
    let index = serde_json::json!({"weight_map": {TENSOR: "model-00001-of-00002.safetensors"}});
    world.write("m/model.safetensors.index.json", &index.to_string());
}

#[test]
fn a_file_that_was_edited_differs_from_its_manifest() {
    let world = World::new();
    let text = world.read("model/tokenizer_config.json");
    world.write("model/tokenizer_config.json", &(text + "\n"));
    let (count, text) = problems(&world, &["model"]);
    assert_eq!(count, 1);
    assert!(text.contains("model/tokenizer_config.json: differs from manifest.json"), "{text}");
}

#[test]
fn damaged_adapters_name_file_and_tensor() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r"]);
    let weights = world.path("r/adapter/adapter_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let factor = |f: &str| format!("base_model.model.model.layers.0.mlp.up_proj.lora_{f}.weight");
    set_value(&weights, &factor("A"), 3, f32::NAN);
    let (count, text) = problems(&world, &["r/adapter"]);
    let part = format!("adapter_model.safetensors: tensor `{}`: element 3 is NaN", factor("A"));
    assert!(count == 2 && text.contains(&part), "{text}");

    std::fs::write(&weights, &whole[..whole.len() - 3]).unwrap();
    let (_, text) = problems(&world, &["r/adapter"]);
    assert!(text.contains("adapter_model.safetensors: tensor `"), "{text}");

    std::fs::write(&weights, &whole).unwrap();
    edit_header(&weights, |header| {
        let entry = header.remove(&factor("B")).unwrap();
        header.insert("elsewhere".to_owned(), entry);
    });
    let (_, text) = problems(&world, &["r/adapter"]);
    assert!(text.contains(&format!("tensor `{}` has no counterpart", factor("A"))), "{text}");

    std::fs::remove_file(&weights).unwrap();
    let (_, text) = problems(&world, &["r/adapter"]);
    assert!(text.contains("adapter_model.safetensors: not found"), "{text}");
}

#[test]
fn memory_on_gpus_is_planned_from_the_configuration_alone() {
    let world = World::new();
    world.write(
        "train.toml",
        "model = \"base\"\n[data]\ntrain = \"none\"\n[train]\nprecision = \"bf16\"\n[train.full]\n",
    );
    world.write(
        "base/config.json",
        r#"{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#,
    );
    let said =
        world.ok(["plan", "train.toml", "--gpus", "8xA100-80GB", "--set", "train.activation_checkpointing=true"]);
    assert!(said.starts_with("8 x A100, 80.0 GB each; 8030261248 parameters, 8030261248 trained\n"), "{said}");
    assert!(said.contains("\ntrain.zero_stage = 2 fits, with ") && said.contains(" tokens/s"), "{said}");
    let said = world.ok(["plan", "train.toml", "--gpus", "1x24GB"]);
    assert!(said.contains("no ZeRO stage fits") && !said.contains("tokens/s"), "{said}");
    world.write("base/config.json", r#"{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}"#);
    let said = world.fails(["plan", "train.toml", "--gpus", "1x24GB"]);
    assert!(said.contains("`GPT2LMHeadModel` is not supported"), "{said}");
    let said = world.fails(["plan", "train.toml", "--gpus", "eight"]);
    assert!(said.contains("--gpus: `eight`: expected a number, a kind and its memory, such as 8xA100-80GB"), "{said}");
}
