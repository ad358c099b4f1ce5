//! Keys of PEFT's `rank_pattern` and `alpha_pattern`.

use std::fmt;
use std::sync::Arc;

use regex::Regex;
use serde::{Deserialize, Serialize};

/// A key of PEFT's `rank_pattern` and `alpha_pattern`: a regular expression that must match the end of a module's name,
/// starting after a dot or at the beginning of the name. As in PEFT, that is `(.*\.)?(KEY)$`.
///
/// The expression is compiled once, when the pattern is created. Most keys are plain names, which are compared without
/// a regular expression. Patterns are equal if their keys are.
///
/// ```
/// use cl_checkpoint::ModulePattern;
/// let pattern = ModulePattern::from("self_attn.[qk]_proj");
/// assert!(pattern.is_match("model.layers.0.self_attn.q_proj"));
/// assert!(!pattern.is_match("model.layers.0.cross_self_attn.q_proj"));
/// assert!(ModulePattern::from("q_proj(").error().is_some());
/// ```
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct ModulePattern {
    key: String,
    matcher: Result<Matcher, regex::Error>,
}

/// How names are compared with a key.
#[derive(Clone)]
enum Matcher {
    Name(Name),
    /// Shared by clones, because a cloned [`Regex`] allocates memory for matching.
    Expression(Arc<Regex>),
}

/// A key without operators other than `.`, such as `q_proj`, `layers.0.mlp` or `^layers\.0\.mlp`.
#[derive(Clone)]
struct Name {
    /// Whether it is the whole name, because the key starts with `^`.
    whole: bool,
    /// Its characters; `None` for a dot that is not escaped, which stands for any character.
    chars: Vec<Option<char>>,
}

impl ModulePattern {
    /// Returns the key as written.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the pattern matches a module. An invalid regular expression matches none.
    pub fn is_match(&self, module: &str) -> bool {
        match &self.matcher {
            Ok(Matcher::Name(name)) => name.is_match(module),
            Ok(Matcher::Expression(regex)) => regex.is_match(module),
            Err(_) => false,
        }
    }

    /// Returns the error if the key is not a valid regular expression.
    pub fn error(&self) -> Option<&regex::Error> {
        self.matcher.as_ref().err()
    }
}

impl Name {
    /// Returns the name, or `None` if the key has other operators.
    fn of(key: &str) -> Option<Name> {
        let rest = key.strip_prefix('^');
        let mut chars = Vec::with_capacity(key.len());
        let mut left = rest.unwrap_or(key).chars();
        while let Some(c) = left.next() {
            chars.push(match c {
                '.' => None,
                // `\<` and `\>` are word boundaries, and escaped letters and digits have meanings of their own.
                '\\' => Some(left.next().filter(|c| c.is_ascii_punctuation() && !"<>".contains(*c))?),
                c if c.is_ascii_alphanumeric() || "_-".contains(c) => Some(c),
                _ => return None,
            });
        }
        Some(Name { whole: rest.is_some(), chars })
    }

    /// Compares backwards, since most names differ within the last component.
    fn is_match(&self, module: &str) -> bool {
        let mut left = module.chars().rev();
        let same = |c: &Option<char>| left.next().is_some_and(|m| c.map_or(m != '\n', |c| c == m));
        self.chars.iter().rev().all(same)
            && match left.next() {
                None => true,
                Some(before) => !self.whole && before == '.' && left.all(|c| c != '\n'),
            }
    }
}

impl From<String> for ModulePattern {
    fn from(key: String) -> ModulePattern {
        let matcher = match Name::of(&key) {
            Some(name) => Ok(Matcher::Name(name)),
            None => expression(&key).map(|regex| Matcher::Expression(Arc::new(regex))),
        };
        ModulePattern { key, matcher }
    }
}

fn expression(key: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

impl From<&str> for ModulePattern {
    fn from(key: &str) -> ModulePattern {
        key.to_owned().into()
    }
}

impl From<ModulePattern> for String {
    fn from(pattern: ModulePattern) -> String {
        pattern.key
    }
}

impl fmt::Debug for ModulePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.fmt(f)
    }
}

impl PartialEq for ModulePattern {
    fn eq(&self, other: &ModulePattern) -> bool {
        self.key == other.key
    }
}

impl Eq for ModulePattern {}

impl PartialOrd for ModulePattern {
    fn partial_cmp(&self, other: &ModulePattern) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ModulePattern {
    fn cmp(&self, other: &ModulePattern) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Names match as their regular expressions do, including dots, which match any character.
    #[test]
    fn names_match_as_regular_expressions() {
        let keys = ["q", "a.q", r"a\.q", "^a.q", r"^a\.q", "", "^", ".", r"\.", "-q", r"\-q", "a_q", "é"];
        let modules =
            ["", "q", "a.q", "b.a.q", "xa.q", "axq", "a.aéq", "b\n.q", "b\n.a.q", "a\nq", ".q", "a.", "-q", "é.q"];
        for key in keys {
            let expression = expression(key).unwrap();
            for module in modules {
                let found = ModulePattern::from(key).is_match(module);
                assert_eq!(found, expression.is_match(module), "{key:?} {module:?}");
            }
        }
        for key in ["q", "^layers.0.mlp", r"^model\.layers\.0\.mlp\.up_proj"] {
            assert!(Name::of(key).is_some(), "{key}");
        }
        for key in ["q$", "q|k", "[qk]", "q+", r"\d", r"\bq", r"\<q", "(?i)q", "q\\", "a^q"] {
            assert!(Name::of(key).is_none(), "{key}");
        }
    }

    proptest! {
        #[test]
        fn random_names_match_as_regular_expressions(key in r"\^?([ab_.]|\\\.){0,6}", module in r"[ab_.\né]{0,8}") {
            prop_assert_eq!(ModulePattern::from(key.as_str()).is_match(&module), expression(&key).unwrap().is_match(&module));
        }
    }
}
