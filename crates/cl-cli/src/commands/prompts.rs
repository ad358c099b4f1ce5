use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use cl_cli::arguments::prompts::PromptArgs;
use cl_data::{Message, Row, Tokenizer, read_rows};

use super::chat_template;

/// A prompt.
pub struct Prompt {
    /// Where it is from, for messages.
    pub source: String,
    /// The text.
    pub text: String,
    /// Whether it was rendered by a chat template, which already adds special tokens.
    rendered: bool,
}

impl Prompt {
    /// Tokenizes the prompt, and checks that there is room for `max_new_tokens` more tokens.
    pub fn tokens(&self, tokenizer: &Tokenizer, max_new_tokens: usize, positions: usize) -> Result<Vec<u32>> {
        let ids = tokenizer.encode(&self.text, !self.rendered)?;
        ensure!(!ids.is_empty(), "{} has no tokens, and the tokenizer adds no BOS", self.source);
        ensure!(
            ids.len().saturating_add(max_new_tokens) <= positions,
            "{}: {} tokens and --max-new-tokens {max_new_tokens} exceed the model's context of {positions} tokens",
            self.source,
            ids.len(),
        );
        Ok(ids)
    }
}

/// A prompt as given in the arguments.
enum Given {
    Text(String),
    Messages(Vec<Message>),
}

/// Returns all prompts; conversations are rendered.
pub fn prompts(args: &PromptArgs, model: &Path) -> Result<Vec<Prompt>> {
    let given = given(args)?;
    let conversations = given.iter().any(|(_, given)| matches!(given, Given::Messages(_)));
    ensure!(
        conversations || (args.system.is_none() && args.template.is_none()),
        "--system and --template apply to conversations; add --chat, or use {{\"messages\"}} in --prompts"
    );
    let template = conversations.then(|| chat_template::open(model, args.template.as_deref())).transpose()?;
    let prompt = |(source, given): (String, Given)| match (given, &template) {
        (Given::Messages(messages), Some(template)) => {
            let own = messages.iter().any(|m| m.role == "system");
            let system = args.system.as_deref().filter(|_| !own);
            let text = chat_template::render(template, system, &messages).with_context(|| source.clone())?;
            Ok(Prompt { source, text, rendered: true })
        }
        (Given::Text(text), _) => Ok(Prompt { source, text, rendered: false }),
        (Given::Messages(_), None) => unreachable!("the template is open when there are messages"),
    };
    given.into_iter().map(prompt).collect()
}

/// Returns the prompts as given, each with its origin.
fn given(args: &PromptArgs) -> Result<Vec<(String, Given)>> {
    let of_user = |given| match given {
        Given::Text(text) if args.chat => Given::Messages(vec![Message::new("user", text)]),
        given => given,
    };
    let Some(file) = &args.prompts else {
        let given = |text: &String| (shortened(text), of_user(Given::Text(text.clone())));
        return Ok(args.prompt.iter().map(given).collect());
    };
    let rows = read_rows(file)?.rows;
    ensure!(!rows.is_empty(), "{}: no rows; {EXPECTED}", file.display());
    let given = |(index, row): (usize, &Row)| {
        let source = format!("{}: row {index} (from 0)", file.display());
        let given = of_row(row).with_context(|| source.clone())?;
        Ok((source, of_user(given)))
    };
    rows.iter().enumerate().map(given).collect()
}

const EXPECTED: &str = "expected {\"prompt\": TEXT} or {\"messages\": [{\"role\": TEXT, \"content\": TEXT}, ...]}";

/// Returns the prompt of a row; other keys are ignored.
fn of_row(row: &Row) -> Result<Given> {
    match (row.get("prompt"), row.get("messages")) {
        (Some(prompt), None) => prompt.as_str().map(|text| Given::Text(text.to_owned())).context(EXPECTED),
        (None, Some(_)) => {
            let tools = row.get("tools").is_some_and(|tools| !tools.is_null() && tools.as_array() != Some(&Vec::new()));
            ensure!(!tools, "`tools` are not passed to the chat template; remove them, or render the prompt yourself");
            let messages = cl_data::messages(row, "messages").context(EXPECTED)?;
            ensure!(!messages.is_empty(), "`messages` is empty; {EXPECTED}");
            Ok(Given::Messages(messages))
        }
        _ => bail!("expected either `prompt` or `messages`; {EXPECTED}"),
    }
}

/// Shortens a prompt for messages.
fn shortened(text: &str) -> String {
    let mut start: String = text.chars().take(60).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    format!("--prompt {start:?}")
}
