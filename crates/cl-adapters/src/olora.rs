//! Penalty for overlap with the adapters of earlier rounds (O-LoRA, Wang et al., arXiv:2310.14152), in the definitions
//! in use.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cl_checkpoint::{Adapter, LayerKind};
use cl_torch::load_tensor;
use cl_torch::tch::{Kind, Tensor};
use serde::{Deserialize, Serialize};

use crate::{AdapterError, Linear};

/// Settings of o-lora (`[train.olora]`): a penalty that keeps a new adapter orthogonal to those of earlier rounds.
///
/// Let A be the factor of the new adapter `[r, in]`, and P the frozen A of all earlier adapters of the same layer,
/// stacked to `[Σr, in]`. The penalty `λ · Ω + λ₂ · Σ (‖A‖ + ‖B‖)` is added to the loss; [`Overlap`] defines Ω.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Given")]
pub struct OloraConfig {
    /// Definition of the penalty.
    pub mode: Overlap,
    /// λ: one number, or one per round. The first round of a sequence has no penalty; if the list is too short, its
    /// last number is used for the remaining rounds. Defaults to [`Overlap::lambda`].
    pub lambda: Lambda,
    /// λ₂, the coefficient of the Frobenius norms (not squared) of the new factors.
    pub lambda_2: f64,
    /// How earlier adapters are applied while a new one is trained.
    pub shape: SequenceShape,
    /// Adapters of rounds before this run, first to last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<PathBuf>,
}

impl Default for OloraConfig {
    fn default() -> Self {
        OloraConfig {
            mode: Overlap::Cosine,
            lambda: Lambda::Every(Overlap::Cosine.lambda()),
            lambda_2: 0.0,
            shape: SequenceShape::Fold,
            earlier: Vec::new(),
        }
    }
}

/// The table as in a file, where the default of λ depends on the mode.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Given {
    mode: Overlap,
    lambda: Option<Lambda>,
    lambda_2: f64,
    shape: SequenceShape,
    earlier: Vec<PathBuf>,
}

impl Default for Given {
    fn default() -> Self {
        let OloraConfig { mode, lambda_2, shape, earlier, .. } = OloraConfig::default();
        Given { mode, lambda: None, lambda_2, shape, earlier }
    }
}

impl From<Given> for OloraConfig {
    fn from(given: Given) -> OloraConfig {
        let Given { mode, lambda, lambda_2, shape, earlier } = given;
        OloraConfig { mode, lambda: lambda.unwrap_or(Lambda::Every(mode.lambda())), lambda_2, shape, earlier }
    }
}

/// Definition of Ω in [`OloraConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlap {
    /// `Σ |A·Pᵀ|` over entries and layers, as in the code of the paper and of O-LoRA. It grows with ranks, rounds and
    /// layers.
    L1,
    /// `Σ (A·Pᵀ)²` over entries and layers: the paper's equation 2.
    Squared,
    /// The mean of the squared cosines between rows of A and rows of P, over entries and then over layers; between 0
    /// and 1.
    Cosine,
}

impl Overlap {
    /// Default of λ: for the sums, the published 0.5; for the mean, a value at which its gradient is a third to a half
    /// of the gradient of the loss. At 0.5, it would be a four-hundredth (docs/methods.md).
    pub fn lambda(self) -> f64 {
        match self {
            Overlap::L1 | Overlap::Squared => 0.5,
            Overlap::Cosine => 100.0,
        }
    }
}

/// Values of λ by round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Lambda {
    /// The same for every round.
    Every(f64),
    /// One per round.
    Rounds(Vec<f64>),
}

impl Lambda {
    /// λ of the round with this number of earlier adapters.
    pub fn of_round(&self, earlier: usize) -> f64 {
        match self {
            Lambda::Every(lambda) => *lambda,
            Lambda::Rounds(list) => list.get(earlier).or(list.last()).copied().unwrap_or(0.0),
        }
    }

    /// All values, in order.
    pub fn values(&self) -> &[f64] {
        match self {
            Lambda::Every(lambda) => std::slice::from_ref(lambda),
            Lambda::Rounds(list) => list,
        }
    }
}

/// How earlier adapters are applied while a new one is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SequenceShape {
    /// Folded: every round starts from the model into which the last adapter was folded (as in the paper).
    Fold,
    /// Stacked: every round starts from the first model, with all earlier adapters frozen and separate (as in O-LoRA).
    Stack,
}

impl OloraConfig {
    /// Checks all ranges.
    ///
    /// # Errors
    /// Returns [`AdapterError::Parameter`] with the key, the value and the allowed values.
    pub fn validate(&self) -> Result<(), AdapterError> {
        let values = self.lambda.values();
        let wrong = |x: &f64| !(0.0..=1e12).contains(x);
        if values.is_empty() || values.iter().any(wrong) {
            let value = format!("{values:?}");
            return Err(AdapterError::Parameter {
                key: "olora.lambda",
                value,
                expected: "numbers of 0 or more, at most 1e12",
            });
        }
        if wrong(&self.lambda_2) {
            let value = self.lambda_2.to_string();
            return Err(AdapterError::Parameter { key: "olora.lambda_2", value, expected: "0 or more, at most 1e12" });
        }
        Ok(())
    }
}

/// The orthogonality penalty of one round, over the linear layers of a model. Layers without an earlier adapter, and
/// adapters on embeddings, do not contribute to Ω.
pub struct Orthogonality {
    mode: Overlap,
    lambda: f64,
    lambda_2: f64,
    groups: Vec<Group>,
    hash: String,
}

/// Layers with the same shapes, which are computed in one batched product.
struct Group {
    /// Indices of the layers among the model's linear layers.
    places: Vec<usize>,
    /// P of each layer, transposed, `[layers, in, Σr]`, f32; with [`Overlap::Cosine`], its rows are normalized to
    /// length 1.
    earlier: Tensor,
}

