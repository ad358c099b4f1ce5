//! Lookup of methods and parameters by name.

use std::sync::LazyLock;

use crate::methods::{METHODS, MethodInfo, ParameterInfo, SHARED};
use crate::problem::{ConfigProblem, Problem};

/// The methods that merge files can name: the built-in ones, and those that a program adds.
///
/// ```
/// use cl_merge::methods::MethodInfo;
/// use cl_merge::{
///     Base, Error, MergeFile, MergeMethod, MergeOptions, MergePieces, MethodRegistry, Piece, TensorGroup, run_file_with,
/// };
///
/// /// The entry-wise maximum of the models.
/// struct Maximum;
///
/// impl MergeMethod for Maximum {
///     fn prepare<'t>(&'t self, _: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
///         Ok(Box::new(|piece: &mut Piece, out: &mut [f32]| {
///             for (i, out) in out.iter_mut().enumerate() {
///                 *out = piece.models.iter().map(|model| model[i]).fold(f32::NEG_INFINITY, f32::max);
///             }
///         }))
///     }
/// }
///
/// static MAXIMUM: MethodInfo =
///     MethodInfo { base: Base::Input, ..MethodInfo::new("maximum", |_settings| Ok(Box::new(Maximum))) };
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let methods = MethodRegistry::builtin().with(&MAXIMUM)?;
/// // Two stages in mergekit's YAML: the mean of a model and the maximum of two others.
/// let text = "
/// name: largest
/// merge_method: maximum
/// models: [{model: MODELS/ft0}, {model: MODELS/ft1}]
/// ---
/// merge_method: linear
/// models:
///   - {model: MODELS/base, parameters: {weight: 0.5}}
///   - {model: largest, parameters: {weight: 0.5}}
/// ";
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// # let text = text.replace("MODELS", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/models"));
/// let file = MergeFile::from_yaml(&text)?;
/// run_file_with(&file, &methods, &folder.join("merged"), &MergeOptions::default(), &|_event| ())?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MethodRegistry {
    methods: Vec<&'static MethodInfo>,
}

impl MethodRegistry {
    /// The built-in methods, [`METHODS`].
    pub fn builtin() -> MethodRegistry {
        MethodRegistry { methods: METHODS.iter().collect() }
    }

    /// Adds a method.
    ///
    /// # Errors
    /// Returns an error if a method with this name exists, because outputs record methods by name, or if one of its
    /// parameters is described neither in its `own_parameters` nor among those of built-in methods.
    pub fn with(mut self, method: &'static MethodInfo) -> Result<MethodRegistry, Problem> {
        let name = method.name;
        if self.get(name).is_some() {
            return Err(Problem::whole(ConfigProblem::MethodNamedTwice { method: name }));
        }
        if let Some(parameter) = method.parameters.iter().find(|parameter| method.parameter(parameter).is_none()) {
            return Err(Problem::whole(ConfigProblem::NotDescribed { method: name, parameter }));
        }
        self.methods.push(method);
        Ok(self)
    }

    /// Returns a method by name.
    pub fn get(&self, name: &str) -> Option<&'static MethodInfo> {
        self.methods.iter().copied().find(|method| method.name == name)
    }

    /// Returns all methods: the built-in ones, then others in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &'static MethodInfo> {
        self.methods.iter().copied()
    }
}

impl Default for MethodRegistry {
    fn default() -> Self {
        MethodRegistry::builtin()
    }
}

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

/// Returns a built-in method by name.
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
