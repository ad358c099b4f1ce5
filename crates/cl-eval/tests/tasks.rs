//! Properties of every task, whatever its metric; predictions that survive kills; tasks loaded from directories.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cl_eval::{
    Answered, BoxError, Document, Error, GenerateRequest, GenerationTask, Gold, Harness, LanguageModel, Loglikelihood,
    LoglikelihoodRequest, Metric, MultipleChoice, Question, Request, Resampling, Response, RunSettings, Scores, Target,
    Task, TaskGroup, TaskOptions, TaskResult, aggregate_group, compare, evaluate, known_tasks, load_task, load_tasks,
    metrics::rouge, rescore, results,
};
use proptest::prelude::*;

/// A model that answers with a function, counts its requests, and fails when told to.
struct Scripted<F: FnMut(&str) -> String> {
    answer: F,
    asked: usize,
    fails_after: usize,
    fingerprint: Option<String>,
}

impl<F: FnMut(&str) -> String> Scripted<F> {
    fn new(answer: F) -> Scripted<F> {
        Scripted { answer, asked: 0, fails_after: usize::MAX, fingerprint: None }
    }
}

impl<F: FnMut(&str) -> String> LanguageModel for Scripted<F> {
    /// A continuation that is the start of the answer is likely, any other one is not.
    fn loglikelihood(
        &mut self,
        requests: &[LoglikelihoodRequest],
        answered: Answered<'_, Loglikelihood>,
    ) -> Result<(), BoxError> {
        self.asked += requests.len();
        let score = |r: &LoglikelihoodRequest| {
            let likely = !r.continuation.is_empty() && (self.answer)(&r.context) == r.continuation;
            let sum = if likely { -0.1 - 0.2 } else { f64::NEG_INFINITY };
            Loglikelihood { sum, greedy: likely, tokens: 1 }
        };
        let answers: Vec<Loglikelihood> = requests.iter().map(score).collect();
        answers.into_iter().enumerate().try_for_each(|(i, a)| answered(i, a))
    }

    fn generate(&mut self, requests: &[GenerateRequest], answered: Answered<'_, String>) -> Result<(), BoxError> {
        // Answer in reverse order: the model may choose any order.
        for (i, request) in requests.iter().enumerate().rev() {
            self.asked += 1;
            if self.asked > self.fails_after {
                return Err("out of memory".into());
            }
            answered(i, (self.answer)(&request.prompt))?;
        }
        Ok(())
    }

    fn fingerprint(&self) -> Option<String> {
        self.fingerprint.clone()
    }
}

const METRICS: [Metric; 8] = [
    Metric::FirstChar,
    Metric::ExactMatch,
    Metric::RougeL,
    Metric::RougeLSwapped,
    Metric::Sari,
    Metric::EditSimilarity,
    Metric::Gsm8k,
    Metric::Gsm8kCot,
];

/// A reference and a perfect answer.
fn perfect(metric: Metric, i: usize) -> (String, String) {
    match metric {
        Metric::FirstChar => (["A", "B", "C"][i % 3].to_owned(), ["A", "B", "C"][i % 3].to_owned()),
        Metric::Gsm8k => (format!("{i} and 1.\n#### {i}"), format!("so\n#### {i}\n")),
        Metric::Gsm8kCot => (i.to_string(), format!("so. The answer is {i}.")),
        _ => (format!("Die Stadt {i} baut größer"), format!("Die Stadt {i} baut größer")),
    }
}

fn generation(metric: Metric, order: impl Iterator<Item = usize>) -> GenerationTask {
    let document = |i| Document {
        prompt: format!("prompt {i}:"),
        reference: perfect(metric, i).0,
        source: Some(format!("Source {i} of the simplified text")),
    };
    let documents = order.map(document).collect();
    GenerationTask { name: format!("{metric:?}"), metric, documents, max_new_tokens: 8, stop: vec![] }
}

fn choices(order: impl Iterator<Item = usize>) -> MultipleChoice {
    let question = |i: usize| {
        let choices = (0..4).map(|c| format!("choice {c} of {i}")).collect();
        Question { query: format!("prompt {i}:"), choices, gold: i % 4 }
    };
    MultipleChoice::new("questions", order.map(question).collect()).unwrap()
}

type Answers = Box<dyn Fn(&str) -> String>;

/// Returns every kind of task over the same documents, in a given order, with a function that gives perfect answers.
fn every_task(order: &[usize]) -> Vec<(Box<dyn Task>, Answers)> {
    let number = |prompt: &str| prompt.trim_start_matches("prompt ").trim_end_matches(':').parse::<usize>().unwrap();
    let mut tasks: Vec<(Box<dyn Task>, Answers)> = Vec::new();
    for metric in METRICS {
        let task = generation(metric, order.iter().copied());
        tasks.push((Box::new(task), Box::new(move |p| perfect(metric, number(p)).1)));
    }
    let answer = move |p: &str| format!(" choice {} of {}", number(p) % 4, number(p));
    tasks.push((Box::new(choices(order.iter().copied())), Box::new(answer)));
    tasks.push((Box::new(choices(order.iter().copied()).by_acc_norm()), Box::new(answer)));
    tasks
}

fn run(task: &dyn Task, answer: impl FnMut(&str) -> String, file: &Path) -> Scores {
    evaluate(task, &mut Scripted::new(answer), file, &mut |_, _| {}).unwrap()
}

#[test]
fn contract() {
    let folder = tempfile::tempdir().unwrap();
    let order: Vec<usize> = (0..130).collect();
    let other: Vec<usize> = (0..130).map(|i| i * 77 % 130).collect();
    for ((task, best), (shuffled, _)) in every_task(&order).into_iter().zip(every_task(&other)) {
        let name = format!("{} {}", task.name(), task.metric().main());
        let file = |what: &str| folder.path().join(format!("{name} {what}.jsonl"));

        let scores = run(task.as_ref(), &best, &file("perfect"));
        assert_eq!(scores.documents, 130);
        assert!((scores.main() - 1.0).abs() < 1e-8, "{name}: {scores:?}"); // ROUGE's F has 1e-8 in its denominator

        let nothing = run(task.as_ref(), |_| String::new(), &file("empty"));
        if task.metric().main() == "sari" {
            // By definition, an empty answer is right about deletions, and about n-grams that were not to be kept: two
            // thirds.
            assert!(nothing.main() > 0.0 && nothing.main() < 2.0 / 3.0, "{name}: {nothing:?}");
        } else if task.name() == "questions" {
            // All choices are equally unlikely, so the first one wins, which is correct for every fourth document.
            assert_eq!(nothing.main(), 33.0 / 130.0, "{name}");
        } else {
            assert_eq!(nothing.main(), 0.0, "{name}: {nothing:?}");
        }

        // Answers that are correct for some documents only, so that the mean is neither 0 nor 1.
        let some = |p: &str| {
            if p.contains('7') { best(p) } else { "Stadt 5 x".to_owned() }
        };
        let partly = run(task.as_ref(), some, &file("partly"));
        assert!(partly.main() > 0.0 && partly.main() < 1.0, "{name}: {partly:?}");
        assert_eq!(run(shuffled.as_ref(), some, &file("shuffled")), partly, "{name}: order of documents");
        assert_eq!(rescore(task.as_ref(), &file("partly")).unwrap(), partly, "{name}: from the file");
        let metrics: Vec<&String> = partly.metrics.keys().collect();
        assert_eq!(metrics, scores.metrics.keys().collect::<Vec<_>>(), "{name}: the same metrics always");
        assert!(partly.metrics.contains_key(task.metric().main()));
    }
}

