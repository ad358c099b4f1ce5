//! Selection of the method for combining adapters, and the merge of one module's dense updates.

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

/// How the updates of a module are combined.
pub(super) enum Recipe {
    /// The sum `Σ factor · ΔW`, which is itself low-rank.
    Sum {
        /// One factor per member.
        factors: Vec<f64>,
    },
    /// A method over dense updates.
    Dense(Box<Method>),
    /// PEFT's way: A and B are merged separately.
    Factors {
        /// `None` for `cat`.
        method: Option<TaskVectors>,
    },
}

/// A method of the registry with its resolved settings.
pub(super) struct Method {
    info: &'static MethodInfo,
    config: MergeConfig,
    /// Trims over the whole adapter, per module and model, if the method trims at that scope.
    trims: Option<Vec<Vec<Trim>>>,
}

/// Resolved settings and the computation they select.
pub(super) struct Resolved {
    pub(super) method: String,
    pub(super) parameters: Parameters,
    pub(super) recipe: Recipe,
}

/// Returns the names of all methods for adapters.
pub(super) fn method_names() -> Vec<&'static str> {
    let of_registry = METHODS.iter().filter(|m| m.for_updates).map(|m| m.name);
    ["cat", "magnitude_prune"].into_iter().chain(of_registry).collect()
}

/// Selects the method for these options; problems are added to `problems`.
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
            // Report invalid parameters now, before the work starts.
            let first = set.modules.first()?;
            problems.extend(method.build(&first.tensor()).err().map(Problem::whole));
            Recipe::Dense(Box::new(method))
        }
    };
    Some(Resolved { method, parameters: resolved, recipe })
}

/// Returns the given parameters, including those implied by the method's name.
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

/// Reports options that cannot be set if factors are merged as in PEFT.
fn factor_problems(method: &str, options: &CombineOptions, problems: &mut Vec<Problem>) {
    if options.rank.is_some() {
        problems.push(Problem::whole(AdapterProblem::FactorRank));
    }
    if !FACTOR_METHODS.contains(&method) {
        let kind = AdapterProblem::FactorMethod { method: method.to_owned(), known: &FACTOR_METHODS };
        problems.push(Problem::whole(kind));
    }
    // PEFT trims each factor separately, so setting `trim = "tensor"` explicitly is accepted.
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

/// Returns the equivalent merge file, with the adapters as models.
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
        ignore_parameters_of_others: false,
        notes: Vec::new(),
    }
}

/// Returns the factor of each member's update in a plain sum.
fn sum_factors(set: &Set<'_>, resolved: &Parameters) -> Vec<f64> {
    let total: f64 = set.members.iter().map(|m| m.weight).sum();
    let divisor = match resolved.divisor {
        Some(Divisor::Weight) => total,
        Some(Divisor::Count) => set.members.len() as f64,
        Some(Divisor::None) | None => 1.0,
    };
    // As in merges of models, a vanishing divisor is replaced by one.
    let divisor = if divisor.abs() < 1e-8 { 1.0 } else { divisor };
    let lambda = number(&resolved.lambda).unwrap_or(1.0);
    set.members.iter().map(|m| lambda * m.weight / divisor).collect()
}

/// Returns PEFT's definition of a method on A and B separately.
fn factor_recipe(
    method: &str,
    set: &Set<'_>,
    options: &CombineOptions,
    resolved: &Parameters,
    problems: &mut Vec<Problem>,
) -> Option<Recipe> {
    // As in PEFT, a single adapter is only weighted.
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
        // Other methods have already been reported as problems.
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

/// Returns the problem if the factors of a module have different ranks and cannot be merged separately.
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

    /// Computes the trimming over all modules, if the method trims over the whole adapter.
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

    /// Returns the members' updates of a module as task vectors on a base of zeros.
    fn group<'g>(&'g self, group: &Group<'g>) -> TensorGroup<'g> {
        let values = |name, update| Values::from_source(name, update, "", cl_checkpoint::Dtype::F32);
        let members = self.config.models.iter().zip(&group.updates);
        let models = members.map(|(member, update)| values(member.model.as_str(), *update)).collect();
        // Methods that treat the base as one more input get no base.
        let base = (self.info.base != Base::Input).then(|| values("zero", group.zero));
        TensorGroup { parallel: group.parallel, ..TensorGroup::new(group.tensor, group.shape, base, models) }
    }

    /// Returns the workspace memory of a merge, without the factors of the updates: the result, and the method's own
    /// memory.
    pub(super) fn workspace(&self, group: &Group<'_>) -> usize {
        let elements: usize = group.shape.iter().product();
        let of_method = self.build(group.tensor).map_or(0, |method| method.workspace(&self.group(group)));
        8 * elements + of_method + (1 << 20)
    }

    /// Returns the size of all members' dense updates in bytes.
    pub(super) fn dense_bytes(&self, module: &Module) -> usize {
        4 * module.elements() * self.config.models.len()
    }

    /// Merges the updates of a module; the result is `[rows, columns]`. `dense` are the dense updates; if it is empty,
    /// their entries are computed on each read, with the same bits. `index` is the position of the group in
    /// [`Method::prepare`].
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

/// The updates of one tensor, one source of f32 values per member.
pub(super) struct Group<'g> {
    pub(super) tensor: &'g str,
    pub(super) shape: &'g [usize],
    pub(super) updates: Vec<&'g dyn TensorSource>,
    pub(super) zero: &'g dyn TensorSource,
    /// Whether all threads work on this tensor together.
    pub(super) parallel: bool,
}
