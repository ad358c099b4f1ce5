use std::ops::Range;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_TOKENIZER, read_file};

use crate::{Error, special};

/// A model's tokenizer: `tokenizer.json`, and the special tokens that `tokenizer_config.json` names.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    eos: Option<String>,
    bos: Option<String>,
    pad: Option<String>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory. Special tokens that `tokenizer_config.json` does not name are looked for in
    /// `special_tokens_map.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when `tokenizer.json` is missing or no tokenizer.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer, Error> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            let message = "not found; a model directory holds its tokenizer in tokenizer.json".to_owned();
            return Err(Error::Tokenizer { path, message });
        }
        let mut tokenizer = Self::from_file(&path)?;
        for file in special::FILES.map(|name| dir.join(name)) {
            let Some(json) = special::read(&file)? else { continue };
            for (key, slot) in [
                ("eos_token", &mut tokenizer.eos),
                ("bos_token", &mut tokenizer.bos),
                ("pad_token", &mut tokenizer.pad),
            ] {
                if slot.is_none() {
                    *slot = special::token(json.get(key));
                }
            }
            tokenizer.path = file;
        }
        Ok(tokenizer)
    }

    /// Reads a `tokenizer.json` alone, of at most 256 MiB; it knows no special tokens by role.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Tokenizer`].
    pub fn from_file(path: &Path) -> Result<Tokenizer, Error> {
        let mut inner = tokenizers::Tokenizer::from_bytes(read_file(path, MAX_TOKENIZER)?)
            .map_err(|e| Error::Tokenizer { path: path.to_owned(), message: e.to_string() })?;
        // Length is our business: a truncation or padding setting left in the file would cut examples silently.
        inner
            .with_truncation(None)
            .map_err(|e| Error::Tokenizer { path: path.to_owned(), message: e.to_string() })?
            .with_padding(None);
        Ok(Tokenizer { inner, path: path.to_owned(), eos: None, bos: None, pad: None })
    }

    /// Token ids of `text`, with the special tokens that the tokenizer adds by itself (BOS, say) or without.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let encoding =
            self.inner.encode_fast(text, add_special_tokens).map_err(|e| Error::Encode { message: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a rendered conversation, which holds its special tokens already, and the bytes of the text that each stands
    /// for.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), Error> {
        let encoding = self.inner.encode(text, false).map_err(|e| Error::Encode { message: e.to_string() })?;
        let places = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// Whether a token is a special one, such as the end of a turn.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// Token ids of `text` as the evaluation harness makes them for the settings of its `add_bos_token`.
    ///
    /// | `add_bos` | tokens |
    /// | --- | --- |
    /// | `None` | with the special tokens that the tokenizer adds by itself |
    /// | `Some(false)` | without any |
    /// | `Some(true)` | without any, and BOS in front if the tokenizer has one, whether or not it would add it by itself |
    ///
    /// A text that begins with the text of BOS (of EOS where there is no BOS) gets no special tokens in any case, so that a
    /// rendered chat template has one BOS and not two.
    ///
    /// Sources: `tok_encode` in lm-evaluation-harness' `models/huggingface.py`; `update_post_processor` in Transformers 5's
    /// `tokenization_utils_tokenizers.py`, by which a given `add_bos_token` takes the place of the tokenizer's own rule, its
    /// EOS included.
    ///
    /// # Errors
    /// [`Error::Encode`], also when BOS is no token of the vocabulary.
    ///
    /// # Example
    /// ```no_run
    /// let tokenizer = cl_data::Tokenizer::from_dir("models/smollm2".as_ref())?;
    /// let ids = tokenizer.encode_with("The capital of France is", Some(true))?;
    /// assert_eq!(ids.first().copied(), tokenizer.bos_id());
    /// # Ok::<(), cl_data::Error>(())
    /// ```
    pub fn encode_with(&self, text: &str, add_bos: Option<bool>) -> Result<Vec<u32>, Error> {
        let prefix = self.bos.as_deref().or(self.eos.as_deref());
        if prefix.is_some_and(|token| text.starts_with(token)) {
            return self.encode(text, false);
        }
        match (add_bos, &self.bos) {
            (None, _) => self.encode(text, true),
            (Some(true), Some(bos)) => {
                let missing = || Error::Encode { message: format!("bos_token `{bos}` is not in the vocabulary") };
                let mut ids = vec![self.bos_id().ok_or_else(missing)?];
                ids.extend(self.encode(text, false)?);
                Ok(ids)
            }
            (Some(_), _) => self.encode(text, false),
        }
    }

    /// Text of token ids.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special_tokens).map_err(|e| Error::Encode { message: e.to_string() })
    }

    /// Text of the token that ends a sequence.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// Text of the token that ends a sequence, which training cannot do without.
    ///
    /// # Errors
    /// [`Error::NoEos`].
    pub fn require_eos(&self) -> Result<&str, Error> {
        self.eos_token().ok_or_else(|| Error::NoEos { path: self.path.clone() })
    }

    /// Id of the end token.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.token_to_id(self.eos.as_deref()?)
    }

    /// Id of the start token.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.token_to_id(self.bos.as_deref()?)
    }

    /// Id of the padding token.
    pub fn pad_id(&self) -> Option<u32> {
        self.inner.token_to_id(self.pad.as_deref()?)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}
