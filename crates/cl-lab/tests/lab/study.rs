use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cl_checkpoint::Interrupt;
use cl_lab::{
    LabError, StudyConfig, StudyEvent, StudyOptions, StudySizes, TinyConfig, plan_study, read_study, run_study,
    sketch_study,
};
use cl_torch::tch::Kind;

use crate::world::{World, silent};

/// The tiny study, reduced to run in seconds; nothing is learned in it.
fn tiny() -> TinyConfig {
    TinyConfig {
        seeds: vec![1],
        hidden_size: 16,
        pretraining_epochs: 1,
        pretraining_questions: 4,
        train_rows: 8,
        test_rows: 4,
        epochs: 1,
        quick: true,
        ..TinyConfig::default()
    }
}

/// Selects one stage of each kind.
fn some() -> StudyOptions {
    let names = [
        "sequence-fft.",
        "sequence-lora-rep",
        "joint-lora.",
        "merge-fft-average-3",
        "merge-ties-2",
        "merge-dare-ties-2",
        "merge-dare-ties-delta-2",
        "blend-a",
        "blend-trained",
        "mix-7",
    ];
    let jobs = std::num::NonZero::new(2);
    StudyOptions { jobs, only: names.map(str::to_owned).to_vec(), ..StudyOptions::default() }
}

fn ignore(_: StudyEvent) {}

fn run(out: &Path) {
    let tiny = tiny();
    tiny.write_world(out, &Interrupt::default(), &mut silent).unwrap();
    run_study(&tiny.study(out), out, &some(), &Interrupt::default(), &mut ignore).unwrap();
}

fn results(out: &Path) -> String {
    std::fs::read_to_string(out.join("results.json")).unwrap()
}

const OUT: &str = "CL_LAB_TEST_STUDY";

/// Not a test by itself: the process that the next test kills.
#[test]
#[ignore = "started by a_killed_study_goes_on_and_ends_as_if_it_had_not_been"]
fn study_to_kill() {
    let Some(out) = std::env::var_os(OUT) else { return };
    run(Path::new(&out));
}

#[test]
fn a_killed_study_goes_on_and_ends_as_if_it_had_not_been() {
    let folder = tempfile::tempdir().unwrap();
    let (alone, killed) = (folder.path().join("alone"), folder.path().join("killed"));
    run(&alone);
    for moment in [
        "base/log.jsonl",
        "stages/base/scores",
        "stages/sequence-fft.seed1/run/rounds/2-tone/log.jsonl",
        "stages/sequence-lora-rep.seed1/run/rounds/1-stance/adapter/manifest.json",
        "stages/merge-ties-2.seed1/adapter",
        "stages/mix-7.seed1/key",
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
    run(&killed);
    // Results do not depend on the study's path: random masks are derived from the names of stages.
    assert_eq!(results(&killed), results(&alone));
}

/// Number of models below a directory.
fn models_in(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let count = |path: std::path::PathBuf| match path.is_dir() {
        true => models_in(&path),
        false => usize::from(path.ends_with("model.safetensors")),
    };
    entries.map(count).sum()
}

#[test]
fn processes_share_the_stages_of_a_study_and_take_over_from_one_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (alone, shared) = (folder.path().join("alone"), folder.path().join("shared"));
    run(&alone);
    tiny().write_world(&shared, &Interrupt::default(), &mut silent).unwrap();
    let start = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "study::study_to_kill", "--ignored"]).env(OUT, &shared).stdout(Stdio::null());
        command.spawn().unwrap()
    };
    let (mut killed, mut other) = (start(), start());
    let started = Instant::now();
    while !shared.join("stages/sequence-fft.seed1/run/rounds/2-tone/log.jsonl").exists() {
        assert!(started.elapsed() < Duration::from_secs(120) && other.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    // This process is the third one.
    let mut elsewhere = BTreeSet::new();
    run_study(&tiny().study(&shared), &shared, &some(), &Interrupt::default(), &mut |event| {
        if let StudyEvent::FinishedElsewhere { name, .. } = event {
            elsewhere.insert(name);
        }
    })
    .unwrap();
    assert!(!elsewhere.is_empty(), "the other process completed no stage");
    assert!(other.wait().unwrap().success());
    assert_eq!(results(&shared), results(&alone));
    assert_eq!(models_in(&shared.join("stages")), models_in(&alone.join("stages")));
}

#[test]
fn another_study_waits_for_the_processes_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = tiny();
    tiny.write_world(folder.path(), &Interrupt::default(), &mut silent).unwrap();
    let study = tiny.study(folder.path());
    let other = StudyConfig { name: "other".to_owned(), ..study.clone() };
    let mut refused = None;
    let options = StudyOptions { only: vec!["base".to_owned()], ..StudyOptions::default() };
    run_study(&study, folder.path(), &options, &Interrupt::default(), &mut |event| {
        if let StudyEvent::Begun { .. } = event {
            let outcome = run_study(&other, folder.path(), &options, &Interrupt::default(), &mut ignore);
            refused = Some(outcome.unwrap_err().to_string());
        }
    })
    .unwrap();
    let message = refused.unwrap();
    assert!(message.contains("another process is using it with different settings"), "{message}");
}

