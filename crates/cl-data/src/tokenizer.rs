use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Error;

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
        if !path.is_file() {
            let message = "not found; a model directory holds its tokenizer in tokenizer.json".to_owned();
            return Err(Error::Tokenizer { path, message });
        }
        let mut tokenizer = Self::from_file(&path)?;
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let file = dir.join(name);
            if !file.is_file() {
                continue;
            }
            let text = std::fs::read(&file).map_err(|source| Error::Io { path: file.clone(), source })?;
            let json: Value = serde_json::from_slice(&text)
                .map_err(|e| Error::Tokenizer { path: file.clone(), message: format!("not valid JSON: {e}") })?;
            for (key, slot) in [
                ("eos_token", &mut tokenizer.eos),
                ("bos_token", &mut tokenizer.bos),
                ("pad_token", &mut tokenizer.pad),
            ] {
                if slot.is_none() {
                    *slot = special(json.get(key));
                }
            }
            tokenizer.path = file;
        }
        Ok(tokenizer)
    }

    /// Reads a `tokenizer.json` alone; it knows no special tokens by role.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn from_file(path: &Path) -> Result<Tokenizer, Error> {
        let mut inner = tokenizers::Tokenizer::from_file(path)
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

/// A special token is text, or an object with its text under `content`.
fn special(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}
