//! Every output tensor planned, and every problem found, before a byte is written.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Dtype, TensorInfo, TensorSource, TensorSpec};
use serde_json::{Map, Value};

use crate::config::{MergeConfig, ModelConfig, Parameters, Profile, SliceConfig, Vocabulary};
use crate::engine::STATE_NAME;
use crate::inputs::{Input, Inputs, compare_configs, compare_names, compare_tokenizers};
use crate::methods::{Linear, OpcmState};
use crate::registry::{self, Base, MethodInfo, Settings};
use crate::{Error, MergeMethod, TensorGroup, Values};

/// A merge that can be run: what is read, what is computed, what is written.
pub struct Plan {
    pub(crate) config: MergeConfig,
    pub(crate) method: &'static MethodInfo,
    pub(crate) inputs: Inputs,
    pub(crate) tensors: Vec<PlannedTensor>,
    pub(crate) out_config: Map<String, Value>,
    pub(crate) companions: Vec<PathBuf>,
    /// Densities of a trim over the whole model.
    pub(crate) whole_model_trim: Option<Vec<f64>>,
    /// What one should know but that does not stand in the way.
    pub notes: Vec<String>,
}

pub(crate) struct PlannedTensor {
    pub(crate) spec: TensorSpec,
    pub(crate) work: Work,
}

pub(crate) enum Work {
    /// The bytes of a tensor of a model, as they are.
    Copy(Source),
    /// Consecutive parts, each merged by itself.
    Merge(Vec<Segment>),
}

/// A tensor of a model.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) model: usize,
    pub(crate) tensor: String,
    /// What keys its random masks.
    pub(crate) key: String,
}

/// Some rows of a tensor, or all of it.
pub(crate) struct Segment {
    pub(crate) elements: Range<usize>,
    pub(crate) shape: Vec<usize>,
    pub(crate) method: Box<dyn MergeMethod>,
    pub(crate) base: Option<Source>,
    pub(crate) models: Vec<Source>,
    /// Whether it is merged by the method of the plan, and so counts in a trim of the whole model.
    pub(crate) whole: bool,
}

/// One output tensor: where it comes from and with what settings.
struct Draft<'c> {
    name: String,
    t: f64,
    shared: Vec<&'c Parameters>,
    base: Option<(usize, String, &'c Parameters)>,
    models: Vec<DraftInput<'c>>,
}

struct DraftInput<'c> {
    model: usize,
    tensor: String,
    key: String,
    parameters: &'c Parameters,
}

static NO_PARAMETERS: std::sync::LazyLock<Parameters> = std::sync::LazyLock::new(Parameters::default);

impl Plan {
    /// Opens all models and plans the merge; no tensor is read.
    ///
    /// # Errors
    /// [`Error::Problems`] with everything that stands in the way.
    pub fn new(config: &MergeConfig) -> Result<Plan, Error> {
        Plan::of_stage(config, &BTreeMap::new())
    }

    /// As [`Plan::new`], where models may be names of earlier stages, whose directories are given.
    ///
    /// # Errors
    /// [`Error::Problems`].
    pub fn of_stage(config: &MergeConfig, stages: &BTreeMap<String, PathBuf>) -> Result<Plan, Error> {
        let mut config = config.clone();
        let mut problems = Vec::new();
        let Some(method) = registry::method(&config.method.name) else {
            let names: Vec<&str> = registry::METHODS.iter().map(|m| m.name).collect();
            problems.push(format!("no method is called `{}`; there are {}", config.method.name, names.join(", ")));
            return Err(Error::Problems(problems));
        };
        problems.extend(parameter_problems(&config, method));
        config.method.parameters = registry::resolve(method.name, config.profile, &config.method.parameters);
        let config = &config;
        problems.extend(shape_of_config(config, method));
        let mut inputs = Inputs::default();
        for written in written_models(config) {
            if let Err(problem) = inputs.open(written, stages) {
                problems.push(problem);
            }
        }
        if inputs.models.is_empty() || inputs.models.len() < written_models(config).len() {
            return Err(Error::Problems(problems));
        }
        let reference = reference(config, &inputs);
        let previous = previous(config, &inputs).unwrap_or_else(|problem| {
            problems.push(problem);
            None
        });
        let mut notes = Vec::new();
        model_problems(config, &inputs, reference, &mut problems, &mut notes);
        let drafts = match drafts(config, method, &inputs) {
            Ok(drafts) => drafts,
            Err(more) => {
                problems.extend(more);
                return Err(Error::Problems(problems));
            }
        };
        let names: Vec<&str> = drafts.iter().map(|d| d.name.as_str()).collect();
        notes.extend(idle_filters(config, &names));
        let mut tensors = Vec::new();
        let mut vocabulary = None;
        let mut undefined: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for draft in &drafts {
            let context = Context { config, method, inputs: &inputs, reference, previous: previous.as_ref() };
            match plan_tensor(&context, draft, &mut vocabulary) {
                Ok(tensor) => tensors.push(tensor),
                Err(Obstacle::Tensor(problem)) => problems.push(problem),
                Err(Obstacle::Parameters(problem)) => undefined.entry(problem).or_default().push(&draft.name),
            }
        }
        // What is wrong with parameters is mostly wrong for all tensors; said once it can be read.
        problems.extend(undefined.into_iter().map(|(problem, tensors)| match &tensors[..] {
            [one] => format!("tensor `{one}`: {problem}"),
            all if all.len() == drafts.len() => problem,
            some => format!("tensor `{}` and {} more: {problem}", some[0], some.len() - 1),
        }));
        let whole_model_trim = drafts.first().and_then(|draft| {
            let settings = draft.settings(config, None);
            registry::whole_model_trim(&settings)
        });
        if whole_model_trim.is_some() && varies(config) {
            problems.push(
                "density: a gradient or filter means nothing when the whole model is trimmed at once; set trim = \"tensor\""
                    .to_owned(),
            );
        }
        dedup(&mut problems);
        if !problems.is_empty() {
            return Err(Error::Problems(problems));
        }
        let layers = config.slices.iter().map(slice_layers).sum();
        let out_config = out_config(config, &inputs.models[reference], vocabulary, &tensors, layers);
        let companions = companions(config, &inputs, reference, stages).map_err(|p| Error::Problems(vec![p]))?;
        Ok(Plan { config: config.clone(), method, inputs, tensors, out_config, companions, whole_model_trim, notes })
    }

