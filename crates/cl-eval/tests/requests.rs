//! Requests equal those of lm-eval, text for text: `fixtures/make_requests.py` generated rows and recorded the
//! harness's own requests for them.

use std::path::{Path, PathBuf};

use cl_eval::{BoxError, Message, Request, Role, Target, TaskOptions, load_task};
use serde_json::{Value, json};

/// The same chat template as in `make_requests.py`.
fn template(messages: &[Message]) -> Result<String, BoxError> {
    let turn = |m: &Message| {
        let role = match m.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        format!("<{role}>{}</>\n", m.content)
    };
    Ok(messages.iter().map(turn).collect::<String>() + "<assistant>")
}

/// Compares requests, and returns the numbers of documents and requests.
fn compare(expected: &Path, data: &Path) -> (usize, usize) {
    let text = std::fs::read_to_string(expected).unwrap();
    let fixture: Value = serde_json::from_str(&text).unwrap();
    let (mut documents, mut requests) = (0, 0);
    for case in fixture["cases"].as_array().unwrap() {
        let count = |key: &str| case[key].as_u64().map(|n| n as usize);
        let options = TaskOptions {
            limit: count("limit"),
            num_fewshot: count("num_fewshot"),
            fewshot_seed: count("seed").map(|s| s as u32),
            system_instruction: case["system"].as_str(),
            chat: if case["chat"] == true { Some(&template) } else { None },
            fewshot_as_multiturn: case["multiturn"] == true,
            ..TaskOptions::default()
        };
        let name = case["task"].as_str().unwrap();
        let task = load_task(name, data, options).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = case["documents"].as_array().unwrap();
        assert_eq!(task.len(), expected.len(), "{name}");
        for (i, document) in expected.iter().enumerate() {
            let ours = match (task.request(i), task.target(i)) {
                (Request::Loglikelihood(asked), Target::Choice { gold, .. }) => {
                    requests += asked.len();
                    let pairs: Vec<_> = asked.into_iter().map(|r| json!([r.context, r.continuation])).collect();
                    json!({ "pairs": pairs, "gold": gold })
                }
                (Request::Continuation(asked), Target::Continuation { .. }) => {
                    requests += 1;
                    json!({ "pairs": [[asked.context, asked.continuation]] })
                }
                (Request::Generate(asked), Target::Reference { reference, .. }) => {
                    requests += 1;
                    json!({ "prompt": asked.prompt, "until": asked.stop, "gold": reference })
                }
                (Request::Generate(asked), Target::Answers { answers, .. }) => {
                    requests += 1;
                    let single = (document["gold"].is_string() && answers.len() == 1).then(|| json!(answers[0]));
                    json!({ "prompt": asked.prompt, "until": asked.stop, "gold": single.unwrap_or(json!(answers)) })
                }
                other => panic!("{name}: {other:?}"),
            };
            assert_eq!(&ours, document, "{name}, document {i}, {:?} shots", case["num_fewshot"]);
            documents += 1;
        }
    }
    (documents, requests)
}

#[test]
fn requests_are_lm_eval_s() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let (documents, requests) = compare(&fixtures.join("requests.json"), &fixtures.join("requests"));
    assert!(documents > 700 && requests > 2400, "{documents} documents, {requests} requests");
}

/// `CL_DATA`: a directory that contains `lm-eval` and `gsm8k`; `CL_REQUESTS`: the output of
/// `make_requests.py CL_DATA/lm-eval CL_REQUESTS`.
#[test]
#[ignore = "needs real data"]
fn requests_about_real_data_are_lm_eval_s() {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (Some(data), Some(requests)) = (variable("CL_DATA"), variable("CL_REQUESTS")) else {
        eprintln!("left out: CL_DATA or CL_REQUESTS is not set; 0 documents compared");
        return;
    };
    let (documents, requests) = compare(&requests, &data.join("lm-eval"));
    eprintln!("{documents} documents, {requests} requests compared");
    let others =
        ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "20Minuten", "dbpedia", "amazon", "yahoo", "agnews"];
    for name in others {
        let task = load_task(name, &data.join("trace"), TaskOptions::default()).unwrap_or_else(|e| panic!("{e}"));
        eprintln!("{name}: {} documents", task.len());
    }
}

/// `CL_LM_EVAL`: a Python interpreter that has lm-eval, or the directory of the package.
#[test]
#[ignore = "needs an installed lm-eval"]
fn the_eight_shots_of_gsm8k_cot_are_found_in_an_installed_lm_eval() {
    let Some(lm_eval) = std::env::var_os("CL_LM_EVAL").map(PathBuf::from) else {
        eprintln!("left out: CL_LM_EVAL is not set");
        return;
    };
    let samples = cl_eval::lm_eval_samples(&lm_eval, "tasks/gsm8k/gsm8k-cot.yaml").unwrap();
    let ends = |row: &cl_data::Row| row["target"].as_str().unwrap().contains(" The answer is ");
    assert_eq!((samples.rows.len(), samples.rows.iter().all(ends)), (8, true));
}
