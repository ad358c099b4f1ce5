//! Selection of the method for adapters, and the merge of one module's dense updates.

use cl_checkpoint::TensorSource;
use serde_json::Value;

use super::options::{CombineOptions, Space};
use super::set::{Module, Set, one_per_adapter};
use crate::Error;
use crate::methods::{
    Base, Consensus, Divisor, Election, METHODS, MergeMethod, MethodInfo, Profile, Rescale, SettingsError, Sign,
    Sparsify, TaskVectors, Trimmed, merge_tensor, whole_model_trim,
};
use crate::problem::{AdapterProblem, ConfigProblem, Place, Problem};
use crate::recipe::config::{MergeConfig, MethodConfig, ModelConfig, Parameters};
use crate::recipe::parameter::Parameter;
use crate::recipe::settings::Scopes;
use crate::recipe::{check, registry, settings};
use crate::tensor::select::{Trim, trim_models};
use crate::tensor::{TensorGroup, Values};

/// What is computed of a module's updates.
pub(super) enum Recipe {
    /// `Σ factor · ΔW`, which is low-rank as it is.
    Sum {
        /// One for each member.
        factors: Vec<f64>,
    },
    /// A method over dense updates.
    Dense(Box<Method>),
    /// PEFT's way, A and B apart.
    Factors {
        /// None for `cat`.
        method: Option<TaskVectors>,
    },
}

/// A method of the registry with all its settings.
pub(super) struct Method {
    info: &'static MethodInfo,
    config: MergeConfig,
    /// Trims over all modules, per module and model, where the method trims the whole adapter at once.
    trims: Option<Vec<Vec<Trim>>>,
}

/// Settings as they hold, and what is computed.
pub(super) struct Resolved {
    pub(super) method: String,
    pub(super) parameters: Parameters,
    pub(super) recipe: Recipe,
}

/// Names of everything that can be asked for.
pub(super) fn method_names() -> Vec<&'static str> {
    let of_registry = METHODS.iter().filter(|m| m.for_updates).map(|m| m.name);
    ["cat", "magnitude_prune"].into_iter().chain(of_registry).collect()
}

/// The method of these options; what is wrong with it goes to `problems`.
pub(super) fn resolve(set: &Set<'_>, options: &CombineOptions, problems: &mut Vec<Problem>) -> Option<Resolved> {
    let method = options.method.replace('-', "_");
    if registry::method(&method).is_some_and(|info| !info.for_updates) {
        problems.push(Problem::whole(AdapterProblem::OnlyForModels { method }));
        return None;
    }
    let of_registry = match method.as_str() {
        "cat" | "linear" => "task_arithmetic",
        "magnitude_prune" => "breadcrumbs",
        other => other,
    };
    let Some(info) = registry::method(of_registry) else {
        let kind = ConfigProblem::UnknownMethod { method, known: method_names(), for_adapters: true };
        problems.push(Problem::whole(kind));
        return None;
    };
    if options.density.len() > 1 && options.density.len() != set.members.len() {
        let (adapters, given) = (set.members.len(), options.density.len());
        problems.push(one_per_adapter("density", adapters, given, true));
    }
    let parameters = parameters(&method, options, problems);
    let config = merge_config(set, info, options, parameters);
    problems.extend(check::parameter_problems(&config, info));
    if !info.models.contains(&set.members.len()) && !set.members.is_empty() {
        let (method, adapters, found) = (method.clone(), info.models.clone(), set.members.len());
        problems.push(Problem::whole(AdapterProblem::AdapterCount { method, adapters, found }));
    }
    if !problems.is_empty() {
        return None;
    }
    let mut config = config;
    config.method.parameters = match settings::resolve(info, options.profile, &config.method.parameters) {
        Ok(resolved) => resolved,
        Err(error) => {
            problems.push(Problem::whole(error));
            return None;
        }
    };
    let resolved = config.method.parameters.clone();
    let recipe = match options.space {
        Space::Factors => factor_recipe(&method, set, options, &resolved, problems)?,
        Space::Delta if info.name == "task_arithmetic" => Recipe::Sum { factors: sum_factors(set, &resolved) },
        Space::Delta => {
            let method = Method { info, config, trims: None };
            // What parameters forbid is said here, before the work.
            let first = set.modules.first()?;
            problems.extend(method.build(&first.tensor()).err().map(Problem::whole));
            Recipe::Dense(Box::new(method))
        }
    };
    Some(Resolved { method, parameters: resolved, recipe })
}

