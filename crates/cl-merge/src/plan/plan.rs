//! Plans every output tensor and collects all problems, before anything is written.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cl_checkpoint::{Adapter, Dtype, TensorInfo, TensorSpec};
use serde_json::{Map, Value};

use super::draft::{Draft, drafts};
use super::extra;
use super::head::Head;
use super::inputs::{Input, Inputs, bare_model, compare_configs, compare_names, compare_tokenizers};
use super::output::{out_config, tokenizer_model};
use super::vocabulary::{Participant, Vocabulary, is_token_table, put_wanted_template};
use super::work::{PlannedTensor, Segment, Source, Work};
use crate::Error;
use crate::methods::{Linear, MergeMethod, MethodInfo, OpcmState, SettingsError, whole_model_trim};
use crate::problem::{ConfigProblem, ModelProblem, Place, Problem, ProblemKind, TokenizerProblem};
use crate::recipe::check::{idle_filters, parameter_problems, shape_of_config, varies};
use crate::recipe::config::{
    ExtraTensors, MergeConfig, SliceConfig, Vocabulary as VocabularyPolicy, model_and_adapter,
};
use crate::recipe::mergekit::drop_parameters_of_others;
use crate::recipe::registry::MethodRegistry;
use crate::recipe::settings;
use crate::recipe::tokenizer::{TokenizerConfig, UNION};
use crate::tensor::{TensorGroup, Values, is_eight_bit, is_readable};

/// A validated merge that is ready to run.
pub struct Plan {
    pub(crate) config: MergeConfig,
    pub(crate) method: &'static MethodInfo,
    pub(crate) inputs: Inputs,
    pub(crate) tensors: Vec<PlannedTensor>,
    pub(crate) out_config: Map<String, Value>,
    pub(crate) companions: Vec<PathBuf>,
    /// Generated files by name; they replace companion files.
    pub(crate) made: BTreeMap<String, Vec<u8>>,
    /// Densities, if trimming is over the whole model.
    pub(crate) whole_model_trim: Option<Vec<f64>>,
    /// Earlier stages, which its models can refer to by name.
    pub(crate) stages: Vec<MergeConfig>,
    /// Notes, which do not prevent the merge.
    pub notes: Vec<String>,
}

impl Plan {
    /// Opens all models and plans the merge; no tensor is read.
    ///
    /// # Errors
    /// Returns [`Error::Problems`] with all problems.
    pub fn new(config: &MergeConfig) -> Result<Plan, Error> {
        Plan::with_methods(config, &MethodRegistry::builtin())
    }

    /// Like [`Plan::new`], with methods that are not built in.
    ///
    /// # Errors
    /// Returns [`Error::Problems`] with all problems.
    pub fn with_methods(config: &MergeConfig, methods: &MethodRegistry) -> Result<Plan, Error> {
        Plan::of_stage(config, methods, &BTreeMap::new())
    }