    /// The tensors that will be written, in their order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.tensors.iter().map(|t| t.spec.clone()).collect()
    }

    /// Bytes of tensors that will be written.
    pub fn bytes_written(&self) -> u64 {
        self.tensors.iter().map(|t| bytes(t.spec.dtype, &t.spec.shape)).sum()
    }

    /// Bytes of tensors that inputs hold; a method may go over them more than once.
    pub fn bytes_read(&self) -> u64 {
        let of = |source: &Source| {
            let info = self.inputs.models[source.model].checkpoint.info(&source.tensor);
            info.map_or(0, |info| info.byte_len() as u64)
        };
        let read = |tensor: &PlannedTensor| match &tensor.work {
            Work::Copy(source) => of(source),
            Work::Merge(segments) => {
                let sources = segments.iter().flat_map(|s| s.models.iter().chain(&s.base));
                let distinct: BTreeMap<(usize, &str), u64> =
                    sources.map(|s| ((s.model, s.tensor.as_str()), of(s))).collect();
                distinct.values().sum()
            }
        };
        self.tensors.iter().map(read).sum()
    }

    /// Directories of the models, in the order in which the file names them.
    pub fn models(&self) -> impl Iterator<Item = &Path> {
        self.inputs.models.iter().map(|m| m.path.as_path())
    }

    /// The values of a segment.
    pub(crate) fn group<'p>(&'p self, tensor: &'p PlannedTensor, segment: &'p Segment) -> TensorGroup<'p> {
        let values = |source: &'p Source| {
            let checkpoint = &self.inputs.models[source.model].checkpoint;
            let dtype = checkpoint.info(&source.tensor).expect("planned from its header").dtype;
            Values::from_source(&source.key, checkpoint, &source.tensor, dtype).skip(segment.elements.start)
        };
        TensorGroup {
            name: &tensor.spec.name,
            shape: &segment.shape,
            base: segment.base.as_ref().map(values),
            models: segment.models.iter().map(values).collect(),
            parallel: false,
            model_trims: None,
        }
    }
}

