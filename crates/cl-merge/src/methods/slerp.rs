use serde::Deserialize;

use super::gram::{Gram, Vectors, combine};
use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, undefined};
use super::settings::TensorSettings;
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::TensorGroup;

/// Spherical linear interpolation from the base to one model, with each tensor as one vector:
/// `(sin((1−t)φ) θ₀ + sin(tφ) θ₁) / sin φ`, with `φ` the angle between `θ₀` and `θ₁`.
///
/// Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985. As in mergekit, the values are not normalized
/// before they are combined, and interpolation is linear if the magnitude of the cosine is above 0.9995, which is
/// almost always the case for fine-tuned models of one base.
#[derive(Clone, Debug)]
pub struct Slerp {
    /// Interpolation between the base (0) and the model (1); any number; values outside 0 to 1 extrapolate.
    pub t: f64,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "SLERP",
    paper: "Shoemake 1985",
    formula: "(sin((1−t)φ) θ₀ + sin(tφ) θ₁) / sin φ, φ the angle between θ₀ and θ₁",
    parameters: &["t"],
    models: 1..=1,
    ordered: true,
    for_updates: false,
    ..MethodInfo::new("slerp", build)
};

#[derive(Deserialize)]
struct Settings {
    t: Option<f64>,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let hint = "0 for the base to 1 for the model";
    let missing = SettingsError::Missing { method: "slerp", parameter: "t", hint };
    let t = settings.read::<Settings>()?.t.ok_or(missing)?;
    Ok(Box::new(Slerp { t }))
}

impl MergeMethod for Slerp {
    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() || group.models.len() != 1 {
            return Err(undefined(
                group,
                "slerp",
                Undefined::NotOneModelOnBase("interpolates from a base to one model"),
            ));
        }
        combine(group, Vectors::Inputs, |gram| Ok(coefficients(gram, self.t)))
    }
}

fn coefficients(gram: &Gram, t: f64) -> Vec<f64> {
    let length = |i| Some(gram.norm(i)).filter(|&norm| norm > 1e-8).unwrap_or(1.0);
    let cosine = (gram.dot(0, 1) / (length(0) * length(1))).clamp(-1.0, 1.0);
    if cosine.abs() > 0.9995 { vec![1.0 - t, t] } else { arc(cosine, t).to_vec() }
}

/// Coefficients of two vectors for the point at fraction `t` of the arc between them; the cosine must not be ±1.
pub(super) fn arc(cosine: f64, t: f64) -> [f64; 2] {
    let angle = cosine.acos();
    [((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()]
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    fn slerp(t: f64, a: &[f32], b: &[f32]) -> Vec<f32> {
        merged(&Slerp { t }, &[a.len()], Some(a), &[b]).unwrap()
    }

    /// ```python
    /// a, b = np.array([1., 2, 3]), np.array([-2., 1, 4])
    /// f = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    /// (np.sin(.7 * f) * a + np.sin(.3 * f) * b) / np.sin(f)
    /// ```
    #[test]
    fn known_values() {
        let out = slerp(0.3, &[1.0, 2.0, 3.0], &[-2.0, 1.0, 4.0]);
        for (x, expected) in out.iter().zip([0.078_027_1, 1.811_002_1, 3.543_977]) {
            assert!((x - expected).abs() < 1e-6, "{out:?}");
        }
        // Orthogonal vectors of length one: 45°.
        let half = 0.5f32.sqrt();
        assert_eq!(slerp(0.5, &[1.0, 0.0], &[0.0, 1.0]), [half, half]);
    }

    #[test]
    fn ends_equal_vectors_and_zeros() {
        let (a, b) = ([0.1, -0.7, 0.3], [0.4, 0.3, -0.2]);
        assert_eq!(slerp(0.0, &a, &b), a);
        assert_eq!(slerp(1.0, &a, &b), b);
        assert_eq!(slerp(0.3, &a, &a), a);
        // Parallel and antiparallel vectors are interpolated linearly.
        assert_eq!(slerp(0.5, &[1.0, 2.0], &[2.0, 4.0]), [1.5, 3.0]);
        assert_eq!(slerp(0.25, &[1.0, 2.0], &[-1.0, -2.0]), [0.5, 1.0]);
        assert_eq!(slerp(0.5, &[0.0, 0.0], &[0.0, 0.0]), [0.0, 0.0]);
        assert!(slerp(0.5, &[], &[]).is_empty());
        assert_eq!(merged(&Slerp { t: 0.5 }, &[], Some(&[2.0]), &[&[4.0]]).unwrap(), [3.0]);
    }

    #[test]
    fn needs_a_base_and_one_model() {
        assert!(merged(&Slerp { t: 0.5 }, &[1], None, &[&[1.0], &[2.0]]).is_err());
        assert!(merged(&Slerp { t: 0.5 }, &[1], Some(&[1.0]), &[&[1.0], &[2.0]]).is_err());
    }
}
