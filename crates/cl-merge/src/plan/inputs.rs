//! The model directories that a merge reads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cl_checkpoint::{Checkpoint, TensorSource};
use serde_json::{Map, Value};

use super::head::Head;
use crate::adapter::folded::Folded;
use crate::methods::OpcmState;
use crate::problem::{ModelProblem, Place, Problem, TokenizerProblem};
use crate::recipe::config::{MergeConfig, model_and_adapter};

/// Model directories, each opened once.
#[derive(Default)]
pub(crate) struct Inputs {
    pub(crate) models: Vec<Input>,
}

/// A model that the merge reads.
pub(crate) struct Input {
    /// Name as written in the merge file.
    pub(crate) written: String,
    pub(crate) path: PathBuf,
    /// The model directory, without any adapter.
    pub(crate) checkpoint: Arc<Checkpoint>,
    /// The model with an adapter folded in, if the file says `model+adapter`.
    pub(crate) folded: Option<Arc<Folded>>,
}

/// A tensor source that several readers share.
pub(crate) type SharedSource = Arc<dyn TensorSource + Send + Sync>;

impl Input {
    /// Returns its tensors.
    pub(crate) fn source(&self) -> &dyn TensorSource {
        match &self.folded {
            Some(folded) => &**folded,
            None => &*self.checkpoint,
        }
    }

    /// Returns its tensors as a shared source.
    pub(crate) fn shared(&self) -> SharedSource {
        match &self.folded {
            Some(folded) => folded.clone(),
            None => self.checkpoint.clone(),
        }
    }

    /// Returns the content of its config.json.
    pub(crate) fn config(&self) -> &Map<String, Value> {
        self.folded.as_ref().map_or(self.checkpoint.config(), |folded| folded.config())
    }

    /// Returns its companion files: tokenizer, generation settings and templates.
    pub(crate) fn companion_files(&self) -> Result<Vec<PathBuf>, cl_checkpoint::Error> {
        match &self.folded {
            Some(folded) => Ok(folded.companions().to_vec()),
            None => self.checkpoint.companion_files(),
        }
    }

    /// Returns a companion file by name, if it exists.
    pub(crate) fn companion(&self, name: &str) -> Option<PathBuf> {
        self.companion_files().ok()?.into_iter().find(|file| file.ends_with(name))
    }

    /// Checks that none of its files has changed since it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), cl_checkpoint::Error> {
        self.folded.iter().try_for_each(|folded| folded.adapter().check_unchanged())?;
        self.checkpoint.check_unchanged()
    }
}

impl Inputs {
    /// Returns the index of a model, and opens it first if necessary. `directories` maps names of earlier stages and of
    /// Hub models to their directories.
    pub(crate) fn open(
        &mut self,
        written: &str,
        directories: &BTreeMap<String, PathBuf>,
    ) -> Result<usize, Vec<Problem>> {
        if let Some(index) = self.models.iter().position(|m| m.written == written) {
            return Ok(index);
        }
        let (model, adapter) =
            if directories.contains_key(written) { (written, None) } else { model_and_adapter(written) };
        let place = |name: &str| directories.get(name).cloned().unwrap_or_else(|| PathBuf::from(name));
        let path = place(model);
        let checkpoint = Arc::new(Checkpoint::open(&path).map_err(|error| vec![Problem::unopened(&path, error)])?);
        let folded = adapter.map(|dir| Folded::open(checkpoint.clone(), &place(dir))).transpose()?.map(Arc::new);
        self.models.push(Input { written: written.to_owned(), path, checkpoint, folded });
        Ok(self.models.len() - 1)
    }

    /// Returns the index of an opened model.
    pub(crate) fn index(&self, written: &str) -> usize {
        self.models.iter().position(|m| m.written == written).expect("all were opened")
    }

    /// Whether a model is the one with this name in the file.
    pub(crate) fn is(&self, index: usize, written: &str) -> bool {
        let input = &self.models[index];
        input.written == written || input.path == Path::new(written)
    }