fn bytes(dtype: Dtype, shape: &[usize]) -> u64 {
    (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64
}

fn dedup(problems: &mut Vec<String>) {
    let mut seen = BTreeSet::new();
    problems.retain(|problem| seen.insert(problem.clone()));
}

/// All models that the file names, each once, in order.
pub(crate) fn written_models(config: &MergeConfig) -> Vec<&str> {
    let sources = config.slices.iter().flat_map(|s| {
        let sources = s.sources.iter().map(|source| source.model.as_str());
        s.base_model.as_deref().into_iter().chain(sources)
    });
    let base = config.base_model.as_deref().into_iter();
    let previous = config.method.parameters.previous.as_deref().into_iter();
    let all = base.chain(previous).chain(config.models.iter().map(|m| m.model.as_str())).chain(sources);
    let mut seen = BTreeSet::new();
    all.filter(|model| seen.insert(*model)).collect()
}

/// Whose config, tokenizer and dtypes the output has: the base's, else the first model's.
fn reference(config: &MergeConfig, inputs: &Inputs) -> usize {
    let written = config.base_model.as_deref();
    inputs.models.iter().position(|m| Some(m.written.as_str()) == written).unwrap_or(0)
}

/// Every place where parameters stand, and what it is called.
fn scopes(config: &MergeConfig) -> Vec<(String, &Parameters, bool)> {
    let mut scopes = vec![(format!("method.{}", config.method.name), &config.method.parameters, false)];
    for model in &config.models {
        scopes.push((model.model.clone(), &model.parameters, true));
    }
    for (i, slice) in config.slices.iter().enumerate() {
        scopes.push((format!("slice {}", i + 1), &slice.parameters, false));
        for source in &slice.sources {
            scopes.push((format!("slice {}, {}", i + 1, source.model), &source.parameters, true));
        }
    }
    scopes
}

/// Parameters that the method does not have, that have no place where they stand, or that are out of range.
fn parameter_problems(config: &MergeConfig, method: &MethodInfo) -> Vec<String> {
    let mut problems = Vec::new();
    for (place, parameters, of_model) in scopes(config) {
        for name in parameters.names() {
            let known = registry::parameter(&name);
            match known {
                Some(info) if method.parameters.contains(&info.name) => {
                    if of_model && !info.per_model {
                        problems.push(format!("{place}: `{name}` is one for all models; set it under the method"));
                    }
                    let values = serde_json::to_value(parameters).unwrap_or_default();
                    problems.extend(range_problems(&place, info, &values[&name]));
                }
                _ => {
                    let has = if method.parameters.is_empty() {
                        "no parameters".to_owned()
                    } else {
                        method.parameters.join(", ")
                    };
                    problems.push(format!("{place}: {} has no parameter `{name}`; it has {has}", method.name));
                }
            }
        }
    }
    problems
}

/// Numbers in the JSON form of a parameter that are out of range.
fn range_problems(place: &str, info: &registry::ParameterInfo, value: &Value) -> Vec<String> {
    let (low, high) = info.bounds;
    match value {
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or(f64::NAN);
            if (low..=high).contains(&number) {
                return Vec::new();
            }
            vec![format!("{place}: `{}` is {number}; it has to be {}", info.name, info.range)]
        }
        // serde_json writes NaN and infinities as null.
        Value::Null => vec![format!("{place}: `{}` is no finite number; it has to be {}", info.name, info.range)],
        Value::Array(list) if list.is_empty() => vec![format!("{place}: `{}` is an empty list", info.name)],
        Value::Array(list) => list.iter().flat_map(|v| range_problems(place, info, v)).collect(),
        Value::Object(filter) => filter.get("value").map_or(Vec::new(), |v| range_problems(place, info, v)),
        _ => Vec::new(),
    }
}

/// Models and slices: how many, and which of the two.
fn shape_of_config(config: &MergeConfig, method: &MethodInfo) -> Vec<String> {
    let mut problems = Vec::new();
    if config.models.is_empty() == config.slices.is_empty() {
        problems.push("set either `models` or `slices`".to_owned());
    }
    if !config.models.is_empty() {
        let names: Vec<&str> = config.models.iter().map(|m| m.model.as_str()).collect();
        problems.extend(count_problems("models", &names, config.base_model.as_deref(), method));
    }
    for (i, slice) in config.slices.iter().enumerate() {
        let place = format!("slice {}", i + 1);
        let base = slice.base_model.as_deref().or(config.base_model.as_deref());
        let names: Vec<&str> = slice.sources.iter().map(|s| s.model.as_str()).collect();
        problems.extend(count_problems(&place, &names, base, method));
        let mut seen = BTreeSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(**name)) {
            problems.push(format!("{place}: {twice} is named twice"));
        }
        for source in slice.sources.iter().filter(|s| s.layer_range[0] >= s.layer_range[1]) {
            problems.push(format!("{place}, {}: layer_range {:?} is empty", source.model, source.layer_range));
        }
        if slice.sources.iter().any(|s| s.layer_range[1].saturating_sub(s.layer_range[0]) != slice_layers(slice)) {
            problems.push(format!("{place}: all sources need the same number of layers"));
        }
    }
    problems
}

/// Too few or too many models, or no base where one is needed.
fn count_problems(place: &str, names: &[&str], base: Option<&str>, method: &MethodInfo) -> Vec<String> {
    let mut problems = Vec::new();
    if method.base == Base::Required && base.is_none() {
        problems.push(format!("{place}: {} needs a `base_model`", method.name));
    }
    let n = names.iter().filter(|name| method.base == Base::Input || Some(**name) != base).count();
    if !method.models.contains(&n) {
        let (least, most) = (method.models.start(), method.models.end());
        let wanted = match () {
            () if least == most => format!("exactly {least}"),
            () if *most == usize::MAX => format!("at least {least}"),
            () => format!("{least} to {most}"),
        };
        let beside = if method.base == Base::Input { "" } else { " beside the base" };
        problems.push(format!("{place}: {} merges {wanted} model(s){beside}, not {n}", method.name));
    }
    problems
}