    /// Like [`Plan::with_methods`], with the directories of earlier stages, whose names can be used as models.
    ///
    /// # Errors
    /// Returns [`Error::Problems`] with all problems.
    pub fn of_stage(
        config: &MergeConfig,
        methods: &MethodRegistry,
        stages: &BTreeMap<String, PathBuf>,
    ) -> Result<Plan, Error> {
        let method = known_method(config, methods)?;
        let (config, mut problems) = resolved(config, method);
        let config = &config;
        let mut inputs = Inputs::default();
        let directories = config.directories(stages);
        for written in config.written_models() {
            if let Err(more) = inputs.open(written, &directories) {
                problems.extend(more);
            }
        }
        if inputs.models.is_empty() || inputs.models.len() < config.written_models().len() {
            return Err(Error::Problems(problems));
        }
        let reference = inputs.reference(config);
        let previous = config.method.parameters.previous.as_deref().and_then(|written| {
            let state = inputs.models[inputs.index(written)].state();
            state.map_err(|problem| problems.push(problem)).ok()
        });
        let folded = inputs.models.iter().filter_map(|input| input.folded.as_ref());
        let mut notes = config.notes.clone();
        notes.extend(folded.flat_map(|folded| folded.notes.clone()));
        let head = Head::of(&inputs, &mut problems, &mut notes);
        model_problems(config, &inputs, reference, &head, &mut problems, &mut notes);
        let drafts = match drafts(config, method, &inputs, &head) {
            Ok(drafts) => drafts,
            Err(more) => {
                problems.extend(more);
                return Err(Error::Problems(problems));
            }
        };
        let mut drafts = drafts;
        let mut extra = extra::split(&inputs, reference, config.extra_tensors);
        if config.slices.is_empty() {
            drafts.retain(|draft| head.covers(&draft.name) || extra.merged.contains(&draft.name));
            extra.copied.retain(|tensor| !head.covers(&tensor.spec.name));
        } else {
            extra.copied.clear();
        }
        notes.append(&mut extra.notes);
        let names: Vec<&str> = drafts.iter().map(|d| d.name.as_str()).collect();
        notes.extend(idle_filters(config, &names));
        let aligned = Vocabulary::new(config, &inputs, reference, &mut notes).unwrap_or_else(|more| {
            problems.extend(more);
            None
        });
        if aligned.is_some() {
            let tables = extra.copied.iter().filter(|t| is_token_table(&t.spec.name, &t.spec.shape));
            let missing = |name: &str| Problem::new(Place::tensor(name), TokenizerProblem::TableMissing);
            problems.extend(tables.map(|table| missing(&table.spec.name)));
        }
        let mut tensors = Vec::new();
        let mut vocabulary = None;
        let mut undefined = OfTensors::default();
        let mut unmerged = OfTensors::default();
        let mut missing: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for draft in &drafts {
            let context = Context {
                config,
                method,
                inputs: &inputs,
                reference,
                previous: previous.as_ref(),
                vocabulary: aligned.as_ref(),
                head: &head,
            };
            match plan_tensor(&context, draft, &mut vocabulary) {
                Ok(tensor) => tensors.push(tensor),
                Err(Obstacle::Tensor(problem)) => problems.push(problem),
                Err(Obstacle::Parameters(error)) => undefined.add(error.into(), &draft.name),
                Err(Obstacle::Missing { input, tensor }) => missing.entry(input).or_default().push(tensor),
                Err(Obstacle::Dtype(kind)) => unmerged.add((*kind).into(), &draft.name),
            }
        }
        tensors.append(&mut extra.copied);
        // Invalid parameters are mostly invalid for all tensors, so each is reported once.
        problems.extend(undefined.problems(drafts.len()));
        // For whole models, the names were compared before.
        let said = config.slices.is_empty() && !problems.is_empty();
        let lacking = missing.into_iter().filter(|_| !said);
        let lacks = |(input, tensors)| Problem::new(Place::Model(input), ModelProblem::LacksTensors { tensors });
        problems.extend(lacking.map(lacks));
        problems.extend(unmerged.problems(usize::MAX));
        let whole_model_trim =
            drafts.first().and_then(|draft| whole_model_trim(&draft.scopes(config, None).settings(method).ok()?));
        if whole_model_trim.is_some() && varies(config) {
            problems.push(Problem::new(Place::key("density"), ConfigProblem::VaryingDensity));
        }
        dedup(&mut problems);
        if !problems.is_empty() {
            return Err(Error::Problems(problems));
        }
        let layers = config.slices.iter().map(SliceConfig::layers).sum();
        let mut out_config = out_config(config, &inputs.models[reference], vocabulary, &tensors, layers);
        if head.own().is_some() {
            out_config.insert("tie_word_embeddings".to_owned(), false.into());
        }
        let (companions, mut made, tokenizer) = match &aligned {
            Some(aligned) => {
                aligned.put_special_ids(&mut out_config, &inputs);
                let files = inputs.models[aligned.model()].companion_files()?;
                (files, aligned.files(&inputs)?, aligned.model())
            }
            None => {
                let model = tokenizer_model(config, &inputs, reference, stages)?;
                (inputs.models[model].companion_files()?, BTreeMap::new(), model)
            }
        };
        let companions = without_stale_tokenizer(companions, &made, &mut notes);
        put_wanted_template(config, &inputs, tokenizer, &mut made, &mut notes)?;
        drop(aligned);
        Ok(Plan {
            config: config.clone(),
            method,
            inputs,
            tensors,
            out_config,
            companions,
            made,
            whole_model_trim,
            stages: Vec::new(),
            notes,
        })
    }

