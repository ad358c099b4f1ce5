use std::ops::Range;

use crate::problem::ChatProblem;
use crate::{ChatTemplate, Encoded, Error, Message, Tokenizer};

/// Tokenizes a conversation as rendered by the model's chat template. The loss covers the assistant's turns: from the
/// end of the generation prompt to the end of the message, and the special token that ends the turn.
///
/// Turns are located in the text of the whole conversation, which also works for templates that render earlier turns
/// differently from the last one (some omit earlier reasoning). A token that starts in the generation prompt and ends
/// in the message, such as a word with its leading space, belongs to the message. The loss covers none of the first
/// `context` messages. A conversation of more than `max_length` tokens is truncated at its end.
///
/// # Errors
/// Returns an error if the template rejects the conversation or changes the assistant's messages, or if the text cannot
/// be tokenized.
pub(crate) fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    context: usize,
    max_length: Option<usize>,
) -> Result<Encoded, Error> {
    let text = template.render(messages, false)?;
    let answers = answers(template, messages, context, &text)?;
    let (mut ids, places) = tokenizer.encode_with_offsets(&text)?;
    let mut learned: Vec<Range<usize>> = Vec::new();
    let is_special = |place: usize| ids.get(place).is_some_and(|&id| tokenizer.is_special(id));
    for Turn { answer, end: of_turn } in answers {
        let mut first = places.partition_point(|place| place.end <= answer.start);
        let mut end = first + places[first..].partition_point(|place| place.start < answer.end);
        // Special tokens can absorb adjacent white space, which may belong to the answer. A special token before the
        // answer is then part of the prompt, and one after it is the end of the turn.
        if first < end && is_special(first) && places[first].start < answer.start {
            first += 1;
        }
        let closed = first < end && is_special(end - 1) && places[end - 1].end > answer.end;
        let space = places[end..].iter().take_while(|p| p.start < of_turn && is_space(&text, p));
        let closing = end + space.count();
        let adjacent = closing == end || places.get(closing).is_some_and(|place| place.start < of_turn);
        if !closed && adjacent && is_special(closing) {
            end = closing + 1;
        }
        learned.push(first..end);
    }
    if let Some(max) = max_length {
        ids.truncate(max);
        learned.retain_mut(|range| {
            range.end = range.end.min(max);
            range.start < range.end
        });
    }
    Ok(Encoded { input_ids: ids, learned })
}

/// The position in bytes of an assistant's turn in the text of a conversation.
struct Turn {
    /// From the end of the generation prompt to the end of the message.
    answer: Range<usize>,
    /// The end of the turn, including what the template adds after the message; the end of the message if that is not
    /// known.
    end: usize,
}

/// Locates the assistant's turns, except those of the first `context` messages.
fn answers(template: &ChatTemplate, messages: &[Message], context: usize, text: &str) -> Result<Vec<Turn>, Error> {
    let mut turns: Vec<Turn> = Vec::new();
    let mut contents = marked(template, messages, text).unwrap_or_default().into_iter();
    let mut from = 0;
    for (i, message) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
        let before = template.render(&messages[..i], true)?;
        let opened = text.starts_with(&before).then_some(before.len()).filter(|start| *start >= from);
        let is_context = i < context;
        // Templates may omit what is only context. It is not searched for, as the same text could occur later.
        let start = if is_context { opened } else { Some(opened.unwrap_or(from)) };
        let found = contents.next().or_else(|| searched(message.content.trim(), text, start?));
        let range = match found {
            Some(range) => range,
            None if is_context => continue,
            None => return Err(template.error(ChatProblem::NotRendered { index: i })),
        };
        let Range { start, end } = with_white_space(range, &message.content, text);
        from = end;
        if !is_context {
            let start = opened.filter(|opened| *opened <= start).unwrap_or(start);
            turns.push(Turn { answer: start..end, end: turn_end(template, &messages[..=i], text, end) });
        }
    }
    Ok(turns)
}

