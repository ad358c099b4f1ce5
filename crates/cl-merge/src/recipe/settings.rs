//! Resolution of settings: defaults, and the values for each tensor.

use std::collections::BTreeMap;

use toml::{Table, Value};

use super::config::Parameters;
use super::parameter::Parameter;
use crate::methods::{Divisor, MergeMethod, MethodInfo, OpcmState, Profile, SettingsError, TensorSettings};

/// The scopes in which the settings of one tensor are looked up.
pub(crate) struct Scopes<'a> {
    /// Parameters of the slice, if any, and then of the method; the first scope with a value is used.
    pub(crate) shared: Vec<&'a Parameters>,
    /// Parameters of each model, and the name of the tensor in it. These take precedence over `shared`.
    pub(crate) models: Vec<(&'a Parameters, &'a str)>,
    pub(crate) tensor: &'a str,
    /// Relative position of the tensor among the layers, from 0 to 1.
    pub(crate) t: f64,
    /// Keys of each model's random masks.
    pub(crate) keys: Vec<&'a str>,
    /// State of the earlier merge that this one continues.
    pub(crate) previous: Option<&'a OpcmState>,
    pub(crate) seed: u64,
}

impl Scopes<'_> {
    /// Creates the method for the tensor. The last of `shared` must be resolved parameters.
    ///
    /// # Errors
    /// Returns an error if something is missing or out of range.
    pub(crate) fn build(&self, method: &MethodInfo) -> Result<Box<dyn MergeMethod>, SettingsError> {
        (method.build)(&self.settings(method)?)
    }

    /// Resolves the settings of the tensor. If filters match nothing, the defaults of the papers are used.
    ///
    /// # Errors
    /// Returns an error if a value is not a number, string, boolean, gradient or list of filters.
    pub(crate) fn settings(&self, method: &MethodInfo) -> Result<TensorSettings<'_>, SettingsError> {
        let shared: Vec<Given> = self.shared.iter().map(|p| given(method, p)).collect::<Result<_, _>>()?;
        let own: Vec<Given> = self.models.iter().map(|(p, _)| given(method, p)).collect::<Result<_, _>>()?;
        let defaults = (method.defaults)(Profile::Method).0;
        let mut values = Table::new();
        for &name in method.parameters {
            let of_shared = |tensor: &str| {
                let set = shared.iter().find_map(|scope| scope.get(name)?.resolve(tensor, self.t));
                set.or_else(|| defaults.get(name).cloned())
            };
            let value = if method.parameter(name).is_some_and(|info| info.per_model) {
                let of_model = |(scope, (_, tensor)): (&Given, &(_, &str))| {
                    let set = scope.get(name).and_then(|setting| setting.resolve(tensor, self.t));
                    set.or_else(|| of_shared(tensor))
                };
                own.iter().zip(&self.models).map(of_model).collect::<Option<Vec<Value>>>().map(Value::Array)
            } else {
                of_shared(self.tensor)
            };
            values.extend(value.map(|value| (name.to_owned(), value)));
        }
        Ok(TensorSettings { values, models: self.keys.clone(), seed: self.seed, previous: self.previous })
    }
}

/// The settings of one scope, by name, restricted to the method's parameters.
type Given = BTreeMap<String, Setting>;

/// The value that a file gives a parameter.
enum Setting {
    /// A gradient or filters, which depend on the tensor.
    Varying(Parameter),
    /// A constant for all tensors.
    Plain(Value),
}

impl Setting {
    fn resolve(&self, tensor: &str, t: f64) -> Option<Value> {
        match self {
            Setting::Varying(parameter) => parameter.resolve(tensor, t).map(Value::Float),
            Setting::Plain(value) => Some(value.clone()),
        }
    }
}

fn given(method: &MethodInfo, parameters: &Parameters) -> Result<Given, SettingsError> {
    let setting = |(name, value): (String, Value)| match value {
        Value::Array(_) | Value::Table(_) => match value.try_into() {
            Ok(varying) => Ok((name, Setting::Varying(varying))),
            Err(error) => Err(SettingsError::Varying { parameter: name, source: Box::new(error) }),
        },
        plain => Ok((name, Setting::Plain(plain))),
    };
    let has = |name: &str| method.parameters.contains(&name);
    table(method, parameters)?.into_iter().filter(|(name, _)| has(name)).map(setting).collect()
}