    /// Returns the tensors that will be written, in order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.tensors.iter().map(|t| t.spec.clone()).collect()
    }

    /// Returns the number of tensor bytes that will be written.
    pub fn bytes_written(&self) -> u64 {
        self.tensors.iter().map(|t| bytes(t.spec.dtype, &t.spec.shape)).sum()
    }

    /// Returns the number of tensor bytes in the inputs; a method may read them more than once.
    pub fn bytes_read(&self) -> u64 {
        let of = |source: &Source| {
            let info = self.inputs.models[source.model].source().info(&source.tensor);
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

    /// Returns the directories of the models, in the order of the file.
    pub fn models(&self) -> impl Iterator<Item = &Path> {
        self.inputs.models.iter().map(|m| m.path.as_path())
    }

    /// Returns the inputs of a segment.
    pub(crate) fn group<'p>(&'p self, tensor: &'p PlannedTensor, segment: &'p Segment) -> TensorGroup<'p> {
        let values = |source: &'p Source| {
            if let Some(table) = &source.table {
                return Values::from_source(&source.key, &**table, "", Dtype::F32).skip(segment.elements.start);
            }
            let checkpoint = self.inputs.models[source.model].source();
            let dtype = checkpoint.info(&source.tensor).expect("planned from its header").dtype;
            Values::from_source(&source.key, checkpoint, &source.tensor, dtype).skip(segment.elements.start)
        };
        let models = segment.models.iter().map(values).collect();
        TensorGroup::new(&tensor.spec.name, &segment.shape, segment.base.as_ref().map(values), models)
    }
}

/// Returns the method that a merge file names.
fn known_method(config: &MergeConfig, methods: &MethodRegistry) -> Result<&'static MethodInfo, Problem> {
    methods.get(&config.method.name).ok_or_else(|| {
        let known = methods.iter().map(|m| m.name).collect();
        let method = config.method.name.clone();
        Problem::whole(ConfigProblem::UnknownMethod { method, known, for_adapters: false })
    })
}

/// Fills in the defaults of a merge file, and returns the problems that do not depend on its models.
fn resolved(config: &MergeConfig, method: &'static MethodInfo) -> (MergeConfig, Vec<Problem>) {
    let mut config = config.clone();
    if config.ignore_parameters_of_others {
        drop_parameters_of_others(&mut config, method);
    }
    let mut problems = parameter_problems(&config, method);
    if config.tokenizer.is_some() && config.tokenizer_source.is_some() {
        problems.push(Problem::whole(TokenizerProblem::SourceTwice));
    }
    // The union of all tokens is not the tokenizer of any one model.
    if config.tokenizer_source.as_deref() == Some(UNION) {
        (config.tokenizer_source, config.tokenizer) = (None, Some(TokenizerConfig::default()));
    }
    match settings::resolve(method, config.profile, &config.method.parameters) {
        Ok(resolved) => config.method.parameters = resolved,
        Err(error) => problems.push(Problem::whole(error)),
    }
    problems.extend(shape_of_config(&config, method));
    (config, problems)
}

/// Returns the problems of a stage that can be found before the stages it uses have run: those of its settings, and of
/// models that are not stages.
pub(crate) fn problems_without_stages(config: &MergeConfig, methods: &MethodRegistry, stages: &[&str]) -> Vec<Problem> {
    let method = match known_method(config, methods) {
        Ok(method) => method,
        Err(problem) => return vec![problem],
    };
    let (config, mut problems) = resolved(config, method);
    let directories = config.directories(&BTreeMap::new());
    let mut inputs = Inputs::default();
    for written in config.written_models() {
        let (model, adapter) = model_and_adapter(written);
        if !stages.contains(&model) {
            problems.extend(inputs.open(written, &directories).err().into_iter().flatten());
        } else if let Some(adapter) = adapter {
            let dir = directories.get(adapter).cloned().unwrap_or_else(|| PathBuf::from(adapter));
            problems.extend(Adapter::open(&dir).err().map(|error| Problem::unopened(&dir, error)));
        }
    }
    problems
}

/// Returns the notes of a stage that do not depend on its models.
///
/// # Errors
/// Returns an error if its method does not exist.
#[cfg(feature = "cli")]
pub(crate) fn notes_without_models(config: &MergeConfig, methods: &MethodRegistry) -> Result<Vec<String>, Error> {
    Ok(resolved(config, known_method(config, methods)?).0.notes)
}

fn bytes(dtype: Dtype, shape: &[usize]) -> u64 {
    (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64
}

fn dedup(problems: &mut Vec<Problem>) {
    let mut seen = BTreeSet::new();
    problems.retain(|problem| seen.insert(problem.to_string()));
}

/// Problems grouped by their text, with the affected tensors.
#[derive(Default)]
struct OfTensors<'t>(BTreeMap<String, (ProblemKind, Vec<&'t str>)>);