fn slice_layers(slice: &SliceConfig) -> usize {
    slice.sources.first().map_or(0, |s| s.layer_range[1].saturating_sub(s.layer_range[0]))
}

/// Problems between models, whatever the tensors are.
fn model_problems(
    config: &MergeConfig,
    inputs: &Inputs,
    reference: usize,
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) {
    let whole = config.slices.is_empty();
    let first = &inputs.models[reference];
    for (i, other) in inputs.models.iter().enumerate().filter(|(i, _)| *i != reference) {
        let (wrong, notable) = compare_configs(first, other, whole);
        let comparable = wrong.is_empty();
        problems.extend(wrong);
        notes.extend(notable);
        // Names of another architecture would only repeat that it is another one.
        if whole && comparable {
            problems.extend(compare_names(first, other));
        }
        if let Some(difference) = compare_tokenizers(first, &inputs.models[i]) {
            if config.ignore_tokenizers { notes.push(difference) } else { problems.push(difference) }
        }
    }
}

/// `model.layers.7.mlp.up_proj.weight` as prefix, layer and rest.
fn layer_of(tensor: &str) -> Option<(&str, usize, &str)> {
    for marker in [".layers.", ".h.", ".layer.", ".blocks.", "layers.", "h."] {
        let Some(at) = tensor.find(marker) else { continue };
        if !marker.starts_with('.') && at != 0 {
            continue;
        }
        let (prefix, rest) = tensor.split_at(at + marker.len());
        if let Some((number, rest)) = rest.split_once('.')
            && let Ok(layer) = number.parse()
        {
            return Some((prefix, layer, rest));
        }
    }
    None
}

/// Whether a tensor outside the layers comes before them.
fn before_layers(tensor: &str) -> bool {
    ["embed", "wte", "wpe"].iter().any(|part| tensor.contains(part))
}

/// Place of a layer among `count`: 0 to 1, and 1 for a single one.
fn place(layer: usize, count: usize) -> f64 {
    if count > 1 { layer as f64 / (count - 1) as f64 } else { 1.0 }
}

/// Every output tensor with its sources.
fn drafts<'c>(config: &'c MergeConfig, method: &MethodInfo, inputs: &Inputs) -> Result<Vec<Draft<'c>>, Vec<String>> {
    if config.slices.is_empty() {
        Ok(whole_drafts(config, method, inputs))
    } else {
        slice_drafts(config, method, inputs)
    }
}

fn model_index(inputs: &Inputs, written: &str) -> usize {
    inputs.models.iter().position(|m| m.written == written).expect("all were opened")
}

/// What keys the random masks of each model: its name, else its path as written; a second one of the same is told apart.
fn mask_keys(models: &[ModelConfig]) -> Vec<String> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let key = |model: &'_ ModelConfig, n: usize| {
        let name = model.name.as_ref().unwrap_or(&model.model);
        if n > 1 { format!("{name}#{n}") } else { name.clone() }
    };
    models
        .iter()
        .map(|model| {
            let n = seen.entry(model.name.as_deref().unwrap_or(&model.model)).or_default();
            *n += 1;
            key(model, *n)
        })
        .collect()
}

/// Whether the base is one more input of its own accord: mergekit adds it where a method has no other use for it.
fn base_is_input(config: &MergeConfig, method: &MethodInfo) -> bool {
    method.base == Base::Input && config.profile == Profile::Mergekit
}

fn whole_drafts<'c>(config: &'c MergeConfig, method: &MethodInfo, inputs: &Inputs) -> Vec<Draft<'c>> {
    let keys = mask_keys(&config.models);
    let base = config.base_model.as_deref();
    let mut members: Vec<(usize, String, &'c Parameters)> = config
        .models
        .iter()
        .zip(keys)
        // A base that is listed among the models is no task vector.
        .filter(|(model, _)| method.base == Base::Input || Some(model.model.as_str()) != base)
        .map(|(model, key)| (model_index(inputs, &model.model), key, &model.parameters))
        .collect();
    if let Some(base) = base
        && base_is_input(config, method)
        && config.models.iter().all(|m| m.model != base)
    {
        members.push((model_index(inputs, base), base.to_owned(), &NO_PARAMETERS));
    }
    if !method.ordered {
        members.sort_by(|a, b| a.1.cmp(&b.1));
    }
    if let Some(written) = config.method.parameters.previous.as_deref() {
        members.insert(0, (model_index(inputs, written), written.to_owned(), &NO_PARAMETERS));
    }
    let base = base.filter(|_| method.base != Base::Input).map(|base| {
        let parameters = config.models.iter().find(|m| m.model == base).map_or(&*NO_PARAMETERS, |m| &m.parameters);
        (model_index(inputs, base), parameters)
    });
    let reference = &inputs.models[reference(config, inputs)].checkpoint;
    let layers = reference.names().iter().filter_map(|n| layer_of(n)).map(|l| l.1 + 1).max().unwrap_or(0);
    let draft = |name: &str| Draft {
        name: name.to_owned(),
        t: match layer_of(name) {
            Some((_, layer, _)) => place(layer, layers),
            None if before_layers(name) || config.profile == Profile::Mergekit => 0.0,
            None => 1.0,
        },
        shared: vec![&config.method.parameters],
        base: base.map(|(model, parameters)| (model, name.to_owned(), parameters)),
        models: members
            .iter()
            .map(|(model, key, parameters)| DraftInput {
                model: *model,
                tensor: name.to_owned(),
                key: key.clone(),
                parameters,
            })
            .collect(),
    };
    reference.names().into_iter().map(draft).collect()
}

