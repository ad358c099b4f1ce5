use std::f64::consts::PI;

use serde::Deserialize;

use super::gram::{Gram, Vectors, combine};
use super::info::{Base, MethodInfo};
use super::method::{MergeMethod, MergePieces};
use super::parameters::ParameterInfo;
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use crate::Error;
use crate::tensor::TensorGroup;

/// Mean of all inputs on the sphere, times their mean norm: `m · Σ ‖θᵢ‖ / n`, where `m` is the point from which the
/// tangent vectors to the directions `uᵢ = θᵢ / ‖θᵢ‖` sum to zero: `Σ φᵢ / sin φᵢ · (uᵢ − cos φᵢ · m) = 0`,
/// `cos φᵢ = uᵢ · m`. Tensors are treated as vectors.
///
/// Karcher, "Riemannian center of mass and mollifier smoothing", 1977; for models arXiv 2603.04972. All inputs,
/// including a base, have the same weight. As in mergekit, inputs with a norm of at most `tol` contribute to the mean
/// norm, but not to the direction. The iteration updates coefficients of the inputs, not tensors. An input opposite to
/// the mean is ignored, because the shortest path to it is not unique.
#[derive(Clone, Debug)]
pub struct Karcher {
    /// Maximum number of iterations; 10 in mergekit. With 0, the result has the direction of the arithmetic mean of the
    /// `uᵢ`.
    pub max_iter: usize,
    /// Step size in radians at which the iteration stops; at least 0, 1e-5 in mergekit.
    pub tol: f64,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Karcher mean",
    paper: "Karcher 1977; arXiv 2603.04972",
    formula: "mean on the sphere, iterated, times the mean norm",
    parameters: &["max_iter", "tol"],
    own_parameters: &[
        ParameterInfo::number("max_iter", "maximum number of iterations", "between 0 and 1000000", (0.0, 1e6)),
        ParameterInfo::number("tol", "tolerance of convergence", "above 0", (0.0, f64::MAX)),
    ],
    base: Base::Input,
    defaults: |_| Defaults::new().with("max_iter", 10).with("tol", 1e-5),
    ..MethodInfo::new("karcher", build)
};

#[derive(Deserialize)]
struct Settings {
    max_iter: usize,
    tol: f64,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { max_iter, tol } = settings.read()?;
    Ok(Box::new(Karcher { max_iter, tol }))
}

impl MergeMethod for Karcher {
    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        combine(group, Vectors::Inputs, |gram| Ok(self.coefficients(gram)))
    }
}

impl Karcher {
    fn coefficients(&self, gram: &Gram) -> Vec<f64> {
        if gram.size() == 1 {
            return vec![1.0];
        }
        let tol = self.tol.max(0.0);
        let norms = gram.norms();
        let directed: Vec<usize> = (0..norms.len()).filter(|&i| norms[i] > tol).collect();
        let mean_norm = norms.iter().sum::<f64>() / norms.len() as f64;
        let mut coefficients = vec![0.0; norms.len()];
        for (&i, c) in directed.iter().zip(self.mean(&gram.divided(&directed, &norms), tol)) {
            coefficients[i] = c * mean_norm / norms[i];
        }
        coefficients
    }

    /// The mean of unit vectors on the sphere, as their coefficients; the iteration starts at the first vector if they
    /// cancel out.
    fn mean(&self, cosines: &Gram, tol: f64) -> Vec<f64> {
        let n = cosines.size();
        let chords = vec![1.0 / n as f64; n];
        let first = (0..n).map(|i| if i == 0 { 1.0 } else { 0.0 }).collect();
        let mut mean = normalized(cosines, chords, tol).unwrap_or(first);
        for _ in 0..self.max_iter {
            let mut tangent = vec![0.0; n];
            for (i, cosine) in cosines.dots_with(&mean).into_iter().enumerate() {
                let cosine = cosine.clamp(-1.0, 1.0);
                let angle = cosine.acos();
                if angle <= tol || PI - angle <= tol {
                    continue;
                }
                let share = angle / angle.sin() / n as f64;
                tangent.iter_mut().zip(&mean).for_each(|(t, m)| *t -= share * cosine * m);
                tangent[i] += share;
            }
            let step = cosines.norm_with(&tangent);
            if step <= tol {
                break;
            }
            let moved = mean.iter().zip(&tangent).map(|(m, t)| step.cos() * m + step.sin() / step * t).collect();
            let Some(next) = normalized(cosines, moved, tol) else { break };
            mean = next;
        }
        mean
    }
}