impl<'t> OfTensors<'t> {
    fn add(&mut self, kind: ProblemKind, tensor: &'t str) {
        self.0.entry(kind.to_string()).or_insert((kind, Vec::new())).1.push(tensor);
    }

    /// Returns one problem for each group. If it affects all of several tensors, no tensor is named.
    fn problems(self, all: usize) -> impl Iterator<Item = Problem> {
        self.0.into_values().map(move |(kind, tensors)| {
            let everywhere = tensors.len() > 1 && tensors.len() == all;
            Problem::new(if everywhere { Place::Whole } else { Place::tensors(&tensors) }, kind)
        })
    }
}

/// Removes SentencePiece's `tokenizer.model` from the companion files if a new `tokenizer.json` makes it obsolete.
fn without_stale_tokenizer(
    mut companions: Vec<PathBuf>,
    made: &BTreeMap<String, Vec<u8>>,
    notes: &mut Vec<String>,
) -> Vec<PathBuf> {
    const STALE: &str = "tokenizer.model";
    let before = companions.len();
    companions.retain(|file| !made.contains_key("tokenizer.json") || !file.ends_with(STALE));
    if companions.len() < before {
        notes.push(format!("{STALE} is left out, because it lacks the changes in tokenizer.json"));
    }
    companions
}

/// Reports incompatible models, independently of individual tensors.
fn model_problems(
    config: &MergeConfig,
    inputs: &Inputs,
    reference: usize,
    head: &Head,
    problems: &mut Vec<Problem>,
    notes: &mut Vec<String>,
) {
    let whole = config.slices.is_empty();
    let first = &inputs.models[reference];
    if config.method.name != "passthrough" || config.dtype.is_some() {
        inputs.models.iter().for_each(|input| eight_bit_weights(input, problems, notes));
    }
    for (i, other) in inputs.models.iter().enumerate().filter(|(i, _)| *i != reference) {
        let (wrong, notable) = compare_configs(first, other, whole, head);
        let comparable = wrong.is_empty();
        problems.extend(wrong);
        notes.extend(notable.iter().map(Problem::to_string));
        if let Some(bare) = bare_model(first, other) {
            // A bare model has no head either, so the missing head is not reported as well.
            problems.retain(|problem| !matches!(&*problem.kind, ProblemKind::Model(ModelProblem::HeadMissing { .. })));
            problems.push(bare);
            continue;
        }
        // If the architectures differ, different names are not reported as well.
        if whole && comparable && config.extra_tensors == ExtraTensors::Error {
            problems.extend(compare_names(first, other, head));
        }
        if config.tokenizer.is_some() {
            continue;
        }
        if let Some(difference) = compare_tokenizers(first, &inputs.models[i]) {
            if config.ignore_tokenizers { notes.push(difference.to_string()) } else { problems.push(difference) }
        }
    }
}

/// Eight-bit weights are read as they are. If there are also scales, the model is quantized, which is a problem.
fn eight_bit_weights(input: &Input, problems: &mut Vec<Problem>, notes: &mut Vec<String>) {
    let names = input.source().names();
    let eight = |name: &&str| input.source().info(name).is_some_and(|info| is_eight_bit(info.dtype));
    if !names.iter().any(eight) {
        return;
    }
    match names.iter().find(|name| name.ends_with("scale_inv") || name.ends_with("_scale")) {
        Some(scale) => {
            let kind = ModelProblem::ScaledWeights { scale: (*scale).to_owned() };
            problems.push(Problem::new(Place::model(&input.written), kind));
        }
        None => notes.push(format!(
            "{}: weights of eight bits are read; where they give the output its dtype it is bfloat16, if `dtype` says nothing",
            input.written
        )),
    }
}

/// What all tensors of a merge share.
struct Context<'c> {
    config: &'c MergeConfig,
    method: &'static MethodInfo,
    inputs: &'c Inputs,
    reference: usize,
    previous: Option<&'c OpcmState>,
    /// The output's tokens, if rows of token tables are reordered to match them.
    vocabulary: Option<&'c Vocabulary<'c>>,
    head: &'c Head,
}

