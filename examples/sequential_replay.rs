//! A small Llama is trained on four tasks in sequence, with LoRA alone and with 10 % replay, to measure forgetting.
//!
//! ```text
//! cargo run -p cl-examples --example sequential_replay
//! ```
//!
//! Everything is generated from a seed: facts for pretraining, tasks, tokenizer, weights. It takes about a minute on
//! two cores and needs no network and no data.

use cl_checkpoint::Interrupt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use cl_eval::{Group, ScoreMatrix};
use cl_lab::{Buffer, EvalConfig, Replay, SequenceConfig, run_sequence, tables_of};
use cl_torch::tch;
use world::{pretrain, say, sequence, write_data};

mod world;

const TASKS: [&str; 4] = ["first", "mood", "largest", "last"];

fn main() -> Result<()> {
    // So small a model gains little from more threads, and on a busy machine threads that wait for each other cost minutes.
    tch::set_num_threads(1);
    let started = Instant::now();
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("data");
    let questions = write_data(&data)?;

    eprintln!("pretraining a small Llama on facts and on the form of the tasks' questions");
    let base = pretrain(folder.path(), &data)?;

    let mut results = Vec::new();
    for replay in [None, Some(Replay { fraction: 0.1, buffer: Buffer::Redrawn })] {
        let name = if replay.is_some() { "LoRA-Rep" } else { "LoRA" };
        let config = replayed(&base, &data, &questions, replay);
        let report = run_sequence(&config, &folder.path().join(name), false, &Interrupt::default(), &mut say)?;
        for table in tables_of(&report.matrix, name, config.profile) {
            println!("{}", table.text());
        }
        results.push(report.matrix);
    }
    compare(&results[0], &results[1]);
    eprintln!("{:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// The four tasks in order, all tasks and facts scored after every round.
fn replayed(base: &Path, data: &Path, questions: &[PathBuf], replay: Option<Replay>) -> SequenceConfig {
    let config = sequence(base, data, &TASKS);
    let old = questions.iter().map(|q| q.display().to_string()).collect();
    SequenceConfig { replay, eval: EvalConfig { old, ..config.eval }, ..config }
}

/// What replay changed.
fn compare(without: &ScoreMatrix, with: &ScoreMatrix) {
    let show = |v: Option<f64>| v.map_or("–".to_owned(), |v| format!("{v:+.3}"));
    let last = |m: &ScoreMatrix, group| m.mean(m.rows.len() - 1, group);
    println!("What replay changed:            without     with");
    let row = |name: &str, figure: &dyn Fn(&ScoreMatrix) -> Option<f64>| {
        println!("  {name:<28}  {:>8} {:>8}", show(figure(without)), show(figure(with)));
    };
    row("new knowledge at the end", &|m| last(m, Group::New));
    row("old knowledge at the end", &|m| last(m, Group::Old));
    row("backward transfer (absolute)", &|m| m.mean_of(ScoreMatrix::absolute_bwt));
    row("forgetting", &|m| m.mean_of(ScoreMatrix::forgetting));
}
