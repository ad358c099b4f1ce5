use cl_checkpoint::Interrupt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cl_lab::{StudyConfig, reproduce};
use cl_torch::tch;

use crate::world::silent;

/// The study in a few seconds; nothing is learned in it.
fn tiny() -> StudyConfig {
    StudyConfig {
        hidden_size: 16,
        pretraining_questions: 4,
        pretraining_epochs: 1,
        train_rows: 16,
        test_rows: 4,
        epochs: 2,
        ..StudyConfig::default()
    }
}

const OUT: &str = "CL_LAB_TEST_STUDY";

/// Not a test of its own: the process that the next one kills.
#[test]
#[ignore = "started by a_killed_study_goes_on_and_ends_as_if_it_had_not_been"]
fn study_to_kill() {
    let Some(out) = std::env::var_os(OUT) else { return };
    tch::set_num_threads(1);
    reproduce(&tiny(), Path::new(&out), &Interrupt::default(), &mut silent).unwrap();
}

#[test]
fn a_killed_study_goes_on_and_ends_as_if_it_had_not_been() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let (alone, killed) = (folder.path().join("alone"), folder.path().join("killed"));
    let study = reproduce(&tiny(), &alone, &Interrupt::default(), &mut silent).unwrap();
    for moment in [
        "base/log.jsonl",
        "base/model/manifest.json",
        "sequences/FFT/rounds/1-first/log.jsonl",
        "sequences/LoRA/rounds/2-mood/adapter/manifest.json",
        "sequences/LoRA-Rep/rounds/3-largest/scores/first.jsonl",
    ] {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "study::study_to_kill", "--ignored"])
            .env(OUT, &killed)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !killed.join(moment).exists() && process.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(120), "{moment} did not appear");
            std::thread::sleep(Duration::from_millis(1));
        }
        process.kill().unwrap();
        process.wait().unwrap();
    }
    let again = reproduce(&tiny(), &killed, &Interrupt::default(), &mut silent).unwrap();
    assert_eq!(again.tables, study.tables);
    for file in ["tables.md", "base/model/model.safetensors", "sequences/LoRA-Rep/matrix.json"] {
        let read = |out: &Path| std::fs::read(out.join(file)).unwrap();
        assert!(read(&alone) == read(&killed), "{file} differs");
    }
    let message = reproduce(&StudyConfig { seed: 2, ..tiny() }, &killed, &Interrupt::default(), &mut silent)
        .err()
        .unwrap()
        .to_string();
    assert!(message.contains("it has `seed: 1,`, this run has `seed: 2,`; choose another --out"), "{message}");
}

#[test]
fn the_study_has_the_papers_first_four_tables() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let study = reproduce(&tiny(), folder.path(), &Interrupt::default(), &mut silent).unwrap();
    let captions: Vec<&str> = study.tables.iter().map(|t| t.caption.as_str()).collect();
    for (i, start) in ["Table 1. Full", "Table 2. LoRA", "Table 3. Full", "Table 4. LoRA"].iter().enumerate() {
        assert!(captions[i].starts_with(start), "{captions:?}");
    }
    for (table, rows) in [(0, ["base", "FFT 1", "FFT 1,2", "FFT 1-3", "FFT 1-4"]), (3, lora())] {
        let names: Vec<&str> = study.tables[table].rows.iter().map(|r| r[0].as_str()).collect();
        assert_eq!(names[..5], rows, "{names:?}");
    }
    assert_eq!(study.tables[0].columns[1..], ["AVE", "homes", "colours"]);
    assert_eq!(study.tables[2].columns[1..], ["first", "mood", "largest", "last", "AVE"]);
    let markdown = std::fs::read_to_string(folder.path().join("tables.md")).unwrap();
    assert!(study.tables.iter().all(|t| markdown.contains(&t.markdown())));
    let names: Vec<&str> = study.matrices.iter().map(|m| m.0.as_str()).collect();
    assert_eq!(names, ["FFT", "LoRA", "LoRA-Rep"]);
    for (name, matrix) in &study.matrices {
        assert_eq!((matrix.rows.len(), matrix.columns.len()), (5, 6), "{name}");
        assert!(matrix.scores.iter().flatten().all(|s| s.is_some_and(|s| (0.0..=1.0).contains(&s))), "{name}");
    }
}

fn lora() -> [&'static str; 5] {
    ["base", "LoRA 1", "LoRA 1,2", "LoRA 1-3", "LoRA 1-4"]
}