#[test]
fn an_answer_of_another_kind_counts_as_empty() {
    for (task, _) in every_task(&[0, 1]) {
        let wrong = match task.request(0) {
            Request::Generate(_) => Response::Loglikelihoods(vec![-1.0]),
            Request::Loglikelihood(_) | Request::Continuation(_) => Response::Text("choice 0".to_owned()),
        };
        let empty = match task.request(0) {
            Request::Generate(_) => Response::Text(String::new()),
            Request::Loglikelihood(_) | Request::Continuation(_) => Response::Loglikelihoods(vec![]),
        };
        let score = |response| task.metric().scores(&task.target(0), response);
        assert_eq!(score(&wrong), score(&empty), "{}", task.name());
    }
}

proptest! {
    #[test]
    fn any_texts_have_scores_in_the_unit_interval(
        source in any::<String>(),
        answer in prop_oneof![any::<String>(), "[ab. \n\t<>_:LITSRNUM0-9]{0,400}"],
        reference in prop_oneof![any::<String>(), "[ab. ,\n$#0-9-]{0,300}"],
    ) {
        let target = Target::Reference { reference, source: Some(source) };
        for metric in METRICS {
            let scores = metric.scores(&target, &Response::Text(answer.clone()));
            prop_assert!(scores.contains_key(metric.main()));
            for (name, value) in scores {
                prop_assert!((0.0..=1.0).contains(&value), "{name} = {value}");
            }
        }
    }
}

#[test]
fn a_killed_run_goes_on_where_it_was_and_leaves_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("deep/whole.jsonl"), folder.path().join("cut.jsonl"));
    let task = generation(Metric::RougeL, 0..150);
    let answer = |p: &str| format!("ä {p} 的");
    let scores = run(&task, answer, &whole);
    let bytes = std::fs::read(&whole).unwrap();

    // Stopped by an error: answers given before are kept, although they are not the first ones of the file.
    let mut model = Scripted { fails_after: 128, ..Scripted::new(answer) };
    let error = evaluate(&task, &mut model, &cut, &mut |_, _| {}).unwrap_err();
    assert_eq!(error.to_string(), "task `RougeL`: the model failed: out of memory");
    let mut seen = Vec::new();
    let mut model = Scripted::new(answer);
    assert_eq!(evaluate(&task, &mut model, &cut, &mut |done, all| seen.push((done, all))).unwrap(), scores);
    assert_eq!((model.asked, seen.first(), seen.last(), seen.len()), (22, Some(&(128, 150)), Some(&(150, 150)), 23));
    assert_eq!(std::fs::read(&cut).unwrap(), bytes);

    // Killed while writing: wherever the file is truncated, even within a character, only the incomplete line is
    // requested again.
    let start = bytes.len() - 300;
    for end in (start..bytes.len()).step_by(7).chain([0, 1, bytes.len() - 1]) {
        std::fs::write(&cut, &bytes[..end]).unwrap();
        let mut model = Scripted::new(answer);
        assert_eq!(evaluate(&task, &mut model, &cut, &mut |_, _| {}).unwrap(), scores);
        assert!(model.asked <= 3 || end <= 1, "cut at {end}: asked {}", model.asked);
        assert_eq!(std::fs::read(&cut).unwrap(), bytes, "cut at {end}");
    }
    // Nothing is requested if all answers exist.
    let mut model = Scripted::new(answer);
    evaluate(&task, &mut model, &cut, &mut |_, _| {}).unwrap();
    assert_eq!(model.asked, 0);
}

#[test]
fn answers_are_found_by_their_requests() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.jsonl");
    let task = generation(Metric::ExactMatch, 0..20);
    run(&task, |p| p.to_owned(), &file);

    // Fewer documents: nothing is requested, and the other answers are kept.
    let few = generation(Metric::ExactMatch, 5..10);
    let mut model = Scripted::new(|_: &str| "x".to_owned());
    assert_eq!(evaluate(&few, &mut model, &file, &mut |_, _| {}).unwrap().documents, 5);
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 20);
    // A different metric on the same requests only requires rescoring.
    let rouge = GenerationTask { metric: Metric::RougeL, ..generation(Metric::ExactMatch, 0..20) };
    let scores = evaluate(&rouge, &mut model, &file, &mut |_, _| {}).unwrap();
    assert!(scores.metrics.contains_key("rouge_l") && !scores.metrics.contains_key("exact_match"));
    assert_eq!(model.asked, 0);
    // A prompt that occurs twice is requested once; a different setting makes a different request.
    let twice = generation(Metric::ExactMatch, [30, 30, 3].into_iter());
    assert_eq!(evaluate(&twice, &mut model, &file, &mut |_, _| {}).unwrap().documents, 3);
    assert_eq!(model.asked, 1);
    let longer = GenerationTask { max_new_tokens: 9, ..generation(Metric::ExactMatch, 0..2) };
    evaluate(&longer, &mut model, &file, &mut |_, _| {}).unwrap();
    assert_eq!(model.asked, 3);

    let error = rescore(&generation(Metric::ExactMatch, 29..33), &file).unwrap_err();
    assert!(matches!(error, Error::Unanswered { document: 0, documents: 4, .. }), "{error}");
    assert!(matches!(rescore(&task, &folder.path().join("none.jsonl")), Err(Error::Unanswered { document: 0, .. })));
}

#[test]
fn another_model_s_answers_are_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.jsonl");
    let task = generation(Metric::ExactMatch, 0..3);
    let model = |name: &str| Scripted { fingerprint: Some(name.to_owned()), ..Scripted::new(|p: &str| p.to_owned()) };
    evaluate(&task, &mut model("a"), &file, &mut |_, _| {}).unwrap();
    evaluate(&task, &mut model("a"), &file, &mut |_, _| {}).unwrap();
    let before = std::fs::read(&file).unwrap();
    let error = evaluate(&task, &mut model("b"), &file, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("contains answers of model a, expected b; remove the file"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), before, "the file is as it was");
}

#[test]
fn another_file_in_the_place_of_the_predictions_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("facts.jsonl");
    let task = generation(Metric::ExactMatch, 0..3);
    run(&task, |p| p.to_owned(), &file);
    let good = std::fs::read_to_string(&file).unwrap();
    let damaged = good.replacen("response", "respond", 1);
    for (text, line) in [
        ("{\"query\": \"q\", \"choices\": [\"a\"], \"gold\": 0}\n", 1),
        ("{\"query\": \"q\"", 1),
        ("[1, 2]", 1),
        ("\n", 1),
        (&format!("{good}notes"), 4),
        (&damaged, 1),
    ] {
        std::fs::write(&file, text).unwrap();
        let mut model = Scripted::new(|p: &str| p.to_owned());
        let error = evaluate(&task, &mut model, &file, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains(&format!("facts.jsonl: line {line} is not a prediction")), "{error}");
        assert!(matches!(rescore(&task, &file), Err(Error::NotPredictions { .. })));
        assert_eq!((std::fs::read_to_string(&file).unwrap().as_str(), model.asked), (text, 0));
    }
    // A blank line, such as editors and shells add at the end, is none of these.
    std::fs::write(&file, format!("{good}\n")).unwrap();
    rescore(&task, &file).unwrap();
}