/// Scales a combination to length 1; `None` if its norm is at most `tol`.
fn normalized(gram: &Gram, c: Vec<f64>, tol: f64) -> Option<Vec<f64>> {
    let norm = gram.norm_with(&c);
    (norm > tol).then(|| c.into_iter().map(|c| c / norm).collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    const DEFAULT: Karcher = Karcher { max_iter: 10, tol: 1e-5 };
    const MODELS: [&[f32]; 3] = [&[3.0, 0.0, 4.0], &[0.0, 2.0, 0.0], &[1.0, 2.0, 2.0]];

    fn karcher(method: &Karcher, models: &[&[f32]]) -> Vec<f32> {
        merged(method, &[models[0].len()], None, models).unwrap()
    }

    /// ```python
    /// def karcher(x, steps):
    ///     u = x / np.linalg.norm(x, axis=1, keepdims=True)
    ///     m = u.mean(0) / np.linalg.norm(u.mean(0))
    ///     for _ in range(steps):
    ///         f = np.arccos(u @ m)
    ///         t = ((f / np.sin(f))[:, None] * (u - np.cos(f)[:, None] * m)).mean(0)
    ///         m = np.cos(np.linalg.norm(t)) * m + np.sin(np.linalg.norm(t)) * t / np.linalg.norm(t)
    ///     return m * np.linalg.norm(x, axis=1).mean()
    /// x = np.array([[3., 0, 4], [0, 2, 0], [1, 2, 2]])
    /// karcher(x, 0), karcher(x, 1), karcher(x, 20)
    /// ```
    #[test]
    fn known_values() {
        let cases = [
            (Karcher { max_iter: 0, tol: 1e-5 }, [1.291_818_6, 2.306_819, 2.030_000_6]),
            (Karcher { max_iter: 1, tol: 1e-5 }, [1.294_379_6, 2.316_340_6, 2.017_488_3]),
            (Karcher { max_iter: 1000, tol: 1e-7 }, [1.295_686_9, 2.316_406, 2.016_574]),
        ];
        for (method, expected) in cases {
            let out = karcher(&method, &MODELS);
            assert!(out.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6), "{out:?}");
            // A base is an additional input.
            assert_eq!(merged(&method, &[3], Some(MODELS[0]), &MODELS[1..]).unwrap(), out);
        }
    }

    /// The mean of two vectors is halfway along the arc.
    #[test]
    fn of_two_it_is_slerp() {
        let mean = karcher(&DEFAULT, &[&[1.0, 2.0], &[-2.0, 1.0]]);
        let slerp = merged(&super::super::Slerp { t: 0.5 }, &[2], Some(&[1.0, 2.0]), &[&[-2.0, 1.0]]).unwrap();
        assert!(mean.iter().zip(slerp).all(|(x, y)| (x - y).abs() < 1e-6), "{mean:?}");
    }

    #[test]
    fn equal_zero_opposite_single_and_empty() {
        let x: [f32; 3] = [0.1, -0.7, 0.3];
        assert_eq!(karcher(&DEFAULT, &[&x, &x, &x]), x);
        assert_eq!(karcher(&DEFAULT, &[&x]), x);
        assert_eq!(karcher(&DEFAULT, &[&[0.0; 3], &[0.0; 3]]), [0.0; 3]);
        let halves = karcher(&DEFAULT, &[&[0.0; 3], &x]);
        assert!(halves.iter().zip(x).all(|(y, x)| (y - x / 2.0).abs() < 1e-7), "{halves:?}");
        assert!(karcher(&DEFAULT, &[&[], &[]]).is_empty());
        // The first of two opposite directions, with the mean norm.
        for tol in [1e-5, 0.0, -1.0] {
            let out = karcher(&Karcher { max_iter: 100, tol }, &[&[1.0, 2.0], &[-3.0, -6.0]]);
            assert!((out[0] - 2.0).abs() < 1e-6 && (out[1] - 4.0).abs() < 1e-6, "{out:?}");
        }
    }
}