/// Locates the trimmed content of each assistant message exactly, by rendering the conversation once more with a mark
/// before and after each content. Returns `None` if the template does more with contents than output them, so that the
/// text without the marks is different.
fn marked(template: &ChatTemplate, messages: &[Message], text: &str) -> Option<Vec<Range<usize>>> {
    let unused = |c: &char| !text.contains(*c) && !template.text().contains(*c);
    let mark = ('\u{e000}'..='\u{f8ff}').find(unused)?; // private use
    let with_marks = |message: &Message| {
        if message.role != "assistant" {
            return message.clone();
        }
        let content = &message.content;
        let said = content.trim();
        let lead = content.len() - content.trim_start().len();
        let (lead, tail) = (&content[..lead], &content[lead + said.len()..]);
        Message::new(message.role.clone(), format!("{lead}{mark}{said}{mark}{tail}"))
    };
    let messages: Vec<Message> = messages.iter().map(with_marks).collect();
    let rendered = template.render(&messages, false).ok()?;
    let mut pieces = rendered.split(mark);
    let mut place = pieces.next()?.len();
    let mut contents = Vec::new();
    while let Some(content) = pieces.next() {
        contents.push(place..place + content.len());
        place += content.len() + pieces.next()?.len();
    }
    let said = messages.iter().filter(|m| m.role == "assistant").map(|m| m.content.trim().trim_matches(mark));
    let same = rendered.replace(mark, "") == text && said.eq(contents.iter().map(|range| &text[range.clone()]));
    same.then_some(contents)
}

/// Returns the first occurrence of a content at or after `from`.
fn searched(said: &str, text: &str, from: usize) -> Option<Range<usize>> {
    let start = from + text[from..].find(said)?;
    Some(start..start + said.len())
}

/// Extends the range of a trimmed content by its surrounding white space, if the template has kept it.
fn with_white_space(range: Range<usize>, content: &str, text: &str) -> Range<usize> {
    let said = content.trim_start();
    let lead = &content[..content.len() - said.len()];
    let tail = &said[said.trim_end().len()..];
    let start = range.start - if text[..range.start].ends_with(lead) { lead.len() } else { 0 };
    let end = range.end + if text[range.end..].starts_with(tail) { tail.len() } else { 0 };
    start..end
}

/// Returns the end of the last of these turns in the text of the whole conversation. A template can add white space
/// between a message and the token that ends it, as Llama 2's does.
fn turn_end(template: &ChatTemplate, messages: &[Message], text: &str, end: usize) -> usize {
    if !text[end..].starts_with(char::is_whitespace) {
        return end;
    }
    let so_far = template.render(messages, false).ok();
    so_far.filter(|so_far| text.starts_with(so_far)).map_or(end, |so_far| so_far.len().max(end))
}