#[test]
fn a_model_that_answers_too_little_is_an_error() {
    struct Short;
    impl LanguageModel for Short {
        fn loglikelihood(
            &mut self,
            _: &[LoglikelihoodRequest],
            _: Answered<'_, Loglikelihood>,
        ) -> Result<(), BoxError> {
            Ok(())
        }
        fn generate(&mut self, _: &[GenerateRequest], answered: Answered<'_, String>) -> Result<(), BoxError> {
            answered(0, String::new())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.jsonl");
    for task in [Box::new(generation(Metric::Sari, 0..2)) as Box<dyn Task>, Box::new(choices(0..2))] {
        let error = evaluate(task.as_ref(), &mut Short, &file, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, Error::Answers { .. }), "{error}");
    }
    let none = GenerationTask { documents: vec![], ..generation(Metric::Sari, 0..1) };
    assert!(matches!(evaluate(&none, &mut Short, &file, &mut |_, _| {}), Err(Error::NoDocuments { .. })));
    let blocked = folder.path().join("p.jsonl/below.jsonl");
    std::fs::write(&file, "").unwrap();
    let error = evaluate(&generation(Metric::Sari, 0..2), &mut Short, &blocked, &mut |_, _| {}).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::NoDirectory { .. }) && message.contains("p.jsonl: is a file"), "{message}");
    assert!(message.contains("below.jsonl") && !message.contains("os error"), "{message}");
}

fn write(path: PathBuf, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn prompt(task: &dyn Task, document: usize) -> GenerateRequest {
    match task.request(document) {
        Request::Generate(request) => request,
        Request::Loglikelihood(_) | Request::Continuation(_) => panic!("asks for log-likelihoods"),
    }
}

#[test]
fn tasks_by_name_alias_and_directory() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("trace");
    let row = r#"[{"prompt": "p ", "answer": "B"}, {"prompt": "q", "answer": "A"}]"#;
    for spec in &known_tasks()[..6] {
        write(data.join(spec.name).join("test.json"), row);
    }
    write(data.join("my task/test.jsonl"), "{\"prompt\": \"p\", \"answer\": \"a\"}\n");
    write(data.join("facts.jsonl"), "{\"query\": \"q\", \"choices\": [\"a\", \"b\"], \"gold\": 1}\n");
    let options = TaskOptions::default();
    for spec in &known_tasks()[..6] {
        for name in std::iter::once(&spec.name).chain(spec.aliases) {
            for name in [(*name).to_owned(), name.to_uppercase()] {
                let task = load_task(&name, &data, options).unwrap();
                assert_eq!(
                    (task.name(), task.len(), task.metric().main()),
                    (spec.name, 2, spec.metric.main()),
                    "{name}"
                );
                let request = prompt(task.as_ref(), 0);
                assert_eq!((request.prompt.as_str(), request.max_new_tokens), ("p ", spec.max_new_tokens));
            }
        }
    }
    for alias in ["C-STANCE", "cstance", "FOMC", "MeetingBank", "meeting", "Py150", "ScienceQA", "science", "20Minuten"]
    {
        assert!(load_task(alias, &data, options).is_ok(), "{alias}");
    }
    let limited = TaskOptions { limit: Some(1), max_new_tokens: Some(3), metric: Some(Metric::RougeL), ..options };
    let task = load_task("my task", &data, limited).unwrap();
    assert_eq!((task.len(), task.metric().main(), prompt(task.as_ref(), 0).max_new_tokens), (1, "rouge_l", 3));
    for name in ["my task", "fomc", "facts.jsonl"] {
        let all = load_task(name, &data, options).unwrap().len();
        let task = load_task(name, &data, TaskOptions { limit: Some(1), ..options }).unwrap();
        assert_eq!((task.len(), task.available()), (1, all), "{name}");
    }
    assert_eq!(load_task("fomc", &data, options).unwrap().len(), 2);
    assert_eq!(load_task("my task", &data, options).unwrap().metric().main(), "exact_match");
    assert_eq!(load_task("facts.jsonl", &data, options).unwrap().name(), "facts");

    for (name, part) in [
        ("nothing", "task `nothing`: not found in"),
        ("", "known tasks: C-STANCE, FOMC"),
        ("gsm8k", "gsm8k/test.jsonl is missing"),
        ("gone.jsonl", "gone.jsonl"),
    ] {
        let error = load_task(name, &data, options).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
    let none = TaskOptions { limit: Some(0), ..options };
    assert!(matches!(load_task("FOMC", &data, none), Err(Error::NoDocuments { .. })));
    write(data.join("FOMC/test.json"), "[{\"prompt\": 1}]");
    let error = load_task("FOMC", &data, options).err().unwrap().to_string();
    assert!(error.contains("test.json: row 0"), "{error}");
}

#[test]
fn gsm8k_is_asked_as_lm_eval_asks() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("trace");
    std::fs::create_dir_all(&data).unwrap();
    let rows = |n: usize| -> String {
        (0..n)
            .map(|i| format!("{{\"question\": \"Question: {i}?\", \"answer\": \"so {i}\\n#### {i},000\"}}\n"))
            .collect()
    };
    write(folder.path().join("gsm8k/test.jsonl"), &(rows(2) + "{\"question\": \"x\", \"answer\": \"42\"}\n"));
    let options = TaskOptions::default();
    let error = load_task("gsm8k", &data, options).err().unwrap().to_string();
    assert!(error.contains("train.jsonl is missing; the 5 few-shot examples"), "{error}");
    write(folder.path().join("gsm8k/train.jsonl"), &rows(7473));
    let task = load_task("gsm8k", &data, options).unwrap();
    // random.Random(1234).sample(range(7473), 5), twice: see fixtures/python_sample.json.
    for (document, drawn) in [(0, [6374, 3610, 957, 61, 742]), (1, [7462, 6610, 4769, 286, 5501])] {
        let shots: String =
            drawn.iter().map(|i| format!("Question: Question: {i}?\nAnswer: so {i}\n#### {i},000\n\n")).collect();
        let request = prompt(task.as_ref(), document);
        assert_eq!(request.prompt, format!("{shots}Question: Question: {document}?\nAnswer:"));
        assert_eq!((request.max_new_tokens, request.stop.join("|").as_str()), (256, "Question:|</s>|<|im_end|>"));
    }
    let score =
        |task: &dyn Task, d, text: &str| task.metric().scores(&task.target(d), &Response::Text(text.to_owned()));
    assert_eq!(score(task.as_ref(), 1, "… #### 1000")["strict_match"], 1.0);
    assert_eq!(score(task.as_ref(), 1, "it is $1,000.")["flexible_extract"], 1.0);
    assert_eq!(score(task.as_ref(), 2, "42")["flexible_extract"], 1.0, "an answer without a mark");

    let error = load_task("gsm8k_cot", &data, options).err().unwrap().to_string();
    assert!(error.contains("pip install lm-eval") && error.contains("--lm-eval python3"), "{error}");
    assert!(error.contains("gsm8k_cot/fewshot.jsonl") && !error.contains('\n'), "{error}");
    let package = folder.path().join("site-packages");
    let yaml = package.join("lm_eval/tasks/gsm8k/gsm8k-cot.yaml");
    let samples: String =
        (0..8).map(|i| format!("  - question: q{i}\n    target: 't{i}.\n\n      The end.'\n")).collect();
    write(yaml.clone(), &format!("task: gsm8k_cot\nfewshot_config:\n  sampler: first_n\n  samples:\n{samples}"));
    for place in [package.as_path(), &package.join("lm_eval"), &yaml] {
        let task = load_task("gsm8k_cot", &data, TaskOptions { lm_eval: Some(place), ..options }).unwrap();
        let shots: String = (0..8).map(|i| format!("Q: q{i}\nA: t{i}.\nThe end.\n\n")).collect();
        assert_eq!(prompt(task.as_ref(), 0).prompt, format!("{shots}Q: Question: 0?\nA:"));
        assert!(serde_json::to_string(&task.settings()).unwrap().contains("gsm8k-cot.yaml"));
    }
    let shots = folder.path().join("lm-eval/gsm8k_cot/fewshot.jsonl");
    write(shots.clone(), "{\"question\": \"a\", \"target\": \"b. The answer is 1.\"}\n{\"question\": \"c\"}\n");
    let two = TaskOptions { num_fewshot: Some(2), ..options };
    let error = load_task("gsm8k_cot", &data, two).err().unwrap().to_string();
    assert!(
        error.contains("fewshot.jsonl: row 1") && error.contains("no `answer`, `target`; the row has question"),
        "{error}"
    );
    write(shots, "{\"question\": \"a\", \"target\": \"b. The answer is 1.\"}\n");
    let error = load_task("gsm8k_cot", &data, options).err().unwrap().to_string();
    assert!(error.contains("8 few-shot examples need 8 rows to draw from, but there are 1"), "{error}");
    let one = TaskOptions { num_fewshot: Some(1), ..options };
    let task = load_task("gsm8k_cot", &data, one).unwrap();
    assert_eq!(prompt(task.as_ref(), 0).prompt, "Q: a\nA: b. The answer is 1.\n\nQ: Question: 0?\nA:");
    assert_eq!(score(task.as_ref(), 1, "The answer is 1,000.")["strict_match"], 1.0);
    assert_eq!(score(task.as_ref(), 1, "#### 1000")["strict_match"], 0.0);
}

