//! What can be said of a merge file without its models: parameters that nobody has, numbers out of range, models too many.

use std::collections::BTreeSet;

use serde_json::Value;

use super::config::{MergeConfig, Parameters};
use super::parameter::Parameter;
use crate::methods::{Base, MethodInfo, ParameterInfo};

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
pub(crate) fn parameter_problems(config: &MergeConfig, method: &MethodInfo) -> Vec<String> {
    let mut problems = Vec::new();
    for (place, parameters, of_model) in scopes(config) {
        for name in parameters.names() {
            match method.parameter(&name) {
                Some(info) => {
                    if of_model && !info.per_model {
                        problems.push(format!("{place}: `{name}` is one for all models; set it under the method"));
                    }
                    let values = serde_json::to_value(parameters).unwrap_or_default();
                    problems.extend(range_problems(&place, info, &values[&name]));
                }
                None => {
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
fn range_problems(place: &str, info: &ParameterInfo, value: &Value) -> Vec<String> {
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
pub(crate) fn shape_of_config(config: &MergeConfig, method: &MethodInfo) -> Vec<String> {
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
        if slice.sources.iter().any(|s| s.layer_range[1].saturating_sub(s.layer_range[0]) != slice.layers()) {
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

/// Whether densities are not plain numbers.
pub(crate) fn varies(config: &MergeConfig) -> bool {
    scopes(config).iter().any(|(_, p, _)| p.density.as_ref().is_some_and(|d| !matches!(d, Parameter::Number(_))))
}

/// Filters that match no tensor.
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
