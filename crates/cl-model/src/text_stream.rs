use cl_data::Tokenizer;

use crate::ModelError;

/// Decodes a stream of tokens to text incrementally, up to the first stop string.
///
/// Returned text is never retracted: incomplete characters, and text that may be the start of a stop string, are held
/// back. Special tokens have no text, but one of them can be a stop string.
///
/// A tokenizer with byte fallback decodes a run of byte tokens as a whole: an invalid UTF-8 byte can turn characters
/// that have already been returned into U+FFFD. They remain in the stream; [`whole`](TextStream::whole) is exact.
///
/// # Example
/// ```no_run
/// # let tokenizer = cl_data::Tokenizer::from_dir("models/smollm2".as_ref())?;
/// let stop = ["\n\n".to_owned()];
/// let mut stream = cl_model::TextStream::new(&tokenizer, &stop);
/// for id in tokenizer.encode("One.\n\nTwo.", false)? {
///     print!("{}", stream.push(id)?);
/// }
/// println!("{}", stream.finish()?);
/// assert_eq!((stream.text(), stream.stopped()), ("One.", true));
/// # Ok::<(), cl_model::ModelError>(())
/// ```
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    stop: &'a [String],
    stop_ids: Vec<u32>, // special tokens
    ids: Vec<u32>,
    // Tokens before `done` are in `text`. Those from `context` on are decoded again with each new token, because the
    // text of a token may depend on the token before it.
    context: usize,
    done: usize,
    text: String,
    handed_out: usize,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    /// Creates an empty stream, which ends before the first of the `stop` strings.
    pub fn new(tokenizer: &'a Tokenizer, stop: &'a [String]) -> TextStream<'a> {
        let (ids, text) = (Vec::new(), String::new());
        let stop_ids = stop.iter().filter_map(|stop| tokenizer.special_id(stop)).collect();
        TextStream { tokenizer, stop, stop_ids, ids, context: 0, done: 0, text, handed_out: 0, stopped: false }
    }

    /// Adds the next token and returns the text that has become final, which may be empty. After a stop string, tokens
    /// are ignored.
    ///
    /// # Errors
    /// Returns an error if the tokenizer cannot decode the tokens.
    pub fn push(&mut self, id: u32) -> Result<&str, ModelError> {
        self.stopped |= self.stop_ids.contains(&id);
        if !self.stopped {
            self.ids.push(id);
            let before = self.tokenizer.decode(&self.ids[self.context..self.done], true)?;
            let with = self.tokenizer.decode(&self.ids[self.context..], true)?;
            let new = with[common_prefix(&before, &with)..].to_owned();
            if !new.is_empty() && !new.ends_with('\u{fffd}') {
                (self.context, self.done) = (self.done, self.ids.len());
                self.append(&new);
            }
        }
        Ok(self.hand_out())
    }

    /// Returns the text that is still held back, after the last token.
    ///
    /// # Errors
    /// Returns an error if the tokenizer cannot decode the tokens.
    pub fn finish(&mut self) -> Result<&str, ModelError> {
        let (whole, stopped) = self.decode_all()?;
        if whole.starts_with(&self.text[..self.handed_out]) {
            self.text = whole;
            self.stopped |= stopped;
        } else if !self.stopped {
            let before = self.tokenizer.decode(&self.ids[self.context..self.done], true)?;
            let with = self.tokenizer.decode(&self.ids[self.context..], true)?;
            self.append(&with[common_prefix(&before, &with)..]);
        }
        let rest = self.handed_out;
        self.handed_out = self.text.len();
        Ok(&self.text[rest..])
    }

    /// Decodes all tokens so far together, up to the first stop string.
    ///
    /// # Errors
    /// Returns an error if the tokenizer cannot decode the tokens.
    pub fn whole(&self) -> Result<String, ModelError> {
        Ok(self.decode_all()?.0)
    }

    fn decode_all(&self) -> Result<(String, bool), ModelError> {
        let mut whole = self.tokenizer.decode(&self.ids, true)?;
        let end = first_of(self.stop, &whole);
        whole.truncate(end.unwrap_or(whole.len()));
        Ok((whole, end.is_some()))
    }

    /// Returns whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Returns all text so far without the stop string, including text that is still held back.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn append(&mut self, new: &str) {
        let longest = self.stop.iter().map(String::len).max().unwrap_or(0);
        let from = self.text.floor_char_boundary(self.text.len().saturating_sub(longest));
        self.text.push_str(new);
        if let Some(at) = first_of(self.stop, &self.text[from..]) {
            self.text.truncate(from + at);
            self.stopped = true;
        }
    }

    fn hand_out(&mut self) -> &str {
        let held = if self.stopped { 0 } else { beginning_of(self.stop, &self.text[self.handed_out..]) };
        let from = self.handed_out;
        self.handed_out = self.text.len() - held;
        &self.text[from..self.handed_out]
    }
}