/// The given parameters, with what the method's name means for adapters.
fn parameters(method: &str, options: &CombineOptions, problems: &mut Vec<Problem>) -> Parameters {
    let mut parameters = options.parameters.clone();
    for density in options.density.iter().copied().chain(number(&parameters.density)) {
        if !(density > 0.0 && density <= 1.0) {
            problems.push(Problem::whole(AdapterProblem::Density { density }));
        }
    }
    if let [density] = options.density[..] {
        parameters.density = Some(Parameter::Number(density));
    }
    let dare_or_ties = matches!(method, "ties" | "dare_ties" | "dare_linear");
    if options.profile == Profile::Paper && dare_or_ties && options.density.is_empty() {
        parameters.density.get_or_insert(Parameter::Number(0.2));
    }
    if method == "magnitude_prune" {
        parameters.gamma.get_or_insert(Parameter::Number(0.0));
    }
    if method == "cat" {
        let names = parameters.names();
        problems.extend(names.into_iter().map(|parameter| Problem::whole(AdapterProblem::CatParameter { parameter })));
        problems.extend(options.rank.map(|_| Problem::whole(AdapterProblem::CatRank)));
    }
    if options.space == Space::Factors {
        factor_problems(method, options, problems);
    }
    for (name, value) in serde_json::to_value(&parameters).ok().iter().flat_map(Value::as_object).flatten() {
        if value.is_array() || value.is_object() {
            problems.push(Problem::new(Place::key(name), AdapterProblem::Varying));
        }
    }
    parameters
}

/// PEFT's methods on factors.
const FACTOR_METHODS: [&str; 6] = ["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"];

/// What cannot be set where everything is as in PEFT.
fn factor_problems(method: &str, options: &CombineOptions, problems: &mut Vec<Problem>) {
    if options.rank.is_some() {
        problems.push(Problem::whole(AdapterProblem::FactorRank));
    }
    if !FACTOR_METHODS.contains(&method) {
        let kind = AdapterProblem::FactorMethod { method: method.to_owned(), known: &FACTOR_METHODS };
        problems.push(Problem::whole(kind));
    }
    // Each factor is trimmed by itself in PEFT: to say so is no mistake.
    let by_tensor = options.parameters.trim == Some(Trimmed::Tensor);
    let settable = |name: &str| matches!(name, "density" | "election") || (name == "trim" && by_tensor);
    let names = options.parameters.names();
    let meaningless = names.into_iter().filter(|name| !settable(name));
    problems.extend(meaningless.map(|parameter| Problem::whole(AdapterProblem::FactorParameter { parameter })));
}

fn number(parameter: &Option<Parameter>) -> Option<f64> {
    match parameter {
        Some(Parameter::Number(value)) => Some(*value),
        _ => None,
    }
}

