use std::io::Write;
use std::process::Stdio;

use crate::world::World;

const PROMPTS: [&str; 3] = ["first of a b c d :", "mood of the glad day :", "where does alba live ?"];

fn config(models: &[&str], more: &str) -> String {
    let experts: String = models
        .iter()
        .map(|m| format!("[[experts]]\nmodel = \"{m}\"\npositive_prompts = [\"mood of the {m} day :\"]\n"))
        .collect();
    format!("base_model = \"model\"\n{more}\n{experts}")
}

/// Generates greedily, and returns token ids.
fn ids(world: &World, model: &str) -> String {
    let prompts = PROMPTS.iter().flat_map(|p| ["--prompt", p]);
    world.ok(["generate", model, "--ids", "--max-new-tokens", "8"].into_iter().chain(prompts))
}

#[test]
fn a_mixture_is_a_model_as_any_other() {
    let world = World::new();
    world.model("other", 2);
    world.write("equal.toml", &config(&["model", "model", "model"], "router.init = \"random\""));
    world.ok(["moe", "mix", "equal.toml", "--out", "equal"]);
    assert_eq!(ids(&world, "equal"), ids(&world, "model"));
    world.write("one.toml", &config(&["other"], "num_experts_per_tok = 1"));
    world.ok(["moe", "mix", "one.toml", "--out", "one"]);
    assert_eq!(world.json("one/config.json")["architectures"][0], "MixtralForCausalLM");
    world.ok(["check", "one"]);
    world.ok(["merge", "verify", "one"]);
}

