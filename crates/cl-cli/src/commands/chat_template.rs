use std::path::Path;

use anyhow::{Result, bail};
use cl_checkpoint::Checkpoint;
use cl_checkpoint::files::{MAX_TOKENIZER, read_text};
use cl_data::{ChatTemplate, Message, Tokenizer};

/// Opens the chat template in `file`, or else that of the model.
pub fn open(model: &Path, file: Option<&Path>) -> Result<ChatTemplate> {
    if let Some(file) = file {
        let text = read_text(file, MAX_TOKENIZER)?;
        let tokens = special_tokens(&Tokenizer::from_dir(model)?)?;
        let tokens: Vec<(&str, &str)> = tokens.iter().map(|(role, token)| (*role, token.as_str())).collect();
        return Ok(ChatTemplate::new(&text, &tokens)?);
    }
    if let Some(template) = ChatTemplate::from_dir(model)? {
        return Ok(template);
    }
    // If this is not a model at all, report that first.
    Checkpoint::open(model)?;
    bail!(
        "{}: no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json); set one with \
         --template FILE",
        model.display()
    )
}

/// Returns the special tokens, under the names that templates use.
fn special_tokens(tokenizer: &Tokenizer) -> Result<Vec<(&'static str, String)>> {
    let ids = [("bos_token", tokenizer.bos_id()), ("eos_token", tokenizer.eos_id()), ("pad_token", tokenizer.pad_id())];
    let present = ids.into_iter().filter_map(|(role, id)| Some((role, id?)));
    present.map(|(role, id)| Ok((role, tokenizer.decode(&[id], false)?))).collect()
}

/// Renders a conversation, including the start of the assistant's turn.
pub fn render(template: &ChatTemplate, system: Option<&str>, turns: &[Message]) -> Result<String> {
    let system = system.map(|text| Message::new("system", text));
    let messages: Vec<Message> = system.into_iter().chain(turns.iter().cloned()).collect();
    Ok(template.render(&messages, true)?)
}
