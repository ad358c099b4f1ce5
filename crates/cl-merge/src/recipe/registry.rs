//! Lookup of methods and parameters by name.

use std::sync::LazyLock;

use crate::methods::{METHODS, MethodInfo, ParameterInfo, SHARED};

/// All parameters: those shared by several methods, then each method's own.
pub static PARAMETERS: LazyLock<Vec<ParameterInfo>> = LazyLock::new(|| {
    let mut parameters: Vec<ParameterInfo> = SHARED.to_vec();
    for own in METHODS.iter().flat_map(|method| method.own_parameters) {
        if parameters.iter().all(|other| other.name != own.name) {
            parameters.push(*own);
        }
    }
    parameters
});

/// Returns a method by name.
pub(crate) fn method(name: &str) -> Option<&'static MethodInfo> {
    METHODS.iter().find(|info| info.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_of_a_method_is_described_and_of_use() {
        for info in METHODS {
            for name in info.parameters {
                assert!(info.parameter(name).is_some(), "{}: {name}", info.name);
            }
            for own in info.own_parameters {
                assert!(info.parameter(own.name).is_some(), "{}: {} is not among its parameters", info.name, own.name);
            }
        }
        for info in PARAMETERS.iter() {
            assert!(METHODS.iter().any(|m| m.parameters.contains(&info.name)), "{} is nobody's", info.name);
        }
    }

    #[test]
    fn names_are_unique() {
        for (i, info) in METHODS.iter().enumerate() {
            assert!(METHODS[..i].iter().all(|other| other.name != info.name), "{}", info.name);
        }
    }
}
