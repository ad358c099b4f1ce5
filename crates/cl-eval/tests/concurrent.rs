//! Several evaluations at once, and an evaluation that looks for answers while another one is running.

use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use cl_eval::{
    Answered, BoxError, Error, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest, MultipleChoice,
    Question, evaluate, rescore,
};

/// Answers every request, after calling `before`.
struct Model<'a> {
    before: &'a (dyn Fn() + Sync),
    asked: usize,
}

impl LanguageModel for Model<'_> {
    fn loglikelihood(
        &mut self,
        requests: &[LoglikelihoodRequest],
        answered: Answered<'_, Loglikelihood>,
    ) -> Result<(), BoxError> {
        (self.before)();
        self.asked += requests.len();
        let answer = |length: usize| Loglikelihood { sum: -(length as f64), greedy: false, tokens: 1 };
        requests.iter().enumerate().try_for_each(|(i, r)| answered(i, answer(r.continuation.len())))
    }

    fn generate(&mut self, _: &[GenerateRequest], _: Answered<'_, String>) -> Result<(), BoxError> {
        Err("not asked for".into())
    }

    fn fingerprint(&self) -> Option<String> {
        Some("m".to_owned())
    }
}

fn task(name: &str) -> MultipleChoice {
    let question =
        |i: usize| Question { query: format!("{name} {i}"), choices: vec!["a".into(), "bb".into()], gold: 0 };
    MultipleChoice::new(name, (0..50).map(question).collect()).unwrap()
}

fn run(name: &str, path: &Path, before: &(dyn Fn() + Sync)) -> Result<usize, Error> {
    let mut model = Model { before, asked: 0 };
    let scores = evaluate(&task(name), &mut model, path, &mut |_, _| {})?;
    assert_eq!(scores.main(), 1.0);
    Ok(model.asked)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

#[test]
fn tasks_are_scored_into_one_directory_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("out");
    let all_ask = Barrier::new(4);
    std::thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let (dir, all_ask) = (&dir, &all_ask);
            scope.spawn(move || {
                let path = dir.join(format!("{name}.jsonl"));
                let wait = || {
                    all_ask.wait();
                };
                run(name, &path, &wait).unwrap();
                // Run again: all requests are already answered.
                assert_eq!(run(name, &path, &|| {}).unwrap(), 0);
            });
        }
    });
    assert_eq!(names(&dir), ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]);
}

#[test]
fn the_same_task_is_scored_by_one_and_refused_to_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out/a.jsonl");
    let refused = AtomicUsize::new(0);
    let others = || {
        for _ in 0..3 {
            let error = run("a", &path, &|| {}).unwrap_err();
            assert!(matches!(error, Error::Busy { .. }), "{error}");
            assert!(error.to_string().contains("out/a.jsonl: another process is writing"), "{error}");
            refused.fetch_add(1, Ordering::Relaxed);
        }
    };
    assert_eq!(run("a", &path, &others).unwrap(), 100);
    assert_eq!(refused.into_inner(), 3);
    assert_eq!(rescore(&task("a"), &path).unwrap().documents, 50);
    assert_eq!(names(path.parent().unwrap()), ["a.jsonl"]);
}

#[test]
fn a_line_feed_that_a_kill_cut_off_costs_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    run("a", &path, &|| {}).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let lines: Vec<&[u8]> = whole.split_inclusive(|b| *b == b'\n').collect();
    let two = lines[..2].concat();
    for (kept, asked) in [(two.len() - 1, 96), (two.len() - 2, 98), (two.len(), 96)] {
        std::fs::write(&path, &two[..kept]).unwrap();
        assert_eq!(run("a", &path, &|| {}).unwrap(), asked);
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }
}

#[test]
fn what_kills_left_of_a_file_is_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let others = [".a.jsonl.b.jsonl.x1Y2z3.part", ".aXjsonl.x1Y2z3.part", "a.jsonl.x1Y2z3.part"];
    for name in others.into_iter().chain([".a.jsonl.x1Y2z3.part"]) {
        std::fs::write(folder.path().join(name), "").unwrap();
    }
    run("a", &folder.path().join("a.jsonl"), &|| {}).unwrap();
    let mut expected = [others.as_slice(), &["a.jsonl"]].concat();
    expected.sort();
    assert_eq!(names(folder.path()), expected);
}

#[test]
fn a_damaged_log_names_the_line_and_a_fifo_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    run("a", &path, &|| {}).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let second = bytes.iter().position(|b| *b == b'\n').unwrap() + 20;
    bytes[second] = 0xff;
    std::fs::write(&path, &bytes).unwrap();
    let message = run("a", &path, &|| {}).unwrap_err().to_string();
    assert!(message.contains("a.jsonl: line 2 is not a prediction") && message.contains("move it"), "{message}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    if cfg!(unix) {
        std::fs::remove_file(&path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let message = run("a", &path, &|| {}).unwrap_err().to_string();
        assert!(message.contains("is a FIFO"), "{message}");
    }
}
