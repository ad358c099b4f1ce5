use serde::Deserialize;

use super::info::{Base, MethodInfo};
use super::method::{MergeMethod, MergePieces, undefined};
use super::parameters::{INFINITE, ParameterInfo};
use super::settings::TensorSettings;
use super::settings_error::SettingsError;
use super::undefined::Undefined;
use crate::Error;
use crate::tensor::{Piece, TensorGroup, kernels};

/// The only input, base or model, times a scale: `θ = scale · θ₁`.
///
/// Used to stack layers of several models. A scale of zero for the last projections of a block (`o_proj`, `down_proj`)
/// turns the block into the identity.
#[derive(Clone, Debug)]
pub struct Passthrough {
    /// Scale; any number, 1 by default.
    pub scale: Option<f64>,
}

pub(super) const INFO: MethodInfo = MethodInfo {
    title: "Passthrough",
    paper: "mergekit",
    formula: "scale · θ",
    parameters: &["scale"],
    own_parameters: &[
        ParameterInfo::number("scale", "factor applied to the tensor", "a finite number", INFINITE).per_model()
    ],
    base: Base::Input,
    models: 1..=1,
    ordered: true,
    for_updates: false,
    ..MethodInfo::new("passthrough", build)
};

#[derive(Deserialize)]
struct Settings {
    scale: Option<Vec<f64>>,
}

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    let Settings { scale } = settings.read()?;
    Ok(Box::new(Passthrough { scale: scale.and_then(|scales| scales.first().copied()) }))
}

impl MergeMethod for Passthrough {
    fn copies(&self) -> bool {
        self.scale.is_none_or(|scale| scale == 1.0)
    }

    fn prepare<'t>(&'t self, group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        if group.models.len() + usize::from(group.base.is_some()) != 1 {
            return Err(undefined(group, "passthrough", Undefined::NotOneInput("passes one input on")));
        }
        Ok(Box::new(|piece: &mut Piece, out: &mut [f32]| {
            out.copy_from_slice(piece.models.first().unwrap_or(&piece.base));
            if let Some(scale) = self.scale {
                kernels::scale(out, scale as f32);
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::merged;
    use super::*;

    #[test]
    fn one_input_and_its_scale() {
        let x: [f32; 3] = [0.1, -0.7, 0.3];
        let (plain, half) = (Passthrough { scale: None }, Passthrough { scale: Some(0.5) });
        assert_eq!(merged(&plain, &[3], None, &[&x]).unwrap(), x);
        assert_eq!(merged(&plain, &[3], Some(&x), &[]).unwrap(), x);
        assert_eq!(merged(&half, &[3, 1], Some(&x), &[]).unwrap(), x.map(|x| x / 2.0));
        assert!(merged(&half, &[0], None, &[&[]]).unwrap().is_empty());
        assert!(merged(&plain, &[3], Some(&x), &[&x]).is_err());
        assert!(merged(&plain, &[3], None, &[&x, &x]).is_err());
    }
}