#[test]
fn a_change_makes_only_what_it_concerns_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    run(out);
    let mut config = tiny().study(out);
    let done = |config: &StudyConfig| {
        let mut begun = None;
        let observe = &mut |event| {
            if let StudyEvent::Begun { stages, done } = event {
                begun = Some((stages, done));
            }
        };
        run_study(config, out, &some(), &Interrupt::default(), observe).map(|_| begun.unwrap())
    };
    let (stages, all) = done(&config).unwrap();
    assert_eq!(all, stages, "nothing has changed");
    let before = results(out);
    let base = StudyOptions { only: vec!["base".to_owned()], ..StudyOptions::default() };
    run_study(&config, out, &base, &Interrupt::default(), &mut ignore).unwrap();
    assert_eq!(results(out), before, "a call for one stage forgets nothing of the others");
    config.full.insert("learning_rate".to_owned(), 2e-3.into());
    let left: Vec<String> =
        plan_study(&config, out, &some()).unwrap().stages.into_iter().filter(|s| !s.done).map(|s| s.name).collect();
    assert!(left.iter().all(|name| !name.contains("lora") && !name.contains("ties") && name != "base"), "{left:?}");
    assert!(left.iter().any(|name| name == "mix-7.seed1") && left.iter().any(|name| name == "sequence-fft.seed1"));
    done(&config).unwrap();
    assert_ne!(results(out), before);
    // Evaluation settings affect all stages, including merges and the base.
    config.eval.add_bos_token = Some(false);
    assert!(plan_study(&config, out, &some()).unwrap().stages.iter().all(|stage| !stage.done));
    config.eval.add_bos_token = None;
    assert!(plan_study(&config, out, &some()).unwrap().stages.iter().all(|stage| stage.done));
    // Editing a test row affects all stages.
    edit(&out.join("data/tone/test.json"), " is ", " was ");
    assert!(plan_study(&config, out, &some()).unwrap().stages.iter().all(|stage| !stage.done));
}

