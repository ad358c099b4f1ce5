//! results.json has the same keys as that of lm-evaluation-harness.

use cl_eval::{GroupResult, RunSettings, Scores, TaskGroup, TaskResult, results, write_results};
use serde_json::{Map, Value, json};

fn scores(task: &str, documents: usize, metrics: &[(&str, f64, Option<f64>)]) -> Scores {
    let main_metric = metrics[0].0.to_owned();
    let stderr = metrics.iter().filter_map(|(m, _, e)| Some(((*m).to_owned(), (*e)?))).collect();
    let metrics = metrics.iter().map(|(m, v, _)| ((*m).to_owned(), *v)).collect();
    Scores { task: task.to_owned(), documents, main_metric, metrics, stderr }
}

fn group(name: &str, members: &[&str]) -> TaskGroup {
    TaskGroup { name: name.to_owned(), version: 2, members: members.iter().map(|&m| m.to_owned()).collect() }
}

fn example() -> Value {
    let piqa = scores("piqa", 2, &[("acc", 0.5, Some(0.5)), ("acc_norm", 1.0, Some(0.0))]);
    let gsm8k = scores("gsm8k", 1, &[("flexible_extract", 1.0, None), ("strict_match", 0.0, None)]);
    let all = scores("all", 3, &[("acc", 0.25, Some(0.1))]);
    let settings: Map<String, Value> =
        json!({"num_fewshot": 5, "seed": 1234, "version": 3}).as_object().unwrap().clone();
    let tasks = [
        TaskResult { scores: &piqa, settings: Map::new(), original: Some(500) },
        TaskResult { scores: &gsm8k, settings, original: None },
    ];
    let group = group("all", &["piqa", "gsm8k"]);
    let groups = [GroupResult { group: &group, scores: &all }];
    let run = RunSettings {
        model: "models/a".to_owned(),
        dtype: "float32".to_owned(),
        limit: Some(2),
        ..RunSettings::default()
    };
    results(&tasks, &groups, &run)
}

#[test]
fn keys_are_the_harnesss() {
    let json = example();
    let piqa = r#"{"name":"piqa","alias":"piqa","sample_len":2,"acc,none":0.5,"acc_stderr,none":0.5,"acc_norm,none":1.0,"acc_norm_stderr,none":0.0}"#;
    assert_eq!(json["results"]["piqa"].to_string(), piqa); // as written by lm-eval 0.4.13, including the order of keys
    let gsm8k = &json["results"]["gsm8k"];
    assert_eq!(
        (&gsm8k["exact_match,flexible-extract"], &gsm8k["exact_match,strict-match"]),
        (&json!(1.0), &json!(0.0))
    );
    assert_eq!(gsm8k["exact_match_stderr,strict-match"], "N/A");
    assert_eq!(
        (&json["n-shot"]["gsm8k"], &json["n-shot"]["piqa"], &json["versions"]["gsm8k"]),
        (&json!(5), &json!(0), &json!(3))
    );
    assert_eq!(json["configs"]["gsm8k"]["seed"], 1234);
    assert_eq!(json["configs"]["gsm8k"]["metric_list"].as_array().unwrap().len(), 1);
    assert_eq!(json["n-samples"]["piqa"], json!({"original": 500, "effective": 2}));
    assert_eq!(json["higher_is_better"]["gsm8k"], json!({"exact_match": true}));
    assert_eq!(json["groups"]["all"]["acc,none"], 0.25);
    assert_eq!(json["group_subtasks"], json!({"all": ["piqa", "gsm8k"]}));
    assert_eq!((&json["versions"]["all"], json["n-shot"].get("all")), (&json!(2), None)); // 0 and 5 few-shot examples
    assert_eq!(json["results"]["all"]["sample_count"], json!({"acc,none": 3}));
    assert_eq!(json["config"]["limit"], 2);
    let keys = [
        "results",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
        "max_length",
        "chat_template",
        "model_source",
        "model_name",
    ];
    assert!(keys.iter().all(|key| json.get(key).is_some()));
}

#[test]
fn groups_are_nested_as_the_harness_nests_them() {
    // As `group_subtasks` of mmlu in lm-eval 0.4.13: the subgroups, whose tasks are only listed under them.
    let of = |task: &str| scores(task, 2, &[("acc", 0.5, Some(0.5))]);
    let (tasks, all) = (["m_a", "m_b", "m_c", "m_d"].map(of), of("m"));
    let groups = [group("m", &["m_a", "m_b", "m_c", "m_d"]), group("m_x", &["m_b", "m_a"]), group("m_y", &["m_c"])];
    let tasks = tasks.each_ref().map(|scores| TaskResult { scores, settings: Map::new(), original: None });
    let groups = groups.each_ref().map(|group| GroupResult { group, scores: &all });
    let json = results(&tasks, &groups, &RunSettings::default());
    let expected = json!({"m": ["m_x", "m_y", "m_d"], "m_x": ["m_b", "m_a"], "m_y": ["m_c"]});
    assert_eq!((&json["group_subtasks"], &json["n-shot"]["m_x"]), (&expected, &json!(0)));
}

#[test]
fn files_are_whole_and_equal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/results.json");
    write_results(&path, &example()).unwrap();
    let first = std::fs::read(&path).unwrap();
    write_results(&path, &example()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), first);
    assert_eq!(serde_json::from_slice::<Value>(&first).unwrap(), example());
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    assert!(write_results(&path.join("below"), &example()).unwrap_err().to_string().contains("results.json"));
}
