use std::io::{IsTerminal, Write, stderr, stdin};

use anyhow::{Result, bail};
use cl_checkpoint::Interrupt;
use cl_cli::arguments::chat::Args;
use cl_data::{ChatTemplate, Message};
use cl_lab::LoadedModel;
use cl_model::{GenerateOptions, Scorer, Session};

use super::decoding::{decoding, of_model};
use super::input::Lines;
use super::{chat_template, loaded, reply};
use cl_cli::output::say;

/// A conversation with the model, including the model's cached state.
struct Conversation<'a> {
    args: &'a Args,
    template: ChatTemplate,
    loaded: &'a LoadedModel,
    session: Session<'a>,
    options: GenerateOptions<'a>,
    system: Option<String>,
    turns: Vec<Message>,
}

/// Runs the command.
pub fn run(mut args: Args, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let decoding = decoding(&args.decoding)?;
    super::locate(args.hub, &mut args.model, &mut args.adapter, interrupt)?;
    let args = &args;
    let template = chat_template::open(&args.model, args.template.as_deref())?;
    check_system(&template, args.system.as_deref())?;
    let loaded = loaded::open(&args.model, &args.adapter, &args.compute)?;
    let eos = Scorer::new(&loaded.model, &loaded.tokenizer).end_tokens();
    let decoding = of_model(decoding, &args.decoding, &loaded.model);
    let mut conversation = Conversation {
        args,
        template,
        loaded: &loaded,
        session: Session::new(&loaded.model),
        options: GenerateOptions { max_new_tokens: 0, eos: &eos, decoding, ..GenerateOptions::default() },
        system: args.system.clone(),
        turns: Vec::new(),
    };
    let terminal = stdin().is_terminal() && stderr().is_terminal();
    if terminal {
        say("/reset, /system TEXT, /exit; Ctrl-C ends a reply, or the program if there is none");
    }
    let mut lines = Lines::new();
    loop {
        if terminal {
            let _ = write!(stderr(), "> ");
        }
        let Some(line) = lines.next(&|| interrupt.requested())? else { break };
        if line.trim_end() == "/exit" {
            break;
        }
        conversation.take(&line, &|| interrupt.requested(), out)?;
        match interrupt.exit_code() {
            Some(CTRL_C) => interrupt.clear(),
            Some(_) => break,
            None => {}
        }
    }
    if interrupt.requested() {
        bail!("stopped");
    }
    Ok(())
}

/// Exit code after Ctrl-C.
const CTRL_C: u8 = 130;

/// Checks that the template supports a system message, as not every template does.
fn check_system(template: &ChatTemplate, system: Option<&str>) -> Result<()> {
    chat_template::render(template, system, &[Message::new("user", "?")]).map(|_| ())
}

impl Conversation<'_> {
    /// Handles a line of input: a command, or a message to answer.
    fn take(&mut self, line: &str, interrupted: &dyn Fn() -> bool, out: &mut impl Write) -> Result<()> {
        let (first, rest) = line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
        match first {
            "" => {}
            "/reset" => self.turns.clear(),
            "/system" => self.set_system(rest.trim()),
            // A word with further slashes is a path, not a command.
            _ if first.len() > 1 && first.starts_with('/') && !first[1..].contains(|c: char| !c.is_alphabetic()) => {
                say(format_args!("unknown command {first}; commands: /reset, /system TEXT, /exit"));
            }
            _ => self.answer(line, interrupted, out)?,
        }
        Ok(())
    }

    fn set_system(&mut self, text: &str) {
        let system = Some(text.to_owned()).filter(|text| !text.is_empty());
        match check_system(&self.template, system.as_deref()) {
            Ok(()) => self.system = system,
            Err(error) => say(format_args!("the system message is unchanged: {error}")),
        }
    }

    fn answer(&mut self, message: &str, interrupted: &dyn Fn() -> bool, out: &mut impl Write) -> Result<()> {
        self.turns.push(Message::new("user", message));
        let prompt = chat_template::render(&self.template, self.system.as_deref(), &self.turns)?;
        // The template adds BOS itself.
        let ids = self.loaded.tokenizer.encode(&prompt, false)?;
        let positions = self.loaded.model.config.max_position_embeddings;
        let room = positions.saturating_sub(ids.len());
        if room == 0 {
            self.turns.pop();
            say(format_args!(
                "the conversation would exceed the model's context ({} of {positions} tokens); the message was dropped. \
                 /reset starts a new conversation",
                ids.len()
            ));
            return Ok(());
        }
        self.options.max_new_tokens = room.min(self.args.max_new_tokens);
        let (tokenizer, stop) = (&self.loaded.tokenizer, &self.args.decoding.stop);
        let reply = reply::write(&mut self.session, tokenizer, &ids, &self.options, stop, interrupted, out)?;
        self.options.first_prompt += 1;
        self.turns.push(Message::new("assistant", reply.text));
        if interrupted() {
            say("(interrupted)");
        } else if !reply.stopped && room <= self.args.max_new_tokens {
            say(format_args!(
                "(truncated: the context of {positions} tokens is full; /reset starts a new conversation)"
            ));
        } else if !reply.stopped {
            say(format_args!("(truncated after {} tokens; see --max-new-tokens)", self.args.max_new_tokens));
        }
        Ok(())
    }
}