/// Number of bytes of the longest common prefix.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

/// Byte position of the first stop string.
fn first_of(stop: &[String], text: &str) -> Option<usize> {
    stop.iter().filter_map(|s| text.find(s.as_str())).min()
}

/// Length in bytes of the longest suffix of a text that may be the start of a stop string.
fn beginning_of(stop: &[String], text: &str) -> usize {
    let may_begin = |s: &String| {
        let boundaries = s.char_indices().map(|(at, _)| at).filter(|&at| at > 0);
        boundaries.filter(|&at| text.ends_with(&s[..at])).max().unwrap_or(0)
    };
    stop.iter().map(may_begin).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level tokenizer with one token per byte, whose id is the byte, and no longer tokens; 256 is a special
    /// token.
    fn bytes() -> Tokenizer {
        // Byte-level BPE represents unprintable bytes by the characters from U+0100 on.
        let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
        let mut unprintable = 256..;
        let mut vocab = serde_json::Map::new();
        for b in 0..256u32 {
            let stand_in = if printable(b) { Some(b) } else { unprintable.next() };
            vocab.insert(char::from_u32(stand_in.unwrap()).unwrap().to_string(), b.into());
        }
        let special = serde_json::json!({"id": 256, "content": "<end>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true});
        let tokenizer = serde_json::json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
            "normalizer": null, "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        Tokenizer::from_file(&path).unwrap()
    }

    /// A tokenizer with byte fallback, as in Llama 2: one token per byte, whose id is the byte, then `a` (256) and `b`
    /// (257).
    fn byte_fallback() -> Tokenizer {
        let bytes = (0..256u32).map(|b| (format!("<0x{b:02X}>"), b.into()));
        let letters = [("a".to_owned(), 256u32.into()), ("b".to_owned(), 257u32.into())];
        let vocab: serde_json::Map<String, serde_json::Value> = bytes.chain(letters).collect();
        let tokenizer = serde_json::json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true}});
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        Tokenizer::from_file(&path).unwrap()
    }

    /// Returns the pieces of text returned by the stream, the rest, and whether a stop string was found.
    fn stream(ids: impl IntoIterator<Item = u32>, stop: &[&str]) -> (Vec<String>, String, bool) {
        let tokenizer = bytes();
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
        let mut stream = TextStream::new(&tokenizer, &stop);
        let pieces: Vec<String> = ids.into_iter().map(|id| stream.push(id).unwrap().to_owned()).collect();
        let rest = stream.finish().unwrap().to_owned();
        assert_eq!(stream.text(), pieces.concat() + &rest);
        (pieces, rest, stream.stopped())
    }

    fn of(text: &str) -> impl Iterator<Item = u32> {
        text.bytes().map(u32::from)
    }

    #[test]
    fn characters_come_whole() {
        let (pieces, rest, _) = stream(of("aé€😀"), &[]);
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(rest, "");
        // Bytes that never form a character are returned at the end, as the tokenizer decodes them.
        let (pieces, rest, _) = stream([b'a'.into(), 0xf0, 0x9f], &[]);
        assert_eq!((pieces.concat().as_str(), rest.chars().all(|c| c == '\u{fffd}')), ("a", true));
        assert!(!rest.is_empty());
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_held_back() {
        let (pieces, rest, stopped) = stream(of("a\nb\n\nc"), &["\n\n"]);
        assert_eq!(pieces, ["a", "", "\nb", "", "", ""]);
        assert_eq!((rest.as_str(), stopped), ("", true));
        // Held-back text that does not become a stop string is returned at the end.
        let (pieces, rest, stopped) = stream(of("aEN"), &["END", "x"]);
        assert_eq!((pieces.concat().as_str(), rest.as_str(), stopped), ("a", "EN", false));
        // The start of a stop string occurs within another start of it.
        let (pieces, _, stopped) = stream(of("aab"), &["ab"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("a", true));
        // The search starts in the middle of a multi-byte character of the text before.
        let (pieces, _, stopped) = stream(of("ééa."), &["a."]);
        assert_eq!((pieces.concat().as_str(), stopped), ("éé", true));
    }

    #[test]
    fn special_tokens_have_no_text() {
        let (pieces, rest, _) = stream(of("a").chain([256]).chain(of("b")), &[]);
        assert_eq!((pieces.concat().as_str(), rest.as_str()), ("ab", ""));
    }

    #[test]
    fn a_special_token_can_be_a_stop_string() {
        let (pieces, rest, stopped) = stream(of("aE").chain([256]).chain(of("b")), &["<end>", "END"]);
        assert_eq!((pieces.concat() + &rest, stopped), ("aE".to_owned(), true));
        // Its text alone is not the token.
        let (pieces, rest, stopped) = stream(of("a<en"), &["<end>"]);
        assert_eq!((pieces.concat() + &rest, stopped), ("a<en".to_owned(), false));
    }

    #[test]
    fn however_the_text_is_cut_into_tokens_the_stop_string_ends_it() {
        for stop in ["c", "cd", "cde", "bcd", "é€", "😀"] {
            let text = "ab cdeé€ab😀z";
            let (pieces, rest, stopped) = stream(of(text), &[stop, "zzz"]);
            assert_eq!(
                (pieces.concat() + &rest, stopped),
                (text[..text.find(stop).unwrap_or(text.len())].to_owned(), text.contains(stop)),
                "{stop}"
            );
        }
    }

    #[test]
    fn text_goes_on_after_bytes_that_are_no_character() {
        let tokenizer = byte_fallback();
        // 0x91 is not valid UTF-8, so the tokenizer decodes the whole run of bytes, including `.`, as U+FFFD.
        let ids = [256, b'.'.into(), 0x91, 257, 256, b'.'.into(), 0x91];
        let stop = [];
        let mut stream = TextStream::new(&tokenizer, &stop);
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap().to_owned()).collect();
        let rest = stream.finish().unwrap().to_owned();
        assert_eq!(pieces, ["a", ".", "", "\u{fffd}\u{fffd}b", "a", ".", ""]);
        assert_eq!(rest, "\u{fffd}\u{fffd}");
        assert_eq!(stream.text(), pieces.concat() + &rest);
        assert_eq!(stream.whole().unwrap(), "a\u{fffd}\u{fffd}ba\u{fffd}\u{fffd}");
        // A stop string after such bytes is found.
        let stop = ["ba".to_owned()];
        let mut stream = TextStream::new(&tokenizer, &stop);
        for id in ids {
            stream.push(id).unwrap();
        }
        assert_eq!(stream.finish().unwrap(), "");
        assert!(stream.stopped());
        assert_eq!((stream.text(), stream.whole().unwrap().as_str()), ("a.\u{fffd}\u{fffd}", "a\u{fffd}\u{fffd}"));
    }
}