/// Why a tensor cannot be planned.
enum Obstacle {
    /// A problem with this tensor.
    Tensor(Problem),
    /// Invalid parameters.
    Parameters(SettingsError),
    /// A tensor that is missing from an input.
    Missing { input: String, tensor: String },
    /// Dtypes that cannot be merged; this usually affects many tensors.
    Dtype(Box<ModelProblem>),
}

impl From<Problem> for Obstacle {
    fn from(problem: Problem) -> Obstacle {
        Obstacle::Tensor(problem)
    }
}

/// Plans one tensor, or returns the problem that prevents it. `vocabulary` receives the number of rows of token tables.
fn plan_tensor(
    context: &Context<'_>,
    draft: &Draft<'_>,
    vocabulary: &mut Option<usize>,
) -> Result<PlannedTensor, Obstacle> {
    let &Context { config, method, inputs, reference, previous, .. } = context;
    let source = |model: usize, tensor: &str, key: &str| Source {
        model,
        tensor: context.head.tensor(&inputs.models[model], tensor).to_owned(),
        key: key.to_owned(),
        table: None,
    };
    let base = draft.base.as_ref().map(|(model, tensor, _)| source(*model, tensor, "base"));
    let models: Vec<Source> = draft.models.iter().map(|m| source(m.model, &m.tensor, &m.key)).collect();
    let mut infos = Vec::new();
    for s in base.iter().chain(&models) {
        let input = &inputs.models[s.model];
        let missing = || Obstacle::Missing { input: input.written.clone(), tensor: s.tensor.clone() };
        infos.push((s, input, input.source().info(&s.tensor).ok_or_else(missing)?));
    }
    let of_reference = infos.iter().find(|(s, _, _)| s.model == reference).or(infos.first());
    let reference = of_reference.ok_or_else(|| draft.problem(ModelProblem::NoSource))?;
    let dtype = reference.2.dtype;
    if !is_readable(dtype) {
        return copied(draft, &infos);
    }
    if let Some((_, input, info)) = infos.iter().find(|(_, _, info)| !is_readable(info.dtype)) {
        let (other, model) = (info.dtype, input.written.clone());
        return Err(Obstacle::Dtype(Box::new(ModelProblem::MixedDtypes { dtype: other, model, elsewhere: dtype })));
    }
    let out_dtype = config.dtype.map_or(written_as(dtype), |d| d.dtype());
    let scopes = draft.scopes(config, previous);
    let method_of = || scopes.build(method).map_err(Obstacle::Parameters);
    let spec = |shape: Vec<usize>| TensorSpec { name: draft.name.clone(), dtype: out_dtype, shape };
    let shape = reference.2.shape.clone();
    if let Some(aligned) = context.vocabulary.filter(|_| is_token_table(&draft.name, &shape)) {
        let base = draft.base.as_ref().map(|b| b.0).or_else(|| config.base_model.as_ref().map(|b| inputs.index(b)));
        let segment = aligned_segment(aligned, draft, &infos, base, inputs, method_of()?)?;
        *vocabulary = Some(aligned.rows);
        return Ok(PlannedTensor { spec: spec(segment.shape.clone()), work: Work::Merge(vec![segment]) });
    }
    if infos.iter().all(|(_, _, info)| info.shape == shape) {
        let as_it_is = out_dtype == dtype || config.dtype.is_none() && is_eight_bit(dtype);
        let method = method_of()?;
        if infos.len() == 1 && as_it_is && method.copies() {
            let spec = TensorSpec { dtype, ..spec(shape) };
            return Ok(PlannedTensor { spec, work: Work::Copy(reference.0.clone()) });
        }
        let elements = 0..shape.iter().product();
        let segment = Segment { elements, shape: shape.clone(), method, base, models, whole: true };
        return Ok(PlannedTensor { spec: spec(shape), work: Work::Merge(vec![segment]) });
    }
    let segments = vocabulary_segments(config, draft, (&infos, reference), base.as_ref(), &models, method_of)?;
    let columns = shape[1..].iter().product::<usize>();
    let rows = segments.last().map_or(0, |s| s.elements.end / columns.max(1));
    *vocabulary = Some(rows);
    let shape = [&[rows], &shape[1..]].concat();
    Ok(PlannedTensor { spec: spec(shape), work: Work::Merge(segments) })
}

