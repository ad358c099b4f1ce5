use serde::{Deserialize, Deserializer, Serialize};

/// Which definitions apply where papers, their code and tools differ. Explicit settings take precedence over it.
///
/// Only merging supports all three; everything else reads its profile with [`Profile::of_training`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// Definitions of the authors of the methods.
    #[default]
    Method,
    /// Definitions used for "Collaboratively adding new knowledge to an LLM". In merging, these are PEFT's: DARE
    /// without rescaling, and trimming per tensor.
    Paper,
    /// In merging, the definitions of mergekit; elsewhere the same as [`Profile::Method`].
    Mergekit,
}

impl Profile {
    /// Deserializes a profile outside of merging, `method` or `paper`; for `#[serde(deserialize_with = …)]`.
    ///
    /// ```
    /// use cl_checkpoint::Profile;
    /// # use serde::Deserialize;
    /// #[derive(Debug, Deserialize)]
    /// struct Config {
    ///     #[serde(default, deserialize_with = "Profile::of_training")]
    ///     profile: Profile,
    /// }
    /// let config: Config = serde_json::from_str(r#"{"profile": "paper"}"#)?;
    /// assert_eq!(config.profile, Profile::Paper);
    /// assert!(serde_json::from_str::<Config>(r#"{"profile": "mergekit"}"#).is_err());
    /// # Ok::<(), serde_json::Error>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error of the format if it is neither of the two.
    pub fn of_training<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Profile, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename = "Profile", rename_all = "snake_case")]
        enum OfTraining {
            Paper,
            Method,
        }
        Ok(match OfTraining::deserialize(deserializer)? {
            OfTraining::Paper => Profile::Paper,
            OfTraining::Method => Profile::Method,
        })
    }
}

impl std::fmt::Display for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Profile::Method => "method",
            Profile::Paper => "paper",
            Profile::Mergekit => "mergekit",
        })
    }
}