#[test]
fn what_is_checked_before_a_byte_is_written() {
    let world = World::new();
    world.write("bad.toml", &config(&["model", "nowhere"], "num_experts_per_tok = 3"));
    let message = world.fails(["moe", "mix", "bad.toml", "--out", "mix"]);
    for part in ["2 problems found", "experts[1]: nowhere: not found", "num_experts_per_tok: 3; expected 1 to"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    world.write("word.toml", &config(&["model"], "rooter = 1"));
    let message = world.fails(["moe", "mix", "word.toml", "--out", "mix"]);
    assert!(message.contains("word.toml: line 2: unknown key `rooter` (did you mean `router`?)"), "{message}");
    world.write("states.toml", &config(&["model", "model"], "router.init = \"states\""));
    let message = world.fails(["moe", "mix", "states.toml", "--out", "mix"]);
    assert!(message.contains("cl moe states CONFIG --out FILE"), "{message}");
    world.write("good.toml", &config(&["model", "model"], ""));
    let said = world.ok(["moe", "mix", "good.toml", "--dry-run"]);
    assert!(said.contains("nothing was written") && said.contains("MiB at most, of 2048 MiB allowed"), "{said}");
    let message = world.fails(["moe", "mix", "good.toml", "--dry-run", "--memory", "1MiB"]);
    assert!(message.contains("memory: at least") && message.contains("allow more with --memory"), "{message}");
    assert!(!world.exists("mix"));
    let message = world.fails(["moe", "mix", "good.toml", "--out", "model", "--overwrite"]);
    assert!(message.contains("model: is the base model"), "{message}");
}

#[test]
fn routers_start_from_the_hidden_states_of_prompts() {
    let world = World::new();
    world.model("other", 2);
    world.write("states.toml", &config(&["model", "other"], "num_experts_per_tok = 1"));
    for pooling in ["last", "mean", "embeddings"] {
        let (file, out) = (format!("{pooling}.safetensors"), format!("mix-{pooling}"));
        world.ok(["moe", "states", "states.toml", "--out", &file, "--pooling", pooling]);
        let router = format!("num_experts_per_tok = 1\n[router]\ninit = \"states\"\nstates = \"{file}\"");
        world.write("mix.toml", &config(&["model", "other"], &router));
        world.ok(["moe", "mix", "mix.toml", "--out", &out]);
        assert!(!ids(&world, &out).is_empty());
    }
    let weights = |name: &str| std::fs::read(world.path(format!("{name}/model.safetensors"))).unwrap();
    assert_ne!(weights("mix-last"), weights("mix-mean"));
    let message = world.fails(["moe", "states", "states.toml", "--out", "last.safetensors"]);
    assert!(message.contains("already exists"), "{message}");
}

#[test]
fn a_document_of_mergekit_moe_is_read() {
    let world = World::new();
    world.model("other", 2);
    world.write(
        "moe.yaml",
        "base_model: model\ngate_mode: random\nexperts_per_token: 1\nexperts:\n  - source_model: model\n    positive_prompts: \
         [\"a\"]\n  - source_model: other\n",
    );
    world.ok(["moe", "mix", "moe.yaml", "--out", "mix"]);
    assert_eq!(world.json("mix/config.json")["num_local_experts"], 2);
    let info = world.json("mix/model_info.json");
    let number = |key: &str| info[key].as_u64().unwrap();
    assert_eq!(
        number("total_parameters"),
        number("stem_parameters") + number("expert_parameters") + number("router_parameters")
    );
    assert_eq!(number("active_parameters"), number("total_parameters") - number("expert_parameters") / 2);
}

#[test]
fn the_share_of_a_shared_expert_follows_its_prompts() {
    let world = World::new();
    world.model("other", 2);
    let document = |prompts: &str| {
        format!(
            "base_model: model\nexperts:\n  - source_model: model\n    positive_prompts: [\"first of a b c d :\"]\n  - source_model: \
             other\n    positive_prompts: [\"where does alba live ?\"]\nshared_experts:\n  - source_model: other\n{prompts}"
        )
    };
    world.write("gated.yaml", &document("    positive_prompts: [\"mood of the glad day :\"]\n"));
    world.write("constant.yaml", &document(""));
    for name in ["gated", "constant"] {
        let states = format!("{name}.safetensors");
        world.ok(["moe", "states", &format!("{name}.yaml"), "--out", &states]);
        world.ok(["moe", "mix", &format!("{name}.yaml"), "--states", &states, "--out", name]);
        assert_eq!(world.json(&format!("{name}/config.json"))["architectures"][0], "Qwen2MoeForCausalLM");
        assert!(!ids(&world, name).trim().is_empty());
    }
    let message = world.fails(["moe", "mix", "gated.yaml", "--states", "constant.safetensors", "--out", "mix"]);
    assert!(message.contains("made from other prompts"), "{message}");
    world.write("negative.yaml", &document("    negative_prompts: [\"mood of the glad day :\"]\n"));
    let message = world.fails(["moe", "states", "negative.yaml", "--out", "negative.safetensors"]);
    assert!(message.contains("shared_expert has no positive_prompts"), "{message}");
}

#[test]
fn a_task_is_routed_to_the_adapter_with_similar_prompts() {
    let world = World::new();
    let prompts = ["mood of the glad day :", "where does alba live ?"];
    for (seed, task) in [("1", "mood"), ("2", "first")] {
        let data = format!("data.train=data/{task}");
        world.ok(["train", "train.toml", "--out", task, "--set", &data, "--set", &format!("seed={seed}")]);
    }
    let expert = |task: &str, prompt: &str| {
        format!("[[experts]]\nadapter = \"{task}/adapter\"\npositive_prompts = [\"{prompt}\"]\n")
    };
    let experts = expert("mood", prompts[0]) + &expert("first", prompts[1]);
    world.write("blend.toml", &format!("base_model = \"model\"\n{experts}"));
    let said = world.ok(["moe", "route", "blend.toml", "--prompt", "mood of the sad day :", "--out", "routed"]);
    assert!(said.contains("mood") && said.contains("1.000") && said.contains("routed"), "{said}");
    // With two adapters, states relative to the mean are opposite to each other.
    let line = |name: &str| said.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(
        line("mood").ends_with("1.000") && line("first").ends_with("0.000") && line("first").contains('-'),
        "{said}"
    );
    let text = |adapter: &str| {
        world.ok(["generate", "model", "--adapter", adapter, "--ids", "--max-new-tokens", "8", "--prompt", prompts[0]])
    };
    assert_eq!(text("routed"), text("mood/adapter"));
    let both = world.ok(["moe", "route", "blend.toml", "--prompt", prompts[1], "--top", "2", "--temperature", "100"]);
    assert!(
        both.lines().filter(|line| line.ends_with("0.50") || line.contains(" 0.5") || line.contains(" 0.49")).count()
            == 2,
        "{both}"
    );
    let message = world.fails(["moe", "route", "blend.toml", "--prompt", "a", "--out", "mood/adapter", "--overwrite"]);
    assert!(message.contains("mood/adapter: is an expert"), "{message}");
    world.write(
        "bare.toml",
        "base_model = \"model\"\n[[experts]]\nadapter = \"mood/adapter\"\n[[experts]]\nadapter = \"first/adapter\"\n",
    );
    let message = world.fails(["moe", "route", "bare.toml", "--prompt", "a"]);
    assert!(message.contains("experts[0] has no positive_prompts"), "{message}");
    world.write("one.toml", &format!("base_model = \"model\"\n{}", expert("mood", "a")));
    assert!(world.fails(["moe", "route", "one.toml", "--prompt", "a"]).contains("at least two experts"));
}

#[test]
fn experts_stored_as_differences_are_scored_generate_and_their_routers_learn() {
    let world = World::new();
    world.model("other", 2);
    world.write("mix.toml", &config(&["model", "other"], ""));
    for (storage, name) in [("lowrank:3", "lowrank"), ("bitdelta", "bits")] {
        let said = world.ok(["moe", "mix", "mix.toml", "--experts", storage, "--dry-run"]);
        assert!(said.contains(&format!("times the base's bytes, experts stored as {storage}")), "{said}");
        assert!(!world.exists(name));
        world.ok(["moe", "mix", "mix.toml", "--experts", storage, "--out", name]);
        let config = world.json(&format!("{name}/config.json"));
        assert_eq!(
            (&config["architectures"][0], &config["expert_storage"]),
            (&"DeltaMoeLlamaForCausalLM".into(), &storage.into())
        );
        let parameters = world.json(&format!("{name}/model_info.json"))["total_parameters"].as_u64().unwrap();
        let (said, millions) = (world.ok(["check", name]), parameters as f64 / 1e6);
        assert!(said.contains("MoeLlama family") && said.contains(&format!(" {millions:.1} M parameters")), "{said}");
        world.ok(["merge", "verify", name]);
        assert!(!ids(&world, name).trim().is_empty());
        let scores = format!("scores-{name}");
        world.ok(["eval", name, "--tasks", "first", "--data", "data", "--max-new-tokens", "2", "--out", &scores]);
        let mut router = format!("model = \"{name}\"\n") + "[data]\ntrain = [\"data/first\", \"data/mood\"]\n[train]\n";
        router += "max_steps = 3\nlearning_rate = 0.01\n[router]\nz_loss = 0.001\n";
        world.write("router.toml", &router);
        world.ok(["check", "router.toml"]);
        let out = format!("trained-{name}");
        world.ok(["moe", "train-router", "router.toml", "--out", &out]);
        assert!(!ids(&world, &format!("{out}/model")).trim().is_empty());

        // Full fine-tuning is not possible with experts stored as differences from the base.
        let full = world.read("train.toml").replace("model = \"model\"", &format!("model = \"{name}\""));
        let full: String = full.split("[train.lora]").next().unwrap().to_owned() + "[train.full]\n";
        world.write("full.toml", &full);
        let message = world.fails(["train", "full.toml", "--out", "full"]);
        assert!(message.contains("stored as differences from the base"), "{message}");
    }
    let output = world.command(["moe", "mix", "mix.toml", "--experts", "lowrank:0", "--dry-run"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2)); // a usage error
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected full, lowrank:R"), "{output:?}");
    world.write("key.toml", &config(&["model", "other"], "expert_storage = \"half\""));
    let message = world.fails(["moe", "mix", "key.toml", "--dry-run"]);
    assert!(message.contains("expected full, lowrank:R"), "{message}");
    world.write(
        "moe.yaml",
        "base_model: model\ngate_mode: random\nexpert_storage: lowrank:2\nexperts:\n  - source_model: model\n  - source_model: \
         other\n",
    );
    world.ok(["moe", "mix", "moe.yaml", "--out", "yaml"]);
    assert_eq!(world.json("yaml/config.json")["expert_storage"], "lowrank:2");
}

/// Two adapters of one base, `r1/adapter` and `r2/adapter`, and the mixture's configuration.
fn adapters(world: &World, more: &str) {
    world.ok(["train", "train.toml", "--out", "r1", "--set", "train.learning_rate=0.05"]);
    let second = ["--set", "data.train=\"data/mood\"", "--set", "train.lora.r=4", "--set", "train.learning_rate=0.05"];
    world.ok(["train", "train.toml", "--out", "r2"].into_iter().chain(second));
    let experts = "[[experts]]\nadapter = \"r1/adapter\"\n[[experts]]\nadapter = \"r2/adapter\"\n";
    world.write("blend.toml", &format!("base_model = \"model\"\n{more}\n{experts}"));
}

#[test]
fn a_mixture_of_adapters_is_taken_where_an_adapter_is() {
    let world = World::new();
    adapters(&world, "router.init = \"arrow\"");
    let said = world.ok(["moe", "blend", "blend.toml", "--dry-run"]);
    assert!(said.contains("nothing was written") && !world.exists("mix"), "{said}");
    let bytes: u64 = said.split(" bytes").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    world.ok(["moe", "blend", "blend.toml", "--out", "mix"]);
    assert!(world.ok(["check", "mix"]).contains("mixture: "));
    for command in [&["adapter", "info", "mix"] as &[&str], &["merge", "diff", "mix", "model"]] {
        let message = world.fails(command);
        assert!(message.contains("this is a mixture of adapters"), "{message}");
    }
    let written = std::fs::metadata(world.path("mix/mixture_model.safetensors")).unwrap().len();
    assert!((1..8192).contains(&(written - bytes)), "{bytes} bytes of tensors and a header, {written} in the file");
    let config = world.json("mix/mixture_config.json");
    assert_eq!((&config["experts"][0]["name"], &config["experts"][1]["name"]), (&"r1".into(), &"r2".into()));
    assert_eq!(config["modules"]["model.layers.0.mlp.up_proj"]["ranks"], serde_json::json!([2, 4]));

    // The same model as folding the two adapters one after the other.
    let ids = |adapter: &str| {
        let prompts = PROMPTS.iter().flat_map(|p| ["--prompt", p]);
        world.ok(["generate", "model", "--ids", "--max-new-tokens", "8", "--adapter", adapter]
            .into_iter()
            .chain(prompts))
    };
    world.write(
        "one.toml",
        "base_model = \"model\"\nrouter.norm = \"softmax\"\n[[experts]]\nadapter = \"r1/adapter\"\n",
    );
    world.ok(["moe", "blend", "one.toml", "--out", "one"]);
    assert_eq!(ids("one"), ids("r1/adapter"));
    assert_ne!(ids("mix"), ids("r2/adapter"));
    let eval = ["eval", "model", "--tasks", "first,mood", "--data", "data", "--max-new-tokens", "2"];
    world.ok(eval.iter().chain(&["--adapter", "mix", "--adapter", "one", "--adapter", "r1/adapter", "--out", "e"]));
    let scores = |name: &str| world.json(&format!("e/{name}/scores.json"));
    assert_eq!(scores("one"), scores("r1"));
    assert!(world.exists("e/mix/first.jsonl"));

    let message = world.fails(["moe", "blend", "blend.toml", "--out", "mix"]);
    assert!(message.contains("mix"), "{message}");
    world.ok(["moe", "blend", "blend.toml", "--out", "mix", "--overwrite"]);
    world.model("other", 2);
    let message = world.fails(["generate", "other", "--prompt", "a", "--adapter", "mix"]);
    assert!(message.contains("is a mixture for the base model"), "{message}");
    for args in [&["adapter", "info", "mix"][..], &["adapter", "fold", "model", "mix", "--out", "f"]] {
        world.fails(args);
    }
}

#[test]
fn mixtures_of_all_kinds_are_scored_generate_chat_and_are_checked() {
    let world = World::new();
    world.model("other", 2);
    world.write("model/chat_template.jinja", "{% for m in messages %}{{ m.content }} :{% endfor %}");
    let modules = "modules = [\"mlp_fg\", \"q_proj\", \"o_proj\"]\nlayers = [1]";
    for (name, more, kind) in [
        ("mixtral", "", "mixtral"),
        ("attention", modules, "moellama"),
        ("shared", "shared_expert = { model = \"other\" }", "qwen2_moe"),
        ("gateless", "gateless = true\nmodules = [\"mlp\", \"q_proj\"]", "moellama"),
        ("global", "global_router = true\nmodules = [\"mlp\", \"q_proj\"]", "moellama"),
    ] {
        let file = format!("{name}.toml");
        world.write(&file, &config(&["model", "other"], more));
        world.ok(["moe", "mix", &file, "--out", name]);
        assert_eq!(world.json(&format!("{name}/config.json"))["model_type"], kind);
    }
    adapters(&world, "");
    world.ok(["moe", "blend", "blend.toml", "--out", "adapters"]);
    for (name, model, beside) in [
        ("a", "mixtral", &[] as &[&str]),
        ("b", "attention", &[]),
        ("c", "model", &["--adapter", "adapters"]),
        ("d", "shared", &[]),
        ("e", "gateless", &[]),
        ("f", "global", &[]),
    ] {
        let eval = ["eval", model, "--tasks", "first", "--data", "data", "--max-new-tokens", "2", "--out", name];
        world.ok(eval.iter().chain(beside));
        let generate = ["generate", model, "--prompt", PROMPTS[0], "--ids", "--max-new-tokens", "4"];
        assert!(!world.ok(generate.iter().chain(beside)).trim().is_empty());
        let mut chat = world.command(["chat", model, "--max-new-tokens", "2"].iter().chain(beside));
        let mut process = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        process.stdin.take().unwrap().write_all(b"where does alba live ?\n").unwrap();
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        world.ok(["check", beside.last().unwrap_or(&model)]);
    }
    for mixture in ["mixtral", "attention", "adapters", "shared", "gateless", "global"] {
        let info = world.json(&format!("{mixture}/model_info.json"));
        let number = |key: &str| info[format!("{key}_parameters")].as_u64().unwrap();
        assert_eq!(number("total"), number("stem") + number("expert") + number("router"), "{mixture}");
        // Both experts are active for every token.
        assert_eq!(number("active"), number("total"), "{mixture}");
    }
}

#[test]
fn what_stands_in_the_way_of_a_mixture_of_adapters_is_said_at_once() {
    let world = World::new();
    adapters(&world, "num_experts_per_tok = 9");
    let train = |out: &str, set: &[&str]| {
        let set = set.iter().flat_map(|s| ["--set", s]);
        world.ok(["train", "train.toml", "--out", out, "--set", "train.max_steps=1"].into_iter().chain(set));
    };
    train("dora", &["train.lora.use_dora=true"]);
    train("table", &["train.lora.target_modules=[\"embed_tokens\", \"lm_head\", \"q_proj\"]"]);
    train("saved", &["train.lora.modules_to_save=[\"norm\"]"]);
    let more: String =
        ["dora", "table", "saved", "nowhere"].map(|a| format!("[[experts]]\nadapter = \"{a}/adapter\"\n")).concat();
    world.write("bad.toml", &(world.read("blend.toml") + &more));
    let message = world.fails(["moe", "blend", "bad.toml", "--out", "mix"]);
    for part in [
        "num_experts_per_tok: 9; expected 1 to the number of experts, 6",
        "experts[2] (dora/adapter): DoRA",
        "experts[3] (table/adapter): `model.embed_tokens` is an embedding",
        "experts[3] (table/adapter): `lm_head` is the output head",
        "experts[4] (saved/adapter): tensor `base_model.model.model.norm.weight` is a module trained in full",
        "experts[5]: nowhere/adapter/adapter_config.json: not found",
        "nothing was written",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!world.exists("mix"));

    // A model with the same shape is a different base.
    world.model("other", 2);
    world.write(
        "other.toml",
        &world.read("blend.toml").replace("base_model = \"model\"\nnum_experts_per_tok = 9", "base_model = \"other\""),
    );
    let message = world.fails(["moe", "blend", "other.toml", "--out", "mix"]);
    assert!(message.contains("2 problems found") && message.contains("--ignore-base"), "{message}");
    world.ok(["moe", "blend", "other.toml", "--out", "mix", "--ignore-base"]);
    world.ok(["generate", "other", "--prompt", "a", "--adapter", "mix", "--max-new-tokens", "1"]);
}
