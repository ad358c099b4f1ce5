//! Description of a single adapter.

use std::path::Path;

use cl_checkpoint::{
    Adapter, Beside, BesideKind, Dtype, LayerKind, Manifest, ModulePattern, Source, TargetModules, TensorSource,
};
use rayon::prelude::*;
use serde::Serialize;

use super::low_rank::LowRank;
use super::set::Set;
use crate::Error;

/// Description of an adapter.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterInfo {
    /// Directory of the adapter.
    pub path: String,
    /// PEFT's type of the adapter, `LORA`.
    pub kind: String,
    /// Whether it is a DoRA adapter, with a magnitude per row.
    pub dora: bool,
    /// Whether the scaling is `alpha / √r`.
    pub rslora: bool,
    /// Path or name of the base model.
    pub base: Option<String>,
    /// Rank of modules without a pattern.
    pub r: usize,
    /// Alpha of modules without a pattern.
    pub alpha: f64,
    /// Ranks of other modules, by pattern.
    pub rank_pattern: Vec<(ModulePattern, usize)>,
    /// Alphas of other modules, by pattern.
    pub alpha_pattern: Vec<(ModulePattern, f64)>,
    /// Target modules.
    pub targets: Option<TargetModules>,
    /// Number of elements in all tensors.
    pub parameters: usize,
    /// Dtypes of the factors.
    pub dtypes: Vec<String>,
    /// A feature that is not supported; the adapter can only be described.
    pub unsupported: Option<String>,
    /// Sources according to the manifest, if there is one.
    pub sources: Vec<Source>,
    /// Modules by name.
    pub modules: Vec<ModuleInfo>,
    /// Tensors other than factors and magnitudes.
    pub beside: Vec<BesideInfo>,
    /// `‖ΔW‖` over all modules.
    pub norm: f64,
}

/// A tensor that is not a factor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BesideInfo {
    /// The base tensor that it replaces or changes.
    pub tensor: String,
    /// PEFT's key for it: `modules_to_save`, `bias`, `lora_bias` or `trainable_token_indices`; `not trained` for a copy
    /// of the base's tensor.
    pub kind: &'static str,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
}

/// One module of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleInfo {
    /// Name of the module.
    pub module: String,
    /// Whether it is an embedding.
    pub embedding: bool,
    /// Shape of the weight: rows, columns.
    pub shape: [usize; 2],
    /// Rank of the factors.
    pub rank: usize,
    /// Scaling of `B·A`.
    pub scaling: f64,
    /// `‖ΔW‖`, including the scaling; for DoRA without the magnitudes.
    pub norm: f64,
    /// Effective rank `exp(−Σ pᵢ ln pᵢ)` with `pᵢ = σᵢ / Σσ` (Roy and Vetterli, "The effective rank", 2007). Zero if
    /// the update is zero.
    pub effective_rank: f64,
}

/// Describes an adapter, without forming the product of its factors.
///
/// # Errors
/// Returns an error if the adapter cannot be read or contains non-finite values.
pub fn info(dir: &Path) -> Result<AdapterInfo, Error> {
    let adapters = [Adapter::open(dir)?];
    let adapter = &adapters[0];
    let set = Set::new(&adapters, &[], &mut Vec::new());
    let modules: Vec<Result<ModuleInfo, Error>> = set
        .modules
        .par_iter()
        .map(|module| {
            let part = &module.parts[0];
            let low_rank = LowRank::of(part.scaling, &set.load(part)?);
            let values = low_rank.singular_values(&module.name)?;
            Ok(ModuleInfo {
                module: module.name.clone(),
                embedding: module.kind == LayerKind::Embedding,
                shape: module.shape,
                rank: part.module.rank(),
                scaling: part.scaling,
                norm: values.iter().map(|s| s * s).sum::<f64>().sqrt(),
                effective_rank: effective_rank(&values),
            })
        })
        .collect();
    let modules: Vec<ModuleInfo> = modules.into_iter().collect::<Result<_, _>>()?;
    let config = adapter.config();
    let beside = if config.not_built().is_some() { Vec::new() } else { adapter.beside()? };
    let tensors: Vec<_> = adapter.names().into_iter().filter_map(|name| adapter.info(name)).collect();
    let mut dtypes: Vec<Dtype> = tensors.iter().map(|info| info.dtype).collect();
    dtypes.sort();
    dtypes.dedup();
    Ok(AdapterInfo {
        path: dir.display().to_string(),
        kind: config.peft_type.clone(),
        dora: config.use_dora,
        rslora: config.use_rslora,
        base: config.base_model_name_or_path.clone(),
        r: config.r,
        alpha: config.lora_alpha,
        rank_pattern: config.rank_pattern.clone(),
        alpha_pattern: config.alpha_pattern.clone(),
        targets: config.target_modules.clone(),
        parameters: tensors.iter().map(|info| info.elements()).sum(),
        dtypes: dtypes.iter().map(|dtype| format!("{dtype:?}")).collect(),
        unsupported: config.not_built(),
        sources: Manifest::read(dir).map(|manifest| manifest.sources).unwrap_or_default(),
        norm: modules.iter().map(|m| m.norm * m.norm).sum::<f64>().sqrt(),
        modules,
        beside: beside.iter().map(|b| beside_info(adapter, b)).collect(),
    })
}

fn beside_info(adapter: &Adapter, beside: &Beside) -> BesideInfo {
    BesideInfo {
        tensor: beside.tensor.clone(),
        kind: match beside.kind {
            BesideKind::Saved => "modules_to_save",
            BesideKind::Bias => "bias",
            BesideKind::UpdateBias { .. } => "lora_bias",
            BesideKind::Rows(_) => "trainable_token_indices",
            BesideKind::Untrained => "not trained",
        },
        shape: adapter.info(&beside.name).map(|info| info.shape.clone()).unwrap_or_default(),
    }
}

/// Returns the effective rank for given singular values. Values at the level of rounding errors contribute next to
/// nothing.
fn effective_rank(values: &[f64]) -> f64 {
    let total: f64 = values.iter().sum();
    if total == 0.0 {
        return 0.0;
    }
    let shares = values.iter().map(|s| s / total).filter(|p| *p > 0.0);
    (-shares.map(|p| p * p.ln()).sum::<f64>()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_ranks() {
        assert!((effective_rank(&[2.0, 2.0, 2.0]) - 3.0).abs() < 1e-12);
        assert!((effective_rank(&[5.0, 0.0]) - 1.0).abs() < 1e-12);
        assert_eq!(effective_rank(&[0.0, 0.0]), 0.0);
    }
}