/// Replaces the first occurrence of a text in a file.
fn edit(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{}", path.display());
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// What a study starts, and its results.
fn started(config: &StudyConfig, out: &Path) -> (BTreeSet<String>, String) {
    let mut names = BTreeSet::new();
    run_study(config, out, &StudyOptions::default(), &Interrupt::default(), &mut |event| {
        if let StudyEvent::Started { name, .. } = event {
            names.insert(name);
        }
    })
    .unwrap();
    (names, results(out))
}

#[test]
fn another_evaluation_repeats_no_training() {
    let world = World::new(Kind::Float);
    let compare = "compare = ['sequence', 'merge', 'mixture']\nmembers = [3]";
    let config = StudyConfig { seeds: vec![3], ..own(&world, compare) };
    let mut other = config.clone();
    other.eval.max_new_tokens = Some(1);
    other.eval.tasks = Some(vec!["mood".to_owned(), "first".to_owned()]);
    let (out, fresh) = (world.path("study"), world.path("fresh"));
    started(&config, &out);
    let logs = |method: &str| {
        let stages = std::fs::read_dir(out.join("stages")).unwrap().map(|stage| stage.unwrap().path());
        let of_method = stages.filter(|dir| dir.file_name().unwrap().to_string_lossy().contains(method));
        let rounds = of_method.filter_map(|dir| std::fs::read_dir(dir.join("run/rounds")).ok()).flatten();
        let logs = rounds.map(|round| round.unwrap().path().join("log.jsonl")).filter(|log| log.exists());
        let times = logs.map(|log| (log.metadata().unwrap().modified().unwrap(), log));
        times.collect::<BTreeSet<_>>()
    };
    let (lora, full) = (logs("lora"), logs("fft"));
    assert_eq!((lora.len(), full.len()), (6, 6));
    let (names, after) = started(&other, &out);
    assert!(names.contains("base") && names.contains("sequence-lora.seed3") && names.contains("blend-arrow.seed3"));
    assert_eq!(after, started(&other, &fresh).1, "the results are those of a study that began with these settings");
    assert_eq!(logs("lora"), lora, "adapters are kept, and not trained again");
    assert_ne!(logs("fft"), full, "models of earlier rounds were removed, and are needed to score them");
    assert_eq!(started(&config, &out).1, started(&config, &world.path("first")).1);
    // Checkpoints and logs change no result.
    let mut config = config;
    config.train.insert("save_steps".to_owned(), 2.into());
    let plan = plan_study(&config, &out, &StudyOptions::default()).unwrap();
    assert!(plan.stages.iter().filter(|stage| !stage.name.contains("trained")).all(|stage| stage.done));
}

#[test]
fn other_data_of_one_round_concerns_the_stages_that_train_on_it() {
    let world = World::new(Kind::Float);
    let config = StudyConfig { seeds: vec![3], ..own(&world, "compare = ['sequence', 'merge']\nmembers = [2]") };
    let out = world.path("study");
    started(&config, &out);
    edit(&world.path("data/mood/train.json"), "the", "a");
    let plan = plan_study(&config, &out, &StudyOptions::default()).unwrap();
    let left: Vec<&str> = plan.stages.iter().filter(|stage| !stage.done).map(|stage| stage.name.as_str()).collect();
    let done = ["base", "one-lora-1-first.seed3", "one-lora-3-largest.seed3", "one-fft-1-first.seed3"];
    assert!(left.contains(&"sequence-lora.seed3") && left.contains(&"one-fft-2-mood.seed3"), "{left:?}");
    assert!(left.contains(&"merge-ties-2.seed3") && done.iter().all(|name| !left.contains(name)), "{left:?}");
}

/// The stages of joint training have one round, called `joint`.
#[test]
fn joint_training_depends_on_all_rounds_even_if_one_is_called_joint() {
    let world = World::new(Kind::Float);
    std::fs::rename(world.path("data/first"), world.path("data/joint")).unwrap();
    let mut config = own(&world, "compare = ['joint']");
    config.tasks[0] = "joint".to_owned();
    let out = world.path("study");
    started(&config, &out);
    edit(&world.path("data/mood/train.json"), "the", "a");
    let plan = plan_study(&config, &out, &StudyOptions::default()).unwrap();
    assert!(plan.stages.iter().all(|stage| stage.done == (stage.name == "base")), "{plan:?}");
}

/// A hand-written study of custom tasks.
fn own(world: &World, more: &str) -> StudyConfig {
    let text = format!(
        "name = 'mine'\nmodel = '{}'\ndata = '{}'\ntasks = ['first', 'mood', 'largest']\nseeds = [3, 4]\n{more}\n\
         [train]\nepochs = 1\n[lora]\nlearning_rate = 1e-2\nlora = {{ r = 2 }}\n[router]\nlearning_rate = 1e-2\n[eval]\nmax_new_tokens = 2\n",
        world.path("model").display(),
        world.path("data").display()
    );
    toml::from_str(&text).unwrap()
}

#[test]
fn models_that_stages_left_out_are_made_of_are_kept() {
    let world = World::new(Kind::Float);
    let config = own(&world, "compare = ['merge']\nmembers = [3]");
    let out = world.path("study");
    let run = |only: &[&str]| {
        let only = only.iter().map(|name| (*name).to_owned()).collect();
        let options = StudyOptions { only, ..StudyOptions::default() };
        run_study(&config, &out, &options, &Interrupt::default(), &mut ignore).unwrap();
        let models = std::fs::read_dir(out.join("stages")).unwrap().map(|stage| stage.unwrap().path());
        models.filter(|dir| dir.to_string_lossy().contains("one-fft")).map(|dir| models_in(&dir)).sum::<usize>()
    };
    assert_eq!(run(&["one-fft"]), 6);
    assert_eq!(run(&["merge-fft-average-3.seed3"]), 3, "those of the other seed are needed");
    assert_eq!(run(&[]), 0);
}

#[test]
fn stages_are_complete_by_their_records_alone() {
    let world = World::new(Kind::Float);
    let config = own(&world, "compare = ['merge']\nmembers = [3]");
    let (whole, records) = (world.path("whole"), world.path("records"));
    let run = |out: &Path, only: &str| {
        let options = StudyOptions { only: vec![only.to_owned()], ..StudyOptions::default() };
        let mut started = Vec::new();
        run_study(&config, out, &options, &Interrupt::default(), &mut |event| {
            if let StudyEvent::Started { name, .. } = event {
                started.push(name);
            }
        })
        .unwrap();
        started
    };
    run(&whole, "base");
    std::fs::create_dir_all(records.join("stages/base")).unwrap();
    for file in ["study.json", "stages/base/stage.json"] {
        std::fs::copy(whole.join(file), records.join(file)).unwrap();
    }
    assert_eq!(run(&records, "one-lora-1"), ["one-lora-1-first.seed3", "one-lora-1-first.seed4"]);
}

#[test]
fn a_study_of_ones_own_has_a_row_for_everything_it_compares() {
    let world = World::new(Kind::Float);
    let config =
        own(&world, "compare = ['sequence', 'joint', 'merge', 'mixture']\nmembers = [3]\nexperts = ['first', 'mood']");
    let out = world.path("study");
    let results = run_study(&config, &out, &StudyOptions::default(), &Interrupt::default(), &mut ignore).unwrap();
    let count = |method: &str| results.rows.iter().filter(|row| row.method == method).count();
    // With two seeds: a sequence has one row per round, and each one-round model that merges and mixtures use has one
    // row.
    for (method, rows) in
        [("base", 1), ("LoRA", 2 * (3 + 3)), ("Joint-FFT", 2), ("TIES", 2), ("MoE-FFT (trained)", 4), ("LoRA-Rep", 0)]
    {
        assert_eq!(count(method), rows, "{method}");
    }
    // Mixtures of two and of three fully fine-tuned models, and one of the adapters, each with router statistics.
    for (method, experts) in [
        ("MoE-LoRA (untrained)", ["first", "mood", "largest"].as_slice()),
        ("MoE-LoRA (trained)", &["first", "mood", "largest"]),
        ("MoE-FFT (untrained)", &["first", "mood"]),
        ("MoE-FFT (prototypes)", &["first", "mood"]),
        ("MoE-FFT (trained)", &["first", "mood"]),
    ] {
        let row = results.rows.iter().find(|row| row.method == method).unwrap();
        let routing = row.routing.as_ref().unwrap();
        assert_eq!(routing.experts, experts, "{method}");
        assert_eq!(routing.tasks.iter().map(|t| t.task.as_str()).collect::<Vec<_>>(), ["first", "mood", "largest"]);
        for task in &routing.tasks {
            assert!((task.shares.iter().sum::<f64>() - 1.0).abs() < 1e-4, "{method}: {task:?}");
        }
    }
    // Untrained routers distribute tokens differently than prototypes, and these differently than trained routers.
    let shares = |method: &str| {
        let row = results.rows.iter().find(|row| row.method == method && row.members == Some(2)).unwrap();
        row.routing.clone().unwrap().tasks
    };
    assert_ne!(shares("MoE-FFT (untrained)"), shares("MoE-FFT (prototypes)"));
    assert_ne!(shares("MoE-FFT (prototypes)"), shares("MoE-FFT (trained)"));
    assert_eq!(results.columns.iter().map(|c| c.round).collect::<Vec<_>>(), [Some(1), Some(2), Some(3)]);
    results.check().unwrap();
    let matrix: cl_eval::ScoreMatrix =
        serde_json::from_slice(&std::fs::read(out.join("stages/sequence-lora.seed4/run/matrix.json")).unwrap())
            .unwrap();
    for (round, scores) in matrix.scores.iter().enumerate().skip(1) {
        let row = results.rows.iter().find(|row| row.stage == format!("sequence-lora.seed4/{round}")).unwrap();
        assert_eq!((&row.scores, row.round, row.seed), (scores, Some(round), 4));
    }
    // Models that no stage needs anymore have been removed; adapters are kept.
    let stage = |name: &str| out.join("stages").join(name);
    assert!(!stage("one-fft-1-first.seed3/run/rounds/1-first/model").exists());
    assert!(stage("one-lora-1-first.seed3/run/rounds/1-first/adapter/manifest.json").exists());
    // They are created again together with the stage that needs them.
    std::fs::remove_dir_all(stage("mix-3.seed3")).unwrap();
    let again = run_study(&config, &out, &StudyOptions::default(), &Interrupt::default(), &mut ignore).unwrap();
    assert_eq!(
        again.rows.iter().map(|r| &r.scores).collect::<Vec<_>>(),
        results.rows.iter().map(|r| &r.scores).collect::<Vec<_>>()
    );
}

#[test]
fn questions_are_scored_where_they_end_and_orders_differ() {
    let world = World::new(Kind::Float);
    let config = own(&world, "compare = ['questions']\norders = 3");
    let out = world.path("study");
    let only = StudyOptions { only: vec!["order-lora".to_owned()], ..StudyOptions::default() };
    let results = run_study(&config, &out, &only, &Interrupt::default(), &mut ignore).unwrap();
    let rows: Vec<_> = results.rows.iter().filter(|row| row.method == "LoRA (other orders)").collect();
    assert_eq!(
        rows.iter().map(|r| (r.seed, r.round, r.main)).collect::<Vec<_>>(),
        [1, 2, 3].map(|n| (n, Some(3), false))
    );
    let mut orders = vec![vec!["first".to_owned(), "mood".to_owned(), "largest".to_owned()]];
    for number in 1..=3 {
        let run = out.join(format!("stages/order-lora-{number}.seed3/run"));
        let mut rounds: Vec<(String, bool)> = std::fs::read_dir(run.join("rounds"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), p.join("scores.json").exists()))
            .collect();
        rounds.sort();
        assert_eq!(rounds.iter().map(|r| r.1).collect::<Vec<_>>(), [true, false, false, true], "{rounds:?}");
        let names = rounds[1..].iter().map(|r| r.0.split_once('-').unwrap().1.to_owned()).collect::<Vec<String>>();
        assert!(!orders.contains(&names), "{names:?}");
        orders.push(names);
    }
    assert_eq!(orders[1], ["largest", "mood", "first"]);
}

