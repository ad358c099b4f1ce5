use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cl_eval::{Table, TaskOptions, load_task};
use cl_lab::{EvalConfig, LoadedModel, score_model, write_scores};

use super::Precision;
use crate::progress::Progress;

/// Arguments of `cl eval`.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory.
    model: PathBuf,
    /// Tasks by name, separated by commas: C-STANCE, FOMC, MeetingBank, Py150, ScienceQA, 20Minuten, gsm8k, gsm8k_cot, the
    /// name of any directory in DATA with a test file of {"prompt", "answer"}, or a .jsonl file of multiple-choice questions.
    #[arg(long, value_delimiter = ',', required = true)]
    tasks: Vec<String>,
    /// Directory of tasks, as TRACE is laid out.
    #[arg(long)]
    data: PathBuf,
    /// Directory for predictions (<task>.jsonl) and scores.json; predictions that are there already are kept.
    #[arg(long)]
    out: PathBuf,
    /// PEFT adapter directory to put beside the model.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Only the first so many documents of each task.
    #[arg(long)]
    limit: Option<usize>,
    /// Most tokens of a written answer, instead of each task's own.
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// Dtype to compute in.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
}

/// Runs the command.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    let options = TaskOptions { limit: args.limit, max_new_tokens: args.max_new_tokens, ..TaskOptions::default() };
    let tasks = args.tasks.iter().map(|t| load_task(t.trim(), &args.data, options)).collect::<Result<Vec<_>, _>>()?;
    let device = cl_torch::pick_device(&args.device)?;
    let loaded = LoadedModel::open(&args.model, args.adapter.as_deref(), args.precision.into(), device)?;
    let mut progress = Progress::new();
    let config = EvalConfig::default();
    let scores = score_model(&loaded, &tasks, &config, &args.out, &mut |e| progress.observe(e))?;
    write_scores(&args.out.join("scores.json"), &scores)?;
    let rows = scores
        .iter()
        .flat_map(|s| {
            s.metrics.iter().map(|(metric, value)| {
                let mark = if *metric == s.main_metric { "*" } else { "" };
                vec![s.task.clone(), format!("{metric}{mark}"), format!("{value:.4}"), s.documents.to_string()]
            })
        })
        .collect();
    let columns = ["task", "metric", "score", "documents"].map(str::to_owned).to_vec();
    let caption = "* stands for the task in tables of sequences.".to_owned();
    write!(out, "{}", Table { caption, columns, rows }.text())?;
    Ok(())
}
