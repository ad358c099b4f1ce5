//! Checks of a merge file that do not need its models: unknown parameters, numbers out of range, too many models.

use std::collections::BTreeSet;

use serde_json::Value;

use super::config::{MergeConfig, Parameters};
use super::parameter::Parameter;
use crate::methods::{Base, MethodInfo, ParameterInfo, Profile};
use crate::problem::{ConfigProblem, Place, Problem};

/// Lists all parameter tables of the file, with their places.
fn scopes(config: &MergeConfig) -> Vec<(Place, &Parameters, bool)> {
    let mut scopes = vec![(Place::Key(format!("method.{}", config.method.name)), &config.method.parameters, false)];
    for model in &config.models {
        scopes.push((Place::model(&model.model), &model.parameters, true));
    }
    for (i, slice) in config.slices.iter().enumerate() {
        scopes.push((slice_place(i, None), &slice.parameters, false));
        for source in &slice.sources {
            scopes.push((slice_place(i, Some(&source.model)), &source.parameters, true));
        }
    }
    scopes
}

/// Returns the place of a slice, or of one of its sources.
fn slice_place(index: usize, model: Option<&str>) -> Place {
    Place::Slice { number: index + 1, model: model.map(str::to_owned) }
}

/// Reports parameters that the method does not have, that are set in the wrong place, or that are out of range.
pub(crate) fn parameter_problems(config: &MergeConfig, method: &MethodInfo) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (place, parameters, of_model) in scopes(config) {
        for name in parameters.names() {
            match method.parameter(&name) {
                Some(info) => {
                    if of_model && !info.per_model {
                        let kind = ConfigProblem::SharedParameter { parameter: name.clone() };
                        problems.push(Problem::new(place.clone(), kind));
                    }
                    let values = serde_json::to_value(parameters).unwrap_or_default();
                    problems.extend(range_problems(&place, info, &values[&name]));
                }
                None => {
                    let (method, known) = (method.name, method.parameters);
                    let kind = ConfigProblem::UnknownParameter { method, parameter: name, known };
                    problems.push(Problem::new(place.clone(), kind));
                }
            }
        }
    }
    problems
}

/// Reports numbers out of range in the JSON form of a parameter.
fn range_problems(place: &Place, info: &ParameterInfo, value: &Value) -> Vec<Problem> {
    let (low, high) = info.bounds;
    let (parameter, range) = (info.name, info.range);
    let one = |kind: ConfigProblem| vec![Problem::new(place.clone(), kind)];
    match value {
        Value::Number(number) => {
            let number = number.as_f64().unwrap_or(f64::NAN);
            if (low..=high).contains(&number) {
                return Vec::new();
            }
            one(ConfigProblem::OutOfRange { parameter, value: number, range })
        }
        // serde_json writes NaN and infinities as null.
        Value::Null => one(ConfigProblem::NotFinite { parameter, range }),
        Value::Array(list) if list.is_empty() => one(ConfigProblem::EmptyList { parameter }),
        Value::Array(list) => list.iter().flat_map(|v| range_problems(place, info, v)).collect(),
        Value::Object(filter) => filter.get("value").map_or(Vec::new(), |v| range_problems(place, info, v)),
        _ => Vec::new(),
    }
}

/// Checks that either models or slices are set, and their numbers.
pub(crate) fn shape_of_config(config: &MergeConfig, method: &MethodInfo) -> Vec<Problem> {
    let mut problems = Vec::new();
    if config.models.is_empty() == config.slices.is_empty() {
        problems.push(Problem::whole(ConfigProblem::ModelsOrSlices));
    }
    if !config.models.is_empty() {
        let names: Vec<&str> = config.models.iter().map(|m| m.model.as_str()).collect();
        let base = config.base_model.as_deref();
        let counted = count_problems(&Place::key("models"), &names, base, method);
        if counted.is_empty()
            && base_is_input(config, method)
            && base.is_some_and(|base| !names.contains(&base))
            && !method.models.contains(&(names.len() + 1))
        {
            let kind = ConfigProblem::BaseIsModel { method: method.name, models: method.models.clone() };
            problems.push(Problem::new(Place::key("base_model"), kind));
        }
        problems.extend(counted);
    }
    for (i, slice) in config.slices.iter().enumerate() {
        let place = slice_place(i, None);
        let of_slice = |kind: ConfigProblem| Problem::new(place.clone(), kind);
        let base = slice.base_model.as_deref().or(config.base_model.as_deref());
        let names: Vec<&str> = slice.sources.iter().map(|s| s.model.as_str()).collect();
        problems.extend(count_problems(&place, &names, base, method));
        let mut seen = BTreeSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(**name)) {
            problems.push(of_slice(ConfigProblem::NamedTwice { model: (*twice).to_owned() }));
        }
        for source in slice.sources.iter().filter(|s| s.layer_range[0] >= s.layer_range[1]) {
            let kind = ConfigProblem::EmptyLayerRange { range: source.layer_range };
            problems.push(Problem::new(slice_place(i, Some(&source.model)), kind));
        }
        if slice.sources.iter().any(|s| s.layer_range[1].saturating_sub(s.layer_range[0]) != slice.layers()) {
            problems.push(of_slice(ConfigProblem::LayerCounts));
        }
    }
    problems
}

/// Whether the base is automatically one more input, as in mergekit for methods that do not use it otherwise.
pub(crate) fn base_is_input(config: &MergeConfig, method: &MethodInfo) -> bool {
    method.base == Base::Input && config.profile == Profile::Mergekit
}

/// Reports too few or too many models, or a missing base.
fn count_problems(place: &Place, names: &[&str], base: Option<&str>, method: &MethodInfo) -> Vec<Problem> {
    let mut problems = Vec::new();
    if method.base == Base::Required && base.is_none() {
        problems.push(Problem::new(place.clone(), ConfigProblem::NoBase { method: method.name }));
    }
    let n = names.iter().filter(|name| method.base == Base::Input || Some(**name) != base).count();
    if !method.models.contains(&n) {
        let (name, models, beside_base) = (method.name, method.models.clone(), method.base != Base::Input);
        let kind = ConfigProblem::ModelCount { method: name, models, beside_base, found: n };
        problems.push(Problem::new(place.clone(), kind));
    }
    problems
}

/// Whether a density is not a plain number.
pub(crate) fn varies(config: &MergeConfig) -> bool {
    scopes(config).iter().any(|(_, p, _)| p.density.as_ref().is_some_and(|d| !matches!(d, Parameter::Number(_))))
}

/// Reports filters that match no tensor.
pub(crate) fn idle_filters(config: &MergeConfig, tensors: &[&str]) -> Vec<String> {
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