#[test]
fn a_plan_says_what_stages_take_and_measures_by_what_is_done() {
    let world = World::new(Kind::Float);
    let config = own(&world, "compare = ['sequence', 'merge']");
    let out = world.path("study");
    let rows = |task: &str| {
        let text = std::fs::read_to_string(world.path("data").join(task).join("train.json")).unwrap();
        serde_json::from_str::<Vec<serde_json::Value>>(&text).unwrap().len() as u64
    };
    let plan = plan_study(&config, &out, &StudyOptions::default()).unwrap();
    let stage = |name: &str| plan.stages.iter().find(|stage| stage.name == name).unwrap();
    let steps: u64 = ["first", "mood", "largest"].map(|task| rows(task).div_ceil(4)).iter().sum();
    let (sequence, base) = (stage("sequence-lora.seed3"), stage("base"));
    assert_eq!((sequence.steps, base.steps, base.train_tokens), (steps, 0, 0));
    assert_eq!(sequence.scored_tokens, 3 * base.scored_tokens);
    assert!(sequence.train_tokens > steps && base.scored_tokens > 0 && sequence.seconds > base.seconds);
    assert!(stage("sequence-fft.seed3").memory > sequence.memory && plan.peak_bytes > plan.kept_bytes);
    assert!(plan.rates[0].contains("assumed") && plan.rates.len() == 1);
    let only = StudyOptions { only: vec!["sequence-lora.seed3".to_owned()], ..StudyOptions::default() };
    run_study(&config, &out, &only, &Interrupt::default(), &mut ignore).unwrap();
    let later = plan_study(&config, &out, &StudyOptions::default()).unwrap();
    assert!(later.rates[1].contains("measured: scoring") && later.rates.len() >= 2, "{:?}", later.rates);
    assert_eq!(later.stages.iter().filter(|stage| stage.done).count(), 2);
}

