use std::io::Write;

use anyhow::{Result, ensure};
use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_cli::arguments::generate::Args;
use cl_lab::EvalConfig;
use cl_model::{Batching, GenerateOptions, Generation, Receiver, Scorer, Session, TextStream, generate_each};
use serde_json::json;

use super::decoding::{decoding, of_model};
use super::prompts::{Prompt, prompts};
use super::{loaded, reply};

/// Runs the command.
pub fn run(mut args: Args, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let decoding = decoding(&args.decoding)?;
    if let Some(path) = args.out.as_deref() {
        ensure!(!path.exists(), "--out {}: already exists; remove it, or choose another file", path.display());
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let missing = parent.filter(|parent| !parent.is_dir());
        ensure!(missing.is_none(), "--out {}: its directory does not exist; create it first", path.display());
    }
    super::locate(args.hub, &mut args.model, &mut args.adapter, interrupt)?;
    let args = &args;
    let prompts = prompts(&args.prompts, &args.model)?;
    let loaded = loaded::open(&args.model, &args.adapter, &args.compute)?;
    let positions = loaded.model.config.max_position_embeddings;
    let tokens = |p: &Prompt| p.tokens(&loaded.tokenizer, args.max_new_tokens, positions);
    let ids = prompts.iter().map(tokens).collect::<Result<Vec<_>>>()?;
    let eos = Scorer::new(&loaded.model, &loaded.tokenizer).end_tokens();
    let decoding = of_model(decoding, &args.decoding, &loaded.model);
    let batching = Batching::new(args.batch_sequences, EvalConfig::default().batch_tokens);
    let options =
        GenerateOptions { max_new_tokens: args.max_new_tokens, eos: &eos, decoding, first_prompt: 0, batching };
    if ids.len() == 1 && !args.ids && args.prompts.prompts.is_none() {
        let mut session = Session::new(&loaded.model);
        let (stop, interrupted) = (&args.decoding.stop, || interrupt.requested());
        reply::write(&mut session, &loaded.tokenizer, &ids[0], &options, stop, &interrupted, out)?;
        ensure!(!interrupt.requested(), "stopped before the text was complete");
        return Ok(());
    }
    let slices: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let stop = &args.decoding.stop;
    let streams = ids.iter().map(|_| TextStream::new(&loaded.tokenizer, stop)).collect();
    let mut kept = Vec::new();
    let lines: &mut dyn Write = if args.out.is_some() { &mut kept } else { out };
    let finished = ids.iter().map(|_| None).collect();
    let mut texts =
        Texts { args, prompts: &prompts, streams, failure: None, finished, written: 0, interrupt, out: lines };
    generate_each(&loaded.model, &slices, &options, &mut texts)?;
    if let Some(path) = &args.out {
        write_file(path, &kept)?;
    }
    Ok(())
}

/// Writes the texts in the order of the prompts, each as soon as it and all texts before it are complete.
struct Texts<'a> {
    args: &'a Args,
    prompts: &'a [Prompt],
    streams: Vec<TextStream<'a>>,
    failure: Option<anyhow::Error>,
    finished: Vec<Option<String>>, // lines
    written: usize,
    interrupt: &'a Interrupt,
    out: &'a mut dyn Write,
}

impl Receiver for Texts<'_> {
    type Error = anyhow::Error;

    fn stop(&mut self, index: usize, ids: &[u32]) -> bool {
        let stream = &mut self.streams[index];
        if let Some(Err(error)) = ids.last().map(|&id| stream.push(id)) {
            self.failure = Some(error.into());
        }
        self.failure.is_some() || stream.stopped() || self.interrupt.requested()
    }

    fn done(&mut self, index: usize, mut generation: Generation) -> Result<()> {
        self.failure.take().map_or(Ok(()), Err)?;
        ensure!(!self.interrupt.requested(), "stopped before all texts were complete");
        let stream = &mut self.streams[index];
        stream.finish()?;
        generation.stopped |= stream.stopped();
        let text = stream.whole()?;
        self.finished[index] = Some(line(self.args, &self.prompts[index], &generation, &text));
        while let Some(line) = self.finished.get_mut(self.written).and_then(Option::take) {
            writeln!(self.out, "{line}")?;
            self.written += 1;
        }
        Ok(())
    }
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