fn is_space(text: &str, place: &Range<usize>) -> bool {
    text.get(place.clone()).is_some_and(|token| token.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Encoding;
    use crate::{Example, Profile};

    const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} {{ eos_token }}\n\
                            {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}";

    /// A tokenizer of words, numbered in the order of the list; 0 is unknown.
    fn tokenizer(folder: &std::path::Path) -> Tokenizer {
        let words = ["<unk>", "<s>", "</s>", "<system>", "<user>", "<assistant>", "be", "kind", "one", "two", "three"];
        let vocabulary: serde_json::Map<_, _> =
            words.iter().enumerate().map(|(i, w)| (w.to_string(), serde_json::Value::from(i))).collect();
        let special = |id: usize| {
            serde_json::json!({"id": id, "content": words[id], "single_word": false, "lstrip": false, "rstrip": false,
                               "normalized": false, "special": true})
        };
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(1), special(2)],
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
        });
        std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let config = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>"});
        std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
        Tokenizer::from_dir(folder).unwrap()
    }

    fn encode_after(
        context: usize,
        template: &str,
        turns: &[(&str, &str)],
        max_length: Option<usize>,
    ) -> Result<Encoded, String> {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(folder.path());
        let chat = ChatTemplate::new(template, &[("bos_token", "<s>"), ("eos_token", "</s>")]).unwrap();
        let messages = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        Encoding { tokenizer: &tokenizer, chat: Some(&chat), max_length, profile: Profile::Method }
            .example(&Example::Chat { messages, context })
            .map_err(|e| e.to_string())
    }

    fn encode(template: &str, turns: &[(&str, &str)], max_length: Option<usize>) -> Result<Encoded, String> {
        encode_after(0, template, turns, max_length)
    }

    const TURNS: [(&str, &str); 5] = [
        ("system", "be kind"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "two two"),
        ("assistant", "three  one"),
    ];

    #[test]
    fn every_turn_of_the_assistant_is_learned_with_its_end() {
        let encoded = encode(TEMPLATE, &TURNS, None).unwrap();
        assert_eq!(encoded.input_ids, [1, 3, 6, 7, 2, 4, 8, 2, 5, 9, 2, 4, 9, 9, 2, 5, 10, 8, 2]);
        assert_eq!(encoded.learned, [9..11, 16..19]);
        let labels: Vec<i64> = encoded.labels().into_iter().filter(|&label| label != -100).collect();
        assert_eq!((labels.as_slice(), encoded.targets()), (&[9, 2, 10, 8, 2][..], 5));
    }

    #[test]
    fn messages_that_are_only_context_are_not_learned() {
        let whole = encode(TEMPLATE, &TURNS, None).unwrap();
        let last = &[16, 17, 18][..];
        for (context, expected) in [(2, &[9, 10, 16, 17, 18][..]), (3, last), (4, last), (5, &[])] {
            let encoded = encode_after(context, TEMPLATE, &TURNS, None).unwrap();
            let learned: Vec<usize> = encoded.learned.into_iter().flatten().collect();
            assert_eq!((encoded.input_ids.as_slice(), learned.as_slice()), (whole.input_ids.as_slice(), expected));
        }
        // A template may omit them, but not an answer that is learned.
        let omits = "{% if m.role != 'assistant' or loop.last %}{{ m.content | trim }}{% endif %}";
        let template = TEMPLATE.replace("{{ m.content | trim }}", omits);
        let turns = [("user", "one"), ("assistant", "be"), ("user", "two"), ("assistant", "three one")];
        assert!(encode(&template, &turns, None).unwrap_err().contains("message 1 of the assistant"));
        assert_eq!(encode_after(2, &template, &turns, None).unwrap().targets(), 3);
    }

    #[test]
    fn a_long_conversation_loses_its_end() {
        let encoded = encode(TEMPLATE, &TURNS, Some(17)).unwrap();
        assert_eq!((encoded.input_ids.len(), encoded.learned), (17, vec![9..11, 16..17]));
        assert_eq!(encode(TEMPLATE, &TURNS, Some(6)).unwrap().targets(), 0);
    }

    #[test]
    fn past_turns_may_be_written_in_another_way_than_the_last() {
        // The last answer gets a prefix, as in templates that omit the reasoning of earlier turns.
        let template = TEMPLATE.replace(
            "{{ m.content | trim }}",
            "{% if m.role == 'assistant' and loop.last %}kind {% endif %}{{ m.content | trim }}",
        );
        let encoded = encode(&template, &TURNS, None).unwrap();
        assert_eq!(encoded.input_ids[16..], [7, 10, 8, 2]);
        assert_eq!(encoded.learned, [9..11, 16..20]);
    }

    /// Returns the texts that the loss covers.
    fn learned(template: &str, turns: &[(&str, &str)]) -> Vec<String> {
        let chat = ChatTemplate::new(template, &[("bos_token", "<s>"), ("eos_token", "</s>")]).unwrap();
        let messages: Vec<Message> = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        let text = chat.render(&messages, false).unwrap();
        answers(&chat, &messages, 0, &text).unwrap().into_iter().map(|turn| text[turn.answer].to_owned()).collect()
    }

    #[test]
    fn white_space_at_the_end_of_an_answer_does_not_hide_its_end_token() {
        let template = TEMPLATE.replace(" {{ m.content | trim }} ", " {{ m.content }}");
        let turns = [("user", "one"), ("assistant", "two \n"), ("user", "one"), ("assistant", " \n three\n\n")];
        assert_eq!(learned(&template, &turns), ["two \n", " \n three\n\n"]);
        assert_eq!(learned(TEMPLATE, &turns), ["two", "three"]);
        let encoded = encode(&template, &turns, None).unwrap();
        let labels: Vec<i64> = encoded.labels().into_iter().filter(|&label| label != -100).collect();
        assert_eq!(labels, [9, 2, 10, 2]);
    }

    #[test]
    fn an_answer_is_not_mistaken_for_the_same_text_before_it() {
        // Like reasoning models: an empty thought before the last answer. The text "hi" also occurs in "think".
        let think = TEMPLATE.replace(
            "{{ m.content | trim }}",
            "{% if m.role == 'assistant' and loop.last %}<think> </think> {% endif %}{{ m.content | trim }}",
        );
        assert_eq!(learned(&think, &[("user", "one"), ("assistant", "hi")]), ["<think> </think> hi"]);
        assert_eq!(learned(&think, &[("user", "one"), ("assistant", "")]), ["<think> </think> "]);
        // A generation prompt that starts a thought, which earlier turns do not have.
        let opened = TEMPLATE.replace("<assistant> {% endif", "<assistant> <think>{% endif");
        assert_eq!(learned(&opened, &[("user", "say one"), ("assistant", "one")]), ["one"]);
    }

    #[test]
    fn a_template_that_looks_at_the_content_still_finds_it() {
        let template = TEMPLATE
            .replace("{{ m.content | trim }}", "{% if m.content == 'two' %}kind {% endif %}{{ m.content | trim }}");
        assert_eq!(learned(&template, &TURNS), ["kind two", "three  one"]);
    }

    /// Returns the tokens that the loss covers in `<u>a…b…<u>a…b \n…`. Every character is a token, and so are `</s>`
    /// (5), which absorbs white space before it if `strip` is set, and `<u>` (6) and `<a>` (7), which then absorb white
    /// space after them.
    fn learned_characters(template: &str, strip: bool) -> Vec<i64> {
        let folder = tempfile::tempdir().unwrap();
        let vocabulary = serde_json::json!({"a": 0, "b": 1, " ": 2, "<": 3, "\n": 4});
        let special = |id: usize, content: &str, end: bool| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": strip && end,
                               "rstrip": strip && !end, "normalized": false, "special": true})
        };
        let added = [special(5, "</s>", true), special(6, "<u>", false), special(7, "<a>", false)];
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []}
        });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        let messages = [("user", "a"), ("assistant", " b"), ("user", "a"), ("assistant", "b \n")];
        let messages = messages.map(|(role, content)| Message::new(role, content));
        let chat = ChatTemplate::new(template, &[]).unwrap();
        let encoded = encode_conversation(&tokenizer, &chat, &messages, 0, None).unwrap();
        encoded.labels().into_iter().filter(|label| *label >= 0).collect()
    }

    #[test]
    fn white_space_of_the_template_before_the_end_token_is_learned_with_it() {
        let template =
            "{% for m in messages %}{% if m.role == 'user' %}<u>{% endif %}{{ m.content | trim }}END{% endfor %}";
        let learned = |end: &str| learned_characters(&template.replace("END", end), false);
        assert_eq!(learned(" </s>"), [1, 2, 5, 1, 2, 5]);
        assert_eq!(learned("</s>\n"), [1, 5, 1, 5]);
        // The token that starts the next turn does not end this turn.
        assert_eq!(learned("\n"), [1, 1]);
    }

    #[test]
    fn special_tokens_that_take_in_white_space_are_the_prompt_s_or_the_end() {
        let template = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>{{ m.content }}</s>\
                        {% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
        assert_eq!(learned_characters(template, false), [2, 1, 5, 1, 2, 4, 5]);
        assert_eq!(learned_characters(template, true), [1, 5, 1, 5]);
    }

    #[test]
    fn a_word_with_the_space_before_it_is_learned() {
        // The generation prompt ends with a space, which byte-level tokens include.
        let folder = tempfile::tempdir().unwrap();
        let vocabulary = ["A", ":", "\u{120}", "h", "i", "\u{120}h", "\u{120}hi", ";"];
        let vocabulary: serde_json::Map<_, _> =
            vocabulary.iter().enumerate().map(|(i, w)| (w.to_string(), serde_json::Value::from(i))).collect();
        let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false});
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": level, "post_processor": level, "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": ["\u{120} h", "\u{120}h i"]}
        });
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        let template =
            "{% for m in messages %}A: {{ m.content }};{% endfor %}{% if add_generation_prompt %}A: {% endif %}";
        let chat = ChatTemplate::new(template, &[]).unwrap();
        let messages = [Message::new("user", "hi"), Message::new("assistant", "hi")];
        let encoded = encode_conversation(&tokenizer, &chat, &messages, 0, None).unwrap();
        assert_eq!(encoded.input_ids, [0, 1, 6, 7, 0, 1, 6, 7]);
        assert_eq!(encoded.learned.into_iter().flatten().collect::<Vec<_>>(), [6]);
    }

    #[test]
    fn a_template_that_changes_what_was_said_is_refused() {
        let template = TEMPLATE.replace("{{ m.content | trim }}", "{{ m.content | upper }}");
        assert!(encode(&template, &TURNS, None).unwrap_err().contains("message 2 of the assistant is not in the text"));
    }
}
