use cl_model::is_quantizable;
use cl_torch::tch::Tensor;
use cl_torch::{Quantization, Quantized};
use serde_json::json;

use crate::world::{World, content};

const EVAL: [&str; 10] =
    ["eval", "model", "--tasks", "first,homes.jsonl", "--data", "data", "--out", "e", "--max-new-tokens", "3"];

#[test]
fn a_table_goes_to_stdout_and_scores_and_predictions_to_files() {
    let world = World::new();
    let run = world.run(EVAL);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let cells: Vec<Vec<&str>> = run.stdout.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(cells[0], ["task", "metric", "score", "stderr", "documents"]);
    assert_eq!((cells[1][..2].to_vec(), cells[1][4]), (vec!["first", "exact_match*"], "6"));
    assert_eq!((cells[2][1], cells[3][1]), ("acc*", "acc_norm"));
    let scores = world.json("e/scores.json");
    assert_eq!((&scores[0]["task"], &scores[1]["documents"]), (&"first".into(), &6.into()));
    let score = scores[1]["metrics"]["acc"].as_f64().unwrap();
    assert_eq!(cells[2][2], format!("{score:.4}"));
    let predictions = world.lines("e/homes.jsonl");
    assert_eq!((predictions.len(), world.lines("e/first.jsonl").len()), (6, 6));
    let mean = predictions.iter().map(|p| p["scores"]["acc"].as_f64().unwrap()).sum::<f64>() / 6.0;
    assert_eq!(mean, score);
    assert!(run.stderr.contains("scored homes: 6 documents"), "{}", run.stderr);
}

#[test]
fn run_again_it_asks_nothing_anew() {
    let world = World::new();
    let table = world.ok(EVAL);
    // An edited answer is kept, so the model was not asked again.
    let predictions = world.read("e/first.jsonl");
    let line = predictions.lines().next().unwrap();
    let text =
        serde_json::from_str::<serde_json::Value>(line).unwrap()["response"]["text"].as_str().unwrap().to_owned();
    world.write("e/first.jsonl", &predictions.replacen(&format!("\"text\":\"{text}\""), "\"text\":\"kept\"", 1));
    assert_eq!(world.ok(EVAL), table);
    assert!(world.read("e/first.jsonl").contains("\"text\":\"kept\""));
}

#[test]
fn a_limit_is_extended_later() {
    let world = World::new();
    world.ok(EVAL.iter().chain(&["--limit", "2"]));
    assert_eq!(world.json("e/results.json")["n-samples"]["first"], json!({"original": 6, "effective": 2}));
    let two = world.read("e/first.jsonl");
    assert_eq!(two.lines().count(), 2);
    world.ok(EVAL);
    assert!(world.read("e/first.jsonl").starts_with(&two));
    let table = world.ok(EVAL.iter().chain(&["--limit", "2"]));
    assert!(table.lines().nth(1).unwrap().ends_with(" 2"), "{table}");
    assert_eq!(world.lines("e/first.jsonl").len(), 6, "answers beyond the limit are kept");
    let scored: serde_json::Value = serde_json::from_str(&world.ok(["score", "e/first.jsonl", "--json"])).unwrap();
    assert_eq!(scored[0]["documents"], 2, "and not scored");
}

#[test]
fn more_tokens_than_the_model_has_positions_are_warned_of() {
    let world = World::new();
    let run = world.run(EVAL.iter().chain(&["--max-length", "99999"]));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stderr.contains("max_length 99999 exceeds the model's maximum length of "), "{}", run.stderr);
    let run = world.run(EVAL.iter().map(|arg| if *arg == "e" { "f" } else { arg }).chain(["--max-length", "16"]));
    assert!(!run.stderr.contains("exceeds"), "{}", run.stderr);
}

