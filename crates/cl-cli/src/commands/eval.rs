use std::collections::{BTreeSet, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cl_checkpoint::files::cache_dir;
use cl_checkpoint::logging::LogArgs;
use cl_checkpoint::{HubSnapshot, Interrupt, Precision, refuse_inside};
use cl_cli::arguments::eval::Args;
use cl_data::{ChatTemplate, Profile};
use cl_eval::{
    BoxError, GroupResult, Message, Role, RunSettings, Scores, Table, Task, TaskGroup, TaskOptions, TaskResult,
    aggregate_group, load_tasks, results, write_results,
};
use cl_hub::HubArgs;
use cl_lab::{EvalConfig, LoadedModel, Observer, add_bos_token, score_model_on, write_scores};
use cl_train::Ranks;

use super::loaded;
use crate::progress::Progress;

/// A model or one of its adapters, with its output directory.
struct EvalRun<'a> {
    name: String,
    adapter: Option<&'a Path>,
    out: PathBuf,
}

/// Runs the command.
pub fn run(mut args: Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    super::locate(HubArgs { hub: args.hub }, &mut args.model, &mut args.adapter, interrupt)?;
    let args = &args;
    let ranks = super::join_ranks(Duration::from_secs(args.rank_timeout), interrupt)?;
    if !ranks.is_first() {
        return super::in_silence(|| answer(args, &ranks, interrupt));
    }
    let template = chat_template(args)?;
    let render = template.as_ref().map(|t| move |messages: &[Message]| rendered(t, messages));
    let hub = HubArgs { hub: args.hub }.hub();
    let options = TaskOptions {
        limit: args.limit,
        max_new_tokens: args.max_new_tokens,
        num_fewshot: args.num_fewshot,
        fewshot_seed: Some(args.fewshot_seed),
        chat: render.as_ref().map(|r| r as _),
        fewshot_as_multiturn: args.fewshot_as_multiturn.unwrap_or(args.apply_chat_template),
        system_instruction: args.system_instruction.as_deref(),
        hub: hub.as_ref(),
        profile: args.profile,
        lm_eval: args.lm_eval.as_deref(),
        ..TaskOptions::default()
    };
    let (mut tasks, mut groups) = (Vec::new(), Vec::new());
    for name in &args.tasks {
        let set = load_tasks(name.trim(), &args.data, options)?;
        tasks.extend(set.tasks);
        groups.extend(set.groups);
    }
    let config = scoring(args)?;
    let runs = runs(args)?;
    for run in &runs {
        let inputs: Vec<_> = run.adapter.iter().map(|adapter| ("the adapter", *adapter)).collect();
        refuse_inside(&run.out, &[inputs, vec![("the model", &*args.model)]].concat())?;
    }
    let device = cl_torch::pick_device(&args.device)?;
    let mut loaded = LoadedModel::open(&args.model, runs[0].adapter, args.precision, config.quantize, device)?;
    let mut progress = Progress::new(log);
    let mut columns: Vec<(String, Vec<Scores>)> = Vec::new();
    for (place, run) in runs.iter().enumerate() {
        if place > 0 {
            loaded.set_adapter(run.adapter)?;
        }
        if runs.len() > 1 {
            tracing::info!("{}", run.name);
        }
        let start = Instant::now();
        let mut scores = {
            let observer: &mut Observer<'_> = &mut |e| progress.observe(e);
            score_model_on(&ranks, &loaded, &tasks, &config, &run.out, interrupt, observer)?
        };
        let documents: usize = scores.iter().map(|s| s.documents).sum();
        tracing::info!("  {documents} documents in {:.1} s", start.elapsed().as_secs_f64());
        write_scores(&run.out.join("scores.json"), &scores)?;
        let of_groups = groups.iter().map(|g| aggregate_group(g, &scores)).collect::<Result<Vec<_>, _>>()?;
        let settings = settings(args, &config, run, &loaded, template.as_ref());
        write_results(
            &run.out.join("results.json"),
            &laid_out(&tasks, &config, &scores, &groups, &of_groups, &settings),
        )?;
        scores.extend(of_groups);
        columns.push((run.name.clone(), scores));
    }
    write!(out, "{}", table(&columns).text())?;
    Ok(())
}

/// Answers the requests of rank 0, which loads the tasks and writes all files.
fn answer(args: &Args, ranks: &Ranks, interrupt: &Interrupt) -> Result<()> {
    let (config, runs) = (scoring(args)?, runs(args)?);
    let device = cl_torch::pick_device(&args.device)?;
    let mut loaded = LoadedModel::open(&args.model, runs[0].adapter, args.precision, config.quantize, device)?;
    for (place, run) in runs.iter().enumerate() {
        if place > 0 {
            loaded.set_adapter(run.adapter)?;
        }
        score_model_on(ranks, &loaded, &[], &config, &run.out, interrupt, &mut |_| {})?;
    }
    Ok(())
}

fn scoring(args: &Args) -> Result<EvalConfig> {
    Ok(EvalConfig {
        quantize: args.quantize.as_deref().map(loaded::quantization).transpose()?,
        batch_tokens: args.batch_tokens,
        batch_sequences: args.batch_sequences,
        add_bos_token: args.add_bos_token,
        lm_eval_add_bos_token: args.lm_eval_add_bos_token.or_else(|| {
            let paper = args.profile == Profile::Paper && args.add_bos_token.is_none();
            paper.then_some(false)
        }),
        max_length: args.max_length,
        cache: cache(args),
        ..EvalConfig::default()
    })
}

