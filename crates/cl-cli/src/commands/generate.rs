use std::io::Write;
use std::ops::Range;

use anyhow::{Result, bail, ensure};
use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_cli::arguments::generate::Args;
use cl_lab::{EvalConfig, LoadedModel};
use cl_model::{GenerateOptions, Generation, ModelError, Scorer, Session, TextStream, generate};
use serde_json::json;

use super::decoding::decoding;
use super::prompts::{Prompt, prompts};
use super::{loaded, reply};

/// Runs the command.
pub fn run(mut args: Args, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let decoding = decoding(&args.decoding)?;
    if let Some(path) = args.out.as_deref().filter(|p| p.exists()) {
        bail!("--out {}: exists already; remove it, or choose another file", path.display());
    }
    super::locate(args.hub, &mut args.model, &mut args.adapter, interrupt)?;
    let args = &args;
    let prompts = prompts(&args.prompts, &args.model)?;
    let loaded = loaded::open(&args.model, &args.adapter, args.precision, args.quantize.as_deref(), &args.device)?;
    let positions = loaded.model.config.max_position_embeddings;
    let tokens = |p: &Prompt| p.tokens(&loaded.tokenizer, args.max_new_tokens, positions);
    let ids = prompts.iter().map(tokens).collect::<Result<Vec<_>>>()?;
    let eos = Scorer::new(&loaded.model, &loaded.tokenizer).end_tokens();
    let options = GenerateOptions { max_new_tokens: args.max_new_tokens, eos: &eos, decoding, first_prompt: 0 };
    if ids.len() == 1 && !args.ids && args.prompts.prompts.is_none() {
        let mut session = Session::new(&loaded.model);
        let (stop, interrupted) = (&args.decoding.stop, || interrupt.requested());
        reply::write(&mut session, &loaded.tokenizer, &ids[0], &options, stop, &interrupted, out)?;
        ensure!(!interrupt.requested(), "stopped before the text was complete");
        return Ok(());
    }
    let mut kept = String::new();
    for batch in batches(&ids, args.batch_sequences.max(1)) {
        let of: Vec<&[u32]> = ids[batch.clone()].iter().map(Vec::as_slice).collect();
        let options = GenerateOptions { first_prompt: batch.start, ..options };
        let texts = texts(&loaded, &of, &options, &args.decoding.stop, interrupt)?;
        for (prompt, (generation, text)) in prompts[batch].iter().zip(&texts) {
            let line = line(args, prompt, generation, text);
            match args.out {
                Some(_) => kept += &format!("{line}\n"),
                None => writeln!(out, "{line}")?,
            }
        }
    }
    if let Some(path) = &args.out {
        write_file(path, kept.as_bytes())?;
    }
    Ok(())
}

/// Divides prompts into batches of at most `most` prompts, with a limit on tokens as in `cl eval`.
fn batches(prompts: &[Vec<u32>], most: usize) -> Vec<Range<usize>> {
    let tokens = 4 * EvalConfig::default().batch_tokens;
    let mut all: Vec<Range<usize>> = Vec::new();
    let mut used = 0;
    for (index, prompt) in prompts.iter().enumerate() {
        used += prompt.len();
        match all.last_mut().filter(|batch| batch.len() < most && used <= tokens) {
            Some(batch) => batch.end = index + 1,
            None => {
                all.push(index..index + 1);
                used = prompt.len();
            }
        }
    }
    all
}

/// Generates the texts of a batch.
fn texts(
    loaded: &LoadedModel,
    prompts: &[&[u32]],
    options: &GenerateOptions<'_>,
    stop: &[String],
    interrupt: &Interrupt,
) -> Result<Vec<(Generation, String)>> {
    let mut streams: Vec<TextStream<'_>> = prompts.iter().map(|_| TextStream::new(&loaded.tokenizer, stop)).collect();
    let mut failure: Option<ModelError> = None;
    let generations = generate(&loaded.model, prompts, options, &mut |index, ids| {
        let stream = &mut streams[index];
        if let Some(Err(error)) = ids.last().map(|&id| stream.push(id)) {
            failure = Some(error);
        }
        failure.is_some() || stream.stopped() || interrupt.requested()
    })?;
    failure.map_or(Ok(()), Err)?;
    ensure!(!interrupt.requested(), "stopped before all texts were complete");
    let text = |(mut generation, mut stream): (Generation, TextStream<'_>)| {
        stream.finish()?;
        generation.stopped |= stream.stopped();
        Ok((generation, stream.whole()?))
    };
    generations.into_iter().zip(streams).map(text).collect()
}

/// Formats a text for output.
fn line(args: &Args, prompt: &Prompt, generation: &Generation, text: &str) -> String {
    if args.ids {
        return format!("{:?}", generation.ids);
    }
    if args.prompts.prompts.is_none() {
        return text.to_owned();
    }
    let finish_reason = if generation.stopped { "stop" } else { "length" };
    json!({"prompt": prompt.text, "text": text, "tokens": generation.ids, "finish_reason": finish_reason}).to_string()
}