    /// Finds a model by its path, or by its name in the file.
    pub(crate) fn find(&self, config: &MergeConfig, written: &str) -> Option<usize> {
        let named = config.models.iter().find(|m| m.name.as_deref() == Some(written)).map(|m| m.model.as_str());
        (0..self.models.len()).find(|&index| self.is(index, named.unwrap_or(written)))
    }

    /// Returns the reference, whose config, tokenizer and dtypes the output has: the base, or else the first model.
    pub(crate) fn reference(&self, config: &MergeConfig) -> usize {
        let written = config.base_model.as_deref();
        self.models.iter().position(|m| Some(m.written.as_str()) == written).unwrap_or(0)
    }
}

/// File with the per-tensor state that a method needs to continue from its own output.
pub(crate) const STATE_NAME: &str = "merge_state.json";

impl Input {
    /// Reads the state left by an earlier merge.
    pub(crate) fn state(&self) -> Result<OpcmState, Problem> {
        let path = self.path.join(STATE_NAME);
        let wrong = |kind: ModelProblem| Problem::new(Place::File(path.clone()), kind);
        let text = std::fs::read_to_string(&path).map_err(|source| wrong(ModelProblem::NoState { source }))?;
        serde_json::from_str(&text).map_err(|error| wrong(ModelProblem::State(error)))
    }
}

/// Whether a tensor is a buffer determined by config.json: rotary frequencies in the first Llama checkpoints, causal
/// masks in GPT-2. Newer versions of the same models do not store them, and nothing reads them.
pub(crate) fn is_buffer(tensor: &str) -> bool {
    tensor.ends_with(".rotary_emb.inv_freq") || tensor.ends_with(".attn.masked_bias") || tensor.ends_with(".attn.bias")
}

/// Returns the names of an input's tensors without such buffers.
pub(crate) fn names(source: &dyn TensorSource) -> Vec<&str> {
    // GPT-2's mask has four dimensions; a real bias of that name has one.
    let counts = |name: &&str| {
        let mask = name.ends_with(".attn.bias") && source.info(name).is_some_and(|info| info.shape.len() != 4);
        !is_buffer(name) || mask
    };
    source.names().into_iter().filter(counts).collect()
}

/// Keys of config.json whose values must agree for weights to be compatible.
const SHAPE_KEYS: [&str; 15] = [
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
    "num_local_experts",
    "n_embd",
    "n_layer",
    "n_head",
    "d_model",
    "attention_bias",
];

/// Keys that change how weights are used, but that fine-tunes are known to change.
const TUNED_KEYS: [&str; 5] =
    ["rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "max_position_embeddings"];

/// Compares a model's config.json with that of the reference, and returns problems and notes. `layers` tells whether
/// the number of layers must agree.
pub(crate) fn compare_configs(
    reference: &Input,
    other: &Input,
    layers: bool,
    head: &Head,
) -> (Vec<Problem>, Vec<Problem>) {
    let (a, b) = (reference.config(), other.config());
    // A key that one file omits, and so leaves at its default, is not a contradiction.
    let differ = |key: &&&str| a.get(**key).zip(b.get(**key)).is_some_and(|(a, b)| !same(a, b));
    let say = |key: &&'static str| {
        let value = |config: &Map<String, Value>| config.get(*key).cloned().unwrap_or_default();
        let (value, of_reference) = (value(b), value(a));
        let kind = ModelProblem::ConfigDiffers { key, value, reference: reference.written.clone(), of_reference };
        Problem::new(Place::model(&other.written), kind)
    };
    let problems = SHAPE_KEYS.iter().filter(|k| layers || !["num_hidden_layers", "n_layer"].contains(k));
    let problems = problems.filter(|k| **k != "tie_word_embeddings" || *head == Head::AsStored);
    (problems.filter(differ).map(say).collect(), TUNED_KEYS.iter().filter(differ).map(say).collect())
}

fn same(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| a == b)
}