/// Returns the parameters that are set, by name.
fn table(method: &MethodInfo, parameters: &Parameters) -> Result<Table, SettingsError> {
    let known = Parameters { unknown: BTreeMap::new(), ..parameters.clone() };
    let mut table = Table::try_from(known)?;
    // JSON's null means that the value is not set.
    let of_others = parameters.unknown.iter().filter_map(|(name, value)| Some((name, Value::try_from(value).ok()?)));
    table.extend(of_others.map(|(name, value)| (name.clone(), value)));
    // `normalize` is mergekit's name for the choice between its two divisors.
    if method.parameters.contains(&"divisor")
        && let Some(normalize) = table.remove("normalize")
    {
        let divisor = if normalize.as_bool() == Some(true) { Divisor::Weight } else { Divisor::None };
        table.entry("divisor").or_insert(Value::try_from(divisor)?);
    }
    Ok(table)
}

/// Fills in the default of every parameter of a method, according to the profile.
///
/// # Errors
/// Returns an error if a number is out of TOML's range.
pub(crate) fn resolve(method: &MethodInfo, profile: Profile, given: &Parameters) -> Result<Parameters, SettingsError> {
    let mut resolved = table(method, given)?;
    for (name, value) in (method.defaults)(profile).0 {
        resolved.entry(name).or_insert(value);
    }
    Ok(resolved.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::{Defaults, METHODS, ParameterInfo};
    use crate::recipe::check::parameter_problems;
    use crate::recipe::config::MergeConfig;

    /// Every parameter that a file omits has a default of the type that the method reads, except `t` of two methods.
    #[test]
    fn defaults_make_every_method() {
        for method in METHODS {
            for profile in [Profile::Method, Profile::Paper, Profile::Mergekit] {
                let mut given = Parameters::default();
                if method.parameters.contains(&"t") {
                    given.t = Some(0.5.into());
                }
                let resolved = resolve(method, profile, &given).unwrap();
                let own = Parameters::default();
                let n = (*method.models.end()).min(2);
                let scopes = Scopes {
                    shared: vec![&resolved],
                    models: vec![(&own, "w"); n],
                    tensor: "w",
                    t: 0.0,
                    keys: vec!["a", "b"],
                    previous: None,
                    seed: 42,
                };
                scopes.build(method).map(drop).unwrap_or_else(|e| panic!("{}: {e}", method.name));
            }
        }
    }

    /// A parameter that only one method has needs no field in [`Parameters`].
    #[test]
    fn parameters_of_new_names_are_read_resolved_and_checked() {
        const METHOD: MethodInfo = MethodInfo {
            parameters: &["sharpness", "weight"],
            own_parameters: &[ParameterInfo::number("sharpness", "how sharp", "0 to 2", (0.0, 2.0)).per_model()],
            defaults: |_| Defaults::new().with("sharpness", 1.0).with("weight", 1.0),
            ..MethodInfo::new("sharp", |settings| {
                let Settings { sharpness, weight } = settings.read()?;
                Err(SettingsError::Custom(format!("{sharpness:?} {weight:?}")))
            })
        };
        #[derive(serde::Deserialize)]
        struct Settings {
            sharpness: Vec<f64>,
            weight: Vec<f64>,
        }
        let parse = |text: &str| toml::from_str::<MergeConfig>(text).unwrap();
        let config = parse(
            "[method.sharp]\nsharpness = [{ filter = \"mlp\", value = [0.0, 2.0] }]\n\
             [[models]]\nmodel = \"a\"\nsharpness = 0.25\n[[models]]\nmodel = \"b\"\nweight = 3",
        );
        assert!(parameter_problems(&config, &METHOD).is_empty());
        let resolved = resolve(&METHOD, Profile::Method, &config.method.parameters).unwrap();
        let of = |tensor: &str| {
            let scopes = Scopes {
                shared: vec![&resolved],
                models: config.models.iter().map(|m| (&m.parameters, tensor)).collect(),
                tensor,
                t: 0.25,
                keys: vec!["a", "b"],
                previous: None,
                seed: 42,
            };
            scopes.build(&METHOD).err().unwrap().to_string()
        };
        assert_eq!(of("mlp.weight"), "[0.25, 0.5] [1.0, 3.0]");
        // No filter matches, so the default is used.
        assert_eq!(of("norm.weight"), "[0.25, 1.0] [1.0, 3.0]");
        let wrong = parse("[method.sharp]\nsharpness = 3\ndulness = 1\n[[models]]\nmodel = \"a\"");
        let problems = parameter_problems(&wrong, &METHOD);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems.iter().any(|p| p.to_string().contains("it must be 0 to 2")), "{problems:?}");
    }
}
