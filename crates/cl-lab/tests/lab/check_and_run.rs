//! A check finds everything that stops a run, and a run stops on everything that the check finds, before it writes.

use cl_checkpoint::Interrupt;
use std::path::Path;

use cl_lab::{Finding, LabError, check_sequence, check_train, run_train};
use cl_torch::tch::Kind;

use crate::world::{World, silent};

fn problems(findings: Vec<Finding>) -> Vec<String> {
    let text = |finding| match finding {
        Finding::Problem(problem) => Some(problem.to_string()),
        Finding::Fact(_) => None,
    };
    findings.into_iter().filter_map(text).collect()
}

/// The error of the run reports exactly the problems found by the check.
fn agree(problems: &[String], error: Option<LabError>) {
    let told = error.map(|e| e.to_string()).unwrap_or_default();
    let expected = match problems {
        [] => String::new(),
        [one] => one.clone(),
        many => format!("{} problems:\n  {}", many.len(), many.join("\n  ")),
    };
    assert_eq!(told, expected);
}

#[test]
fn check_and_run_of_a_sequence_agree() {
    let world = World::new(Kind::Float);
    std::fs::create_dir_all(world.path("data/empty")).unwrap();
    std::fs::write(world.path("data/empty/train.json"), "[]").unwrap();
    std::fs::write(world.path("data/empty/test.json"), "[]").unwrap();
    let rows: [(&[&str], usize); 15] = [
        (&[], 0),
        (&["replay.fraction=0.1", "train.max_steps=2"], 0),
        (&["train={full={}, max_steps=2}"], 0),
        (&["profile=paper", "train.max_steps=2"], 0),
        (&["model=nowhere"], 1),
        (&["data=nowhere"], 1),
        (&["device=tpu"], 1),
        (&["tasks=['first', 'empty']"], 2),
        (&["tasks=['first', 'nowhere']"], 2),
        (&["train.lora.target_modules=['q_porj']"], 1),
        (&["train.lora.target_modules='['"], 1),
        (&["train.initial_adapter=nowhere"], 2), // it does not exist, and a sequence cannot start from an adapter
        (&["eval.max_new_tokens=64"], 2),
        (&["eval.max_length=2"], 2), // the length of an answer alone
        (&["model=nowhere", "device=tpu", "tasks=['nowhere']"], 4),
    ];
    for (i, (set, count)) in rows.into_iter().enumerate() {
        let config = world.sequence(set);
        let problems = problems(check_sequence(&config));
        assert_eq!(problems.len(), count, "{set:?}: {problems:?}");
        let out = format!("s{i}");
        agree(&problems, world.run(&config, &out).err());
        assert_eq!(world.path(out).exists(), problems.is_empty(), "{set:?}");
    }
}

#[test]
fn check_and_run_of_a_round_agree() {
    let world = World::new(Kind::Float);
    run_train(&world.train(&["train.max_steps=1"]), &world.path("small"), false, &Interrupt::default(), &mut silent)
        .unwrap();
    let adapter = world.path("small/adapter");
    let (good, bad) = (world.path("good"), world.path("bad"));
    for (dir, key, value) in [(&good, "r", "2"), (&bad, "layer_replication", "[[0, 1]]")] {
        copy_dir(&adapter, dir);
        let config = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&config).unwrap();
        config.insert(key.to_owned(), serde_json::from_str(value).unwrap());
        std::fs::write(dir.join("adapter_config.json"), serde_json::to_string(&config).unwrap()).unwrap();
    }
    let from = |dir: &Path| format!("train.initial_adapter='{}'", dir.display());
    let (from_good, from_bad) = (from(&good), from(&bad));
    let file = format!("data.train='{}'", world.path("data/first/train.json").display());
    let earlier = "data.earlier=['nowhere', 'nor/here']";
    let rows: [(&[&str], usize); 7] = [
        (&[&file], 0),
        (&[&from_good], 0),
        (&[&from_bad], 1),
        (&["data.train=nowhere"], 1),
        (&[earlier], 2),
        (&["model=nowhere", earlier], 3),
        (&["data.format=alpaca", &file], 1),
    ];
    for (i, (set, count)) in rows.into_iter().enumerate() {
        let config = world.train(set);
        let problems = problems(check_train(&config));
        assert_eq!(problems.len(), count, "{set:?}: {problems:?}");
        let out = world.path(format!("r{i}"));
        agree(&problems, run_train(&config, &out, false, &Interrupt::default(), &mut silent).err());
        assert_eq!(out.exists(), problems.is_empty(), "{set:?}");
    }
}

#[test]
fn an_adapter_that_does_not_fit_is_found_by_the_check() {
    let (world, wide) = (World::new(Kind::Float), World::new(Kind::Float));
    let config = cl_lab::toy::model_config(32);
    let options = cl_model::LoadOptions::cpu(Kind::Float);
    let model = cl_model::random_weights(&config, 1, options).unwrap();
    let (files, manifest) = (cl_lab::toy::tokenizer_files(), cl_checkpoint::Manifest::new("model"));
    model.save(&wide.path("model"), Kind::Float, &config, &files, manifest, true).unwrap();
    run_train(&wide.train(&["train.max_steps=1"]), &wide.path("r"), false, &Interrupt::default(), &mut silent).unwrap();
    let config = world.train(&[&format!("train.initial_adapter='{}'", wide.path("r/adapter").display())]);
    let problems = problems(check_train(&config));
    assert!(problems.len() == 1 && problems[0].contains("expected A [r, "), "{problems:?}");
    agree(&problems, run_train(&config, &world.path("s"), false, &Interrupt::default(), &mut silent).err());
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}
