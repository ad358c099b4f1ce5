use serde::Deserialize;

/// A boolean, or 1 or 0, as mergekit-evolve writes booleans.
#[derive(Deserialize)]
#[serde(untagged, expecting = "true or false")]
pub(crate) enum Flag {
    Bool(bool),
    Number(f64),
}

impl Flag {
    pub(crate) fn value(&self) -> Result<bool, String> {
        match *self {
            Flag::Bool(value) => Ok(value),
            Flag::Number(1.0) => Ok(true),
            Flag::Number(0.0) => Ok(false),
            Flag::Number(other) => Err(format!("expected true or false, got {other}")),
        }
    }
}
