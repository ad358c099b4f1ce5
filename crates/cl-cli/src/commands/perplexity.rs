use std::io::Write;
use std::path::Path;

use anyhow::{Result, ensure};
use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_cli::arguments::perplexity::Args;
use cl_cli::light::data::columns;
use cl_data::{ChatTemplate, Dataset, Example, load_as};
use cl_eval::Table;
use cl_lab::{Perplexity, PerplexityOptions, perplexity};
use serde::Serialize;

use super::loaded;

/// A line of the table.
#[derive(Serialize)]
struct Line {
    file: String,
    model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<String>,
    #[serde(flatten)]
    result: Perplexity,
}

/// Runs the command.
pub fn run(mut args: Args, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    super::locate(args.hub, &mut args.model, &mut args.adapter, interrupt)?;
    let columns = columns(&args.columns)?;
    let read = |path: &std::path::PathBuf| -> Result<Dataset> {
        let mut data = whole_texts(load_as(path, args.format, &columns)?);
        data.examples.truncate(args.limit.unwrap_or(usize::MAX));
        Ok(data)
    };
    let data = args.files.iter().map(read).collect::<Result<Vec<_>>>()?;
    let without = (args.adapter.is_empty() || args.base).then_some(None);
    let adapters: Vec<Option<&Path>> =
        without.into_iter().chain(args.adapter.iter().map(|a| Some(a.as_path()))).collect();
    let mut model = loaded::open_one(&args.model, adapters[0], &args.compute)?;
    let context = model.model.config.max_position_embeddings;
    if let Some(max_length) = args.max_length.filter(|n| *n > context) {
        tracing::warn!("--max-length {max_length} is above the model's context of {context} tokens");
    }
    ensure!(args.max_length.is_none_or(|n| n > 1), "--max-length: expected at least 2 tokens");
    let chat = ChatTemplate::from_dir(&args.model)?;
    let options = PerplexityOptions { max_length: args.max_length, batch_tokens: args.batch_tokens };
    let mut lines = Vec::new();
    for (place, adapter) in adapters.iter().enumerate() {
        if place > 0 {
            model.set_adapter(*adapter)?;
        }
        for (data, file) in data.iter().zip(&args.files) {
            let result = perplexity(&model, chat.as_ref(), data, options, interrupt)?;
            tracing::info!("{}: {} tokens, loss {:.4}", file.display(), result.tokens, result.loss);
            lines.push(Line {
                file: file.display().to_string(),
                model: args.model.display().to_string(),
                adapter: adapter.map(|dir| dir.display().to_string()),
                result,
            });
        }
    }
    if let Some(path) = &args.out {
        write_file(path, format!("{}\n", serde_json::to_string_pretty(&lines)?).as_bytes())?;
    }
    write!(out, "{}", table(&lines, adapters.len() > 1).text())?;
    Ok(())
}

/// Joins the paragraphs of a text file, so that each is predicted after the ones before it.
fn whole_texts(mut data: Dataset) -> Dataset {
    let name = data.path.to_string_lossy();
    if name.ends_with(".txt") || name.ends_with(".txt.gz") {
        let paragraphs: Vec<&str> = data.examples.iter().map(Example::answer).collect();
        data.examples = vec![Example::pair("", paragraphs.join("\n\n"))];
    }
    data
}

fn table(lines: &[Line], several: bool) -> Table {
    let texts = lines.iter().any(|line| line.result.text.is_some());
    let mut columns = vec!["file", "documents", "tokens", "loss", "perplexity"];
    if several {
        columns.insert(1, "adapter");
    }
    if texts {
        columns.extend(["word_perplexity", "byte_perplexity", "bits_per_byte"]);
    }
    let row = |line: &Line| {
        let Line { file, adapter, result, .. } = line;
        let adapter = several.then(|| adapter.clone().unwrap_or_else(|| "-".to_owned()));
        let numbers = [
            result.documents.to_string(),
            result.tokens.to_string(),
            format!("{:.4}", result.loss),
            format!("{:.4}", result.perplexity),
        ];
        let of_text = |of: fn(&cl_lab::TextPerplexity) -> f64| {
            result.text.as_ref().map_or_else(|| "-".to_owned(), |text| format!("{:.4}", of(text)))
        };
        let measures: [fn(&cl_lab::TextPerplexity) -> f64; 3] =
            [|t| t.word_perplexity, |t| t.byte_perplexity, |t| t.bits_per_byte];
        let measures = measures.into_iter().filter(|_| texts).map(of_text);
        std::iter::once(file.clone()).chain(adapter).chain(numbers).chain(measures).collect()
    };
    Table {
        caption: "loss: nats per token; perplexity = exp(loss).".to_owned(),
        columns: columns.into_iter().map(str::to_owned).collect(),
        rows: lines.iter().map(row).collect(),
    }
}