#[test]
fn the_papers_study_is_planned_without_model_and_data() {
    let config = read_study("paper.toml".as_ref(), cl_lab::PAPER_STUDY, &[]).unwrap();
    let plan = sketch_study(&config, &StudySizes::of_paper(), &StudyOptions::default()).unwrap();
    let steps = |name: &str| plan.stages.iter().find(|stage| stage.name == name).unwrap().steps;
    // 5,000 rows: 39 steps per epoch, 20 epochs. 395,000 rows: 3,085 steps per epoch, 6 epochs.
    for (round, name) in ["c-stance", "fomc", "meetingbank", "py150", "scienceqa", "20minuten"].iter().enumerate() {
        assert_eq!(steps(&format!("one-fft-{}-{name}.seed42", round + 1)), 780, "{name}");
    }
    assert_eq!(steps("sequence-lora.seed42"), 6 * 780 + 6 * 3085);
    // 2,765,000 rows per epoch, in steps of 128 rows.
    assert_eq!(steps("joint-lora.seed42"), 21_601);
    assert!(
        plan.stages.iter().all(|stage| !stage.done) && plan.stages.iter().any(|stage| stage.name == "mix-4.seed42")
    );
}

#[test]
fn wrong_studies_are_refused_before_anything_runs() {
    let world = World::new(Kind::Float);
    let refused = |config: &StudyConfig, only: &str| {
        let options = StudyOptions { only: vec![only.to_owned()], ..StudyOptions::default() };
        plan_study(config, &world.path("study"), &options).unwrap_err().to_string()
    };
    for (more, part) in [
        ("members = [1]", "members: 1 is out of range; expected 2 to 3"),
        ("experts = ['news']", "no round is called `news`"),
        ("[full]\nepochs = 0", "[full]: epochs = 0"),
        ("threads = 0", "threads: must be at least 1"),
        ("[[columns]]\nname = 'frist'", "columns: no task `frist` is scored; expected one of first, mood, largest"),
        ("[[columns]]\nname = 'mood'\nchance = 25.0", "columns: mood: chance = 25 is out of range; expected 0 to 1"),
        ("members = [3, 3]", "members: 3 is listed twice"),
        ("olora = { lambda = [0.5, 0.5] }", "olora.lambda: 0.5 is listed twice"),
        ("replay = -0.5", "fraction"),
        ("[[rounds]]\nname = 'first'", "both `tasks` and `[[rounds]]`"),
        (
            "[joint]\nepoch = 3",
            "stage joint-fft.seed3: round `joint`: train: unknown key `epoch` (did you mean `epochs`?)",
        ),
    ] {
        let message = refused(&own(&world, more), "");
        assert!(message.contains(part), "{message}");
    }
    let mut config = own(&world, "");
    assert!(refused(&config, "nothing").contains("no stage's name starts with `nothing`"));
    config.seeds.clear();
    assert!(refused(&config, "").contains("seeds: expected at least one"));
    config.seeds = vec![7, 7];
    assert!(refused(&config, "").contains("7 is listed twice"));
    config.seeds = vec![7];
    config.train.insert("lora".to_owned(), toml::Table::new().into());
    assert!(refused(&config, "").contains("write it as [lora]"));
}

