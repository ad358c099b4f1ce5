use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, one_per_model, undefined};
use super::parameters::ParameterInfo;
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, kernels};

/// Task arithmetic without the entries that are relevant to at most one task:
/// `θ = θ₀ + λ τ · [Σᵢ mᵢ ≥ k]`, `τ = Σᵢ δᵢ`, with the masks `mᵢ = [|δᵢ| ≥ tᵢ · |τ − δᵢ|]`.
///
/// Wang et al., "Localizing Task Information for Improved Model Merging and Compression" (TALL-masks, Consensus
/// Merging), arXiv 2405.07813. As in the paper and the authors' code, masks are computed from the sum of task vectors
/// before it is scaled. The comparison in the authors' code is strict: entries exactly at the threshold are not in the
/// mask.
#[derive(Clone, Debug)]
pub struct ConsensusMerging {
    /// λ, the scale of the sum; any number.
    pub lambda: f64,
    /// Thresholds `tᵢ` of the masks, one per model; at least 0, larger values keep fewer entries. The paper searches
    /// 0.2 to 0.6.
    pub tall_lambda: Vec<f64>,
    /// Minimum number `k` of masks that contain an entry: 2 drops entries in one mask or none, 0 drops nothing.
    pub min_agree: usize,
    /// Applies the mask of this model instead of the consensus, which extracts its task from the sum (with λ = 1).
    pub only: Option<usize>,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Consensus (TALL-mask)",
    paper: "Wang et al., arXiv 2405.07813",
    formula: "θ₀ + λ Σ δᵢ where at least min_agree tasks have |δᵢ| ≥ threshold · |Σ δ − δᵢ|",
    parameters: &["lambda", "mask_threshold", "min_agree", "only"],
    own_parameters: &[
        ParameterInfo::number(
            "mask_threshold",
            "minimum ratio of a task's entry to the sum of the others for its mask",
            "at least 0",
            (0.0, f64::MAX),
        )
        .per_model(),
        ParameterInfo::number(
            "min_agree",
            "minimum number of masks that contain an entry",
            "1 or more",
            (1.0, f64::MAX),
        ),
        ParameterInfo::choice("only", "use the mask of this model instead of the consensus", "a model as written"),
    ],
    defaults: |_| Defaults::new().with("lambda", 1.0).with("mask_threshold", 0.4).with("min_agree", 2),
    ..MethodInfo::new("consensus", build)
};

#[derive(Deserialize)]
struct Settings {
    lambda: f32,
    mask_threshold: Vec<f64>,
    min_agree: usize,
    only: Option<String>,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { lambda, mask_threshold, min_agree, only } = settings.read()?;
    let position = |name: String| {
        let found = settings.models.iter().position(|model| *model == name);
        found.ok_or(SettingsError::NotAModel { parameter: "only", name })
    };
    Ok(Box::new(ConsensusMerging {
        lambda: lambda.into(),
        tall_lambda: mask_threshold,
        min_agree,
        only: only.map(position).transpose()?,
    }))
}

impl MergeMethod for ConsensusMerging {
    fn task_vectors(&self) -> bool {
        true
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() {
            return Err(undefined(group, "consensus", Undefined::NoBase("compares task vectors")));
        }
        one_per_model(group, "consensus", "tall_lambda", &self.tall_lambda)?;
        if self.only.is_some_and(|model| model >= group.models.len()) {
            return Err(undefined(group, "consensus", Undefined::NoSuchModel { model: self.only.unwrap_or_default() }));
        }
        Ok(Box::new(|piece: &mut Piece, out: &mut [f32]| self.merge(piece, out)))
    }
}

impl ConsensusMerging {
    fn merge(&self, piece: &mut Piece, out: &mut [f32]) {
        piece.subtract_base();
        let [mut total, mut agree] = piece.zeros();
        piece.models.iter().for_each(|x| kernels::add_scaled(&mut total, 1.0, x));
        for (model, (x, &threshold)) in piece.models.iter().zip(&self.tall_lambda).enumerate() {
            if self.only.is_none_or(|only| only == model) {
                add_mask(&mut agree, x, &total, threshold as f32);
            }
        }
        let needed = if self.only.is_some() { 1.0 } else { self.min_agree as f32 };
        let lambda = self.lambda as f32;
        for (((out, base), total), agree) in out.iter_mut().zip(&piece.base).zip(&total).zip(&agree) {
            *out = base + if *agree >= needed { lambda * total } else { 0.0 };
        }
        piece.give_back([total, agree]);
    }
}

/// Adds 1 to the count of each entry that is in the task's mask.
fn add_mask(count: &mut [f32], x: &[f32], total: &[f32], threshold: f32) {
    for ((count, x), total) in count.iter_mut().zip(x).zip(total) {
        *count += if x.abs() >= threshold * (total - x).abs() { 1.0 } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    const BASE: [f32; 5] = [1.0; 5];
    /// Task vectors 2, 2, 4, 0, 1 and 2, 0, -1, 0, 1.
    const MODELS: [&[f32]; 2] = [&[3.0, 3.0, 5.0, 1.0, 2.0], &[3.0, 1.0, 0.0, 1.0, 2.0]];

    /// With two tasks `τ − δ₁ = δ₂`, so a mask of threshold t is `|δ₁| ≥ t |δ₂|`.
    /// ```python
    /// d = np.array([[2., 2, 4, 0, 1], [2, 0, -1, 0, 1]])
    /// tau = d.sum(0)
    /// np.abs(d) >= t * np.abs(tau - d)
    /// # t = 0.5: [[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]; t = 0.25: [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]]
    /// ```
    #[test]
    fn known_values() {
        let out = |lambda, threshold, min_agree, only| {
            let method = ConsensusMerging { lambda, tall_lambda: vec![threshold; 2], min_agree, only };
            merged(&method, &[5], Some(&BASE), &MODELS).unwrap()
        };
        assert_eq!(out(0.5, 0.5, 2, None), [3.0, 1.0, 1.0, 1.0, 2.0]);
        // Entries at the threshold are in the mask, and masks do not depend on λ.
        assert_eq!(out(0.5, 0.25, 2, None), [3.0, 1.0, 2.5, 1.0, 2.0]);
        assert_eq!(out(1.0, 0.5, 1, None), [5.0, 3.0, 4.0, 1.0, 3.0]);
        assert_eq!(out(1.0, 0.5, 0, None), [5.0, 3.0, 4.0, 1.0, 3.0]);
        assert_eq!(out(1.0, 0.5, 3, None), BASE);
        // Extracts one task from the sum.
        assert_eq!(out(1.0, 0.5, 2, Some(0)), [5.0, 3.0, 4.0, 1.0, 3.0]);
        assert_eq!(out(1.0, 0.5, 2, Some(1)), [5.0, 1.0, 1.0, 1.0, 3.0]);
    }

    #[test]
    fn unchanged_single_scalar_and_empty() {
        let of = |models| ConsensusMerging { lambda: 0.7, tall_lambda: vec![0.4; models], min_agree: 1, only: None };
        assert_eq!(merged(&of(3), &[5], Some(&BASE), &[&BASE, &BASE, &BASE]).unwrap(), BASE);
        assert_eq!(merged(&of(1), &[], Some(&[1.0]), &[&[1.5]]).unwrap(), [1.35]);
        assert!(merged(&of(1), &[0], Some(&[]), &[&[]]).unwrap().is_empty());
        assert!(merged(&of(2), &[5], None, &MODELS).is_err());
        assert!(merged(&ConsensusMerging { only: Some(2), ..of(2) }, &[5], Some(&BASE), &MODELS).is_err());
    }
}
