//! Values of parameters: a number, a gradient over layers, or a list of filters over tensor names.

use serde::{Deserialize, Serialize};

/// A number that can depend on the tensor, in mergekit's three forms.
///
/// ```
/// use cl_merge::Parameter;
/// #[derive(serde::Deserialize)]
/// struct Doc { density: Parameter }
/// let doc: Doc = toml::from_str(r#"density = [{ filter = "mlp", value = [0.2, 0.6] }, { value = 0.5 }]"#)?;
/// assert_eq!(doc.density.resolve("model.layers.1.mlp.up_proj.weight", 0.5), Some(0.4));
/// assert_eq!(doc.density.resolve("model.norm.weight", 1.0), Some(0.5));
/// # Ok::<(), toml::de::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, a list of numbers over layers, or filters { filter = \"…\", value = … }"
)]
pub enum Parameter {
    /// A number for all tensors.
    Number(f64),
    /// A gradient, interpolated linearly from the first layer to the last. Tensors before the layers use the first
    /// value, those after them the last.
    Gradient(Vec<f64>),
    /// A single filter.
    Filter(Filter),
    /// Several filters; the first one that matches is used.
    Filters(Vec<Filter>),
}

/// A value for the tensors whose name contains `filter`. Without `filter`, or if it is `*`, it applies to all tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Substring of the tensor's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Value for the matching tensors.
    pub value: NumberOrGradient,
}

/// A number or a gradient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number or a list of numbers over layers")]
pub enum NumberOrGradient {
    /// A number for all layers.
    Number(f64),
    /// A gradient, interpolated over the layers.
    Gradient(Vec<f64>),
}

impl Parameter {
    /// Returns the value for a tensor at relative position `t` among the layers, from 0 to 1; `None` if no filter
    /// matches.
    pub fn resolve(&self, tensor: &str, t: f64) -> Option<f64> {
        match self {
            Parameter::Number(value) => Some(*value),
            Parameter::Gradient(values) => interpolate(values, t),
            Parameter::Filter(filter) => filter.resolve(tensor, t),
            Parameter::Filters(filters) => filters.iter().find(|f| f.matches(tensor)).and_then(|f| f.value.resolve(t)),
        }
    }

    /// Returns all numbers in the parameter.
    pub fn numbers(&self) -> Vec<f64> {
        match self {
            Parameter::Number(value) => vec![*value],
            Parameter::Gradient(values) => values.clone(),
            Parameter::Filter(filter) => filter.value.numbers(),
            Parameter::Filters(filters) => filters.iter().flat_map(|f| f.value.numbers()).collect(),
        }
    }

    /// Returns the filters that match none of the tensors, probably because of a typing error.
    pub fn idle_filters<'p>(&'p self, tensors: &[&str]) -> Vec<&'p str> {
        let filters = match self {
            Parameter::Filter(filter) => std::slice::from_ref(filter),
            Parameter::Filters(filters) => filters,
            _ => &[],
        };
        filters.iter().filter(|f| !tensors.iter().any(|t| f.matches(t))).filter_map(|f| f.filter.as_deref()).collect()
    }
}

impl From<f64> for Parameter {
    fn from(value: f64) -> Parameter {
        Parameter::Number(value)
    }
}

impl Filter {
    fn matches(&self, tensor: &str) -> bool {
        self.filter.as_deref().is_none_or(|part| part == "*" || tensor.contains(part))
    }

    fn resolve(&self, tensor: &str, t: f64) -> Option<f64> {
        if self.matches(tensor) { self.value.resolve(t) } else { None }
    }
}

impl NumberOrGradient {
    fn resolve(&self, t: f64) -> Option<f64> {
        match self {
            NumberOrGradient::Number(value) => Some(*value),
            NumberOrGradient::Gradient(values) => interpolate(values, t),
        }
    }

    fn numbers(&self) -> Vec<f64> {
        match self {
            NumberOrGradient::Number(value) => vec![*value],
            NumberOrGradient::Gradient(values) => values.clone(),
        }
    }
}

fn interpolate(values: &[f64], t: f64) -> Option<f64> {
    let last = values.len().checked_sub(1)?;
    let place = t.clamp(0.0, 1.0) * last as f64;
    let (low, fraction) = (place.floor() as usize, place.fract());
    Some((1.0 - fraction) * values[low] + fraction * values[last.min(low + 1)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_run_from_the_first_to_the_last_layer() {
        let gradient = Parameter::Gradient(vec![0.0, 1.0, 0.5]);
        let at = |t: f64| gradient.resolve("x", t).unwrap();
        assert_eq!([0.0, 0.25, 0.5, 0.75, 1.0].map(at), [0.0, 0.5, 1.0, 0.75, 0.5]);
        assert_eq!(Parameter::Gradient(vec![0.3]).resolve("x", 0.7), Some(0.3));
        assert_eq!(Parameter::Gradient(vec![]).resolve("x", 0.7), None);
    }

    #[test]
    fn the_first_filter_that_matches_wins_and_idle_ones_are_named() {
        let filter = |filter: Option<&str>, value| Filter {
            filter: filter.map(str::to_owned),
            value: NumberOrGradient::Number(value),
        };
        let all = Parameter::Filters(vec![filter(Some("mlp"), 1.0), filter(Some("mpl"), 2.0), filter(None, 3.0)]);
        assert_eq!(all.resolve("a.mlp.b", 0.0), Some(1.0));
        assert_eq!(all.resolve("a.norm", 0.0), Some(3.0));
        assert_eq!(all.idle_filters(&["a.mlp.b", "a.norm"]), ["mpl"]);
        assert_eq!(Parameter::Filter(filter(Some("mlp"), 1.0)).resolve("norm", 0.0), None);
    }
}
