//! PEFT's `add_weighted_adapter`: methods applied to A and B separately.
//!
//! With `u = √|w·s|`, the new A is a merge of `sign(w·s)·uᵢAᵢ` and the new B one of `uᵢBᵢ`, so that a single adapter
//! keeps its `w·s·B·A`. With several adapters, the product has cross terms `BᵢAⱼ`. Signs are elected without weights,
//! and sums are divided by the number of adapters that contribute (PEFT 0.9 to 0.21; negative weights as since 0.18).

use super::low_rank::LowRank;
use super::options::CombineOptions;
use super::output::NewModule;
use super::report::ModuleReport;
use super::set::{Module, Set};
use super::update::Update;
use crate::Error;
use crate::methods::{Sparsify, TaskVectors, merge_tensor};
use crate::tensor::{TensorGroup, Values};

/// Combines a module's factors by a method, or concatenates them without one, and measures the distance from
/// `Σ wᵢsᵢBᵢAᵢ`.
pub(super) fn combine(
    set: &Set<'_>,
    module: &Module,
    method: Option<&TaskVectors>,
    options: &CombineOptions,
) -> Result<(NewModule, ModuleReport), Error> {
    let mut updates = Vec::new();
    for part in &module.parts {
        updates.push((set.members[part.member].weight * part.scaling, set.load(part)?));
    }
    let parts: Vec<(f64, &Update)> = updates.iter().map(|(scale, update)| (*scale, update)).collect();
    let sum = LowRank::sum(module.shape, &parts);
    let new = match method {
        None => side_by_side(module, &updates),
        Some(method) => merged(set, module, method, &updates)?,
    };
    let low_rank = LowRank::of(1.0, &new);
    let factors = low_rank.encode(&module.name, module.kind, options.dtype.dtype())?;
    let energy = sum.energy();
    let share = |part: f64, none: f64| if energy > 0.0 { part / energy } else { none };
    let report = ModuleReport {
        module: module.name.clone(),
        rank: factors.rank,
        norm: energy.sqrt(),
        energy: share(low_rank.energy(), 1.0),
        relative_error: share(low_rank.minus(&sum).energy() + factors.changed, 0.0).sqrt(),
    };
    Ok((NewModule { name: module.name.clone(), kind: module.kind, shape: module.shape, factors }, report))
}

/// PEFT's `cat`: concatenates the factors, with the scale applied to A.
fn side_by_side(module: &Module, updates: &[(f64, Update)]) -> Update {
    let mut whole = Update::zero(module.shape);
    whole.rank = module.total_rank();
    let scaled = |scale: f64, x: &[f32]| x.iter().map(|&x| (f64::from(x) * scale) as f32).collect::<Vec<f32>>();
    for row in 0..module.shape[0] {
        for (scale, update) in updates {
            let values = &update.left[row * update.rank..(row + 1) * update.rank];
            whole.left.extend(if is_a_left(module) { scaled(*scale, values) } else { values.to_vec() });
        }
    }
    for (scale, update) in updates {
        whole.right.extend(if is_a_left(module) { update.right.clone() } else { scaled(*scale, &update.right) });
    }
    whole
}

/// Whether A is the left factor, as in the update of an embedding.
fn is_a_left(module: &Module) -> bool {
    module.kind == cl_checkpoint::LayerKind::Embedding
}

/// Merges both factors by a method, each as a separate tensor.
fn merged(set: &Set<'_>, module: &Module, method: &TaskVectors, updates: &[(f64, Update)]) -> Result<Update, Error> {
    let rank = module.parts[0].module.rank();
    let [a_name, b_name] = module.parts[0].module.factors();
    let a_left = is_a_left(module);
    let factor = |left: bool| {
        let is_a = left == a_left;
        let weight = |scale: f64| scale.abs().sqrt() * if is_a { scale.signum() } else { 1.0 };
        let own = |list: &Vec<f64>| module.parts.iter().map(|part| list[part.member]).collect();
        let method = TaskVectors {
            weights: updates.iter().map(|(scale, _)| weight(*scale) as f32).collect(),
            sparsify: match &method.sparsify {
                Sparsify::Magnitude { density } => Sparsify::Magnitude { density: own(density) },
                Sparsify::Random { density } => Sparsify::Random { density: own(density) },
                Sparsify::Outliers { density, gamma } => {
                    Sparsify::Outliers { density: own(density), gamma: own(gamma) }
                }
                other => other.clone(),
            },
            ..method.clone()
        };
        let columns = module.shape[1];
        let shape = if left { [module.shape[0], rank] } else { [rank, columns] };
        let zeros = vec![0.0; shape[0] * shape[1]];
        let values = module.parts.iter().zip(updates).map(|(part, (_, update))| {
            Values::from_slice(&set.members[part.member].key, if left { &update.left } else { &update.right })
        });
        let name = if is_a { &a_name } else { &b_name };
        let group = TensorGroup::new(name, &shape, Some(Values::from_slice("zero", &zeros)), values.collect());
        merge_tensor(&method, &group)
    };
    let mut new = Update::zero(module.shape);
    (new.rank, new.left, new.right) = (rank, factor(true)?, factor(false)?);
    Ok(new)
}