fn slice_drafts<'c>(
    config: &'c MergeConfig,
    method: &MethodInfo,
    inputs: &Inputs,
) -> Result<Vec<Draft<'c>>, Vec<String>> {
    let mut drafts = Vec::new();
    let mut problems = Vec::new();
    let outside = |slice: &'c SliceConfig, before: bool| -> Vec<String> {
        let model = &inputs.models[model_index(inputs, &slice.sources[0].model)].checkpoint;
        let names = model.names().into_iter().filter(|n| layer_of(n).is_none() && before_layers(n) == before);
        names.map(str::to_owned).collect()
    };
    let (Some(first), Some(last)) = (config.slices.first(), config.slices.last()) else { return Ok(drafts) };
    for name in outside(first, true) {
        drafts.push(slice_draft(config, method, inputs, first, &name, 0.0, |_| name.clone()));
    }
    let mut layer = 0;
    for (number, slice) in config.slices.iter().enumerate() {
        let base = slice.base_model.as_deref().or(config.base_model.as_deref()).filter(|_| method.base != Base::Input);
        if let Some(base) = base
            && slice.sources.iter().all(|s| s.model != base)
        {
            problems.push(format!("slice {}: `{base}` is the base and has to be among the sources", number + 1));
        }
        for source in &slice.sources {
            let checkpoint = &inputs.models[model_index(inputs, &source.model)].checkpoint;
            let layers = checkpoint.names().iter().filter_map(|n| layer_of(n)).map(|l| l.1 + 1).max().unwrap_or(0);
            if source.layer_range[1] > layers {
                problems.push(format!(
                    "slice {}: {} has layers 0 to {layers}, not up to {}",
                    number + 1,
                    source.model,
                    source.layer_range[1]
                ));
            }
        }
        for i in 0..slice_layers(slice) {
            let model = &inputs.models[model_index(inputs, &slice.sources[0].model)].checkpoint;
            let from = slice.sources[0].layer_range[0] + i;
            let parts: Vec<(String, String)> = model
                .names()
                .iter()
                .filter_map(|n| layer_of(n).filter(|l| l.1 == from))
                .map(|(prefix, _, rest)| (prefix.to_owned(), rest.to_owned()))
                .collect();
            for (prefix, rest) in parts {
                let t = place(i, slice_layers(slice));
                let name = format!("{prefix}{layer}.{rest}");
                drafts.push(slice_draft(config, method, inputs, slice, &name, t, |start| {
                    format!("{prefix}{}.{rest}", start + i)
                }));
            }
            layer += 1;
        }
    }
    let t = if config.profile == Profile::Mergekit { 0.0 } else { 1.0 };
    for name in outside(last, false) {
        drafts.push(slice_draft(config, method, inputs, last, &name, t, |_| name.clone()));
    }
    if problems.is_empty() { Ok(drafts) } else { Err(problems) }
}

/// One tensor of a slice; `tensor(first layer of the range)` is its name in a source.
fn slice_draft<'c>(
    config: &'c MergeConfig,
    method: &MethodInfo,
    inputs: &Inputs,
    slice: &'c SliceConfig,
    name: &str,
    t: f64,
    tensor: impl Fn(usize) -> String,
) -> Draft<'c> {
    let written = slice.base_model.as_deref().or(config.base_model.as_deref()).filter(|_| method.base != Base::Input);
    let mut base = None;
    let mut models = Vec::new();
    for source in &slice.sources {
        let (model, tensor) = (model_index(inputs, &source.model), tensor(source.layer_range[0]));
        if Some(source.model.as_str()) == written {
            base = Some((model, tensor, &source.parameters));
        } else {
            models.push(DraftInput { model, tensor, key: source.model.clone(), parameters: &source.parameters });
        }
    }
    if !method.ordered {
        models.sort_by(|a, b| a.key.cmp(&b.key));
    }
    Draft { name: name.to_owned(), t, shared: vec![&slice.parameters, &config.method.parameters], base, models }
}