fn chat_template(args: &Args) -> Result<Option<ChatTemplate>> {
    if !args.apply_chat_template {
        return Ok(None);
    }
    let template = ChatTemplate::from_dir(&args.model)?;
    let none = || {
        format!(
            "{}: no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json)",
            args.model.display()
        )
    };
    template.with_context(none).map(Some)
}

fn rendered(template: &ChatTemplate, messages: &[Message]) -> Result<String, BoxError> {
    let role = |role| match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    };
    let messages: Vec<_> = messages.iter().map(|m| cl_data::Message::new(role(m.role), &m.content)).collect();
    Ok(template.render(&messages, true)?)
}

/// Returns the evaluations to run: the model alone, all adapters, or both, with unique names.
fn runs(args: &Args) -> Result<Vec<EvalRun<'_>>> {
    let mut runs = Vec::new();
    if args.adapter.is_empty() || args.base {
        runs.push(EvalRun { name: "base".to_owned(), adapter: None, out: args.out.clone() });
    }
    for adapter in &args.adapter {
        // The adapters of all rounds are called `adapter`, so use the name of the parent directory.
        let named = HubSnapshot::model_name(adapter);
        let names: Vec<_> =
            Path::new(&named).components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
        let last = names.iter().rposition(|n| n != "adapter" && n != ".").unwrap_or(0);
        let name = names.get(last).context("--adapter: empty path")?.clone();
        runs.push(EvalRun { name, adapter: Some(adapter), out: args.out.clone() });
    }
    if runs.len() > 1 {
        let mut seen = HashSet::new();
        for run in &mut runs {
            if !seen.insert(run.name.clone()) {
                bail!("two adapters have the name `{}`; evaluate them separately, or rename one", run.name);
            }
            run.out = args.out.join(&run.name);
        }
    }
    Ok(runs)
}

/// Returns the directory of the response cache.
fn cache(args: &Args) -> Option<PathBuf> {
    if args.no_cache {
        return None;
    }
    args.cache.clone().or_else(|| cache_dir().map(|dir| dir.join("responses")))
}

fn settings(
    args: &Args,
    config: &EvalConfig,
    run: &EvalRun<'_>,
    loaded: &LoadedModel,
    template: Option<&ChatTemplate>,
) -> RunSettings {
    let dtype = match args.precision {
        Precision::F32 => "float32",
        Precision::Bf16 => "bfloat16",
    };
    RunSettings {
        model: HubSnapshot::source_name(&args.model),
        fingerprint: Some(loaded.fingerprint.clone()),
        adapter: run.adapter.map(HubSnapshot::source_name),
        dtype: dtype.to_owned(),
        quantization: config.quantize.map(|format| format.name().to_owned()),
        add_bos_token: config.add_bos_token,
        chat_template: template.map(|t| t.text().to_owned()),
        max_length: Some(config.max_length.unwrap_or(loaded.model.config.max_position_embeddings)),
        batch_tokens: Some(config.batch_tokens),
        limit: args.limit,
    }
}

fn laid_out(
    tasks: &[Box<dyn Task>],
    config: &EvalConfig,
    scores: &[Scores],
    groups: &[TaskGroup],
    of_groups: &[Scores],
    run: &RunSettings,
) -> serde_json::Value {
    let pairs = tasks.iter().zip(scores);
    let settings = |task: &dyn Task| {
        let mut settings = task.settings();
        settings.insert("add_bos_token".to_owned(), add_bos_token(task, config).into());
        settings
    };
    let tasks: Vec<TaskResult<'_>> = pairs
        .map(|(task, scores)| {
            let (settings, original) = (settings(task.as_ref()), Some(task.available()));
            TaskResult { scores, settings, original }
        })
        .collect();
    let pairs = groups.iter().zip(of_groups);
    let groups: Vec<GroupResult<'_>> = pairs.map(|(group, scores)| GroupResult { group, scores }).collect();
    results(&tasks, &groups, run)
}

/// Formats scores as a table: for one model, columns for scores and standard errors; for several, one column per model.
fn table(runs: &[(String, Vec<Scores>)]) -> Table {
    let error = |s: &Scores, metric: &str| s.stderr.get(metric).map_or_else(|| "-".to_owned(), |e| format!("{e:.4}"));
    let single = runs.len() == 1;
    let mut rows = Vec::new();
    for (place, scores) in runs[0].1.iter().enumerate() {
        let metrics: BTreeSet<&String> = runs.iter().flat_map(|(_, all)| all[place].metrics.keys()).collect();
        for metric in metrics {
            let mark = if *metric == scores.main_metric { "*" } else { "" };
            let mut row = vec![scores.task.clone(), format!("{metric}{mark}")];
            for (_, all) in runs {
                // An infinite perplexity is left out.
                let value = all[place].metrics.get(metric).map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
                let error = error(&all[place], metric);
                if single {
                    row.extend([value, error]);
                } else {
                    row.push(format!("{value} ±{error}"));
                }
            }
            row.push(scores.documents.to_string());
            rows.push(row);
        }
    }
    let fixed = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
    let scores = if single { fixed(&["score", "stderr"]) } else { runs.iter().map(|(name, _)| name.clone()).collect() };
    let columns = [fixed(&["task", "metric"]), scores, fixed(&["documents"])].concat();
    Table { caption: "* main metric, which represents the task in tables of sequences.".to_owned(), columns, rows }
}
