//! Routers from the weights alone: an expert's row is the direction of the input that its fine-tuning changed the response to most.
//!
//! That is the leading right singular vector of the expert's update, of all matrices that read the router's input together. Its
//! sign is not determined by the update. It is chosen so that the mean token, embedded and normalized as the layer does it, has a
//! positive product with it: a logit of a linear router has no absolute value, unlike that of Arrow.

use std::sync::OnceLock;

use cl_checkpoint::TensorSource;
use cl_merge::adapter::truncated_svd;

use crate::delta::{difference, values_of_base};
use crate::{Error, Plan};

const EMBEDDING: &str = "model.embed_tokens.weight";
/// Elements of the embedding that are held at a time.
const PIECE: usize = 1 << 20;

/// What routers of all layers need of the base.
#[derive(Default)]
pub(crate) struct TaskVectors {
    /// The mean over the vocabulary of embeddings, each divided by its root mean square.
    mean_token: OnceLock<Vec<f32>>,
}

impl TaskVectors {
    /// The rows of a router whose input of width `input` is the output of the layer norm with the weight `norm`, as that of
    /// `matrices`. One row per expert, each of length 1; zeros for an expert without an update.
    pub(crate) fn rows(&self, plan: &Plan, matrices: &[String], norm: &str, input: usize) -> Result<Vec<f32>, Error> {
        let mean_token = self.mean_token(plan)?;
        let norm = values_of_base(plan, norm, 0..input)?;
        let side: Vec<f32> = mean_token.iter().zip(&norm).map(|(x, w)| x * w).collect();
        let first = usize::from(plan.config.shared_expert.is_some());
        let mut rows = Vec::with_capacity(plan.config.experts.len() * input);
        for expert in first..plan.experts.len() {
            rows.extend(direction(plan, expert, matrices, &side)?);
        }
        Ok(rows)
    }

    fn mean_token(&self, plan: &Plan) -> Result<&[f32], Error> {
        if let Some(mean) = self.mean_token.get() {
            return Ok(mean);
        }
        let shape = &plan.base.info(EMBEDDING).expect("checked to be a decoder").shape;
        let (tokens, width) = (shape[0], shape[1]);
        let mut sum = vec![0.0f64; width];
        let step = (PIECE / width).max(1);
        for start in (0..tokens).step_by(step) {
            let end = (start + step).min(tokens);
            for row in values_of_base(plan, EMBEDDING, start * width..end * width)?.chunks_exact(width) {
                let square = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / width as f64;
                if square > 0.0 {
                    sum.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x) / square.sqrt());
                }
            }
        }
        let mean = sum.into_iter().map(|s| (s / tokens as f64) as f32).collect();
        Ok(self.mean_token.get_or_init(|| mean))
    }
}

/// The leading right singular vector of an expert's update of `matrices` together, whose product with `side` is not negative.
fn direction(plan: &Plan, expert: usize, matrices: &[String], side: &[f32]) -> Result<Vec<f32>, Error> {
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
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let mut row = cut.v;
    row.resize(columns, 0.0);
    let length = dot(&row, &row).sqrt();
    if length > 0.0 {
        let factor = if dot(&row, side) < 0.0 { -1.0 } else { 1.0 } / length;
        row.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
    }
    Ok(row)
}