/// The merge file that says the same of models.
fn merge_config(set: &Set<'_>, info: &MethodInfo, options: &CombineOptions, parameters: Parameters) -> MergeConfig {
    let weighs = info.parameters.contains(&"weight");
    let models = set.members.iter().enumerate().map(|(i, member)| {
        let mut own = Parameters::default();
        if weighs || member.weight != 1.0 {
            own.weight = Some(Parameter::Number(member.weight));
        }
        if options.density.len() > 1 {
            own.density = options.density.get(i).copied().map(Parameter::Number);
        }
        ModelConfig { model: member.key.clone(), name: None, parameters: own }
    });
    MergeConfig {
        name: None,
        method: MethodConfig { name: info.name.to_owned(), parameters },
        profile: options.profile,
        base_model: None,
        models: models.collect(),
        slices: Vec::new(),
        dtype: None,
        seed: options.seed,
        tokenizer_source: None,
        tokenizer: None,
        chat_template: None,
        vocabulary: Default::default(),
        extra_tensors: Default::default(),
        ignore_tokenizers: false,
        revisions: Default::default(),
        places: Default::default(),
        notes: Vec::new(),
    }
}

/// What each member's update is multiplied by in a plain sum.
fn sum_factors(set: &Set<'_>, resolved: &Parameters) -> Vec<f64> {
    let total: f64 = set.members.iter().map(|m| m.weight).sum();
    let divisor = match resolved.divisor {
        Some(Divisor::Weight) => total,
        Some(Divisor::Count) => set.members.len() as f64,
        Some(Divisor::None) | None => 1.0,
    };
    // As in the merging of models: what vanishes is not divided by.
    let divisor = if divisor.abs() < 1e-8 { 1.0 } else { divisor };
    let lambda = number(&resolved.lambda).unwrap_or(1.0);
    set.members.iter().map(|m| lambda * m.weight / divisor).collect()
}

/// PEFT's definition of a method on A and B apart.
fn factor_recipe(
    method: &str,
    set: &Set<'_>,
    options: &CombineOptions,
    resolved: &Parameters,
    problems: &mut Vec<Problem>,
) -> Option<Recipe> {
    // As PEFT does: one adapter is only weighted.
    let method = if set.members.len() == 1 { "linear" } else { method };
    if method == "cat" {
        return Some(Recipe::Factors { method: None });
    }
    let density = match options.density.len() {
        0 | 1 => vec![number(&resolved.density).unwrap_or(1.0); set.members.len()],
        _ => options.density.clone(),
    };
    let election = match resolved.election {
        Some(Election::Count) => Sign::Count,
        _ => Sign::Sum,
    };
    let elected = (Some(Consensus { sign: election, weighted: false }), Divisor::Count);
    let (sparsify, (consensus, divisor)) = match method {
        "linear" => (Sparsify::None, (None, Divisor::None)),
        "ties" => (Sparsify::Magnitude { density }, elected),
        "dare_linear" => (Sparsify::Random { density }, (None, Divisor::None)),
        "dare_ties" => (Sparsify::Random { density }, elected),
        "magnitude_prune" => {
            let gamma = vec![0.0; density.len()];
            (Sparsify::Outliers { density, gamma }, (None, Divisor::None))
        }
        // Another one was said to be a problem before.
        _ => return None,
    };
    problems.extend(set.modules.iter().find_map(|module| mixed_ranks(set, module)));
    problems.extend(set.wholes.first().map(|whole| {
        let name = &set.members[whole.parts[0].member].name;
        Problem::new(Place::adapter(name), AdapterProblem::BesideFactors { tensor: whole.tensor.clone() })
    }));
    let random = method.starts_with("dare");
    let rescale = if random && options.profile != Profile::Paper { Rescale::Density } else { Rescale::None };
    let weights = Vec::new(); // of each module, as scalings are
    let seed = options.seed;
    Some(Recipe::Factors {
        method: Some(TaskVectors { weights, lambda: 1.0, sparsify, rescale, consensus, divisor, seed }),
    })
}

/// Why the factors of a module cannot be merged apart, if so.
fn mixed_ranks(set: &Set<'_>, module: &Module) -> Option<Problem> {
    let rank = module.parts[0].module.rank();
    let other = module.parts.iter().find(|part| part.module.rank() != rank)?;
    let adapters = [&module.parts[0], other].map(|part| set.members[part.member].name.clone());
    let kind = AdapterProblem::MixedRanks { adapters, ranks: [rank, other.module.rank()] };
    Some(Problem::new(Place::Module(module.name.clone()), kind))
}

