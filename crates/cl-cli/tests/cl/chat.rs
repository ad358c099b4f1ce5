//! `cl chat`, used through a pipe.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::world::{CommandOutput, World};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %} {{ m.role[0] }} {{ m.content }} :{% endfor %}\
                        {% if add_generation_prompt %} a{% endif %}";
const SAMPLED: [&str; 4] = ["--temperature", "1", "--seed", "7"];

fn world() -> World {
    let world = World::new();
    world.write("model/chat_template.jinja", TEMPLATE);
    world
}

fn start(world: &World, max_new_tokens: &str, more: &[&str]) -> Child {
    let mut command = world.command(["chat", "model", "--max-new-tokens", max_new_tokens].iter().chain(more));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs a chat with these input lines.
fn chat(world: &World, more: &[&str], input: &[u8]) -> CommandOutput {
    let mut process = start(world, "4", more);
    // A chat that ends early does not read all of its input.
    let _ = process.stdin.take().unwrap().write_all(input);
    let output = process.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    CommandOutput { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Returns the replies to input that causes no other messages.
fn replies(world: &World, more: &[&str], input: &str) -> Vec<String> {
    let run = chat(world, more, input.as_bytes());
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    run.stdout.lines().map(str::to_owned).collect()
}

#[test]
fn every_reply_continues_the_conversation() {
    let world = world();
    let replies = replies(&world, &[], "a b\nwhere ?\r\n\n   \nmood");
    assert_eq!(replies.len(), 3);
    // The same conversations with `cl generate`, which keeps no state between them.
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let turns = [
        turn("user", "a b"),
        turn("assistant", &replies[0]),
        turn("user", "where ?"),
        turn("assistant", &replies[1]),
        turn("user", "mood"),
    ];
    let rows = [1, 3, 5].map(|n| json!({"messages": turns[..n]}).to_string());
    world.write("prompts.jsonl", &rows.join("\n"));
    world.ok(["generate", "model", "--prompts", "prompts.jsonl", "--max-new-tokens", "4", "--out", "texts.jsonl"]);
    let texts: Vec<String> = world.lines("texts.jsonl").iter().map(|l| l["text"].as_str().unwrap().into()).collect();
    assert_eq!(texts, replies);
}

#[test]
fn commands_change_the_conversation() {
    let world = world();
    let sampled = replies(&world, &SAMPLED, "a\na\n");
    assert_eq!(sampled, replies(&world, &SAMPLED, "a\na\n"));
    let alone = |system: &str| replies(&world, &["--system", system], "where ?\n").remove(0);
    let run = chat(&world, &[], b"where ?\n/reset\nwhere ?\n/system a b c d e f\n/reset\nwhere ?\n/exit\nwhere ?\n");
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{}", run.stderr);
    assert_eq!(lines[0], lines[1]);
    assert_eq!(lines[2], alone("a b c d e f"));
    let run = chat(&world, &[], b"/help\n/a/path ?\n");
    assert!(run.stderr.contains("unknown command /help; commands: /reset, /system TEXT, /exit"), "{}", run.stderr);
    assert_eq!((run.code, run.stdout.lines().count()), (Some(0), 1));
}

#[test]
fn a_full_context_is_told() {
    let world = world();
    let long = "a ".repeat(57);
    // `<s> u … : a` has 61 of 64 tokens; the next message does not fit anymore, but one after /reset does.
    let run = chat(&world, &[], format!("{long}\nb\n/reset\nb\n").as_bytes());
    assert_eq!((run.code, run.stdout.lines().count()), (Some(0), 2), "{}", run.stderr);
    assert!(run.stderr.contains("(truncated: the context of 64 tokens is full; /reset starts a new"), "{}", run.stderr);
    assert!(
        run.stderr.contains("exceed the model's context (69 of 64 tokens); the message was dropped"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("(truncated after 4 tokens; see --max-new-tokens)"), "{}", run.stderr);
}

#[test]
fn a_stop_string_ends_a_reply() {
    let world = world();
    let free = &replies(&world, &SAMPLED, "a\n")[0];
    let word = free.split(' ').nth(2).unwrap();
    let stopped = replies(&world, &[&SAMPLED[..], &["--stop", word]].concat(), "a\n");
    assert_eq!(stopped, [&free[..free.find(word).unwrap()]]);
}

#[test]
fn what_cannot_be_a_conversation_says_why() {
    let world = World::new();
    let message = world.fails(["chat", "model"]);
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains("model: no chat template") && message.contains("--template FILE"), "{message}");
    world.write("chat.jinja", TEMPLATE);
    assert_eq!(replies(&world, &["--template", "chat.jinja"], "a\n").len(), 1);
    let message = world.fails(["chat", "nowhere"]);
    assert!(message.contains("nowhere: not found; a model is a directory"), "{message}");
    let message = world.fails(["chat", "model", "--template", "chat.jinja", "--temperature", "0"]);
    assert!(message.contains("temperature is 0"), "{message}");
    // A template that rejects system messages.
    let refuses =
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ bos_token }} a";
    world.write("chat.jinja", refuses);
    let message = world.fails(["chat", "model", "--template", "chat.jinja", "--system", "x"]);
    assert!(message.contains("no system here"), "{message}");
    let run = chat(&world, &["--template", "chat.jinja"], b"/system x\na\n");
    assert_eq!((run.code, run.stdout.lines().count()), (Some(0), 1));
    assert!(run.stderr.contains("the system message is unchanged") && run.stderr.contains("no system here"));
    let run = chat(&world, &["--template", "chat.jinja"], b"a\n\xff\xfe\n");
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("line 2 of standard input is not valid UTF-8"), "{}", run.stderr);
}