#[test]
fn a_study_of_the_paper_is_the_papers_everywhere() {
    let world = World::new(Kind::Float);
    let text = format!(
        "name = 'paper'\nprofile = 'paper'\nmodel = '{}'\ndata = '{}'\ntasks = ['first', 'mood']\nseeds = [3]\n[lora.lora]\nr = 2\n[eval]\nmax_new_tokens = 2\n",
        world.path("model").display(),
        world.path("data").display()
    );
    let config = read_study("memory".as_ref(), &text, &["train.epochs=2".to_owned()]).unwrap();
    let out = world.path("study");
    let only = StudyOptions { only: vec!["sequence-lora.seed3".to_owned()], ..StudyOptions::default() };
    run_study(&config, &out, &only, &Interrupt::default(), &mut ignore).unwrap();
    let sequence = std::fs::read_to_string(out.join("stages/sequence-lora.seed3/run/config.toml")).unwrap();
    for line in [
        "profile = \"paper\"",
        "loss_norm = \"microbatch_mean\"",
        "precision = \"bf16\"",
        "adapter_precision = \"f32\"",
        "learning_rate = 0.00002",
        "lm_eval_add_bos_token = false",
        "epochs = 2",
    ] {
        assert!(sequence.lines().any(|l| l == line), "{line}: {sequence}");
    }
}

