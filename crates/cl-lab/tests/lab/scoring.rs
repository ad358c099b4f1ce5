//! What `cl eval` and `cl check` do around the model's own computation.

use cl_checkpoint::Interrupt;
use cl_eval::{Prediction, Task, TaskOptions, load_task};
use cl_lab::{EvalConfig, Event, Finding, LoadedModel, check_sequence, check_train, score_model};
use cl_torch::tch::{Device, Kind};
use cl_train::Precision;
use serde_json::json;

use crate::world::World;

/// Scores two tasks, one of them from lm-eval, and returns the warnings.
fn score(world: &World, config: &EvalConfig, out: &str) -> Vec<String> {
    let piqa = world.path("data/piqa/validation.jsonl");
    std::fs::create_dir_all(piqa.parent().unwrap()).unwrap();
    std::fs::write(piqa, json!({"goal": "a", "sol1": "b", "sol2": "c", "label": 0}).to_string()).unwrap();
    let options = TaskOptions { max_new_tokens: Some(2), ..TaskOptions::default() };
    let load = |name: &str| load_task(name, &world.path("data"), options).unwrap();
    let tasks: Vec<Box<dyn Task>> = vec![load("piqa"), load("first")];
    let loaded = LoadedModel::open(&world.path("model"), None, Precision::F32, None, Device::Cpu).unwrap();
    let mut warnings = Vec::new();
    let mut observe = |event: Event<'_>| {
        if let Event::Warning(text) = event {
            warnings.push(text.to_owned());
        }
    };
    let scores = score_model(&loaded, &tasks, config, &world.path(out), &Interrupt::default(), &mut observe).unwrap();
    assert_eq!(scores.iter().map(|s| s.task.as_str()).collect::<Vec<_>>(), ["piqa", "first"]);
    warnings
}

#[test]
fn a_cache_that_cannot_be_written_is_a_warning() {
    let world = World::new(Kind::Float);
    std::fs::write(world.path("file"), "").unwrap();
    let cache = Some(world.path("file/responses"));
    let warnings = score(&world, &EvalConfig { cache, ..EvalConfig::default() }, "with");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("file/responses") && warnings[0].contains("--no-cache"), "{warnings:?}");
    assert!(score(&world, &EvalConfig::default(), "without").is_empty());
    let read = |out: &str| std::fs::read(world.path(out).join("first.jsonl")).unwrap();
    assert_eq!(read("with"), read("without"));
}

#[test]
fn bos_can_be_left_out_for_the_tasks_of_lm_eval_alone() {
    let world = World::new(Kind::Float);
    let models = |out: &str| {
        ["piqa", "first"].map(|task| {
            let text = std::fs::read_to_string(world.path(out).join(format!("{task}.jsonl"))).unwrap();
            let line: Prediction = serde_json::from_str(text.lines().next().unwrap()).unwrap();
            line.model.unwrap()
        })
    };
    score(&world, &EvalConfig { lm_eval_add_bos_token: Some(false), ..EvalConfig::default() }, "apart");
    let [piqa, first] = models("apart");
    assert!(piqa.ends_with(":no-bos") && first.ends_with(":f32"), "{piqa} {first}");
    score(&world, &EvalConfig { add_bos_token: Some(false), ..EvalConfig::default() }, "all");
    assert!(models("all").iter().all(|m| m.ends_with(":no-bos")));
}

fn warnings(findings: Vec<Finding>) -> Vec<String> {
    let warning = |finding| match finding {
        Finding::Fact(text) => text.strip_prefix("warning: ").map(str::to_owned),
        Finding::Problem(problem) => panic!("{problem}"),
    };
    findings.into_iter().filter_map(warning).collect()
}

#[test]
fn rows_that_are_probably_not_meant_are_warned_of() {
    let world = World::new(Kind::Float);
    assert_eq!(warnings(check_sequence(&world.sequence(&[]))), Vec::<String>::new());
    let row = |prompt: &str, answer: &str| json!({"prompt": prompt, "answer": answer});
    let rows = json!([row("a b c d e f", "g"), row("x", ""), row("x", ""), row("t", "a")]);
    std::fs::write(world.path("data/first/train.json"), rows.to_string()).unwrap();
    std::fs::write(world.path("data/mood/test.json"), json!([row("t", "a")]).to_string()).unwrap();
    let found = warnings(check_sequence(&world.sequence(&["train.max_length=4"])));
    let of_first: Vec<&String> = found.iter().filter(|w| w.contains("data/first/train.json")).collect();
    for part in [
        "2 of 4 rows have an empty answer",
        "max_length = 4",
        "1 of 4 rows repeat an earlier row",
        "1 of 4 rows have a prompt",
    ] {
        assert!(of_first.iter().any(|w| w.contains(part)), "{part}: {found:?}");
    }
    let found = warnings(check_sequence(&world.sequence(&["eval.max_length=65"])));
    let part = "eval.max_length 65 exceeds the model's maximum length of 64 tokens";
    assert!(found.iter().any(|w| w.contains(part)), "{found:?}");
    let found = warnings(check_train(&world.train(&[])));
    assert!(found.iter().any(|w| w.contains("empty answer")) && !found.iter().any(|w| w.contains("max_length")));
}
