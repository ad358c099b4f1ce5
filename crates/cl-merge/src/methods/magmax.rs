use serde::Deserialize;

use super::info::MethodInfo;
use super::method::{MergeMethod, MergePieces, undefined};
use super::settings::{Defaults, TensorSettings};
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, kernels};

/// For each entry, the task-vector value of largest magnitude: `θ = θ₀ + λ δₖ`, `k = argmaxᵢ |δᵢ|`.
///
/// Marczak et al., "MagMax", arXiv 2407.06322. Ties go to the first model; in the authors' code, to the last.
#[derive(Clone, Debug)]
pub struct MagMax {
    /// λ; any number, 0.5 in the authors' scripts.
    pub lambda: f64,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "MagMax",
    paper: "Marczak et al., arXiv 2407.06322",
    formula: "θ₀ + λ · the δᵢ of greatest magnitude, entry by entry",
    parameters: &["lambda"],
    defaults: |_| Defaults::new().with("lambda", 1.0),
    ..MethodInfo::new("magmax", build)
};

#[derive(Deserialize)]
struct Settings {
    lambda: f32,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { lambda } = settings.read()?;
    Ok(Box::new(MagMax { lambda: lambda.into() }))
}

impl MergeMethod for MagMax {
    fn task_vectors(&self) -> bool {
        true
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.base.is_none() {
            return Err(undefined(group, "magmax", Undefined::NoBase("compares task vectors")));
        }
        let lambda = self.lambda as f32;
        Ok(Box::new(move |piece: &mut Piece, out: &mut [f32]| {
            piece.subtract_base();
            let [mut greatest] = piece.zeros();
            piece.models.iter().for_each(|x| kernels::take_greater(&mut greatest, x));
            out.copy_from_slice(&piece.base);
            kernels::add_scaled(out, lambda, &greatest);
            piece.give_back([greatest]);
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    #[test]
    fn greatest_magnitude_wins_and_the_first_of_equals() {
        let base = [1.0; 4];
        // Task vectors 1, -2, 0.5, 0 and -1, 1, -0.25, 0.
        let models: [&[f32]; 2] = [&[2.0, -1.0, 1.5, 1.0], &[0.0, 2.0, 0.75, 1.0]];
        let out = |lambda| merged(&MagMax { lambda }, &[2, 2], Some(&base), &models).unwrap();
        assert_eq!(out(1.0), [2.0, -1.0, 1.5, 1.0]);
        assert_eq!(out(0.5), [1.5, 0.0, 1.25, 1.0]);
        assert_eq!(out(0.0), base);
    }

    #[test]
    fn equal_single_scalar_and_empty() {
        let (base, x) = ([0.25, 0.5, 0.0], [0.5, -0.75, 0.375]);
        for models in [&[&x[..]; 1][..], &[&x[..]; 3]] {
            assert_eq!(merged(&MagMax { lambda: 1.0 }, &[3], Some(&base), models).unwrap(), x);
            assert_eq!(merged(&MagMax { lambda: 0.7 }, &[3], Some(&x), models).unwrap(), x);
        }
        assert_eq!(merged(&MagMax { lambda: 1.0 }, &[], Some(&[1.0]), &[&[3.0]]).unwrap(), [3.0]);
        assert!(merged(&MagMax { lambda: 1.0 }, &[0], Some(&[]), &[&[]]).unwrap().is_empty());
        assert!(merged(&MagMax { lambda: 1.0 }, &[3], None, &[&x]).is_err());
    }
}
