//! `cl generate` with sampling, penalties, stop sequences, prompt files, chat templates and several adapters.

use serde_json::{Value, json};

use crate::world::World;

const PROMPTS: [&str; 4] = ["first of a b c d :", "mood of the glad day :", "where does alba live ?", "a"];
const SAMPLED: [&str; 6] = ["--temperature", "1.2", "--top-k", "30", "--top-p", "0.95"];
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %} {{ m.role[0] }} {{ m.content }} :{% endfor %}\
                        {% if add_generation_prompt %} a{% endif %}";

/// A world with the prompts in `prompts.jsonl`.
fn world() -> World {
    let world = World::new();
    let rows: Vec<String> = PROMPTS.iter().map(|p| json!({"prompt": p, "answer": "ignored"}).to_string()).collect();
    world.write("prompts.jsonl", &rows.join("\n"));
    world
}

/// Runs `cl generate` on `prompts.jsonl`, and returns its JSON lines.
fn file(world: &World, more: &[&str]) -> Vec<Value> {
    let args = ["generate", "model", "--prompts", "prompts.jsonl", "--max-new-tokens", "12"];
    world.ok(args.iter().chain(more)).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn one(world: &World, prompt: &str, more: &[&str]) -> String {
    let args = ["generate", "model", "--max-new-tokens", "12", "--prompt", prompt];
    world.ok(args.iter().chain(more))
}

#[test]
fn the_same_seed_writes_the_same_text() {
    let world = world();
    let text = |more: &[&str]| one(&world, PROMPTS[0], &[&SAMPLED, more].concat());
    assert_eq!(text(&["--seed", "1"]), text(&["--seed", "1"]));
    assert_eq!(text(&[]), text(&["--seed", "0"]));
    assert_ne!(text(&["--seed", "1"]), text(&["--seed", "2"]));
    // With a single candidate token, sampling equals greedy decoding.
    assert_eq!(one(&world, PROMPTS[0], &["--top-k", "1", "--seed", "5"]), one(&world, PROMPTS[0], &[]));
}

#[test]
fn a_batch_writes_what_each_prompt_gets_alone() {
    let world = world();
    for settings in [&[][..], &SAMPLED, &["--repetition-penalty", "1.5"]] {
        let all = file(&world, settings);
        assert_eq!(all.len(), PROMPTS.len());
        for size in ["1", "2", "3"] {
            assert_eq!(file(&world, &[settings, &["--batch-sequences", size]].concat()), all, "{settings:?}");
        }
        for (line, prompt) in all.iter().zip(PROMPTS) {
            assert_eq!(line["prompt"], prompt);
            let tokens = line["tokens"].as_array().unwrap().len();
            assert_eq!(line["finish_reason"], if tokens < 12 { "stop" } else { "length" }, "{line}");
        }
        // A single prompt uses the random numbers of index 0, too, and its output is streamed.
        let text = one(&world, PROMPTS[0], settings);
        assert_eq!(json!(text.trim_end_matches('\n')), all[0]["text"]);
        let ids = one(&world, PROMPTS[0], &[settings, &["--ids"]].concat());
        assert_eq!(serde_json::from_str::<Value>(&ids).unwrap(), all[0]["tokens"]);
    }
    let penalized = file(&world, &["--repetition-penalty", "5"]);
    for line in &penalized {
        let mut tokens: Vec<&Value> = line["tokens"].as_array().unwrap().iter().collect();
        let all = tokens.len();
        tokens.sort_by_key(|t| t.as_u64());
        tokens.dedup();
        assert!(tokens.len() > all / 2, "a penalty of 5 leaves little to be repeated: {line}");
    }
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let world = world();
    let free = file(&world, &SAMPLED);
    for line in &free {
        let text = line["text"].as_str().unwrap();
        let words: Vec<&str> = text.split(' ').collect();
        // A stop sequence across a token boundary.
        let stop = format!("{} {}", words[4], words[5]);
        let end = text.find(&stop).unwrap();
        let stopped = file(&world, &[&SAMPLED[..], &["--stop", "not a word", "--stop", &stop]].concat());
        let place = free.iter().position(|l| l == line).unwrap();
        assert_eq!(stopped[place]["text"], &text[..end]);
        assert_eq!(stopped[place]["finish_reason"], "stop");
        assert!(stopped[place]["tokens"].as_array().unwrap().len() <= 6);
    }
    let text = free[0]["text"].as_str().unwrap();
    let word = text.split(' ').nth(3).unwrap();
    let printed = one(&world, PROMPTS[0], &[&SAMPLED[..], &["--stop", word]].concat());
    assert_eq!(printed, format!("{}\n", &text[..text.find(word).unwrap()]));
}

#[test]
fn lines_go_to_a_file_when_all_are_there() {
    let world = world();
    let lines = file(&world, &SAMPLED);
    assert!(file(&world, &[&SAMPLED[..], &["--out", "texts.jsonl"]].concat()).is_empty());
    assert_eq!(world.lines("texts.jsonl"), lines);
    let args = ["generate", "model", "--prompts", "prompts.jsonl", "--out", "texts.jsonl"];
    let message = world.fails(args);
    assert!(message.contains("--out texts.jsonl: already exists; remove it, or choose another file"), "{message}");
}

#[test]
fn conversations_are_written_by_the_chat_template() {
    let world = world();
    world.write("model/chat_template.jinja", TEMPLATE);
    let messages = json!([{"role": "system", "content": "mood"}, {"role": "user", "content": "a b"}]);
    let rows = [json!({"prompt": "a b"}), json!({"messages": messages}), json!({"messages": [messages[1]]})];
    world.write("prompts.jsonl", &rows.map(|r| r.to_string()).join("\n"));
    let prompts = |more: &[&str]| -> Vec<String> {
        file(&world, more).iter().map(|line| line["prompt"].as_str().unwrap().to_owned()).collect()
    };
    let (user, system) = ("<s> u a b : a", "<s> s mood : u a b : a");
    assert_eq!(prompts(&[]), ["a b", system, user]);
    assert_eq!(prompts(&["--chat"]), [user, system, user]);
    assert_eq!(prompts(&["--chat", "--system", "glad"]), ["<s> s glad : u a b : a", system, "<s> s glad : u a b : a"]);
    // Content in parts is joined; what the template would not see is an error.
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]);
    world.write("parts.jsonl", &json!({"messages": parts}).to_string());
    let lines = world.ok(["generate", "model", "--prompts", "parts.jsonl", "--max-new-tokens", "1"]);
    assert!(lines.contains(&json!(user).to_string()), "{lines}");
    let called = json!([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]);
    for (row, part) in
        [(json!({"messages": called}), "tool_calls"), (json!({"messages": parts, "tools": [1]}), "tools")]
    {
        world.write("tools.jsonl", &row.to_string());
        let message = world.fails(["generate", "model", "--prompts", "tools.jsonl"]);
        assert!(message.contains(part), "{message}");
    }
    // BOS occurs once: it is added by the template, not by the tokenizer.
    let plain = one(&world, "u a b : a", &["--ids"]);
    assert_eq!(one(&world, "a b", &["--chat", "--ids"]), plain);
    // A custom template, with the model's special tokens.
    world.write("other.jinja", "{{ bos_token }} {{ messages[0].content }} {{ eos_token }}");
    assert_eq!(prompts(&["--chat", "--template", "other.jinja"])[0], "<s> a b </s>");
}

