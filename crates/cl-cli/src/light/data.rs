//! `cl data`: shows rows and examples of training data.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use cl_data::{
    ChatTemplate, Columns, Encoded, Encoding, Format, Profile, RowPlan, Split, Tokenizer, load_as, load_split_as,
};

/// Subcommands of `cl data`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// List the training rows of a run or a round, in order, as JSON lines.
    Rows(RowsArgs),
    /// Print examples as the model sees them. Text that is not part of the loss is dimmed.
    Show(ShowArgs),
}

/// Arguments of `cl data show`.
#[derive(clap::Args)]
pub struct ShowArgs {
    /// Data file (JSON, JSONL, CSV, TSV, text, Parquet), or task directory with a train split.
    file: PathBuf,
    /// Model directory, for its tokenizer and chat template.
    #[arg(long)]
    model: PathBuf,
    /// First row, from 0.
    #[arg(long, default_value_t = 0)]
    from: usize,
    /// Number of rows.
    #[arg(long, default_value_t = 3)]
    rows: usize,
    /// Maximum number of tokens of an example, like train.max_length.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..=1 << 24))]
    max_length: u32,
    /// Format of the rows: auto, prompt_answer, prompt_completion, alpaca, meta_math, gsm8k, messages, text.
    #[arg(long, default_value = "auto", value_parser = crate::arguments::values::word::<Format>)]
    format: Format,
    /// Names of the fields, for example --columns prompt=question --columns "answer={{ label }}"; keys: prompt, answer,
    /// messages.
    #[arg(long, value_name = "KEY=FIELD")]
    columns: Vec<String>,
    /// Mark the text that is part of the loss with ⟦ and ⟧ instead of dimming the rest; the default if stdout is not a
    /// terminal.
    #[arg(long)]
    plain: bool,
}

/// Arguments of `cl data rows`.
#[derive(clap::Args)]
pub struct RowsArgs {
    /// Directory of a run or a round (rounds/1-TASK), or its rows.json.
    run: PathBuf,
    /// Only this epoch, from 0.
    #[arg(long)]
    epoch: Option<u64>,
}

/// Runs the command.
pub fn run(command: &Command, out: &mut impl Write) -> Result<()> {
    match command {
        Command::Rows(args) => rows(args, out),
        Command::Show(args) => show(args, out),
    }
}

fn show(args: &ShowArgs, out: &mut impl Write) -> Result<()> {
    let columns = columns(&args.columns)?;
    let data = if args.file.is_dir() {
        load_split_as(&args.file, Split::Train, args.format, &columns)?
    } else {
        load_as(&args.file, args.format, &columns)?
    };
    let count = data.examples.len();
    let ignored = &data.ignored_tools;
    if ignored.rows > 0 {
        tracing::warn!("{}: {} rows have `tools`, which are ignored; {ignored}", data.path.display(), ignored.rows);
    }
    ensure!(args.from < count, "--from {}: {} has {count} rows, counted from 0", args.from, data.path.display());
    let tokenizer = Tokenizer::from_dir(&args.model)?;
    let chat = ChatTemplate::from_dir(&args.model)?;
    let max_length = Some(args.max_length as usize);
    let encoding = Encoding { tokenizer: &tokenizer, chat: chat.as_ref(), max_length, profile: Profile::Method };
    let plain = args.plain || !std::io::stdout().is_terminal();
    for (row, example) in data.examples.iter().enumerate().skip(args.from).take(args.rows) {
        let place = || format!("{}, row {row} (from 0)", data.path.display());
        let encoded = encoding.example(example).with_context(place)?;
        let (all, learned) = (encoded.input_ids.len(), encoded.targets());
        writeln!(out, "row {row} of {count}: {all} tokens, {learned} in the loss")?;
        writeln!(out, "{}\n", text(&tokenizer, &encoded, plain)?)?;
    }
    Ok(())
}

/// Decodes the tokens to text, including special tokens, and marks the parts that contribute to the loss.
fn text(tokenizer: &Tokenizer, encoded: &Encoded, plain: bool) -> Result<String> {
    let (shown, learned) = if plain { (["", ""], ["⟦", "⟧"]) } else { (["\x1b[2m", "\x1b[0m"], ["", ""]) };
    let mut text = String::new();
    let mut part = |range: std::ops::Range<usize>, around: [&str; 2]| {
        if !range.is_empty() {
            text = format!("{text}{}{}{}", around[0], tokenizer.decode(&encoded.input_ids[range], false)?, around[1]);
        }
        Ok::<(), cl_data::Error>(())
    };
    let mut end = 0;
    for range in &encoded.learned {
        part(end..range.start, shown)?;
        part(range.clone(), learned)?;
        end = range.end;
    }
    part(end..encoded.input_ids.len(), shown)?;
    Ok(text)
}

/// Parses the entries of `--columns`.
pub fn columns(entries: &[String]) -> Result<Columns> {
    let mut columns = Columns::default();
    for entry in entries {
        let (key, field) = entry.split_once('=').with_context(|| format!("--columns {entry}: expected KEY=FIELD"))?;
        let slot = match key.trim() {
            "prompt" => &mut columns.prompt,
            "answer" => &mut columns.answer,
            "messages" => &mut columns.messages,
            other => anyhow::bail!("--columns {entry}: unknown key `{other}`; expected prompt, answer or messages"),
        };
        *slot = Some(field.to_owned());
    }
    columns.validate()?;
    Ok(columns)
}

fn rows(args: &RowsArgs, out: &mut impl Write) -> Result<()> {
    let file = if args.run.is_dir() { args.run.join("rows.json") } else { args.run.clone() };
    let run = args.run.display();
    let sequence = !file.exists() && args.run.join("rounds").is_dir();
    ensure!(!sequence, "{run}: is a sequence; specify one of its rounds, such as {run}/rounds/1-<name>");
    let plan = RowPlan::read(&file)?;
    let epochs = plan.epochs();
    let chosen = match args.epoch {
        Some(epoch) => {
            ensure!(epoch < epochs, "--epoch {epoch}: the round has {epochs} epochs, counted from 0");
            epoch..epoch + 1
        }
        None => 0..epochs,
    };
    // Process one epoch at a time, to save memory.
    let mut lines = std::io::BufWriter::new(out);
    for row in chosen.flat_map(|epoch| plan.used(epoch)) {
        serde_json::to_writer(&mut lines, &row)?;
        lines.write_all(b"\n")?;
    }
    Ok(lines.flush()?)
}