/// Compares the tokenizers of two models on the ids that both have, if both have a tokenizer.json.
pub(crate) fn compare_tokenizers(reference: &Input, other: &Input) -> Option<Problem> {
    let read = |input: &Input| std::fs::read(input.companion("tokenizer.json")?).ok();
    let (a, b) = (read(reference)?, read(other)?);
    if a == b {
        return None;
    }
    let (a, b) = (tokens(&a)?, tokens(&b)?);
    let (id, token) = a.iter().find(|(id, token)| b.get(id).is_some_and(|other| other != *token))?;
    let (models, tokens) = ([reference, other].map(|input| input.written.clone()), [token.clone(), b[id].clone()]);
    Some(Problem::new(Place::model(&other.written), TokenizerProblem::Differ { models, id: *id, tokens }))
}

/// Returns the tokens by id.
fn tokens(json: &[u8]) -> Option<BTreeMap<u64, String>> {
    let value: Value = serde_json::from_slice(json).ok()?;
    let mut tokens = BTreeMap::new();
    match value.pointer("/model/vocab")? {
        Value::Object(map) => tokens.extend(map.iter().filter_map(|(token, id)| Some((id.as_u64()?, token.clone())))),
        // In a Unigram model, the position is the id.
        Value::Array(list) => {
            let token = |(id, entry): (usize, &Value)| Some((id as u64, entry.get(0)?.as_str()?.to_owned()));
            tokens.extend(list.iter().enumerate().filter_map(token));
        }
        _ => return None,
    }
    for added in value.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        if let Some((id, token)) = added.get("id").and_then(Value::as_u64).zip(added.get("content")) {
            tokens.insert(id, token.as_str().unwrap_or_default().to_owned());
        }
    }
    Some(tokens)
}

/// Prefixes of tensor names in a complete model that the bare model inside it lacks.
const PREFIXES: [&str; 4] = ["model.", "transformer.", "gpt_neox.", "language_model."];

/// Reports if one of the two was saved from the bare model: its names lack the prefix of the other's names.
pub(crate) fn bare_model(reference: &Input, other: &Input) -> Option<Problem> {
    let (a, b) = (names(reference.source()), names(other.source()));
    let of_bare = |bare: &[&str], whole: &[&str]| {
        let whole: BTreeSet<&str> = whole.iter().copied().collect();
        PREFIXES.into_iter().find(|prefix| {
            let found = bare.iter().filter(|name| whole.contains(format!("{prefix}{name}").as_str())).count();
            bare.iter().all(|name| !whole.contains(name)) && 2 * found > bare.len()
        })
    };
    let say = |prefix: &'static str, bare: &Input, whole: &Input| {
        let kind = ModelProblem::BareModel { prefix, whole: whole.written.clone() };
        Problem::new(Place::model(&bare.written), kind)
    };
    let bare = of_bare(&b, &a).map(|prefix| say(prefix, other, reference));
    bare.or_else(|| of_bare(&a, &b).map(|prefix| say(prefix, reference, other)))
}

/// Reports tensor names that only one side has.
pub(crate) fn compare_names(reference: &Input, other: &Input, head: &Head) -> Vec<Problem> {
    let names = |input: &'_ Input| -> BTreeSet<String> {
        let names = names(input.source()).into_iter().filter(|name| !head.covers(name));
        names.map(str::to_owned).collect()
    };
    let (a, b) = (names(reference), names(other));
    let missing: Vec<String> = a.difference(&b).cloned().collect();
    let added: Vec<String> = b.difference(&a).cloned().collect();
    let problem = |kind: ModelProblem| Problem::new(Place::model(&other.written), kind);
    let reference = reference.written.clone();
    let mut problems = Vec::new();
    if !missing.is_empty() {
        problems.push(problem(ModelProblem::TensorsMissing { tensors: missing, reference: reference.clone() }));
    }
    if !added.is_empty() {
        problems.push(problem(ModelProblem::TensorsAdded { tensors: added, reference }));
    }
    problems
}