#[test]
fn several_adapters_write_what_the_model_with_their_sum_does() {
    let world = World::new();
    for (out, seed) in [("r", "1"), ("s", "2")] {
        let seed = format!("seed={seed}");
        world.ok(["train", "train.toml", "--out", out, "--set", &seed]);
    }
    world.ok(["adapter", "fold", "model", "r/adapter", "s/adapter", "--out", "folded"]);
    let ids = |model: &str, more: &[&str]| {
        let prompts = PROMPTS.iter().flat_map(|p| ["--prompt", p]);
        let args = ["generate", model, "--ids", "--max-new-tokens", "6"].into_iter().chain(SAMPLED).chain(prompts);
        world.ok(args.chain(more.iter().copied()))
    };
    let both = ids("model", &["--adapter", "r/adapter", "--adapter", "s/adapter"]);
    assert_eq!(both, ids("folded", &[]));
    assert_ne!(both, ids("model", &["--adapter", "r/adapter"]));
    let message = world.fails(["generate", "model", "--prompt", "a", "--adapter", "r/adapter", "--adapter", "nowhere"]);
    assert!(message.contains("nowhere"), "{message}");
}

#[test]
fn impossible_settings_say_why() {
    let world = world();
    world.write("empty.jsonl", "");
    world.write("neither.jsonl", "{\"prompt\": \"a\"}\n{\"text\": \"a\"}\n");
    world.write("wrong.jsonl", "{\"messages\": [{\"role\": \"user\"}]}\n");
    world.write("broken.jinja", "{% for %}");
    world.write("long.jsonl", &json!({"prompt": "a ".repeat(70)}).to_string());
    let a = ["--prompt", "a"];
    let rows: [(&[&str], &str); 15] = [
        (&["--temperature", "0"], "temperature is 0; expected a number above 0; for greedy decoding"),
        (&["--temperature", "-1"], "temperature is -1"),
        (&["--top-k", "0"], "top_k is 0; expected 1 or more"),
        (&["--top-p", "1.5"], "top_p is 1.5; expected above 0 and at most 1"),
        (&["--repetition-penalty", "0"], "repetition_penalty is 0"),
        (&["--seed", "1"], "--seed has no effect on greedy decoding; add --temperature"),
        (&["--stop", ""], "--stop must not be empty"),
        (&["--chat"], "model: no chat template"),
        (&["--chat"], "set one with --template FILE"),
        (&["--chat", "--template", "broken.jinja"], "chat template"),
        (&["--system", "x"], "--system and --template apply to conversations; add --chat"),
        (&["--prompts", "empty.jsonl"], "empty.jsonl: no rows"),
        (&["--prompts", "neither.jsonl"], "neither.jsonl: row 1 (from 0): expected either `prompt` or `messages`"),
        (&["--prompts", "wrong.jsonl"], "wrong.jsonl: row 0 (from 0): expected {\"prompt\": TEXT} or"),
        (&["--prompts", "long.jsonl"], "long.jsonl: row 0 (from 0): 71 tokens and --max-new-tokens 64 exceed"),
    ];
    for (args, part) in rows {
        let prompt = if args[0] == "--prompts" { &[][..] } else { &a };
        let message = world.fails(["generate", "model"].iter().chain(prompt).chain(args));
        assert!(message.contains(part), "{args:?}: {message}");
    }
    for args in [&["--prompt", "a", "--prompts", "prompts.jsonl"][..], &["--prompt", "a", "--out", "x"]] {
        assert_eq!(world.run(["generate", "model"].iter().chain(args)).code, Some(2), "{args:?}");
    }
}
