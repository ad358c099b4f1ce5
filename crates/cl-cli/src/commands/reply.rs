use std::io::Write;

use anyhow::Result;
use cl_data::Tokenizer;
use cl_model::{GenerateOptions, Session, TextStream};

/// A generated text that was streamed.
pub struct Reply {
    /// The text, without the stop sequence.
    pub text: String,
    /// Whether it ended with an end-of-text token or a stop sequence.
    pub stopped: bool,
}

/// Generates a text and streams it, followed by a line break; stops early if interrupted.
pub fn write(
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions<'_>,
    stop: &[String],
    interrupted: &dyn Fn() -> bool,
    out: &mut impl Write,
) -> Result<Reply> {
    let mut stream = TextStream::new(tokenizer, stop);
    let mut written = Ok(());
    let generation = session.generate(prompt, options, &mut |ids| {
        written = push(&mut stream, ids, out);
        written.is_err() || stream.stopped() || interrupted()
    })?;
    written?;
    writeln!(out, "{}", stream.finish()?)?;
    let stopped = generation.stopped && (stream.stopped() || !interrupted());
    Ok(Reply { text: stream.text().to_owned(), stopped })
}

fn push(stream: &mut TextStream<'_>, ids: &[u32], out: &mut impl Write) -> Result<()> {
    if let Some(&id) = ids.last() {
        let new = stream.push(id)?;
        if !new.is_empty() {
            write!(out, "{new}")?;
        }
    }
    Ok(())
}