impl Orthogonality {
    /// Loads the penalty for the adapters of `linears` (all linear layers of a model, adapted or not) against the
    /// `earlier` adapters, first to last.
    ///
    /// # Errors
    /// Returns [`AdapterError::Shape`] for an earlier adapter with another input width, or an error if reading fails.
    pub fn new<'a>(
        linears: impl Iterator<Item = &'a Linear>,
        earlier: &[Adapter],
        config: &OloraConfig,
    ) -> Result<Orthogonality, AdapterError> {
        config.validate()?;
        // The hash covers whole adapters: if they are stacked, their B matters too, and so do layers that the new
        // adapter does not have.
        let mut hasher = blake3::Hasher::new();
        for adapter in earlier {
            hasher.update(adapter.content_hash()?.as_bytes());
        }
        let mut by_shape: BTreeMap<Vec<i64>, (Vec<usize>, Vec<Tensor>)> = BTreeMap::new();
        for (place, layer) in linears.enumerate() {
            let Some(lora) = &layer.lora else { continue };
            let rows = earlier.iter().map(|adapter| rows(adapter, layer)).collect::<Result<Vec<_>, _>>()?;
            let rows: Vec<Tensor> = rows.into_iter().flatten().collect();
            if rows.is_empty() {
                continue;
            }
            let p = Tensor::cat(&rows, 0);
            let p = if config.mode == Overlap::Cosine { unit_rows(&p) } else { p };
            let group = by_shape.entry([lora.a.size(), p.size()].concat()).or_default();
            group.0.push(place);
            group.1.push(p.tr());
        }
        let groups = by_shape.into_values().map(|(places, p)| Group { places, earlier: Tensor::stack(&p, 0) });
        Ok(Orthogonality {
            mode: config.mode,
            lambda: config.lambda.of_round(earlier.len()),
            lambda_2: config.lambda_2,
            groups: groups.collect(),
            hash: hasher.finalize().to_hex().to_string(),
        })
    }

    /// blake3 hash of the earlier adapters, with which a resumed run is compared.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Computes Ω for the current factors as a differentiable f32 scalar; `None` without earlier adapters.
    ///
    /// # Panics
    /// Panics if `linears` are not those that the penalty was loaded for, in the same order.
    pub fn overlap(&self, linears: &[&Linear]) -> Option<Tensor> {
        let layers: usize = self.groups.iter().map(|g| g.places.len()).sum();
        let parts = self.groups.iter().map(|group| {
            let a: Vec<&Tensor> = group.places.iter().filter_map(|&p| linears[p].lora.as_ref()).map(|l| &l.a).collect();
            let a = Tensor::stack(&a, 0); // (layers, r, in)
            match self.mode {
                Overlap::L1 => a.bmm(&group.earlier).abs().sum(Kind::Float),
                Overlap::Squared => a.bmm(&group.earlier).square().sum(Kind::Float),
                Overlap::Cosine => {
                    let cosines = unit_rows(&a).bmm(&group.earlier);
                    let of_layer = cosines.size()[1] * cosines.size()[2];
                    cosines.square().sum(Kind::Float) / (of_layer * layers as i64) as f64
                }
            }
        });
        parts.reduce(|sum, part| sum + part)
    }

    /// Adds the gradients of `λ · Ω + λ₂ · Σ (‖A‖ + ‖B‖)` to the factors, and returns the value of this sum. If λ and
    /// λ₂ are zero, nothing is computed.
    ///
    /// # Errors
    /// Returns [`AdapterError::Torch`] if an operation fails.
    ///
    /// # Panics
    /// Panics under the same condition as [`Orthogonality::overlap`].
    pub fn backward(&self, linears: &[&Linear]) -> Result<f64, AdapterError> {
        let mut terms = Vec::new();
        if self.lambda > 0.0 {
            terms.extend(self.overlap(linears).map(|overlap| overlap * self.lambda));
        }
        if self.lambda_2 > 0.0 {
            let adapted = linears.iter().filter_map(|l| l.lora.as_ref());
            let norms: Vec<Tensor> = adapted.flat_map(|l| [l.a.norm(), l.b.norm()]).collect();
            terms.push(Tensor::stack(&norms, 0).sum(Kind::Float) * self.lambda_2);
        }
        let Some(sum) = terms.into_iter().reduce(|sum, term| sum + term) else { return Ok(0.0) };
        cl_torch::backward(&[&sum], &[&sum.ones_like()])?;
        Ok(sum.double_value(&[]))
    }
}

/// Loads A of an earlier adapter for a layer, `[r, in]` f32, or `None` if the adapter does not have that layer.
fn rows(adapter: &Adapter, layer: &Linear) -> Result<Option<Tensor>, AdapterError> {
    let modules = adapter.modules();
    let Some(module) = modules.iter().find(|m| m.name == layer.name && m.kind == LayerKind::Linear) else {
        return Ok(None);
    };
    let (input, output) = layer.widths();
    if module.a_shape[1] as i64 != input {
        let (path, a, b) = (adapter.dir().to_owned(), module.a_shape.clone(), module.b_shape.clone());
        return Err(AdapterError::Shape { path, module: layer.name.clone(), input, output, a, b });
    }
    Ok(Some(load_tensor(adapter, &module.factors()[0], Kind::Float, layer.weight.device())?))
}

/// Normalizes rows to length 1. Rows of zeros are unchanged and have a gradient of zero: the squared length is clamped
/// away from 0, where the square root is not differentiable.
fn unit_rows(x: &Tensor) -> Tensor {
    x / x.square().sum_dim_intlist(-1i64, true, Kind::Float).clamp_min(1e-24).sqrt()
}