#[test]
fn a_directory_belongs_to_one_world_and_nothing_of_others_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let write = |tiny: &TinyConfig, out: &Path| tiny.write_world(out, &Interrupt::default(), &mut silent);
    let out = folder.path().join("study");
    write(&tiny(), &out).unwrap();
    write(&tiny(), &out).unwrap();
    let message = write(&TinyConfig { seed: 2, ..tiny() }, &out).unwrap_err().to_string();
    assert!(message.contains("different settings") && message.contains("choose another --out"), "{message}");
    // A directory with unrelated files of any name.
    for name in ["study.toml", "study.json", "data"] {
        let dir = folder.path().join(format!("own {name}"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join(name), "name = 'mine'").unwrap();
        let message = write(&tiny(), &dir).unwrap_err().to_string();
        assert!(message.contains("is not the directory of a study"), "{message}");
        assert_eq!(std::fs::read_to_string(dir.join(name)).unwrap(), "name = 'mine'");
    }
}

#[test]
fn a_stage_that_fails_leaves_the_others() {
    let world = World::new(Kind::Float);
    let config = own(&world, "compare = ['sequence']");
    let out = world.path("study");
    // A file is in the place of the directory of two stages.
    std::fs::create_dir_all(out.join("stages")).unwrap();
    std::fs::write(out.join("study.json"), r#"{"cl_study": 1}"#).unwrap();
    for seed in [3, 4] {
        std::fs::write(out.join(format!("stages/sequence-fft.seed{seed}")), "").unwrap();
    }
    let failed = run_study(&config, &out, &StudyOptions::default(), &Interrupt::default(), &mut ignore);
    match failed {
        Err(LabError::Stages(stages)) => {
            assert!(stages.iter().all(|stage| stage.stage.starts_with("sequence-fft")), "{stages:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(results(&out).contains("sequence-lora.seed4/3"));
}