impl Draft<'_> {
    fn settings<'s>(&'s self, config: &MergeConfig, previous: Option<&'s OpcmState>) -> Settings<'s> {
        Settings {
            shared: self.shared.clone(),
            models: self.models.iter().map(|m| (m.parameters, m.tensor.as_str())).collect(),
            tensor: &self.name,
            t: self.t,
            keys: self.models.iter().map(|m| m.key.as_str()).collect(),
            previous,
            seed: config.seed,
        }
    }
}

/// What all tensors of a merge have in common.
struct Context<'c> {
    config: &'c MergeConfig,
    method: &'static MethodInfo,
    inputs: &'c Inputs,
    reference: usize,
    previous: Option<&'c OpcmState>,
}

/// The state that the earlier merge left, where this one goes on from one.
fn previous(config: &MergeConfig, inputs: &Inputs) -> Result<Option<OpcmState>, String> {
    let Some(written) = config.method.parameters.previous.as_deref() else { return Ok(None) };
    let path = inputs.models[model_index(inputs, written)].path.join(STATE_NAME);
    let text = std::fs::read_to_string(&path)
        .map_err(|e| format!("{}: {e}; `previous` is the output of an earlier opcm merge", path.display()))?;
    serde_json::from_str(&text).map(Some).map_err(|e| format!("{}: {e}", path.display()))
}

/// Why a tensor cannot be planned.
enum Obstacle {
    /// Something of this tensor.
    Tensor(String),
    /// The parameters that hold for it.
    Parameters(String),
}

impl From<String> for Obstacle {
    fn from(problem: String) -> Obstacle {
        Obstacle::Tensor(problem)
    }
}

/// Plans one tensor, or says what is wrong with it. `vocabulary` takes the number of rows of token tables.
fn plan_tensor(
    context: &Context<'_>,
    draft: &Draft<'_>,
    vocabulary: &mut Option<usize>,
) -> Result<PlannedTensor, Obstacle> {
    let &Context { config, method, inputs, reference, previous } = context;
    let source =
        |model: usize, tensor: &str, key: &str| Source { model, tensor: tensor.to_owned(), key: key.to_owned() };
    let base = draft.base.as_ref().map(|(model, tensor, _)| source(*model, tensor, "base"));
    let models: Vec<Source> = draft.models.iter().map(|m| source(m.model, &m.tensor, &m.key)).collect();
    let mut infos = Vec::new();
    for s in base.iter().chain(&models) {
        let input = &inputs.models[s.model];
        let missing = || format!("{}: lacks tensor `{}`", input.written, s.tensor);
        infos.push((s, input, input.checkpoint.info(&s.tensor).ok_or_else(missing)?));
    }
    let of_reference = infos.iter().find(|(s, _, _)| s.model == reference).or(infos.first());
    let reference = of_reference.ok_or_else(|| format!("tensor `{}` has no source", draft.name))?;
    let dtype = reference.2.dtype;
    if !is_float(dtype) {
        return Ok(copied(draft, &infos)?);
    }
    if let Some((s, input, info)) = infos.iter().find(|(_, _, info)| !is_float(info.dtype)) {
        let problem = format!("{}: tensor `{}` is {:?}, elsewhere {dtype:?}", input.written, s.tensor, info.dtype);
        return Err(problem.into());
    }
    let out_dtype = config.dtype.map_or(if dtype == Dtype::F64 { Dtype::F32 } else { dtype }, |d| d.dtype());
    let settings = draft.settings(config, previous);
    let method_of = || registry::build(method.name, &settings).map_err(Obstacle::Parameters);
    let spec = |shape: Vec<usize>| TensorSpec { name: draft.name.clone(), dtype: out_dtype, shape };
    let shape = reference.2.shape.clone();
    if infos.iter().all(|(_, _, info)| info.shape == shape) {
        if infos.len() == 1 && method.name == "passthrough" && out_dtype == dtype && registry::untouched(&settings) {
            return Ok(PlannedTensor { spec: spec(shape), work: Work::Copy(reference.0.clone()) });
        }
        let elements = 0..shape.iter().product();
        let segment = Segment { elements, shape: shape.clone(), method: method_of()?, base, models, whole: true };
        return Ok(PlannedTensor { spec: spec(shape), work: Work::Merge(vec![segment]) });
    }
    let segments = vocabulary_segments(config, draft, &infos, base.as_ref(), &models, method_of)?;
    let columns = shape[1..].iter().product::<usize>();
    let rows = segments.last().map_or(0, |s| s.elements.end / columns.max(1));
    *vocabulary = Some(rows);
    let shape = [&[rows], &shape[1..]].concat();
    Ok(PlannedTensor { spec: spec(shape), work: Work::Merge(segments) })
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

type Infos<'i> = [(&'i Source, &'i Input, &'i TensorInfo)];

