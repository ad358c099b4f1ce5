//! Rounds that are more than one task: several data sets, custom column names, and their own settings.

use cl_checkpoint::Interrupt;
use cl_data::{Example, RowPlan};
use cl_eval::Group;
use cl_lab::{Event, check_sequence, read_sequence, read_study, run_sequence, run_train};
use cl_torch::tch::Kind;
use cl_train::Plan;
use serde_json::json;

use crate::world::{World, silent};

/// Writes small files of GSM8K (`train` and `fewshot` for few-shot examples, `test`) and of MetaMathQA.
fn write_math(world: &World) {
    let jsonl = |rows: Vec<serde_json::Value>| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
    let row =
        |i: usize| json!({"question": format!("{i} and {i}?"), "answer": format!("It is {}.\n#### {}", i + i, i + i)});
    let shot = |i: usize| json!({"question": format!("{i} and 1?"), "target": format!("The answer is {}.", i + 1)});
    let metamath =
        |i: usize| json!({"query": format!("{i} more than {i}?"), "response": format!("The answer is: {}", i + i)});
    for (name, text) in [
        ("gsm8k/train", jsonl((0..6).map(row).collect())),
        ("gsm8k/test", jsonl((6..9).map(row).collect())),
        ("gsm8k/fewshot", jsonl((0..8).map(shot).collect())),
        ("metamath/train", jsonl((0..5).map(metamath).collect())),
    ] {
        let path = world.path("data").join(format!("{name}.jsonl"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

/// The paper's last round: trained on MetaMathQA, evaluated on two variants of GSM8K.
const MATH: &str = "rounds=[{name='first'}, {name='math', data='metamath', scored=['gsm8k', 'gsm8k_cot'], \
                    train={micro_batch_size=2, epochs=1}}]";

#[test]
fn a_round_is_scored_by_tasks_that_it_does_not_train_on() {
    let world = World::new(Kind::Float);
    write_math(&world);
    let config = world.sequence(&["tasks=[]", MATH]);
    let matrix = world.run(&config, "s").unwrap().matrix;
    let columns: Vec<_> = matrix.columns.iter().map(|c| (c.name.as_str(), c.group, c.round)).collect();
    let expected = [("first", Group::New, Some(1)), ("gsm8k", Group::New, Some(2)), ("gsm8k_cot", Group::New, Some(2))];
    assert_eq!(columns, expected);
    // Tasks of the last round have forward transfer and no backward transfer; for earlier tasks it is the other way
    // round.
    for column in 0..3 {
        let taught_last = column > 0;
        assert_eq!(matrix.absolute_bwt(column).is_some(), !taught_last, "column {column}");
        assert_eq!(matrix.forward_transfer(column).is_some(), taught_last, "column {column}");
    }
    let plan = RowPlan::read(&world.path("s/rounds/2-math/rows.json")).unwrap();
    assert_eq!((plan.rows, plan.datasets[0].name.as_str()), (5, "metamath"));
    // Few-shot examples are GSM8K's own solved rows; the documents are those of its test split.
    let asked = std::fs::read_to_string(world.path("s/rounds/2-math/scores/gsm8k.jsonl")).unwrap();
    assert_eq!(asked.lines().count(), 3);
    assert!(!asked.contains("more than"), "a row of MetaMathQA is a shot: {asked}");
}

#[test]
fn rows_of_another_form_are_never_shots() {
    let world = World::new(Kind::Float);
    write_math(&world);
    let (metamath, gsm8k) = (world.path("data/metamath/train.jsonl"), world.path("data/gsm8k/train.jsonl"));
    std::fs::copy(metamath, gsm8k).unwrap();
    let message = world.run(&world.sequence(&["tasks=[]", MATH]), "s").unwrap_err().to_string();
    assert!(message.contains("gsm8k/train.jsonl") && message.contains("question"), "{message}");
}

#[test]
fn joint_training_takes_exact_shares_and_goes_on_inside_an_epoch() {
    let world = World::new(Kind::Float);
    let few: Vec<Example> = (0..3).map(|i| Example::pair(format!("few {i}:"), "a")).collect();
    world.task("few", &few, &few);
    let data = format!("data.train=['{}', '{}']", world.path("data/few").display(), world.path("data/first").display());
    let set = [data.as_str(), "mixture.joint='uniform'", "train.micro_batch_size=3", "train.save_steps=1"];
    let config = world.train(&set);
    run_train(&config, &world.path("whole"), false, &Interrupt::default(), &mut silent).unwrap();

    let plan = RowPlan::read(&world.path("whole/rows.json")).unwrap();
    // Six copies of three rows, next to sixteen rows.
    assert_eq!(plan.datasets.iter().map(|set| set.rows_per_epoch).collect::<Vec<_>>(), [18, 16]);
    for epoch in 0..2 {
        let mut counts = std::collections::HashMap::new();
        plan.used(epoch).for_each(|row| *counts.entry((row.dataset, row.row)).or_insert(0) += 1);
        assert!(counts.iter().all(|((set, _), &n)| n == if set == "few" { 6 } else { 1 }), "{counts:?}");
        assert_eq!(counts.len(), 19);
    }

    let interrupt = Interrupt::default();
    let stopped = run_train(&config, &world.path("cut"), false, &interrupt, &mut |event| {
        if matches!(event, Event::Step(progress) if progress.step.step == 5) {
            interrupt.request();
        }
    });
    assert!(stopped.unwrap_err().is_interrupted());
    run_train(&config, &world.path("cut"), true, &Interrupt::default(), &mut silent).unwrap();
    for file in ["adapter/adapter_model.safetensors", "model/model.safetensors", "rows.json"] {
        let read = |run: &str| std::fs::read(world.path(run).join(file)).unwrap();
        assert!(read("whole") == read("cut"), "{file} differs");
    }
}

#[test]
fn a_fixed_buffer_keeps_its_rows_over_epochs_and_rounds() {
    let world = World::new(Kind::Float);
    let rounds = "rounds=[{name='both', data=['first', 'mood'], scored=['first', 'mood']}, {name='last'}, {name='again', \
                  data='last', scored=[]}]";
    let config = world.sequence(&["tasks=[]", rounds, "replay={fraction=0.25, buffer='fixed'}", "limit.train=12"]);
    world.run(&config, "s").unwrap();
    let replayed = |round: &str, epoch| {
        let plan = RowPlan::read(&world.path(format!("s/rounds/{round}/rows.json"))).unwrap();
        let mut rows: Vec<(String, usize)> = plan.used(epoch).map(|r| (r.dataset, r.row)).collect();
        rows.retain(|(set, _)| set == "first" || set == "mood");
        rows.sort();
        rows
    };
    let buffer = replayed("2-last", 0);
    // A quarter of twelve rows, drawn from a round with two data sets.
    assert_eq!(buffer.len(), 3);
    assert!([replayed("2-last", 1), replayed("3-again", 0)].iter().all(|rows| *rows == buffer));
}

#[test]
fn a_check_says_what_each_round_takes() {
    let world = World::new(Kind::Float);
    write_math(&world);
    let config = world.sequence(&["tasks=[]", MATH, "replay.fraction=0.4"]);
    let said: Vec<String> = check_sequence(&config).iter().map(|finding| format!("{finding:?}")).collect();
    let said = said.join("\n");
    assert!(
        said.contains("round 2 (math): rows per epoch: 2 of first, 5 of metamath; 4 steps per epoch, 4 in total"),
        "{said}"
    );
    let config = world.sequence(&["tasks=[]", "rounds=[{name='first', data=['nowhere']}]"]);
    let error = run_sequence(&config, &world.path("n"), false, &Interrupt::default(), &mut silent).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[test]
fn example_configurations_read_and_the_papers_takes_its_steps() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/configs");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.file_stem().unwrap().to_string_lossy().starts_with("paper_moe") {
            continue; // configurations of mixtures, which cl-moe reads
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let studies = [("study", 3), ("smol", 1), ("paper", 1)];
        if let Some((_, seeds)) = studies.iter().find(|(name, _)| path.file_stem().unwrap() == *name) {
            assert_eq!(read_study(&path, &text, &[]).unwrap().seeds.len(), *seeds);
            continue;
        }
        let config = read_sequence(&path, &text, &[]).unwrap();
        names.push(path.file_stem().unwrap().to_string_lossy().into_owned());
        if names.last().unwrap() != "paper_lora" {
            continue;
        }
        let rounds = config.resolve_rounds().unwrap();
        // Rows of the full data; 20 epochs end at step 780, as in the published checkpoint.
        for round in &rounds[..6] {
            let plan = Plan::new(5_000, &round.train, true).unwrap();
            assert_eq!((plan.steps_per_epoch, plan.total_steps), (39, 780), "{}", round.name);
        }
        let plan = Plan::new(395_000, &rounds[6].train, true).unwrap();
        assert_eq!((rounds.len(), plan.steps_per_epoch, plan.total_steps), (7, 3_085, 6 * 3_085));
        assert_eq!(rounds[6].scored, ["gsm8k", "gsm8k_cot"]);
    }
    assert!(names.contains(&"paper_lora".to_owned()), "{names:?}");
}