#[test]
fn the_paper_s_tasks_by_harness_and_its_rouge() {
    let folder = tempfile::tempdir().unwrap();
    let row = r#"{"prompt": "p", "answer": "a b", "question": "q", "goal": "g", "sol1": "1", "sol2": "2", "label": 0}"#;
    for name in ["MeetingBank", "FOMC", "gsm8k", "other"] {
        write(folder.path().join(name).join("test.jsonl"), row);
    }
    write(folder.path().join("piqa/validation.jsonl"), row);
    let paper = TaskOptions { num_fewshot: Some(0), profile: cl_data::Profile::Paper, ..TaskOptions::default() };
    let load = |name: &str| load_task(name, folder.path(), paper).unwrap();
    for (name, harness, main) in [
        ("MeetingBank", Harness::Trace, "rouge_l_swapped"),
        ("FOMC", Harness::Trace, "first_char"),
        ("gsm8k", Harness::LmEval, "flexible_extract"),
        ("piqa", Harness::LmEval, "acc_norm"),
        ("other", Harness::Other, "exact_match"),
    ] {
        assert_eq!((load(name).harness(), load(name).metric().main()), (harness, main), "{name}");
    }
    // A text with several longest common subsequences; which words are found depends on the direction of the traceback.
    let target = Target::Reference { reference: "a b c a".to_owned(), source: None };
    let answer = Response::Text("b a c b a b".to_owned());
    let (ours, paper) = (Metric::RougeL.scores(&target, &answer), Metric::RougeLSwapped.scores(&target, &answer));
    assert_eq!(ours, paper);
    let as_scripted = rouge::rouge_l("a b c a", "b a c b a b").f;
    assert_eq!(paper["rouge_l_swapped"], as_scripted);
    let method = load_task("MeetingBank", folder.path(), TaskOptions::default()).unwrap();
    assert_eq!(method.metric().main(), "rouge_l");
}

#[test]
fn a_metric_s_name_in_a_configuration() {
    let names: BTreeMap<String, Metric> =
        METRICS.into_iter().map(|m| (serde_json::to_string(&m).unwrap().replace('"', ""), m)).collect();
    let expected =
        ["edit_similarity", "exact_match", "first_char", "gsm8k", "gsm8k_cot", "rouge_l", "rouge_l_swapped", "sari"];
    assert_eq!(names.keys().collect::<Vec<_>>(), expected);
}

const CAPITALS: &str = r#"
name = "capitals"
metric = "acc"
description = "Answer about {{ continent }}.\n\n"
files.eval = ["capitals"]
fewshot.exclude_document = true

[multiple_choice]
context = "Capital of {{ country }}?"
choices = "cities"
gold = "capital"
"#;

const CITIES: &str = r#"{"continent": "Europe", "country": "France", "cities": ["Lyon", "Paris"], "capital": "Paris"}
{"continent": "Asia", "country": "Japan", "cities": ["Tokyo", "Osaka"], "capital": "Tokyo"}
"#;