fn signal(process: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &process.id().to_string()]).status().unwrap().success());
}

/// Sends a message, interrupts the reply, and waits for the line break with which it ends.
fn interrupt_a_reply(process: &Child, input: &mut impl Write, output: &mut impl Read) {
    input.write_all(b"a\n").unwrap();
    output.read_exact(&mut [0; 8]).unwrap();
    signal(process, "-INT");
    let mut byte = [0];
    while byte != [b'\n'] {
        output.read_exact(&mut byte).unwrap();
    }
}

#[test]
fn an_interrupt_ends_a_reply_and_without_one_the_program() {
    let world = world();
    // Give the model room for a reply that does not end by itself.
    let mut config = world.json("model/config.json");
    config["max_position_embeddings"] = 1_000_000.into();
    config["eos_token_id"] = json!(null);
    world.write("model/config.json", &config.to_string());
    let mut tokenizer = world.json("model/tokenizer_config.json");
    tokenizer["eos_token"] = json!(null);
    world.write("model/tokenizer_config.json", &tokenizer.to_string());
    for (more, code) in [(&["/exit\n"][..], 0), (&[], 130)] {
        let mut process = start(&world, "900000", &["--temperature", "1"]);
        let (mut input, mut output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        interrupt_a_reply(&process, &mut input, &mut output);
        match more {
            [] => signal(&process, "-INT"),
            lines => input.write_all(lines.concat().as_bytes()).unwrap(),
        }
        let ended = process.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(code));
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(code != 0 || said.contains("(interrupted)"), "{said}");
    }
    // Every reply can be interrupted.
    let mut process = start(&world, "900000", &["--temperature", "1"]);
    let (mut input, mut output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
    for _ in 0..3 {
        interrupt_a_reply(&process, &mut input, &mut output);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    input.write_all(b"/exit\n").unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0));
    // While the chat waits for input, one signal ends it.
    for (name, code) in [("-INT", 130), ("-TERM", 143)] {
        let mut process = start(&world, "4", &[]);
        let (mut input, mut output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        input.write_all(b"a\n").unwrap();
        let mut byte = [0];
        while byte != [b'\n'] {
            output.read_exact(&mut byte).unwrap();
        }
        // The note that the reply was truncated follows the reply's line break.
        let mut said = process.stderr.take().unwrap();
        while byte != [b')'] {
            said.read_exact(&mut byte).unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        signal(&process, name);
        assert_eq!(process.wait().unwrap().code(), Some(code));
    }
}
