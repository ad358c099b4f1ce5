use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, undefined};
use super::settings::TensorSettings;
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup};

/// Uses the model's value if it is close to the base's, and less of it with increasing distance:
/// `θ = w θ₁ + (1−w) θ₀`, `w = min(1, t / |θ₁ − θ₀|)`.
///
/// alchemonaut, <https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001>. Differences below 1e-6 are replaced by
/// 1e-6, as in mergekit.
#[derive(Clone, Debug)]
pub struct Nearswap {
    /// Largest difference at which the model's value is used unchanged; at least 0.
    pub t: f64,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "NearSwap",
    paper: "alchemonaut 2024, QuartetAnemoi-70B-t0.0001",
    formula: "θ₀ + min(1, t / |θ₁−θ₀|) (θ₁−θ₀)",
    parameters: &["t"],
    models: 1..=1,
    ordered: true,
    for_updates: false,
    ..MethodInfo::new("nearswap", build)
};

#[derive(Deserialize)]
struct Settings {
    t: Option<f64>,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let missing = SettingsError::Missing { method: "nearswap", parameter: "t", hint: "such as 0.001" };
    let t = settings.read::<Settings>()?.t.ok_or(missing)?;
    Ok(Box::new(Nearswap { t }))
}

impl MergeMethod for Nearswap {
    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() || group.models.len() != 1 {
            return Err(undefined(group, "nearswap", Undefined::NotOneModelOnBase("compares one model with a base")));
        }
        let t = self.t as f32;
        Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| {
            for ((out, a), b) in out.iter_mut().zip(&piece.base).zip(&piece.models[0]) {
                let w = (t / (a - b).abs().max(1e-6)).clamp(0.0, 1.0);
                *out = w * b + (1.0 - w) * a;
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    #[test]
    fn near_values_are_taken_and_far_ones_nudged() {
        let (a, b): ([f32; 4], [f32; 4]) = ([1.0, 1.0, 1.0, 1.0], [1.0, 1.25, 1.5, -1.0]);
        let out = |t| merged(&Nearswap { t }, &[2, 2], Some(&a), &[&b]).unwrap();
        // Moved by 0.25 at most.
        assert_eq!(out(0.25), [1.0, 1.25, 1.25, 0.75]);
        assert_eq!(out(10.0), b);
        assert_eq!(out(0.0), a);
        assert_eq!(out(-1.0), a);
    }

    #[test]
    fn equal_scalar_and_empty() {
        let x = [0.1, -0.7, 0.3];
        assert_eq!(merged(&Nearswap { t: 1e-4 }, &[3], Some(&x), &[&x]).unwrap(), x);
        assert_eq!(merged(&Nearswap { t: 1.0 }, &[], Some(&[1.0]), &[&[3.0]]).unwrap(), [2.0]);
        assert!(merged(&Nearswap { t: 1.0 }, &[0], Some(&[]), &[&[]]).unwrap().is_empty());
        assert!(merged(&Nearswap { t: 1.0 }, &[3], None, &[&x]).is_err());
    }
}
