use crate::world::{CommandOutput, World};

const PROMPTS: [&str; 3] = ["first of a b c d :", "mood of the glad day :", "where does alba live ?"];

fn ids(world: &World, prompts: &[&str], more: &[&str]) -> Vec<String> {
    let prompts = prompts.iter().flat_map(|p| ["--prompt", p]);
    let args = ["generate", "model", "--ids", "--max-new-tokens", "5"].into_iter().chain(prompts);
    world.ok(args.chain(more.iter().copied())).lines().map(str::to_owned).collect()
}

#[test]
fn a_prompt_is_continued_the_same_alone_and_with_others() {
    let world = World::new();
    let together = ids(&world, &PROMPTS, &[]);
    assert_eq!(together.len(), PROMPTS.len());
    for (prompt, expected) in PROMPTS.iter().zip(&together) {
        assert_eq!(ids(&world, &[prompt], &[]), [expected.as_str()], "{prompt}");
    }
    assert!(together[0] != together[1] || together[1] != together[2], "prompts make no difference: {together:?}");
}

#[test]
fn text_ids_and_limits() {
    let world = World::new();
    let one = |more: &[&str]| world.ok(["generate", "model", "--prompt", PROMPTS[0]].iter().chain(more));
    let text = one(&["--max-new-tokens", "5"]);
    assert!(text.split_whitespace().count() <= 5 && text.ends_with('\n'), "{text}");
    let ids: Vec<u32> = serde_json::from_str(&one(&["--max-new-tokens", "5", "--ids"])).unwrap();
    assert!(ids.len() <= 5);
    assert!(serde_json::from_str::<Vec<u32>>(&one(&["--max-new-tokens", "2", "--ids"])).unwrap() == ids[..2]);
    assert_eq!(one(&["--max-new-tokens", "0", "--ids"]), "[]\n");
    let bf16 =
        ["generate", "model", "--prompt", "a", "--max-new-tokens", "2", "--precision", "bf16", "--device", "cpu"];
    let bf16 = CommandOutput::of(&mut world.command(bf16));
    assert_eq!(bf16.code, Some(0), "{}", bf16.stderr);
    // The warning appears once, and only where it applies.
    let warnings = bf16.stderr.matches("has no instructions for bf16").count();
    assert_eq!(warnings, usize::from(cl_torch::emulates_bf16()), "{}", bf16.stderr);
    world.ok(["generate", "model", "--prompt", "- a list", "--max-new-tokens", "1"]);
    world.ok(["--threads", "1", "generate", "model", "--prompt", "a", "--max-new-tokens", "1"]);
}

#[test]
fn an_adapter_changes_what_is_written_as_the_folded_model_does() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r", "--set", "train.learning_rate=0.05"]);
    let plain = ids(&world, &PROMPTS, &[]);
    let beside = ids(&world, &PROMPTS, &["--adapter", "r/adapter"]);
    std::fs::rename(world.path("r/model"), world.path("folded")).unwrap();
    std::fs::rename(world.path("model"), world.path("base")).unwrap();
    std::fs::rename(world.path("folded"), world.path("model")).unwrap();
    assert_eq!(beside, ids(&world, &PROMPTS, &[]));
    assert_ne!(beside, plain);
}

#[test]
fn impossible_requests_say_why() {
    let world = World::new();
    let rows: [(&[&str], &str); 8] = [
        (
            &["model", "--prompt", "a", "--max-new-tokens", "63"],
            "2 tokens and --max-new-tokens 63 exceed the model's context of 64",
        ),
        (
            &["model", "--prompt", "a", "--max-new-tokens", "18446744073709551615"],
            "exceed the model's context of 64 tokens",
        ),
        (&["nowhere", "--prompt", "a"], "nowhere: not found; a model is a directory that contains config.json"),
        (&["train.toml", "--prompt", "a"], "train.toml: is a file; a model is a directory"),
        (&["data", "--prompt", "a"], "data/config.json: not found"),
        (&["model", "--prompt", "a", "--adapter", "model"], "model/adapter_config.json: not found"),
        (&["model", "--prompt", "a", "--device", "tpu"], "device `tpu`: expected auto, cpu, cuda or cuda:N"),
        (&["model", "--prompt", "a", "--device", "cuda:77"], "device `cuda:77`"),
    ];
    for (args, part) in rows {
        let message = world.fails(["generate"].iter().chain(args));
        assert!(message.contains(part), "{args:?}: {message}");
    }
}

#[test]
fn an_empty_prompt_needs_a_tokenizer_that_adds_a_first_token() {
    let world = World::new();
    world.ok(["generate", "model", "--prompt", "", "--max-new-tokens", "2"]);
    let mut tokenizer = world.json("model/tokenizer.json");
    tokenizer["post_processor"] = serde_json::Value::Null;
    world.write("model/tokenizer.json", &tokenizer.to_string());
    let message = world.fails(["generate", "model", "--prompt", "a", "--prompt", "", "--max-new-tokens", "2"]);
    assert!(message.contains("--prompt \"\" has no tokens"), "{message}");
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r"]);
    let adapter = world.path("r/adapter/adapter_model.safetensors");
    crate::world::edit_header(&adapter, |header| {
        let names: Vec<String> = header.keys().filter(|k| k.contains("layers.1.")).cloned().collect();
        for name in names {
            let entry = header.remove(&name).unwrap();
            header.insert(name.replace("layers.1.", "layers.7."), entry);
        }
    });
    for command in [
        &["generate", "model", "--prompt", "a", "--max-new-tokens", "2", "--adapter", "r/adapter"] as &[&str],
        &["eval", "model", "--tasks", "homes.jsonl", "--data", "data", "--out", "e", "--adapter", "r/adapter"],
        &["train", "train.toml", "--out", "s", "--set", "train.initial_adapter=r/adapter"],
    ] {
        let message = world.fails(command);
        let part = "module `model.layers.7.";
        assert!(
            message.contains(part) && message.contains("neither a linear layer nor the embedding of this model"),
            "{message}"
        );
    }
    assert!(!world.exists("e") && !world.exists("s"));
}
