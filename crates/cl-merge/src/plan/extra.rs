//! Tensors that only some inputs have.

use std::collections::BTreeSet;

use cl_checkpoint::TensorSpec;

use super::inputs::{Inputs, names};
use super::work::{PlannedTensor, Source, Work};
use crate::recipe::config::ExtraTensors;

/// The result of a policy for tensors that only some inputs have.
pub(crate) struct Extra {
    /// Names that all inputs have; under the policy `Error`, all names of the reference.
    pub(crate) merged: BTreeSet<String>,
    /// Tensors that are copied from one input.
    pub(crate) copied: Vec<PlannedTensor>,
    /// Notes for the user.
    pub(crate) notes: Vec<String>,
}

/// Splits the tensors into those that all inputs have, and others, which follow the policy.
pub(crate) fn split(inputs: &Inputs, reference: usize, policy: ExtraTensors) -> Extra {
    let of = |model: usize| names(inputs.models[model].source()).into_iter().map(str::to_owned).collect();
    let all: Vec<BTreeSet<String>> = (0..inputs.models.len()).map(of).collect();
    let mut extra = Extra { merged: all[reference].clone(), copied: Vec::new(), notes: Vec::new() };
    let buffers: usize = inputs.models.iter().map(|m| m.source().names().len() - names(m.source()).len()).sum();
    if buffers > 0 {
        extra
            .notes
            .push(format!("{buffers} buffers that follow from config.json are left out (rotary_emb.inv_freq, …)"));
    }
    if policy == ExtraTensors::Error {
        return extra;
    }
    extra.merged.retain(|name| all.iter().all(|of| of.contains(name)));
    let order = std::iter::once(reference).chain((0..all.len()).filter(|i| *i != reference));
    let mut seen = extra.merged.clone();
    let mut left_out = 0;
    for model in order {
        for name in &all[model] {
            if !seen.insert(name.clone()) {
                continue;
            }
            if model == reference || policy == ExtraTensors::Union {
                extra.copied.extend(copy(inputs, model, name));
            } else {
                left_out += 1;
            }
        }
    }
    if !extra.copied.is_empty() {
        extra.notes.push(format!(
            "{} tensors that not all models have are copied from the first that has them",
            extra.copied.len()
        ));
    }
    if left_out > 0 {
        extra.notes.push(format!("{left_out} tensors that the base does not have are left out"));
    }
    extra
}

fn copy(inputs: &Inputs, model: usize, name: &str) -> Option<PlannedTensor> {
    let info = inputs.models[model].source().info(name)?;
    let spec = TensorSpec { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone() };
    let source = Source { model, tensor: name.to_owned(), key: String::new(), table: None };
    Some(PlannedTensor { spec, work: Work::Copy(source) })
}
