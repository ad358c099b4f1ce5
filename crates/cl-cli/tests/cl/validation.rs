//! `[validation]` as seen by a user: what is held out, logged, kept and reported.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::world::World;

fn world(validation: &str) -> World {
    let world = World::new();
    let text = world.read("train.toml");
    world.write("train.toml", &format!("{text}[validation]\n{validation}\n"));
    world
}

fn rows_of(used: &[Value]) -> BTreeSet<u64> {
    used.iter().map(|r| r["row"].as_u64().unwrap()).collect()
}

#[test]
fn held_out_rows_are_counted_logged_and_never_trained_on() {
    let world = world("fraction = 0.25\nevery = 2");
    let facts = world.ok(["check", "train.toml"]);
    assert!(facts.contains("the round: 4 of 16 rows held out for validation, evaluated every 2 steps"), "{facts}");
    assert!(facts.contains("warning: the round: only 4 validation rows"), "{facts}");
    assert!(facts.contains("rows per epoch: 12 of first; 3 steps per epoch, 9 in total"), "{facts}");
    let done = world.ok(["train", "train.toml", "--out", "r", "--set", "train.report_to=['csv']"]);
    assert!(done.contains("lowest validation loss "), "{done}");
    let log = world.lines("r/log.jsonl");
    let evaluated: Vec<u64> =
        log.iter().filter(|l| l.get("eval_loss").is_some()).map(|l| l["step"].as_u64().unwrap()).collect();
    assert_eq!(evaluated, [2, 4, 6, 8, 9]);
    assert!(world.read("r/log.csv").lines().next().unwrap().ends_with(",eval_loss"));
    let planned = world.json("r/rows.json");
    assert_eq!((planned["datasets"][0]["rows"].as_u64(), planned["rows"].as_u64()), (Some(12), Some(36)));
    assert_eq!(planned["datasets"][0]["held_out"]["rows"], 4);
    let used = rows_of(&world.rows("r"));
    assert_eq!(used.len(), 12);
    assert!(used.iter().all(|row| *row < 16));
    let again = world.ok(["train", "train.toml", "--out", "r2", "--set", "seed=43"]);
    assert!(again.contains("lowest validation loss "));
    assert_ne!(rows_of(&world.rows("r2")), used, "the seed draws them");
}

#[test]
fn early_stopping_ends_the_audit_too() {
    let world = world("fraction = 0.25\nevery = 1\npatience = 1");
    world.ok(["train", "train.toml", "--out", "r", "--set", "train.learning_rate=0.5", "--set", "train.epochs=20"]);
    let steps = world.lines("r/log.jsonl").len();
    assert!(steps < 60, "{steps} steps");
    assert_eq!(world.rows("r").len(), steps * 4, "four rows a step, and none that was not used");
}

#[test]
fn a_file_validates_without_a_row_less_to_train_on() {
    let world = world("data = 'data/last/test.json'");
    let facts = world.ok(["check", "train.toml"]);
    assert!(facts.contains("the round: 6 rows for validation, evaluated each epoch"), "{facts}");
    world.ok(["train", "train.toml", "--out", "r"]);
    assert!(world.read("r/data.blake3").contains("data/last/test.json"));
    assert_eq!(rows_of(&world.rows("r")).len(), 16);
    let sources = &world.json("r/adapter/manifest.json")["sources"];
    assert!(sources.to_string().contains("\"validation\""), "{sources}");
    world.write("data/last/test.json", &world.read("data/mood/test.json"));
    let message = world.fails(["train", "train.toml", "--out", "r", "--resume"]);
    assert!(message.contains("data/last/test.json has changed"), "{message}");
}

#[test]
fn a_round_has_its_own_validation_and_replays_no_held_out_row() {
    let world = World::new();
    let text = world.read("lora.toml").replace("tasks = [\"first\", \"mood\"]\n", "");
    let rounds = "[validation]\nfraction = 0.25\n[replay]\nfraction = 1.0\n[[rounds]]\nname = 'first'\n[[rounds]]\nname = \
                  'mood'\nvalidation = { fraction = 0.5, keep = 'last' }\n";
    world.write("s.toml", &format!("{text}{rounds}"));
    let facts = world.ok(["check", "s.toml"]);
    assert!(facts.contains("round 1 (first): 4 of 16 rows held out"), "{facts}");
    assert!(facts.contains("round 2 (mood): 8 of 16 rows held out"), "{facts}");
    world.ok(["sequence", "s.toml", "--out", "s"]);
    let first = rows_of(&world.rows("s/rounds/1-first"));
    let second = world.rows("s/rounds/2-mood");
    let replayed: Vec<Value> = second.into_iter().filter(|r| r["dataset"] == "first").collect();
    assert!(!replayed.is_empty() && rows_of(&replayed).is_subset(&first));
}

#[test]
fn wrong_settings_are_refused_by_name() {
    for (validation, part) in [
        ("fraction = 1.5", "validation.fraction = 1.5"),
        ("fraction = 0.1\ndata = 'x'", "only one of the two"),
        ("keep = 'best'", "either `fraction` or `data`"),
        ("fraction = 0.1\nkeep = 'first'", "first"),
        ("fraction = 0.1\npatience = 0", "validation.patience = 0"),
        ("data = 'nowhere.json'", "nowhere.json"),
    ] {
        let message = world(validation).fails(["train", "train.toml", "--out", "r"]);
        assert!(message.contains(part), "{message}");
    }
}
