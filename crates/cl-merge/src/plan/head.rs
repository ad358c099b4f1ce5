//! Output heads of models with tied and untied embeddings.

use cl_checkpoint::TensorSource;
use serde_json::Value;

use super::inputs::{Input, Inputs, names};
use crate::problem::{ModelProblem, Place, Problem};

/// Whether the output has an output head of its own. Some inputs may store none, because their embeddings are tied, some a
/// copy of their embeddings, and some a head of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// All inputs are alike: it is a tensor like others, or none has it.
    AsStored,
    /// The embeddings of all inputs are tied, but some store a copy of them under this name, which is left out.
    Tied(String),
    /// Some inputs have a head of their own under this name. For inputs without one, it is their embeddings.
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
    /// The head of the output of these inputs. Inputs that have neither a head nor tied embeddings, although others have a
    /// head, are problems.
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

    /// Whether the head is not compared between inputs, because not all of them have to store it.
    pub(crate) fn covers(&self, tensor: &str) -> bool {
        match self {
            Head::AsStored => false,
            Head::Tied(name) | Head::Own(name) => name == tensor,
        }
    }

    /// Whether a tensor of an input is one of the output.
    pub(crate) fn keeps(&self, tensor: &str) -> bool {
        !matches!(self, Head::Tied(name) if name == tensor)
    }

    /// The name of a head that the output has even if the model whose names it has lacks it.
    pub(crate) fn own(&self) -> Option<&str> {
        match self {
            Head::Own(name) => Some(name),
            Head::AsStored | Head::Tied(_) => None,
        }
    }

    /// The tensor of an input for one of the output: the embeddings for a head that it does not store.
    pub(crate) fn tensor<'i>(&self, input: &'i Input, tensor: &'i str) -> &'i str {
        if self.own() == Some(tensor) && input.source().info(tensor).is_none() {
            embeddings(input, tensor).unwrap_or(tensor)
        } else {
            tensor
        }
    }
}

/// Whether config.json says that embeddings and head are one; where it says nothing, whether they are in models of its type.
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
    // An adapter may change one of the two.
    if is_tied(input)
        && input.folded.is_none()
        && embeddings(input, name).is_some_and(|table| same(source, table, name))
    {
        Stored::Copy
    } else {
        Stored::Own
    }
}

fn same(source: &dyn TensorSource, a: &str, b: &str) -> bool {
    let alike = source.info(a).zip(source.info(b)).is_some_and(|(a, b)| a.shape == b.shape && a.dtype == b.dtype);
    alike && source.bytes(a).ok().zip(source.bytes(b).ok()).is_some_and(|(a, b)| a == b)
}

/// The embeddings that a head of this name would be tied to.
fn embeddings<'i>(input: &'i Input, head: &str) -> Option<&'i str> {
    const TABLES: [&str; 5] =
        ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight"];
    // Those of the same part of a model with several.
    let prefix = head.strip_suffix(HEAD).unwrap_or_default();
    let is_table = |name: &&str| name.starts_with(prefix) && TABLES.iter().any(|table| name.ends_with(table));
    let tables: Vec<&str> = names(input.source()).into_iter().filter(is_table).collect();
    if let [one] = tables[..] { Some(one) } else { None }
}