#[test]
fn another_model_adapter_or_precision_needs_another_output() {
    let world = World::new();
    world.ok(EVAL);
    world.ok(["train", "train.toml", "--out", "r"]);
    world.model("other", 2);
    let before = content(&world.path("e"));
    let others: [&[&str]; 3] =
        [&["--adapter", "r/adapter"], &["--precision", "bf16"], &["--limit", "3", "--adapter", "r/adapter"]];
    for more in others {
        let message = world.fails(EVAL.iter().chain(more));
        assert!(message.contains("e/first.jsonl: contains answers of model "), "{message}");
        assert!(message.contains("choose another output path"), "{message}");
    }
    let mut other = EVAL;
    other[1] = "other";
    world.fails(other);
    assert_eq!(content(&world.path("e")), before);
}

#[test]
fn an_adapter_beside_the_model_scores_as_the_folded_model() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r", "--set", "train.learning_rate=0.05"]);
    let (mut beside, mut folded) = (EVAL, EVAL);
    (beside[7], folded[1], folded[7]) = ("beside", "r/model", "folded");
    let table = world.ok(beside.iter().chain(&["--adapter", "r/adapter"]));
    assert_eq!(world.ok(folded), table);
}

#[test]
fn what_cannot_be_asked_is_told() {
    let world = World::new();
    world.write("data/empty/test.json", "[]");
    world.write("data/wrong.jsonl", "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 2}\n");
    world.write("data/one.jsonl", "{\"query\": \"q\", \"choices\": [\"a\"], \"gold\": 0}\n");
    world.write("data/folder/test.json/x", "");
    let rows = [
        ("nowhere", "task `nowhere`: not found in data; known tasks: C-STANCE, FOMC"),
        ("nowhere.jsonl", "data/nowhere.jsonl: not found"),
        ("empty", "data/empty/test.json: no examples"),
        ("wrong.jsonl", "data/wrong.jsonl: line 1: gold = 2, but choices are counted from 0 and there are 2"),
        ("one.jsonl", "data/one.jsonl: line 1: `choices` has length 1; at least 2 are required"),
        ("folder", "data/folder/test.json: is a directory"),
        ("FOMC", "task `FOMC`: no directory `FOMC` in data, in its subdirectory `trace`"),
        ("gsm8k", "task `gsm8k`: data/gsm8k/test.jsonl is missing"),
        ("first,first", "task `first`: listed twice"),
        ("first,../data/first", "the same as that of `first`"),
    ];
    for (tasks, part) in rows {
        let message =
            world.fails(["eval", "model", "--tasks", tasks, "--data", "data", "--out", "e", "--max-new-tokens", "3"]);
        assert!(message.contains(part), "{tasks}: {message}");
        assert!(!world.exists("e"), "{tasks}");
    }
    let message = world.fails(["eval", "model", "--tasks", "first", "--data", "data", "--out", "e"]);
    assert!(message.contains("task `first`: 64 new tokens leave no room"), "{message}");
    let mut into_a_file = EVAL;
    into_a_file[7] = "lora.toml";
    let message = world.fails(into_a_file);
    assert!(message.contains("lora.toml: is a file"), "{message}");
}

#[test]
fn predictions_of_a_task_named_by_its_path_stay_in_the_output() {
    let world = World::new();
    let before = content(&world.path("data"));
    let absolute = world.path("data/first");
    for (out, task) in [("a", absolute.to_str().unwrap()), ("b", "../data/first")] {
        world.ok(["eval", "model", "--tasks", task, "--data", "data", "--out", out, "--max-new-tokens", "3"]);
        let names: Vec<String> = content(&world.path(out)).into_iter().map(|f| f.0).collect();
        assert_eq!(names, ["first.jsonl", "results.json", "scores.json"]);
    }
    assert_eq!(content(&world.path("data")), before);
    assert!(!world.exists("first.jsonl"));
}

#[test]
fn unusual_documents_are_asked_as_well_as_they_can_be() {
    let world = World::new();
    let rows = serde_json::json!([
        {"prompt": "", "answer": "a"}, {"prompt": "first of a b c d :", "answer": ""},
        {"prompt": "a ".repeat(500), "answer": "ü"}, {"prompt": "unbekannte Wörter 日本", "answer": "a"}
    ]);
    world.write("data/ödd tæsk/test.json", &rows.to_string());
    world.ok(["eval", "model", "--tasks", "ödd tæsk", "--data", "data", "--out", "e", "--max-new-tokens", "3"]);
    assert_eq!(world.lines("e/ödd tæsk.jsonl").len(), 4);
}