/// A tensor of integers: the same everywhere, or nothing that can be merged.
fn copied(draft: &Draft<'_>, infos: &Infos<'_>) -> Result<PlannedTensor, String> {
    let (source, input, info) = infos[0];
    let bytes = input.checkpoint.bytes(&source.tensor).map_err(|e| e.to_string())?;
    for (s, other, _) in &infos[1..] {
        if other.checkpoint.bytes(&s.tensor).map_err(|e| e.to_string())? != bytes {
            return Err(format!(
                "tensor `{}` is {:?}, which cannot be merged, and differs between {} and {}",
                draft.name, info.dtype, input.written, other.written
            ));
        }
    }
    let spec = TensorSpec { name: draft.name.clone(), dtype: info.dtype, shape: info.shape.clone() };
    Ok(PlannedTensor { spec, work: Work::Copy(source.clone()) })
}

/// Token tables of different lengths: the rows that all have are merged, the rest follows the policy.
fn vocabulary_segments(
    config: &MergeConfig,
    draft: &Draft<'_>,
    infos: &Infos<'_>,
    base: Option<&Source>,
    models: &[Source],
    method_of: impl Fn() -> Result<Box<dyn MergeMethod>, Obstacle>,
) -> Result<Vec<Segment>, Obstacle> {
    let rest = |info: &TensorInfo| info.shape.get(1..).unwrap_or_default().to_vec();
    let table = rest(infos[0].2);
    let shapes = || {
        let mut shapes: BTreeMap<&Vec<usize>, Vec<&str>> = BTreeMap::new();
        infos.iter().for_each(|(_, input, info)| shapes.entry(&info.shape).or_default().push(&input.written));
        let list: Vec<String> = shapes.iter().map(|(s, models)| format!("{s:?} in {}", models.join(", "))).collect();
        list.join("; ")
    };
    let is_table = ["embed", "lm_head", "wte"].iter().any(|part| draft.name.contains(part));
    if !is_table || table.is_empty() || infos.iter().any(|(_, _, info)| rest(info) != table) {
        return Err(format!("tensor `{}` has different shapes: {}", draft.name, shapes()).into());
    }
    let rows = |info: &TensorInfo| info.shape[0];
    let common = infos.iter().map(|(_, _, info)| rows(info)).min().unwrap_or(0);
    let columns: usize = table.iter().product();
    let segment = |rows: Range<usize>, method, base: Option<Source>, models: Vec<Source>, whole| Segment {
        shape: [&[rows.len()], &table[..]].concat(),
        elements: rows.start * columns..rows.end * columns,
        method,
        base,
        models,
        whole,
    };
    let mut segments = vec![segment(0..common, method_of()?, base.cloned(), models.to_vec(), true)];
    match config.vocabulary {
        Vocabulary::Error => {
            return Err(format!(
                "tensor `{}` has different numbers of rows: {}; set `vocabulary` to \"common\" (rows that all have), \
                 \"base\" (the base's rows) or \"keep\" (all rows)",
                draft.name,
                shapes()
            )
            .into());
        }
        Vocabulary::Common => {}
        Vocabulary::Base => {
            let (source, _, info) = infos[0];
            if rows(info) > common {
                let copy = Box::new(Linear { weights: vec![1.0], normalize: false });
                segments.push(segment(common..rows(info), copy, None, vec![source.clone()], false));
            }
        }
        Vocabulary::Keep => {
            let mut lengths: Vec<usize> = infos.iter().map(|(_, _, info)| rows(info)).collect();
            lengths.sort_unstable();
            lengths.dedup();
            for pair in lengths.windows(2) {
                let holders: Vec<Source> =
                    infos.iter().filter(|(_, _, info)| rows(info) >= pair[1]).map(|(s, _, _)| (*s).clone()).collect();
                let mean = Box::new(Linear { weights: vec![1.0; holders.len()], normalize: true });
                segments.push(segment(pair[0]..pair[1], mean, None, holders, false));
            }
        }
    }
    Ok(segments)
}

/// Whether densities are not plain numbers.
fn varies(config: &MergeConfig) -> bool {
    scopes(config).iter().any(|(_, p, _)| p.density.as_ref().is_some_and(|d| !matches!(d, crate::Parameter::Number(_))))
}