#[test]
fn a_task_of_one_s_own() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    write(data.join("capitals.toml"), CAPITALS);
    write(data.join("capitals.jsonl"), CITIES);
    let options = TaskOptions { num_fewshot: Some(1), ..TaskOptions::default() };
    let task = load_task("capitals.toml", data, options).unwrap();
    let shown = "Answer about Europe.\n\nCapital of Japan? Tokyo\n\nCapital of France?";
    let Request::Loglikelihood(asked) = task.request(0) else { panic!() };
    assert_eq!((asked[1].context.as_str(), asked[1].continuation.as_str()), (shown, " Paris"));
    let settings = task.settings();
    assert_eq!((&settings["num_fewshot"], &settings["fewshot_seed"]), (&1.into(), &1234.into()));
    // Examples from the documents themselves never include the document, unless lm-eval's rules apply.
    for (keys, excludes) in [("", true), ("harness = \"lm-eval\"", false), ("fewshot.exclude_document = false", false)]
    {
        write(data.join("other.toml"), &CAPITALS.replace("fewshot.exclude_document = true", keys));
        let other = load_task("other.toml", data, options).unwrap();
        assert_eq!(other.settings()["exclude_document"], excludes, "{keys}");
        assert!(!excludes || (0..2).all(|i| other.request(i) == task.request(i)));
    }
    let scores = run(task.as_ref(), |_| " Paris".to_owned(), &data.join("predictions.jsonl"));
    assert_eq!(scores.metrics["acc"], 1.0, "the first choice wins where none is likely");

    for (from, to, parts) in [
        ("metric =", "metrics =", ["capitals.toml", "unknown key `metrics` (did you mean `metric`?)"]),
        ("\"acc\"", "\"rouge_l\"", ["capitals.toml: `metric`", "acc_norm or probability_mass"]),
        ("{{ country }}", "{{ country", ["capitals.toml: `multiple_choice.context`", "syntax error"]),
        ("{{ country }}", "{{ land }}", ["capitals.jsonl: row 0", "`multiple_choice.context`: no `land`; the row has"]),
        ("\"cities\"", "\"country\"", ["capitals.jsonl: row 0", "expected a list of strings"]),
        ("\"capital\"", "\"2\"", ["`multiple_choice.gold`: is 2", "below 2"]),
        ("\"capital\"", "\"country\"", ["`multiple_choice.gold`: is", "France"]),
        ("\"capital\"", "\"{{ capital }}\"", ["`multiple_choice.gold`: is an expression", "remove {{"]),
        ("[\"capitals\"]", "[\"gone\"]", ["gone.jsonl is missing", "documents"]),
        ("gold =", "continuation = \"x\"\ngold =", ["`multiple_choice`", "either `context`"]),
        ("gold =", "labels = \"[1, 0]\"\ngold =", ["capitals.toml: `multiple_choice`", "either `gold` or `labels`"]),
        ("gold = \"capital\"", "", ["capitals.toml: `multiple_choice`", "either `gold` or `labels`"]),
        ("gold = \"capital\"", "labels = \"[1]\"", ["row 0", "`multiple_choice.labels`: is [1], expected 2 labels"]),
        (
            "gold = \"capital\"",
            "labels = \"[0, 2]\"",
            ["row 0", "`multiple_choice.labels`: is [0, 2], expected 2 labels"],
        ),
        ("gold = \"capital\"", "labels = \"[0, 0]\"", ["row 0", "at least one of them 1"]),
        ("gold = \"capital\"", "labels = \"capital\"", ["row 0", "`multiple_choice.labels`: is \"Paris\""]),
    ] {
        write(data.join("capitals.toml"), &CAPITALS.replacen(from, to, 1));
        let error = load_task("capitals.toml", data, TaskOptions::default()).err().unwrap().to_string();
        assert!(parts.iter().all(|p| error.contains(p)), "{to}: {error}");
    }
    let own = "name = \"t\"\nmetric = \"exact_match\"\nfiles.eval = [\"capitals\"]\n";
    for (keys, part) in [
        (
            "generation = { prompt = \"p\", target = \"t\", stop = [\"\"] }",
            "`generation.stop`: must not contain an empty string",
        ),
        ("generation = { prompt = \"p\", target = \"t\", max_new_tokens = 0 }", "`generation.max_new_tokens`"),
        ("loglikelihood = { context = \"c\", continuation = \"t\" }", "`metric`: must be greedy_match"),
        ("", "exactly one of [multiple_choice], [generation] and [loglikelihood]"),
    ] {
        write(data.join("own.toml"), &format!("{own}{keys}"));
        let error = load_task("own.toml", data, options).err().unwrap().to_string();
        assert!(error.contains("own.toml") && error.contains(part), "{error}");
    }
    write(
        data.join("own.toml"),
        &format!("{own}generation = {{ prompt = \"{{{{ country }}}}\", target = \"{{{{ capital }}}}\" }}"),
    );
    assert_eq!(prompt(load_task("own.toml", data, options).unwrap().as_ref(), 0).max_new_tokens, 256);
}

