use std::fmt;
use std::path::{Path, PathBuf};

use cl_checkpoint::files::{MAX_CONFIG, read_text};

/// The Hugging Face Hub, with the disk cache that its Python clients also use.
///
/// # Example
/// ```
/// use cl_hub::{Hub, Repo};
///
/// // Without a network, a file that is not in the cache is an error.
/// let cache = tempfile::tempdir()?;
/// let hub = Hub { endpoint: "https://huggingface.co".into(), cache: cache.path().into(), token: None, offline: true };
/// let model = Repo::parse_model("openai/gpt-oss-20b").expect("a valid name");
/// let error = hub.revision(&model).err().expect("it is not there");
/// assert!(error.to_string().contains("openai/gpt-oss-20b"));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Hub {
    /// Address of the Hub, with or without a trailing slash.
    pub endpoint: String,
    /// The directory that contains `models--organization--name` and `datasets--organization--name`.
    pub cache: PathBuf,
    /// Access token for private and gated repositories, and for uploads.
    pub token: Option<String>,
    /// Whether to send no requests.
    pub offline: bool,
}

impl fmt::Debug for Hub {
    /// Omits the token, which must not be logged.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &token)
            .field("offline", &self.offline)
            .finish()
    }
}

impl Hub {
    /// Reads settings from the environment variables of `huggingface_hub`: `HF_ENDPOINT`; `HF_HUB_CACHE`, else
    /// `HF_HOME`, else `XDG_CACHE_HOME`, else the user's `.cache`; `HF_TOKEN`, else the file named by `HF_TOKEN_PATH`,
    /// else `token` in `HF_HOME`; `HF_HUB_OFFLINE` (also `HF_DATASETS_OFFLINE` and `TRANSFORMERS_OFFLINE`).
    ///
    /// Source: <https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>.
    pub fn from_env() -> Hub {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Hub {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let user = set("HOME").or_else(|| set("USERPROFILE")).unwrap_or_else(|| ".".to_owned());
        let folder = |name: &str| set(name).map(|path| expanded(&path, &user));
        let home = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .unwrap_or_else(|| Path::new(&user).join(".cache/huggingface"));
        let cache =
            folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub"));
        let kept = || read_text(&folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")), MAX_CONFIG).ok();
        let yes = |name: &str| {
            set(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        let token = set("HF_TOKEN")
            .or_else(|| set("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| if yes("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { kept() });
        Hub {
            endpoint: set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            cache,
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            offline: ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().any(yes),
        }
    }

    /// Returns the commit that a file in the cache belongs to; `None` for any other file.
    ///
    /// # Example
    /// ```
    /// use cl_hub::Hub;
    ///
    /// let hub = Hub { endpoint: String::new(), cache: "/c".into(), token: None, offline: true };
    /// let path = hub.cache.join("datasets--openai--gsm8k/snapshots/0123abcd/main/test.jsonl");
    /// assert_eq!(hub.commit(&path).as_deref(), Some("0123abcd"));
    /// assert_eq!(hub.commit("test.jsonl".as_ref()), None);
    /// ```
    pub fn commit(&self, path: &Path) -> Option<String> {
        let mut parts = path.strip_prefix(&self.cache).ok()?.iter();
        parts.nth(1).filter(|folder| *folder == "snapshots")?;
        Some(parts.next()?.to_str()?.to_owned())
    }
}

/// Expands `~` to the home directory.
fn expanded(path: &str, user: &str) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => Path::new(user).join(rest),
        None => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        Hub::from_variables(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn variables_of_the_environment() {
        let plain = hub(&[("HOME", "/u")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/u/.cache/huggingface/hub"));
        assert_eq!((plain.token, plain.offline), (None, false));
        assert_eq!(hub(&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")]).cache, Path::new("/x/huggingface/hub"));
        assert_eq!(hub(&[("HOME", "/u"), ("HF_HOME", "~/h")]).cache, Path::new("/u/h/hub"));
        assert_eq!(hub(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
        assert_eq!(hub(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror/");
        for value in ["1", "true", "YES"] {
            assert!(hub(&[("HF_HUB_OFFLINE", value)]).offline);
        }
        assert!(!hub(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn tokens() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "kept\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(hub(&[("HF_HOME", home)]).token.as_deref(), Some("kept"));
        let given = hub(&[("HF_HOME", home), ("HF_TOKEN", "given")]);
        assert_eq!(given.token.as_deref(), Some("given"));
        assert!(!format!("{given:?}").contains("given"));
    }
}