#[test]
fn several_adapters_over_one_model_are_one_table() {
    let world = World::new();
    for seed in ["1", "2"] {
        let set = format!("seed={seed}");
        world.ok([
            "train",
            "train.toml",
            "--out",
            &format!("r{seed}"),
            "--set",
            "train.learning_rate=0.05",
            "--set",
            &set,
        ]);
    }
    let table =
        world.ok(EVAL.iter().chain(&["--base", "--adapter", "r1/adapter", "--adapter", "r2/adapter", "--no-cache"]));
    let cells: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(cells, ["task", "metric", "base", "r1", "r2", "documents"]);
    for (run, adapter) in [("base", None), ("r1", Some("r1/adapter")), ("r2", Some("r2/adapter"))] {
        let mut alone = EVAL;
        let out = format!("alone-{run}");
        alone[7] = &out;
        let adapter: Vec<&str> = adapter.map(|a| ["--adapter", a]).into_iter().flatten().collect();
        world.ok(alone.iter().chain(&adapter).chain(&["--no-cache"]));
        for file in ["first.jsonl", "homes.jsonl", "scores.json", "results.json"] {
            assert_eq!(world.read(&format!("e/{run}/{file}")), world.read(&format!("{out}/{file}")), "{run} {file}");
        }
    }
    let message = world.fails(EVAL.iter().chain(&["--adapter", "r1/adapter", "--adapter", "r1"]));
    assert!(message.contains("two adapters have the name `r1`"), "{message}");
}

#[test]
fn answers_are_kept_for_every_command_and_damaged_ones_asked_again() {
    let world = World::new();
    let with = |out: &'static str, more: &[&'static str]| {
        let mut args = EVAL.to_vec();
        args[7] = out;
        [args, vec!["--cache", "answers"], more.to_vec()].concat()
    };
    let table = world.ok(with("a", &[]));
    let names: Vec<String> = content(&world.path("answers")).into_iter().map(|f| f.0).collect();
    let [file] = names.as_slice() else { panic!("{names:?}") };
    let file = format!("answers/{file}");
    let lines = world.lines(&file);
    let before = world.read(&file);
    // A run with another output directory has the same requests; none is computed again.
    assert_eq!(world.ok(with("b", &[])), table);
    assert_eq!((world.read(&file), world.read("b/homes.jsonl")), (before.clone(), world.read("a/homes.jsonl")));
    // A damaged line is reported, skipped and computed again; the others are kept.
    let damaged = before.replacen("\"key\"", "\"kez\"", 1);
    world.write(&file, &damaged);
    let run = world.run(with("c", &[]));
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), table.as_str()), "{}", run.stderr);
    assert!(
        run.stderr.contains("warning: ") && run.stderr.contains("1 damaged lines (first: line 1)"),
        "{}",
        run.stderr
    );
    assert_eq!(world.read(&file).lines().count(), lines.len() + 1);
    // A different dtype counts as a different model.
    world.ok(with("d", &["--precision", "bf16"]));
    assert_eq!(content(&world.path("answers")).len(), 2);
    // With or without BOS, requests differ.
    world.ok(with("f", &["--add-bos-token", "false"]));
    let other = world.fails(with("f", &["--add-bos-token", "true"]));
    assert!(other.contains("contains answers of model"), "{other}");
}

