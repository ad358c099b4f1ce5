//! Reading completed runs as results.

use std::fs;
use std::path::Path;

use cl_report::{Error, RowKind, Run, StudyResults, write};
use serde_json::json;

/// Writes a sequence of two rounds as `cl sequence` does.
fn sequence(dir: &Path, seed: u64, last: f64, order: [usize; 2]) {
    let columns = json!([
        {"name": "a", "group": "new", "round": order[0]},
        {"name": "b", "group": "new", "round": order[1]},
        {"name": "old", "group": "old", "round": null},
    ]);
    let matrix = json!({"columns": columns, "rows": ["base", "1", "1,2"],
        "scores": [[0.1, 0.2, 0.9], [0.8, 0.3, 0.8], [0.6, last, 0.7]]});
    for (t, round) in ["0-base", "1-a", "2-b"].iter().enumerate() {
        let round = dir.join("rounds").join(round);
        fs::create_dir_all(round.join("adapter")).unwrap();
        let task = |name: &str, c: usize| {
            json!({"task": name, "documents": 50, "main_metric": "exact_match",
                "metrics": {"exact_match": matrix["scores"][t][c]}, "stderr": {"exact_match": 0.01}})
        };
        let scores = json!([task("a", 0), task("b", 1), task("old", 2)]);
        fs::write(round.join("scores.json"), scores.to_string()).unwrap();
        if t > 0 {
            fs::write(round.join("log.jsonl"), "{\"step\":1,\"seconds\":1.5}\n{\"step\":2,\"seconds\":2.0}\n").unwrap();
            fs::write(round.join("adapter/adapter_model.safetensors"), [0; 1000]).unwrap();
        }
    }
    fs::write(dir.join("matrix.json"), matrix.to_string()).unwrap();
    fs::write(dir.join("config.toml"), format!("model = \"models/tiny\"\nseed = {seed}\n[train]\nepochs = 1\n"))
        .unwrap();
}

fn runs(list: &[(&str, &Path)]) -> Vec<Run> {
    list.iter().map(|(name, path)| Run { name: (*name).to_owned(), path: (*path).to_owned() }).collect()
}

#[test]
fn sequences_and_evaluations_become_results() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two, merged] = ["one", "two", "merged"].map(|name| folder.path().join(name));
    sequence(&one, 4, 0.9, [1, 2]);
    sequence(&two, 5, 0.7, [1, 2]);
    fs::create_dir(&merged).unwrap();
    let scores = json!([{"task": "a", "documents": 50, "main_metric": "exact_match", "metrics": {"exact_match": 0.5}, "stderr": {"exact_match": 0.02}}]);
    fs::write(merged.join("scores.json"), scores.to_string()).unwrap();
    let results = StudyResults::read(&runs(&[("LoRA", &one), ("LoRA", &two), ("average", &merged)]), &[]).unwrap();
    assert_eq!((results.seeds.as_slice(), results.model.as_str()), ([1, 4, 5].as_slice(), "tiny"));
    assert_eq!(results.rounds, ["a", "b"]);
    let kinds: Vec<(RowKind, u64, Option<usize>)> = results.rows.iter().map(|r| (r.kind, r.seed, r.round)).collect();
    let sequence = RowKind::Sequence;
    let expected = [
        (RowKind::Base, 4, None),
        (sequence, 4, Some(1)),
        (sequence, 4, Some(2)),
        (sequence, 5, Some(1)),
        (sequence, 5, Some(2)),
        (RowKind::Other, 1, None),
    ];
    assert_eq!(kinds, expected);
    let last = &results.rows[4];
    assert_eq!(last.scores, [Some(0.6), Some(0.7), Some(0.7)]);
    assert_eq!(last.standard_errors, [Some(0.01); 3]);
    assert_eq!((last.seconds, last.bytes), (Some(3.5), Some(1000)));
    assert_eq!(results.rows[5].scores, [Some(0.5), None, None]);

    let out = folder.path().join("report");
    write(&results, &out).unwrap();
    let csv = fs::read_to_string(out.join("tables.csv")).unwrap();
    // Mean and sample standard deviation of 0.9 and 0.7.
    let line = csv.lines().find(|l| l.contains("\"LoRA 1,2\",b,")).unwrap();
    let numbers: Vec<f64> = line.rsplit(',').skip(2).take(4).map(|f| f.parse().unwrap()).collect();
    assert_eq!(numbers[1], 2.0, "{line}");
    assert!((numbers[2] - 0.02f64.sqrt()).abs() < 1e-9, "{line}");
    let again = StudyResults::read(&runs(&[("x", &out)]), &[]).unwrap();
    assert_eq!(again.rows.len(), results.rows.len(), "a report's own results.json is a study");
    let both = StudyResults::read(&runs(&[("x", &out), ("LoRA", &one)]), &[]);
    assert!(matches!(both, Err(Error::Several { .. })));
}

#[test]
fn sequences_in_different_orders_are_not_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    sequence(&one, 1, 0.9, [1, 2]);
    sequence(&two, 1, 0.9, [2, 1]);
    let error = StudyResults::read(&runs(&[("a", &one), ("b", &two)]), &[]).unwrap_err();
    assert!(error.to_string().contains("trains on `a` in round 2, but the first sequence in round 1"), "{error}");
}

#[test]
fn what_holds_no_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(StudyResults::read(&runs(&[("x", folder.path())]), &[]).is_err());
    fs::write(folder.path().join("results.json"), "{\"rows\": 3}").unwrap();
    let error = StudyResults::read(&runs(&[("x", folder.path())]), &[]).unwrap_err();
    assert!(error.to_string().contains("results.json: not a study's results"), "{error}");
}