/// Plans a token table whose rows are reordered to the output's tokens before they are merged.
fn aligned_segment(
    vocabulary: &Vocabulary<'_>,
    draft: &Draft<'_>,
    infos: &Infos<'_>,
    base: Option<usize>,
    inputs: &Inputs,
    method: Box<dyn MergeMethod>,
) -> Result<Segment, Problem> {
    let participants = infos.iter().map(|(source, input, info)| Participant {
        model: source.model,
        input,
        tensor: &source.tensor,
        dtype: info.dtype,
        shape: &info.shape,
    });
    let participants: Vec<Participant<'_>> = participants.collect();
    let columns = |p: &Participant<'_>| p.shape.get(1..).unwrap_or_default().to_vec();
    if participants.iter().any(|p| columns(p) != columns(&participants[0])) {
        let shapes = participants.iter().map(|p| (p.shape.to_vec(), vec![p.input.written.clone()])).collect();
        return Err(draft.problem(ModelProblem::Shapes { shapes }));
    }
    let tables = vocabulary.align(&participants, base, inputs)?;
    let shape = [&[vocabulary.rows], &participants[0].shape[1..]].concat();
    let sources = infos.iter().zip(tables);
    let mut sources: Vec<Source> =
        sources.map(|((s, _, _), table)| Source { table: Some(Arc::new(table)), ..(*s).clone() }).collect();
    // The base precedes the models.
    let base = draft.base.is_some().then(|| sources.remove(0));
    Ok(Segment { elements: 0..shape.iter().product(), shape, method, base, models: sources, whole: true })
}

/// Returns the output dtype for an input's dtype, if none is requested.
fn written_as(dtype: Dtype) -> Dtype {
    match dtype {
        Dtype::F64 => Dtype::F32,
        eight if is_eight_bit(eight) => Dtype::BF16,
        same => same,
    }
}

type InputTensor<'i> = (&'i Source, &'i Input, &'i TensorInfo);
type Infos<'i> = [InputTensor<'i>];

/// Plans a tensor of integers, which is copied if all inputs agree and cannot be merged otherwise.
fn copied(draft: &Draft<'_>, infos: &Infos<'_>) -> Result<PlannedTensor, Obstacle> {
    let (source, input, info) = infos[0];
    let bytes = input.source().bytes(&source.tensor).map_err(|error| draft.problem(error))?;
    for (s, other, _) in &infos[1..] {
        if other.source().bytes(&s.tensor).map_err(|error| draft.problem(error))? != bytes {
            let models = [input.written.clone(), other.written.clone()];
            return Err(Obstacle::Dtype(Box::new(ModelProblem::CannotMerge { dtype: info.dtype, models })));
        }
    }
    let spec = TensorSpec { name: draft.name.clone(), dtype: info.dtype, shape: info.shape.clone() };
    Ok(PlannedTensor { spec, work: Work::Copy(source.clone()) })
}

/// Plans token tables of different lengths: rows that all models have are merged, others follow the policy.
fn vocabulary_segments(
    config: &MergeConfig,
    draft: &Draft<'_>,
    (infos, (source, _, info)): (&Infos<'_>, &InputTensor<'_>),
    base: Option<&Source>,
    models: &[Source],
    method_of: impl Fn() -> Result<Box<dyn MergeMethod>, Obstacle>,
) -> Result<Vec<Segment>, Obstacle> {
    let rest = |info: &TensorInfo| info.shape.get(1..).unwrap_or_default().to_vec();
    let table = rest(infos[0].2);
    let shapes = || {
        let mut shapes: BTreeMap<Vec<usize>, Vec<String>> = BTreeMap::new();
        for (_, input, info) in infos {
            shapes.entry(info.shape.clone()).or_default().push(input.written.clone());
        }
        shapes.into_iter().collect()
    };
    let is_table = ["embed", "lm_head", "wte"].iter().any(|part| draft.name.contains(part));
    if !is_table || table.is_empty() || infos.iter().any(|(_, _, info)| rest(info) != table) {
        return Err(draft.problem(ModelProblem::Shapes { shapes: shapes() }).into());
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
        VocabularyPolicy::Error => {
            return Err(draft.problem(ModelProblem::RowCounts { shapes: shapes() }).into());
        }
        VocabularyPolicy::Common => {}
        VocabularyPolicy::Base => {
            if rows(info) > common {
                let copy = Box::new(Linear { weights: vec![1.0], normalize: false });
                segments.push(segment(common..rows(info), copy, None, vec![(*source).clone()], false));
            }
        }
        VocabularyPolicy::Keep => {
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