/// A task with several right choices: loaded, answered, saved, scored again, and compared.
#[test]
fn several_choices_can_be_right() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let task = CAPITALS.replace("\"acc\"", "\"probability_mass\"").replace("gold = \"capital\"", "labels = \"right\"");
    write(data.join("capitals.toml"), &task);
    let row = r#"{"continent": "Asia", "country": "Japan", "cities": ["Osaka", "Tokyo", "Edo"], "right": [0, 1, 1]}"#;
    write(data.join("capitals.jsonl"), &format!("{row}\n{}\n", row.replace("[0, 1, 1]", "[1, 0, 1]")));
    let options = TaskOptions { num_fewshot: Some(1), ..TaskOptions::default() };
    let task = load_task("capitals.toml", data, options).unwrap();
    let Request::Loglikelihood(asked) = task.request(1) else { panic!() };
    assert!(asked[0].context.contains("Japan? Tokyo\n\n"), "the first right choice is shown: {}", asked[0].context);
    assert!(matches!(task.target(0), Target::Choice { gold: Gold::Several(right), .. } if right == [1, 2]));

    // Only Tokyo is likely at all.
    let predictions = data.join("predictions.jsonl");
    let scores = run(task.as_ref(), |_| " Tokyo".to_owned(), &predictions);
    assert_eq!(
        (scores.main_metric.as_str(), scores.main(), scores.stderr["probability_mass"]),
        ("probability_mass", 0.5, 0.5)
    );
    assert_eq!(rescore(task.as_ref(), &predictions).unwrap(), scores);
    let text = std::fs::read_to_string(&predictions).unwrap();
    assert!(text.contains(r#""gold":[1,2]"#) && text.contains(r#""gold":[0,2]"#), "{text}");
    let (from_file, lines) = cl_eval::score_file(&predictions).unwrap().remove(0);
    assert_eq!(from_file, scores);
    assert_eq!(Metric::Acc.lacks(&lines[0].target), None);
    assert_eq!(Metric::Acc.scores(&lines[0].target, &lines[0].response)["acc"], 1.0);
    let result = TaskResult { scores: &scores, settings: task.settings(), original: None };
    let json = results(&[result], &[], &RunSettings::default());
    assert_eq!(json["results"]["capitals"]["acc,none"], 0.5);
    assert_eq!(json["results"]["capitals"]["acc_stderr,none"], 0.5);

    let other = data.join("other.jsonl");
    run(task.as_ref(), |_| String::new(), &other); // all are equally unlikely
    let comparison = compare(&predictions, &other, Resampling::default()).unwrap();
    let of = &comparison.tasks[0].metrics["probability_mass"];
    assert!(
        (of.means.a - 0.5).abs() < 1e-15 && (of.means.b - 2.0 / 3.0).abs() < 1e-15 && of.mcnemar.is_none(),
        "{of:?}"
    );
}

/// A task of continuations: loaded, answered, saved, scored again, and written as lm-eval's results.
#[test]
fn continuations_have_greedy_matches_and_a_perplexity() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let task = "name = \"capitals\"\nmetric = \"greedy_match\"\nfiles.eval = [\"capitals\"]\n\
                loglikelihood = { context = \"Capital of {{ country }}?\", continuation = \" {{ capital }}\" }\n";
    write(data.join("capitals.toml"), task);
    let rows = "{\"country\": \"France\", \"capital\": \"Paris\"}\n{\"country\": \"Japan\", \"capital\": \"Tokyo\"}\n";
    write(data.join("capitals.jsonl"), rows);
    let options = TaskOptions { num_fewshot: Some(1), ..TaskOptions::default() };
    let shots = load_task("capitals.toml", data, options).unwrap();
    let Request::Continuation(asked) = shots.request(0) else { panic!() };
    // The delimiter precedes the continuation of an example only, as in lm-eval.
    let context = "Capital of Japan?  Tokyo\n\nCapital of France?";
    assert_eq!((asked.context.as_str(), asked.continuation.as_str()), (context, " Paris"));

    let task = load_task("capitals.toml", data, TaskOptions::default()).unwrap();
    let file = |name: &str| data.join(name).with_extension("predictions.jsonl");
    let answer = |context: &str| if context.contains("France") { " Paris" } else { " Tokyo" }.to_owned();
    let scores = run(task.as_ref(), answer, &file("right"));
    let perplexity = (0.1_f64 + 0.2).exp();
    assert_eq!((scores.main_metric.as_str(), scores.main()), ("greedy_match", 1.0));
    assert_eq!((scores.metrics["perplexity"], scores.stderr["perplexity"]), (perplexity, 0.0));
    let text = std::fs::read_to_string(file("right")).unwrap();
    assert!(text.contains(r#""target":{"continuation":{"continuation":" Paris"}}"#), "{text}");
    assert_eq!(rescore(task.as_ref(), &file("right")).unwrap(), scores);
    let (from_file, lines) = cl_eval::score_file(&file("right")).unwrap().remove(0);
    assert_eq!(from_file, scores);
    assert_eq!(Metric::GreedyMatch.lacks(&lines[0].target), None);
    for other in [Metric::Acc, Metric::ExactMatch] {
        assert!(
            other.lacks(&lines[0].target).is_some() && !other.scores(&lines[0].target, &lines[0].response).is_empty()
        );
    }
    let json = results(
        &[TaskResult { scores: &scores, settings: task.settings(), original: None }],
        &[],
        &RunSettings::default(),
    );
    assert_eq!(json["results"]["capitals"]["acc,none"], 1.0);
    assert_eq!(json["results"]["capitals"]["perplexity,none"], perplexity);
    assert_eq!(json["higher_is_better"]["capitals"], serde_json::json!({"acc": true, "perplexity": false}));
    assert_eq!(json["configs"]["capitals"]["metric_list"][1]["aggregation"], "perplexity");

    // An impossible continuation: the perplexity is infinite, and left out of a group's as well.
    let partly = run(task.as_ref(), |_| " Paris".to_owned(), &file("partly"));
    assert_eq!((partly.main(), partly.metrics.get("perplexity")), (0.5, None));
    let named = |scores: &Scores, task: &str| Scores { task: task.to_owned(), ..scores.clone() };
    let group = |members: &[&str]| TaskGroup {
        name: "all".to_owned(),
        version: 1,
        members: members.iter().map(|m| (*m).to_owned()).collect(),
    };
    let all = [named(&scores, "a"), named(&scores, "b"), named(&partly, "c")];
    assert_eq!(aggregate_group(&group(&["a", "b"]), &all).unwrap().metrics, scores.metrics);
    let with_infinite = aggregate_group(&group(&["a", "c"]), &all).unwrap();
    assert_eq!(with_infinite.metrics, BTreeMap::from([("greedy_match".to_owned(), 0.75)]));

    let comparison = compare(&file("right"), &file("partly"), Resampling::default()).unwrap();
    assert!((comparison.tasks[0].metrics["greedy_match"].means.difference.value + 0.5).abs() < 1e-15);
}

/// Task files of lm-evaluation-harness: what is not supported is an error that names the key. Requests are compared with
/// the harness's in `requests.rs`.
#[test]
fn task_files_of_lm_eval_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    write(data.join("capitals.jsonl"), CITIES);
    const TASK: &str = "task: capitals\ndataset_path: json\ndataset_kwargs: {data_files: {test: capitals.jsonl}}\n\
                        output_type: multiple_choice\ntest_split: test\ndoc_to_text: country\ndoc_to_choice: cities\n\
                        doc_to_target: capital\nmetric_list: [{metric: acc}, {metric: f1}]\nmetadata: {version: 1.5}\n";
    write(data.join("capitals.yaml"), TASK);
    let options = TaskOptions::default();
    let task = load_task("capitals.yaml", data, options).unwrap();
    let settings = task.settings();
    assert_eq!((task.name(), task.metric(), &settings["version"]), ("capitals", Metric::Acc, &1.into()));
    assert!(settings["source"].as_str().unwrap().ends_with("without its metrics f1"), "{settings:?}");

    for (from, to, parts) in [
        ("doc_to_text: country", "doc_to_text: !function utils.text", ["`doc_to_text`", "utils.text is Python code"]),
        (
            "doc_to_choice: cities",
            "doc_to_choice: !function utils.all",
            ["`doc_to_choice`", "utils.all is Python code"],
        ),
        ("doc_to_choice: cities", "doc_to_choice: \"a, {{ b }}\"", ["`doc_to_choice`", "one expression"]),
        ("doc_to_choice: cities", "doc_to_choice: [1, 2]", ["`doc_to_choice`", "a list of texts"]),
        ("task: capitals", "task: [a, b]", ["`task`", "a single task"]),
        ("multiple_choice", "loglikelihood_rolling", ["`output_type`", "cl eval perplexity"]),
        ("metric: acc}", "metric: mcc}", ["`metric_list`", "acc or acc_norm"]),
        ("test_split", "process_docs: !function utils.p\ntest_split", ["`process_docs`", "Python code"]),
        ("test_split", "gen_prefix: x\ntest_split", ["`gen_prefix`", "is not supported"]),
        ("test_split: test", "", ["`test_split`", "the split of the documents"]),
        ("{test: capitals.jsonl}", "{test: [capitals.jsonl, b.jsonl]}", ["`dataset_kwargs.data_files`", "one file"]),
        ("{test: capitals", "{train: capitals", ["`dataset_kwargs.data_files`", "one file for each split"]),
        ("capitals.jsonl", "gone.jsonl", ["gone.jsonl", "is missing"]),
        ("dataset_path: json", "dataset_path: csv", ["`dataset_path`", "JSON Lines"]),
        ("task: capitals", "include: gone.yaml\ntask: capitals", ["gone.yaml", "not found"]),
        ("task: capitals", "include: capitals.yaml\ntask: capitals", ["`include`", "16 files"]),
        ("task: capitals", "task: {", ["capitals.yaml", "line"]),
    ] {
        write(data.join("capitals.yaml"), &TASK.replacen(from, to, 1));
        let error = load_task("capitals.yaml", data, options).err().unwrap_or_else(|| panic!("{to}")).to_string();
        assert!(parts.iter().all(|p| error.contains(p)), "{to}: {error}");
    }
}

/// A task of generated answers with several right ones, filters and options of the comparison: loaded, answered, saved,
/// scored again, compared, and written as lm-eval's results. The comparison itself is tested in `metrics.rs`.
#[test]
fn answers_are_filtered_and_compared_with_several_right_ones() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    const TASK: &str = r#"
name = "sums"
metric = "exact_match"
files.eval = ["sums"]

[generation]
prompt = "{{ q }} ="
targets = "a"
stop = ["\n"]

[generation.exact_match]
regexes_to_ignore = [","]

[[generation.exact_match.filter_list]]
name = "last-number"
filter = [{ function = "regex", regex_pattern = "[0-9,]+", group_select = -1 }, { function = "take_first" }]

[[generation.exact_match.filter_list]]
name = "none"
filter = [{ function = "remove_whitespace" }]
"#;
    write(data.join("sums.toml"), TASK);
    write(data.join("sums.jsonl"), "{\"q\": \"1+1\", \"a\": [\"two\", 2]}\n{\"q\": \"999+1\", \"a\": \"1000\"}\n");
    let shot = TaskOptions { num_fewshot: Some(1), ..TaskOptions::default() };
    assert_eq!(prompt(load_task("sums.toml", data, shot).unwrap().as_ref(), 1).prompt, "1+1 = two\n\n999+1 =");

    let task = load_task("sums.toml", data, TaskOptions::default()).unwrap();
    let predictions = data.join("sums.predictions.jsonl");
    let answer = |prompt: &str| if prompt.starts_with('1') { " two " } else { "It is 1,000." }.to_owned();
    let scores = run(task.as_ref(), answer, &predictions);
    assert_eq!((scores.main_metric.as_str(), scores.main()), ("exact_match,last-number", 0.5));
    assert_eq!(scores.metrics["exact_match"], 0.5);
    assert_eq!(rescore(task.as_ref(), &predictions).unwrap(), scores);
    let (from_file, lines) = cl_eval::score_file(&predictions).unwrap().remove(0);
    assert_eq!(from_file, scores);
    let target = &lines[0].target;
    assert_eq!(target, &serde_json::from_str(&serde_json::to_string(target).unwrap()).unwrap());
    assert_eq!((Metric::RougeL.lacks(target), Metric::Sari.lacks(target).is_some()), (None, true));
    assert!(Metric::RougeL.scores(target, &lines[0].response)["rouge_l"] > 0.99);
    let result = TaskResult { scores: &scores, settings: task.settings(), original: None };
    let json = results(&[result], &[], &RunSettings::default());
    let of = &json["results"]["sums"];
    assert_eq!((&of["exact_match,last-number"], &of["exact_match,none"]), (&0.5.into(), &0.5.into()));
    assert_eq!(json["configs"]["sums"]["metric_list"].as_array().unwrap().len(), 1);
    assert_eq!(json["configs"]["sums"]["exact_match"]["regexes_to_ignore"][0], ",");
    let other = data.join("other.jsonl");
    run(task.as_ref(), |_| "2 or 1000".to_owned(), &other);
    let comparison = compare(&predictions, &other, Resampling::default()).unwrap();
    assert_eq!(comparison.tasks[0].main_metric, "exact_match,last-number");
    assert_eq!(comparison.overall.difference.value, 0.0);

    // Another metric compares the first right answer.
    let sari = TaskOptions { metric: Some(Metric::Sari), ..TaskOptions::default() };
    let source = Some("1+1 =".to_owned());
    let expected = Target::Reference { reference: "two".to_owned(), source };
    assert_eq!(load_task("sums.toml", data, sari).unwrap().target(0), expected);

    for (from, to, parts) in [
        ("targets = \"a\"", "", ["`generation`", "either `target` or `targets`"]),
        ("metric = \"exact_match\"", "metric = \"sari\"", ["`metric`", "must be exact_match"]),
        ("\"none\"", "\"last-number\"", ["`generation.exact_match.filter_list`", "\"last-number\" twice"]),
        ("[0-9,]+", "[0-9,+", ["line 16", "invalid regular expression"]),
        ("remove_whitespace", "majority_vote", ["majority_vote", "take_first"]),
        ("regexes_to_ignore", "regexes", ["regexes_to_ignore", "ignore_case"]),
        ("\"a\"", "\"[]\"", ["generation.targets", "at least one text"]),
        ("\"a\"", "\"none\"", ["generation.targets", "a text or a list"]),
    ] {
        write(data.join("sums.toml"), &TASK.replacen(from, to, 1));
        let error = load_task("sums.toml", data, TaskOptions::default()).err().unwrap_or_else(|| panic!("{to}"));
        assert!(parts.iter().all(|p| error.to_string().contains(p)), "{to}: {error}");
    }
}