impl Method {
    fn build(&self, tensor: &str) -> Result<Box<dyn MergeMethod>, SettingsError> {
        let config = &self.config;
        let scopes = Scopes {
            shared: vec![&config.method.parameters],
            models: config.models.iter().map(|m| (&m.parameters, tensor)).collect(),
            tensor,
            t: 0.0,
            keys: config.models.iter().map(|m| m.model.as_str()).collect(),
            previous: None,
            seed: config.seed,
        };
        scopes.build(self.info)
    }

    /// Looks at all modules together, where the method trims over the whole adapter.
    pub(super) fn prepare(&mut self, all: &[Group<'_>]) -> Result<(), Error> {
        let scopes = Scopes {
            shared: vec![&self.config.method.parameters],
            models: self.config.models.iter().map(|m| (&m.parameters, "")).collect(),
            tensor: "",
            t: 0.0,
            keys: Vec::new(),
            previous: None,
            seed: self.config.seed,
        };
        let settings = scopes.settings(self.info).map_err(Problem::whole)?;
        let Some(density) = whole_model_trim(&settings) else { return Ok(()) };
        let groups: Vec<TensorGroup<'_>> =
            all.iter().map(|group| TensorGroup { parallel: true, ..self.group(group) }).collect();
        let trims = trim_models(&groups, &density)?;
        drop(groups);
        self.trims = Some(trims);
        Ok(())
    }

    /// The members' updates of a module as a merge takes them, on a base of zeros.
    fn group<'g>(&'g self, group: &Group<'g>) -> TensorGroup<'g> {
        let values = |name, update| Values::from_source(name, update, "", cl_checkpoint::Dtype::F32);
        let members = self.config.models.iter().zip(&group.updates);
        let models = members.map(|(member, update)| values(member.model.as_str(), *update)).collect();
        // To some methods a base is one more input.
        let base = (self.info.base != Base::Input).then(|| values("zero", group.zero));
        TensorGroup { parallel: group.parallel, ..TensorGroup::new(group.tensor, group.shape, base, models) }
    }

    /// Bytes that a merge holds beside the updates' factors: the result, and what the method takes.
    pub(super) fn workspace(&self, group: &Group<'_>) -> usize {
        let elements: usize = group.shape.iter().product();
        let of_method = self.build(group.tensor).map_or(0, |method| method.workspace(&self.group(group)));
        8 * elements + of_method + (1 << 20)
    }

    /// Bytes of all updates' entries.
    pub(super) fn dense_bytes(&self, module: &Module) -> usize {
        4 * module.elements() * self.config.models.len()
    }

    /// The merged update of a module, `[rows, columns]`. Where they are given, `dense` are the updates' entries; else these are
    /// computed whenever they are read; their bits are the same. `index` is the group's place among those prepared.
    pub(super) fn merge(&self, index: usize, group: &Group<'_>, dense: &[Vec<f32>]) -> Result<Vec<f32>, Error> {
        let method = self.build(group.tensor).map_err(Problem::whole)?;
        let mut of = self.group(group);
        of.model_trims = self.trims.as_ref().map(|trims| trims[index].clone());
        if !dense.is_empty() {
            let members = self.config.models.iter().zip(dense);
            of.models = members.map(|(member, values)| Values::from_slice(&member.model, values)).collect();
        }
        merge_tensor(&*method, &of)
    }
}

/// What all members do to one tensor, as sources of f32 values, one each.
pub(super) struct Group<'g> {
    pub(super) tensor: &'g str,
    pub(super) shape: &'g [usize],
    pub(super) updates: Vec<&'g dyn TensorSource>,
    pub(super) zero: &'g dyn TensorSource,
    /// Whether all threads work on it together.
    pub(super) parallel: bool,
}
