//! Checkpoints that are kept as adapters or models, and runs that are finished with their last checkpoint.

use std::path::Path;

use cl_checkpoint::{Interrupt, Manifest};
use cl_lab::{Event, LabError, TrainRun, finish_train_on, read_train, run_train};
use cl_torch::tch::Kind;
use cl_train::{Ranks, TrainError, read_log};

use crate::world::{World, silent};

const FULL: &str = "train={full={}, epochs=2, learning_rate=1e-2}";

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Requests a stop when `step` has ended; the run stops after the next one.
fn stop_after(step: u64, config: &TrainRun, out: &Path) {
    let interrupt = Interrupt::default();
    let stopped = run_train(config, out, false, &interrupt, &mut |event| {
        if matches!(event, Event::Step(progress) if progress.step.step == step) {
            interrupt.request();
        }
    });
    assert!(stopped.unwrap_err().is_interrupted());
}

fn finish(config: &TrainRun, out: &Path) -> Result<(), LabError> {
    finish_train_on(&Ranks::alone(), config, out, &Interrupt::default(), &mut silent).map(|_| ())
}

#[test]
fn the_last_checkpoints_are_what_shorter_runs_give() {
    for (set, trained, weights) in
        [(&[][..], "adapter", "adapter_model.safetensors"), (&[FULL], "model", "model.safetensors")]
    {
        let world = World::new(Kind::Float);
        let run = |more: &[&str], out: &str| {
            let config = world.train(&[set, more].concat());
            run_train(&config, &world.path(out), false, &Interrupt::default(), &mut silent).unwrap();
        };
        run(&["train.save_steps=2", "train.keep_checkpoints=2"], "r");
        // Eight steps, of which the last has the result itself.
        assert_eq!(names(&world.path("r/checkpoints")), ["step-4", "step-6"]);
        run(&["train.max_steps=6"], "short");
        let read = |file: String| std::fs::read(world.path(file)).unwrap();
        assert!(read(format!("r/checkpoints/step-6/{weights}")) == read(format!("short/{trained}/{weights}")));
        let kept = world.path("r/checkpoints/step-6");
        assert_eq!(Manifest::verify(&kept).unwrap(), []);
        let manifest = Manifest::read(&kept).unwrap();
        assert_eq!((manifest.kind.as_str(), &manifest.config.unwrap()["step"]), (trained, &6.into()));
    }
}

#[test]
fn a_stopped_run_is_finished_with_its_checkpoint() {
    for (set, trained, weights) in
        [(&[][..], "adapter", "adapter_model.safetensors"), (&[FULL], "model", "model.safetensors")]
    {
        let world = World::new(Kind::Float);
        let config = world.train(set);
        let out = world.path("r");
        stop_after(4, &config, &out);
        finish(&config, &out).unwrap();
        let short = world.train(&[set, &["train.max_steps=5"]].concat());
        run_train(&short, &world.path("short"), false, &Interrupt::default(), &mut silent).unwrap();
        for file in [format!("{trained}/{weights}"), "model/model.safetensors".to_owned(), "rows.json".to_owned()] {
            let read = |run: &str| std::fs::read(world.path(run).join(&file)).unwrap();
            assert!(read("r") == read("short"), "{file}");
        }
        assert_eq!(read_log(&out.join("log.jsonl")).unwrap().len(), 5);
        assert!(!out.join("state").exists());
        // The run is complete, so nothing is left to be done.
        finish(&config, &out).unwrap();
        run_train(&config, &out, true, &Interrupt::default(), &mut silent).unwrap();
        assert_eq!(read_log(&out.join("log.jsonl")).unwrap().len(), 5);
    }
}

#[test]
fn nothing_to_finish_is_an_error_that_leaves_nothing() {
    let world = World::new(Kind::Float);
    let error = finish(&world.train(&[]), &world.path("r")).unwrap_err();
    assert!(matches!(&error, LabError::Train(e) if matches!(**e, TrainError::NoCheckpoint { .. })), "{error}");
    assert!(!world.path("r").exists());
}

#[test]
fn checkpoints_are_not_kept_without_steps_or_weights_in_full() {
    for (train, part) in [("", "save_steps = 0"), ("save_steps = 1\nzero_stage = 3\n", "zero_stage = 3")] {
        let text = format!("model = 'm'\n[data]\ntrain = 'd'\n[train]\n{train}keep_checkpoints = 1\n[train.full]\n");
        let error = read_train("memory".as_ref(), &text, &[]).unwrap_err().to_string();
        assert!(error.contains("keep_checkpoints") && error.contains(part), "{error}");
    }
}
