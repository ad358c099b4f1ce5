//! Routers computed from the weights alone: an expert's row is the direction of the input for which fine-tuning changed
//! the response most.
//!
//! This direction is the leading right singular vector of the expert's update, taken over all matrices that read the
//! router's input. The update does not determine its sign, and unlike in Arrow, the logit of a linear router is not an
//! absolute value. Typical inputs leave most units of an MLP inactive, so the base's gate projection of them is
//! negative on average. Therefore, the sign is chosen such that the gate projection of the row is negative on average.

use cl_checkpoint::TensorSource;
use cl_merge::adapter::truncated_svd;

use crate::delta::{difference, values_of_base};
use crate::names::gate_projection;
use crate::{Error, Plan};

/// Number of elements of a weight in memory at the same time.
const PIECE: usize = 1 << 20;

/// Returns the rows of the router with `input` columns that precedes `matrices` in a layer: one row of length 1 per
/// expert; zeros for an expert without an update.
pub(crate) fn rows(plan: &Plan, layer: usize, matrices: &[String], input: usize) -> Result<Vec<f32>, Error> {
    let inactive: Vec<f64> = mean_row(plan, &gate_projection(layer), input)?.into_iter().map(|x| -x).collect();
    let first = usize::from(plan.config.shared_expert.is_some());
    let mut rows = Vec::with_capacity(plan.config.experts.len() * input);
    for expert in first..plan.experts.len() {
        rows.extend(direction(plan, expert, matrices, &inactive)?);
    }
    Ok(rows)
}

/// Returns the mean over the rows of a matrix of the base.
fn mean_row(plan: &Plan, tensor: &str, columns: usize) -> Result<Vec<f64>, Error> {
    let count = plan.base.info(tensor).expect("planned from this model").shape[0];
    let mut sum = vec![0.0f64; columns];
    let step = (PIECE / columns).max(1);
    for start in (0..count).step_by(step) {
        let end = (start + step).min(count);
        for row in values_of_base(plan, tensor, start * columns..end * columns)?.chunks_exact(columns) {
            sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
    }
    Ok(sum.into_iter().map(|sum| sum / count as f64).collect())
}

/// Returns the leading right singular vector of an expert's update of all `matrices`, with the sign for which its
/// product with `side` is not negative.
fn direction(plan: &Plan, expert: usize, matrices: &[String], side: &[f64]) -> Result<Vec<f32>, Error> {
    let columns = side.len();
    let mut update = Vec::new();
    for tensor in matrices {
        let rows = plan.base.info(tensor).expect("planned from this model").shape[0];
        update.extend(difference(plan, expert, tensor, columns, 0..rows)?);
    }
    let shape = [update.len() / columns, columns];
    let cut = truncated_svd(&update, shape, 1, &matrices[0]).map_err(|_| Error::Decomposition {
        model: plan.experts[expert].dir().display().to_string(),
        tensor: matrices[0].clone(),
    })?;
    let mut row = cut.v;
    row.resize(columns, 0.0);
    let length = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let product: f64 = row.iter().zip(side).map(|(&x, side)| f64::from(x) * side).sum();
    if length > 0.0 {
        let factor = if product < 0.0 { -1.0 } else { 1.0 } / length;
        row.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
    }
    Ok(row)
}
