use std::ops::Range;

use crate::problem::ChatProblem;
use crate::{ChatTemplate, Encoded, Error, Message, Tokenizer};

/// Tokenizes a conversation as rendered by the model's chat template. The loss covers the assistant's turns: from the
/// end of the generation prompt to the end of the message, and the special token that ends the turn.
///
/// Turns are located in the text of the whole conversation, so that templates that render earlier turns differently
/// from the last (some omit earlier reasoning) are handled. A conversation of more than `max_length` tokens is
/// truncated at its end.
///
/// # Errors
/// Returns an error if the template rejects the conversation or changes the assistant's messages, or if the text cannot
/// be tokenized.
pub(crate) fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    max_length: Option<usize>,
) -> Result<Encoded, Error> {
    let text = template.render(messages, false)?;
    let answers = answers(template, messages, &text)?;
    let (mut ids, places) = tokenizer.encode_with_offsets(&text)?;
    let mut learned: Vec<Range<usize>> = Vec::new();
    for answer in answers {
        let first = places.partition_point(|place| place.start < answer.start);
        let mut end = first + places[first..].partition_point(|place| place.start < answer.end);
        if ids.get(end).is_some_and(|&id| tokenizer.is_special(id)) {
            end += 1;
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

/// Byte ranges of the assistant's turns in the text of a conversation.
fn answers(template: &ChatTemplate, messages: &[Message], text: &str) -> Result<Vec<Range<usize>>, Error> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (i, message) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
        let before = template.render(&messages[..i], true)?;
        let said = message.content.trim();
        let from = ranges.last().map_or(0, |range| range.end);
        let opened = text.starts_with(&before).then_some(before.len()).filter(|start| *start >= from);
        let start = opened.unwrap_or(from);
        let Some(place) = text[start..].find(said) else {
            return Err(template.error(ChatProblem::NotRendered { index: i }));
        };
        let place = start + place;
        ranges.push(opened.unwrap_or(place)..place + said.len());
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Encoding;
    use crate::{Example, Profile};

    const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} {{ eos_token }}\n\
                            {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}";

    /// A tokenizer of words, which are numbered as they come; 0 is unknown.
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

    fn encode(template: &str, turns: &[(&str, &str)], max_length: Option<usize>) -> Result<Encoded, String> {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(folder.path());
        let chat = ChatTemplate::new(template, &[("bos_token", "<s>"), ("eos_token", "</s>")]).unwrap();
        let messages = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        Encoding { tokenizer: &tokenizer, chat: Some(&chat), max_length, profile: Profile::Method }
            .example(&Example::Chat { messages })
            .map_err(|e| e.to_string())
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
    fn a_long_conversation_loses_its_end() {
        let encoded = encode(TEMPLATE, &TURNS, Some(17)).unwrap();
        assert_eq!((encoded.input_ids.len(), encoded.learned), (17, vec![9..11, 16..17]));
        assert_eq!(encode(TEMPLATE, &TURNS, Some(6)).unwrap().targets(), 0);
    }

    #[test]
    fn past_turns_may_be_written_in_another_way_than_the_last() {
        // The last answer gets a word in front, as templates do for reasoning that they leave out of the past.
        let template = TEMPLATE.replace(
            "{{ m.content | trim }}",
            "{% if m.role == 'assistant' and loop.last %}kind {% endif %}{{ m.content | trim }}",
        );
        let encoded = encode(&template, &TURNS, None).unwrap();
        assert_eq!(encoded.input_ids[16..], [7, 10, 8, 2]);
        assert_eq!(encoded.learned, [9..11, 16..20]);
    }

    #[test]
    fn a_template_that_changes_what_was_said_is_refused() {
        let template = TEMPLATE.replace("{{ m.content | trim }}", "{{ m.content | upper }}");
        assert!(encode(&template, &TURNS, None).unwrap_err().contains("message 2 of the assistant is not in the text"));
    }
}