/// What is not supported in lm-eval's tasks of generated answers is an error that names the key.
#[test]
fn generation_tasks_of_lm_eval_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    write(data.join("sums.jsonl"), "{\"q\": \"1+1\", \"a\": 2}\n");
    const TASK: &str = "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\n\
                        doc_to_text: q\ndoc_to_target: a\ngeneration_kwargs: {max_gen_toks: 7, until: x}\n\
                        metric_list: [{metric: exact_match, ignore_case: true}, {metric: !function utils.f1}]\n\
                        filter_list: [{name: low, filter: [{function: lowercase}, {function: take_first}]}]\n";
    write(data.join("sums.yaml"), TASK);
    let task = load_task("sums.yaml", data, TaskOptions::default()).unwrap();
    let request = prompt(task.as_ref(), 0);
    assert_eq!((request.max_new_tokens, request.stop.as_slice()), (7, ["x".to_owned()].as_slice()));
    let Target::Answers { answers, exact_match } = task.target(0) else { panic!() };
    assert_eq!(
        (answers, exact_match.ignore_case, exact_match.main().as_str()),
        (vec!["2".to_owned()], true, "exact_match,low")
    );
    assert!(task.settings()["source"].as_str().unwrap().ends_with("without its metrics utils.f1"));
    write(data.join("sums.yaml"), "include: all.yaml\ngeneration_kwargs: null\nfewshot_delimiter: '|'\n");
    write(data.join("all.yaml"), TASK);
    let request = prompt(load_task("sums.yaml", data, TaskOptions::default()).unwrap().as_ref(), 0);
    assert_eq!((request.max_new_tokens, request.stop.as_slice()), (256, ["|".to_owned()].as_slice()));

    for (from, to, parts) in [
        ("lowercase", "majority_vote", ["`filter_list`", "majority_vote"]),
        ("function: lowercase", "function: take_first", ["filter_list", "only as the last filter"]),
        ("ignore_case: true", "aggregation: median", ["`metric_list`", "the aggregation mean"]),
        ("ignore_case: true", "aggregation: !function utils.a", ["`metric_list`", "the aggregation mean"]),
        ("doc_to_target: a", "doc_to_target: Best Answer", ["`doc_to_target`", "the name of a field"]),
        ("max_gen_toks: 7", "temperature: '0.7'", ["`generation_kwargs.do_sample`", "greedily"]),
        ("lowercase", "!function utils.Mine", ["`filter_list`", "!function utils.Mine"]),
        ("lowercase", "regex, regex_pattern: '('", ["`filter_list`", "invalid regular expression"]),
        ("ignore_case", "ignore_cas", ["`metric_list`", "ignore_case"]),
        ("metric: exact_match", "metric: bleu", ["`metric_list`", "expected exact_match"]),
        ("max_gen_toks: 7", "do_sample: true", ["`generation_kwargs.do_sample`", "greedily"]),
        ("max_gen_toks: 7", "temperature: 0.7", ["`generation_kwargs.do_sample`", "greedily"]),
        ("max_gen_toks: 7", "num_beams: 4", ["`generation_kwargs.num_beams`", "not supported"]),
        ("max_gen_toks: 7", "max_gen_toks: 0", ["`generation_kwargs.max_gen_toks`", "an integer from 1"]),
        ("until: x", "until: [1]", ["`generation_kwargs.until`", "a string"]),
        ("doc_to_target: a", "doc_to_target: [a]", ["`doc_to_target`", "not supported"]),
        ("doc_to_text", "doc_to_choice: [x]\ndoc_to_text", ["`doc_to_choice`", "not supported"]),
    ] {
        write(data.join("sums.yaml"), &TASK.replacen(from, to, 1));
        let error = load_task("sums.yaml", data, TaskOptions::default()).err().unwrap_or_else(|| panic!("{to}"));
        assert!(parts.iter().all(|p| error.to_string().contains(p)), "{to}: {error}");
    }
}

