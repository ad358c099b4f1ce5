use std::ops::Range;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_TOKENIZER, read_file};

use crate::{Error, special};

/// A model's tokenizer: `tokenizer.json`, and the special tokens named in `tokenizer_config.json`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    eos: Option<String>,
    bos: Option<String>,
    pad: Option<String>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory. Special tokens missing from `tokenizer_config.json` are taken from
    /// `special_tokens_map.json`.
    ///
    /// # Errors
    /// Returns [`Error::File`] if there is no `tokenizer.json`, [`Error::Tokenizer`] if it is invalid, and
    /// [`Error::Json`] if another file is invalid.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer, Error> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            let hint = "a model directory contains tokenizer.json";
            return Err(cl_checkpoint::Error::NotFound { path, hint }.into());
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

    /// Reads only a `tokenizer.json` of at most 256 MiB, without the roles of special tokens.
    ///
    /// # Errors
    /// Returns [`Error::File`] if the file cannot be read, and [`Error::Tokenizer`] if it is invalid.
    pub fn from_file(path: &Path) -> Result<Tokenizer, Error> {
        let invalid = |source| Error::Tokenizer { path: path.to_owned(), source };
        let mut inner = tokenizers::Tokenizer::from_bytes(read_file(path, MAX_TOKENIZER)?).map_err(invalid)?;
        // A truncation or padding setting in the file would silently modify examples.
        inner.with_truncation(None).map_err(invalid)?.with_padding(None);
        Ok(Tokenizer { inner, path: path.to_owned(), eos: None, bos: None, pad: None })
    }

    /// Returns the token ids of `text`, with or without the special tokens that the tokenizer adds (such as BOS).
    ///
    /// # Errors
    /// Returns [`Error::Encode`] if tokenization fails.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|source| Error::Encode { source })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the token ids of a rendered conversation, which already contains its special tokens, and the byte range
    /// of each token.
    ///
    /// # Errors
    /// Returns [`Error::Encode`] if tokenization fails.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), Error> {
        let encoding = self.inner.encode(text, false).map_err(|source| Error::Encode { source })?;
        let places = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// Whether a token is special, such as an end-of-turn token.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// Returns the id of the special token with this text, if there is one.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text).filter(|&id| self.is_special(id))
    }

    /// Returns the token ids of `text` as in lm-evaluation-harness, depending on its setting `add_bos_token`.
    ///
    /// | `add_bos` | tokens |
    /// | --- | --- |
    /// | `None` | with the special tokens that the tokenizer adds by itself |
    /// | `Some(false)` | without any |
    /// | `Some(true)` | without any, but with BOS in front if there is one, even if the tokenizer does not add it |
    ///
    /// A text that starts with BOS (or with EOS if there is no BOS) never gets special tokens, so that a rendered chat
    /// template does not have two BOS tokens.
    ///
    /// Sources: `tok_encode` in lm-evaluation-harness' `models/huggingface.py`; `update_post_processor` in Transformers
    /// 5's `tokenization_utils_tokenizers.py`, by which a given `add_bos_token` replaces the tokenizer's own rule,
    /// including EOS.
    ///
    /// # Errors
    /// Returns [`Error::Encode`] if tokenization fails, and [`Error::BosNotInVocabulary`] if BOS is not in the
    /// vocabulary.
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
                let missing = || Error::BosNotInVocabulary { token: bos.clone() };
                let mut ids = vec![self.bos_id().ok_or_else(missing)?];
                ids.extend(self.encode(text, false)?);
                Ok(ids)
            }
            (Some(_), _) => self.encode(text, false),
        }
    }

    /// Decodes token ids.
    ///
    /// # Errors
    /// Returns [`Error::Encode`] if tokenization fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special_tokens).map_err(|source| Error::Encode { source })
    }

    /// Returns the text of the EOS token.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// Returns the text of the EOS token, which training requires.
    ///
    /// # Errors
    /// Returns [`Error::NoEos`] if the tokenizer has none.
    pub fn require_eos(&self) -> Result<&str, Error> {
        self.eos_token().ok_or_else(|| Error::NoEos { path: self.path.clone() })
    }

    /// Returns the id of the EOS token.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.token_to_id(self.eos.as_deref()?)
    }

    /// Returns the id of the BOS token.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.token_to_id(self.bos.as_deref()?)
    }

    /// Returns the id of the padding token.
    pub fn pad_id(&self) -> Option<u32> {
        self.inner.token_to_id(self.pad.as_deref()?)
    }

    /// Returns the number of tokens, including added ones.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}
