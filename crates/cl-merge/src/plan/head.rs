//! Output heads of models with tied and untied embeddings.

use cl_checkpoint::TensorSource;
use serde_json::Value;

use super::inputs::{Input, Inputs, names};
use crate::problem::{ModelProblem, Place, Problem};

/// How the output stores its head. Inputs with tied embeddings may store no head, or a copy of their embeddings; other
/// inputs store a head of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// All inputs agree: the head is an ordinary tensor, or no input has one.
    AsStored,
    /// All inputs have tied embeddings, but some store a copy under this name, which is left out.
    Tied(String),
    /// Some inputs have a head of their own under this name. Inputs without one contribute their embeddings.
    Own(String),
}

const KEY: &str = "tie_word_embeddings";
const HEAD: &str = "lm_head.weight";

/// How an input stores its head.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stored {
    Own,
    Copy,
    Not,
}

impl Head {
    /// Determines the head of the output. Inputs that have neither a head nor tied embeddings are reported as problems
    /// if other inputs have a head.
    pub(crate) fn of(inputs: &Inputs, problems: &mut Vec<Problem>, notes: &mut Vec<String>) -> Head {
        let named = |input: &Input| head(input.source()).map(str::to_owned);
        let Some(name) = inputs.models.iter().find_map(named) else { return Head::AsStored };
        let stored: Vec<Stored> = inputs.models.iter().map(|input| stored(input, &name)).collect();
        let any =
            |wanted: Stored| inputs.models.iter().zip(&stored).find(|(_, s)| **s == wanted).map(|(input, _)| input);
        match (any(Stored::Own), any(Stored::Copy), any(Stored::Not)) {
            (None, Some(copy), _) => {
                notes.push(format!(
                    "{}: its embeddings are tied, and its {name} is a copy of them; the output has none",
                    copy.written
                ));
                Head::Tied(name)
            }
            (Some(own), copy, not) if copy.is_some() || not.is_some() => {
                let lacking = inputs.models.iter().zip(&stored).filter(|(input, stored)| {
                    **stored == Stored::Not && !(is_tied(input) && embeddings(input, &name).is_some())
                });
                let missing = |(input, _): (&Input, _)| {
                    let kind = ModelProblem::HeadMissing { reference: own.written.clone() };
                    Problem::new(Place::model(&input.written), kind)
                };
                problems.extend(lacking.map(missing));
                notes.push(format!(
                    "{}: has its own {name}, {} has tied embeddings, which are merged as its head; the output has a \
                     head of its own and tie_word_embeddings = false",
                    own.written,
                    copy.or(not).map_or("", |input| &input.written)
                ));
                Head::Own(name)
            }
            (Some(own), ..) if is_tied(own) => {
                notes.push(format!(
                    "{}: tie_word_embeddings is true in config.json, but its {name} differs from its embeddings; the output \
                     has a head of its own and tie_word_embeddings = false",
                    own.written
                ));
                Head::Own(name)
            }
            _ => Head::AsStored,
        }
    }

    /// Whether the tensor is the head and is not compared between inputs, because not all of them have to store it.
    pub(crate) fn covers(&self, tensor: &str) -> bool {
        match self {
            Head::AsStored => false,
            Head::Tied(name) | Head::Own(name) => name == tensor,
        }
    }

    /// Whether a tensor of an input is part of the output.
    pub(crate) fn keeps(&self, tensor: &str) -> bool {
        !matches!(self, Head::Tied(name) if name == tensor)
    }

    /// Returns the name of the head if the output has one even though the model that determines the output's names may
    /// lack it.
    pub(crate) fn own(&self) -> Option<&str> {
        match self {
            Head::Own(name) => Some(name),
            Head::AsStored | Head::Tied(_) => None,
        }
    }

    /// Returns the tensor of an input for one of the output. For a head that the input does not store, this is its
    /// embedding.
    pub(crate) fn tensor<'i>(&self, input: &'i Input, tensor: &'i str) -> &'i str {
        if self.own() == Some(tensor) && input.source().info(tensor).is_none() {
            embeddings(input, tensor).unwrap_or(tensor)
        } else {
            tensor
        }
    }
}

/// Whether embedding and head are tied according to config.json, or else according to the default of its model type.
fn is_tied(input: &Input) -> bool {
    const TIED: [&str; 6] = ["gemma", "cohere", "gpt2", "opt", "bloom", "falcon"];
    let config = input.config();
    let of_type = || {
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
        TIED.iter().any(|tied| model_type.starts_with(tied))
    };
    config.get(KEY).and_then(Value::as_bool).unwrap_or_else(of_type)
}

fn head(source: &dyn TensorSource) -> Option<&str> {
    names(source).into_iter().find(|name| name.ends_with(HEAD))
}

fn stored(input: &Input, name: &str) -> Stored {
    let source = input.source();
    if source.info(name).is_none() {
        return Stored::Not;
    }
    // An adapter may change only one of the two.
    if is_tied(input)
        && input.folded.is_none()
        && embeddings(input, name).is_some_and(|table| source.same_bytes(table, name).unwrap_or(false))
    {
        Stored::Copy
    } else {
        Stored::Own
    }
}

/// Returns the embedding that a head of this name would be tied to.
fn embeddings<'i>(input: &'i Input, head: &str) -> Option<&'i str> {
    const TABLES: [&str; 5] =
        ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight"];
    // In a model with several parts, the embedding must belong to the same part.
    let prefix = head.strip_suffix(HEAD).unwrap_or_default();
    let is_table = |name: &&str| name.starts_with(prefix) && TABLES.iter().any(|table| name.ends_with(table));
    let tables: Vec<&str> = names(input.source()).into_iter().filter(is_table).collect();
    if let [one] = tables[..] { Some(one) } else { None }
}