#[test]
fn a_task_of_ones_own_and_scores_from_its_files_alone() {
    let world = World::new();
    world.write(
        "capitals.toml",
        r#"
name = "capitals"
metric = "acc"
files.eval = ["capitals"]
[multiple_choice]
context = "first of {{ letters }} :"
choices = "options"
gold = "right"
"#,
    );
    world.write(
        "capitals.jsonl",
        "{\"letters\": \"a b\", \"options\": [\"a\", \"b\"], \"right\": \"a\"}\n{\"letters\": \"c d\", \"options\": [\"c\", \"d\", \"a\"], \"right\": 2}\n",
    );
    let table = world.ok(["eval", "model", "--tasks", "capitals.toml", "--out", "e"]);
    assert!(table.contains("capitals"), "{table}");
    let results = world.json("e/results.json");
    assert_eq!(results["n-samples"]["capitals"]["effective"], 2);
    assert_eq!(results["configs"]["capitals"]["num_fewshot"], 0);
    world.ok(["eval", "model", "--tasks", "capitals.toml", "--out", "f", "--precision", "bf16"]);
    std::fs::remove_dir_all(world.path("model")).unwrap();
    std::fs::remove_file(world.path("capitals.jsonl")).unwrap();
    assert_eq!(world.ok(["score", "e"]), table);
    let compared = world.ok(["eval", "compare", "e", "f"]);
    assert!(compared.contains("capitals") && compared.contains("McNemar"), "{compared}");
}

#[test]
fn a_chat_template_that_is_not_there_is_told() {
    let world = World::new();
    let message = world.fails(EVAL.iter().chain(&["--apply-chat-template"]));
    assert!(message.contains("model: no chat template (neither chat_template.jinja nor"), "{message}");
    world.write("model/chat_template.jinja", "{% for m in messages %}{{ m.content }} {% endfor %}");
    world.ok(EVAL.iter().chain(&["--apply-chat-template"]));
    assert!(world.read("e/results.json").contains("m.content"));
}

/// Copies a model, replacing the weights of its linear layers by their values after quantization to a format.
fn dequantized(world: &World, from: &str, to: &str, format: Quantization) {
    world.copy_dir(from, to);
    let file = world.path(to).join("model.safetensors");
    let weights: Vec<(String, Tensor)> = Tensor::read_safetensors(&file).unwrap();
    let rounded = |(name, weight): (String, Tensor)| match is_quantizable(&name) {
        true => (name, Quantized::new(&weight, format).unwrap().dequantize(weight.kind())),
        false => (name, weight),
    };
    let weights: Vec<(String, Tensor)> = weights.into_iter().map(rounded).collect();
    Tensor::write_safetensors(&weights, &file).unwrap();
}

#[test]
fn a_quantized_model_answers_like_one_with_the_rounded_weights() {
    let world = World::new();
    world.ok(["train", "train.toml", "--out", "r", "--set", "train.lora.base='nf4'"]);
    for (name, format) in [("nf4", Quantization::Nf4), ("int8", Quantization::Int8)] {
        dequantized(&world, "model", &format!("dense-{name}"), format);
        let of = |model: &str, out: &str| -> Vec<String> {
            let more = ["--adapter", "r/adapter", "--out", out];
            [&["eval", model], &EVAL[2..6], &EVAL[8..], &more].concat().into_iter().map(str::to_owned).collect()
        };
        let quantized: Vec<String> =
            of("model", name).into_iter().chain(["--quantize", name].map(str::to_owned)).collect();
        let table = world.ok(&quantized);
        assert_eq!(world.ok(of(&format!("dense-{name}"), &format!("of-dense-{name}"))), table);
        let answers = |out: &str, task: &str| -> Vec<serde_json::Value> {
            world.lines(&format!("{out}/{task}.jsonl")).into_iter().map(|mut line| line["response"].take()).collect()
        };
        for task in ["first", "homes"] {
            assert_eq!(answers(name, task), answers(&format!("of-dense-{name}"), task), "{name} {task}");
        }
        assert_eq!(world.json(&format!("{name}/results.json"))["config"]["quantization"], name);
        // Answers of the quantized model cannot be reused for the dense one.
        let message = world.fails(of("model", name));
        assert!(message.contains("contains answers of model"), "{message}");
    }
    let prompt = ["generate", "model", "--prompt", "a", "--max-new-tokens", "4", "--quantize", "int8"];
    let text = world.ok(prompt);
    assert_eq!(text, world.ok([&["generate", "dense-int8"], &prompt[2..6]].concat()));
    let refused = world.run([&prompt[..7], &["int4"]].concat());
    assert!(refused.code == Some(2) && refused.stderr.contains("nf4, int8"), "{}", refused.stderr);
}