/// Filters that match no tensor.
fn idle_filters(config: &MergeConfig, tensors: &[&str]) -> Vec<String> {
    let mut notes = Vec::new();
    for (place, p, _) in scopes(config) {
        let all = [
            ("weight", &p.weight),
            ("density", &p.density),
            ("gamma", &p.gamma),
            ("epsilon", &p.epsilon),
            ("lambda", &p.lambda),
            ("t", &p.t),
            ("scale", &p.scale),
        ];
        for (name, parameter) in all {
            for filter in parameter.iter().flat_map(|p| p.idle_filters(tensors)) {
                notes.push(format!("{place}: the filter \"{filter}\" of `{name}` matches no tensor"));
            }
        }
    }
    notes
}

/// config.json of the output.
fn out_config(
    config: &MergeConfig,
    reference: &Input,
    vocabulary: Option<usize>,
    tensors: &[PlannedTensor],
    layers: usize,
) -> Map<String, Value> {
    let mut out = reference.checkpoint.config().clone();
    if let Some(rows) = vocabulary {
        out.insert("vocab_size".to_owned(), rows.into());
    }
    if let Some(dtype) = config.dtype.map(|d| serde_json::to_value(d).unwrap_or_default()) {
        let key = if out.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        out.insert(key.to_owned(), dtype);
    }
    if layers > 0 {
        let before = out.get("num_hidden_layers").or(out.get("n_layer")).and_then(Value::as_u64);
        for key in ["num_hidden_layers", "n_layer"] {
            if out.contains_key(key) {
                out.insert(key.to_owned(), layers.into());
            }
        }
        // Lists with one entry per layer, such as layer_types, follow the layers.
        let order: Vec<usize> = config
            .slices
            .iter()
            .filter_map(|s| s.sources.first())
            .flat_map(|s| s.layer_range[0]..s.layer_range[1])
            .collect();
        for value in out.values_mut() {
            if let Value::Array(list) = value
                && Some(list.len() as u64) == before
            {
                *list = order.iter().filter_map(|&i| list.get(i).cloned()).collect();
            }
        }
    }
    debug_assert!(!tensors.is_empty());
    out
}

/// Tokenizer and generation files that go along.
fn companions(
    config: &MergeConfig,
    inputs: &Inputs,
    reference: usize,
    stages: &BTreeMap<String, PathBuf>,
) -> Result<Vec<PathBuf>, String> {
    let of = |index: usize| inputs.models[index].checkpoint.companion_files().map_err(|e| e.to_string());
    match config.tokenizer_source.as_deref() {
        None | Some("base") if config.vocabulary == Vocabulary::Keep => of(longest(inputs, reference)),
        None | Some("base") => of(reference),
        Some(written) => {
            let named = config.models.iter().find(|m| m.name.as_deref() == Some(written)).map(|m| m.model.as_str());
            let path = stages.get(written).cloned().unwrap_or_else(|| PathBuf::from(written));
            match inputs.models.iter().position(|m| m.written == named.unwrap_or(written) || m.path == path) {
                Some(index) => of(index),
                None => Err(format!(
                    "tokenizer_source `{written}` is none of the models; set `base`, or a model by its path or name"
                )),
            }
        }
    }
}

/// The model with the most rows in its token table: the one whose tokenizer knows all kept rows.
fn longest(inputs: &Inputs, reference: usize) -> usize {
    let rows = |input: &Input| {
        let tables = input.checkpoint.names().into_iter().filter(|n| n.contains("embed") || n.contains("wte"));
        tables.filter_map(|n| input.checkpoint.info(n)?.shape.first().copied()).max().unwrap_or(0)
    };
    let most = inputs.models.iter().map(rows).max().unwrap_or(0);
    if rows(&inputs.models[reference]) == most {
        return reference;
    }
    inputs.models.iter().position(|m| rows(m) == most).unwrap_or(reference)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_the_names_of_several_families() {
        assert_eq!(layer_of("model.layers.12.mlp.up_proj.weight"), Some(("model.layers.", 12, "mlp.up_proj.weight")));
        assert_eq!(layer_of("transformer.h.0.ln_1.bias"), Some(("transformer.h.", 0, "ln_1.bias")));
        assert_eq!(layer_of("h.3.ln_1.bias"), Some(("h.", 3, "ln_1.bias")));
        assert_eq!(
            layer_of("bert.encoder.layer.5.output.dense.weight"),
            Some(("bert.encoder.layer.", 5, "output.dense.weight"))
        );
        assert_eq!(layer_of("model.embed_tokens.weight"), None);
        assert_eq!([place(0, 3), place(1, 3), place(2, 3), place(0, 1)], [0.0, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn masks_of_a_model_that_is_named_twice_are_told_apart() {
        let model = |model: &str, name: Option<&str>| ModelConfig {
            model: model.to_owned(),
            name: name.map(str::to_owned),
            ..ModelConfig::default()
        };
        let keys = mask_keys(&[model("a", None), model("a", None), model("b", Some("x")), model("a", None)]);
        assert_eq!(keys, ["a", "a#2", "x", "a#3"]);
    }
}
