use crate::world::World;

const PROMPTS: [&str; 3] = ["first of a b c d :", "mood of the glad day :", "where does alba live ?"];

fn config(models: &[&str], more: &str) -> String {
    let experts: String = models
        .iter()
        .map(|m| format!("[[experts]]\nmodel = \"{m}\"\npositive_prompts = [\"mood of the {m} day :\"]\n"))
        .collect();
    format!("base_model = \"model\"\n{more}\n{experts}")
}

/// Greedy continuations as token ids.
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
    assert!(message.contains("word.toml: line 2: unknown field `rooter`"), "{message}");
    world.write("states.toml", &config(&["model", "model"], "router.init = \"states\""));
    let message = world.fails(["moe", "mix", "states.toml", "--out", "mix"]);
    assert!(message.contains("cl moe states CONFIG --out FILE"), "{message}");
    world.write("good.toml", &config(&["model", "model"], ""));
    let said = world.ok(["moe", "mix", "good.toml", "--dry-run"]);
    assert!(said.contains("nothing was written"), "{said}");
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
    assert!(message.contains("exists already"), "{message}");
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