/// A requested metric of generated answers does not apply to multiple choice and continuations, where it has no meaning.
#[test]
fn a_requested_metric_applies_to_tasks_of_its_kind() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    write(data.join("capitals.toml"), &CAPITALS.replace("\"acc\"", "\"acc_norm\""));
    write(data.join("capitals.jsonl"), CITIES);
    let questions = "{\"query\": \"a?\", \"choices\": [\"b\", \"c\"], \"gold\": 0}\n";
    write(data.join("questions.jsonl"), questions);
    write(data.join("own/test.json"), "[{\"prompt\": \"a\", \"answer\": \"b\"}]");
    for (asked, expected) in [
        (None, ["acc_norm", "acc", "exact_match"]),
        (Some(Metric::EditSimilarity), ["acc_norm", "acc", "edit_similarity"]),
        (Some(Metric::Acc), ["acc", "acc", "exact_match"]),
        (Some(Metric::GreedyMatch), ["acc_norm", "acc", "exact_match"]),
    ] {
        let options = TaskOptions { metric: asked, ..TaskOptions::default() };
        let main = |name| load_task(name, data, options).unwrap().metric().main();
        assert_eq!(["capitals.toml", "questions.jsonl", "own"].map(main), expected, "{asked:?}");
    }
}

#[test]
fn a_fixed_number_of_shots_stays() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let options = TaskOptions { num_fewshot: Some(1), ..TaskOptions::default() };
    write(data.join("capitals.jsonl"), CITIES);
    for (shots, expected) in [("", 0), ("\nfewshot.num_fewshot = 1", 1), ("\nfewshot.num_fewshot = 2", 2)] {
        let fixed = format!("fewshot.exclude_document = false\nfewshot.fixed = true{shots}");
        write(data.join("capitals.toml"), &CAPITALS.replace("fewshot.exclude_document = true", &fixed));
        let task = load_task("capitals.toml", data, options).unwrap();
        let Request::Loglikelihood(asked) = task.request(0) else { panic!() };
        assert_eq!(asked[0].context.matches("Capital of").count(), expected + 1);
        assert_eq!(task.settings()["num_fewshot"], expected);
    }
}

#[test]
fn mmlu_is_a_group() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path();
    let row = |subject: &str| {
        format!(
            "{{\"question\": \"q\", \"subject\": \"{subject}\", \"choices\": [\"a\",\"b\",\"c\",\"d\"], \"answer\": 1}}\n"
        )
    };
    let part =
        |set: &cl_eval::TaskSet| set.tasks.iter().map(|t| t.name()["mmlu_".len()..].to_owned()).collect::<Vec<_>>();
    write(data.join("mmlu/test.jsonl"), &row("virology"));
    let one = load_tasks("mmlu_virology", data, TaskOptions::default()).unwrap();
    assert_eq!((part(&one), one.groups.len()), (vec!["virology".to_owned()], 0));
    let error = load_task("mmlu", data, TaskOptions::default()).err().unwrap().to_string();
    assert!(error.contains("`mmlu` is a group of 57 tasks") && error.contains("mmlu_abstract_algebra"), "{error}");
    let error = load_task("mmlu_alchemy", data, TaskOptions::default()).err().unwrap();
    assert!(matches!(error, Error::UnknownTask { .. }), "{error}");
    let error = load_tasks("mmlu", data, TaskOptions::default()).err().unwrap();
    assert!(matches!(error, Error::NoDocuments { .. }), "{error}");
    // The subjects are those listed in the description.
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tasks/mmlu.toml")).unwrap();
    let subjects = text.lines().filter_map(|l| l.strip_prefix("    \"")?.strip_suffix("\","));
    let rows: String = subjects.map(|s| row(s).repeat(1 + s.len() % 3)).collect();
    write(data.join("mmlu/test.jsonl"), &rows);
    let all = load_tasks("mmlu", data, TaskOptions::default()).unwrap();
    let sizes: Vec<usize> = all.groups.iter().map(|g| g.members.len()).collect();
    assert_eq!((all.tasks.len(), sizes.iter().sum::<usize>(), sizes[0]), (57, 114, 57));
    assert_eq!(load_tasks("mmlu_stem", data, TaskOptions::default()).unwrap().tasks.len(), 19);
    let scores: Vec<Scores> = (all.tasks.iter())
        .map(|t| run(t.as_ref(), |_| " B".to_owned(), &data.join(format!("{}.jsonl", t.name()))))
        .collect();
    let pooled = aggregate_group(&all.groups[0], &scores).unwrap();
    assert_eq!((pooled.documents, pooled.metrics["acc"]), (rows.lines().count(), 1.0));
    assert!(matches!(aggregate_group(&all.groups[0], &scores[1..]), Err(Error::NoMember { .. })));
}

#[test]
fn pooled_standard_errors_are_lm_eval_s() {
    // pooled_sample_stderr([0.1, 0.05], [10, 40]), and the mean weighted by size.
    let score = |task: &str, documents, acc, stderr| Scores {
        task: task.to_owned(),
        documents,
        main_metric: "acc".to_owned(),
        metrics: BTreeMap::from([("acc".to_owned(), acc)]),
        stderr: BTreeMap::from([("acc".to_owned(), stderr)]),
    };
    let group = TaskGroup { name: "g".to_owned(), version: 1, members: vec!["a".to_owned(), "b".to_owned()] };
    let pooled = aggregate_group(&group, &[score("a", 10, 0.5, 0.1), score("b", 40, 0.75, 0.05)]).unwrap();
    assert!((pooled.metrics["acc"] - 0.7).abs() < 1e-15);
    assert!((pooled.stderr["acc"] - 0.0447213595499958).abs() < 1e-15, "{}", pooled.stderr["acc"]);
}
