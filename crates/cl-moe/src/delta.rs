//! Writes experts as compressed differences from the base.

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, TensorSource, TensorSpec, convert};
use cl_merge::adapter::truncated_svd;

use crate::storage::{low_rank_delta_tensors, sign_delta_tensors};
use crate::{Error, ExpertStorage, Plan};

/// Number of elements whose differences are in memory at the same time while signs are packed.
const PIECE: usize = 1 << 20;

/// The difference of one expert from the base, for one matrix.
pub(crate) struct PlannedDelta {
    /// Index of the expert.
    pub(crate) expert: usize,
    /// Name of the base's tensor.
    pub(crate) tensor: String,
    /// Rows and columns.
    pub(crate) shape: [usize; 2],
}

/// The tensors that store the differences of `experts` experts for the weight of `module`.
pub(crate) fn specs(
    storage: ExpertStorage,
    module: &str,
    [rows, columns]: [usize; 2],
    experts: usize,
    dtype: Dtype,
) -> Vec<TensorSpec> {
    let spec = |name: String, dtype, shape: &[usize]| TensorSpec { name, dtype, shape: shape.to_vec() };
    match storage {
        ExpertStorage::Full => Vec::new(),
        ExpertStorage::LowRank(rank) => {
            let rank = rank.min(rows).min(columns);
            let [u, v] = low_rank_delta_tensors(module);
            vec![spec(u, dtype, &[experts, rank, rows]), spec(v, dtype, &[experts, rank, columns])]
        }
        ExpertStorage::BitDelta => {
            let [signs, scales] = sign_delta_tensors(module);
            vec![spec(signs, Dtype::U8, &[experts, rows, columns.div_ceil(8)]), spec(scales, Dtype::F32, &[experts])]
        }
    }
}

/// Computes and writes one difference; returns the number of bytes written.
pub(crate) fn write(plan: &Plan, delta: &PlannedDelta, writer: &CheckpointWriter) -> Result<usize, Error> {
    let module = delta.tensor.strip_suffix(".weight").unwrap_or(&delta.tensor);
    match plan.config.expert_storage {
        ExpertStorage::Full => Ok(0),
        ExpertStorage::LowRank(rank) => write_low_rank(plan, delta, module, rank, writer),
        ExpertStorage::BitDelta => write_signs(plan, delta, module, writer),
    }
}

fn write_low_rank(
    plan: &Plan,
    delta: &PlannedDelta,
    module: &str,
    rank: usize,
    writer: &CheckpointWriter,
) -> Result<usize, Error> {
    let ([rows, columns], tensor) = (delta.shape, &delta.tensor);
    let difference = difference(plan, delta.expert, tensor, columns, 0..rows)?;
    let rank = rank.min(rows).min(columns);
    let expert = &plan.experts[delta.expert];
    let model = || expert.dir().display().to_string();
    let cut = truncated_svd(&difference, delta.shape, rank, tensor)
        .map_err(|_| Error::Decomposition { model: model(), tensor: tensor.clone() })?;
    let mut written = 0;
    for (name, mut values, width) in
        low_rank_delta_tensors(module).into_iter().zip([(cut.u, rows), (cut.v, columns)]).map(|(n, (x, w))| (n, x, w))
    {
        values.resize(rank * width, 0.0);
        let bytes = convert::from_f32(plan.dtype, &values).expect("a floating output");
        if let Some((index, value)) = convert::first_not_finite(plan.dtype, &bytes) {
            return Err(Error::NotFinite { model: model(), tensor: name, index, value });
        }
        writer.write_part(&name, delta.expert * bytes.len(), &bytes)?;
        written += bytes.len();
    }
    Ok(written)
}

fn write_signs(plan: &Plan, delta: &PlannedDelta, module: &str, writer: &CheckpointWriter) -> Result<usize, Error> {
    let [rows, columns] = delta.shape;
    let [signs, scales] = sign_delta_tensors(module);
    let row_bytes = columns.div_ceil(8);
    let start = delta.expert * rows * row_bytes;
    let mut sum = 0.0f64;
    let step = (PIECE / columns).max(1);
    for first in (0..rows).step_by(step) {
        let last = (first + step).min(rows);
        let difference = difference(plan, delta.expert, &delta.tensor, columns, first..last)?;
        sum += difference.iter().map(|&d| f64::from(d.abs())).sum::<f64>();
        let packed: Vec<u8> = difference.chunks(columns).flat_map(pack).collect();
        writer.write_part(&signs, start + first * row_bytes, &packed)?;
    }
    let scale = (sum / (rows * columns) as f64) as f32;
    writer.write_part(&scales, 4 * delta.expert, &scale.to_le_bytes())?;
    Ok(rows * row_bytes + 4)
}

/// Packs signs into bits, first value in the lowest bit; a bit is set if the value is positive.
fn pack(row: &[f32]) -> impl Iterator<Item = u8> + '_ {
    row.chunks(8).map(|eight| eight.iter().enumerate().fold(0, |byte, (j, &v)| byte | u8::from(v > 0.0) << j))
}

/// Computes rows of an expert's difference `W − W₀`, with the base rounded as it is written.
pub(crate) fn difference(
    plan: &Plan,
    expert: usize,
    tensor: &str,
    columns: usize,
    rows: std::ops::Range<usize>,
) -> Result<Vec<f32>, Error> {
    let part = rows.start * columns..rows.end * columns;
    let mut values = values(&plan.experts[expert], tensor, part.clone())?;
    let base = values_of_base(plan, tensor, part)?;
    values.iter_mut().zip(&base).for_each(|(v, b)| *v -= b);
    Ok(values)
}

/// Reads elements of the base, rounded as they are written.
pub(crate) fn values_of_base(plan: &Plan, tensor: &str, part: std::ops::Range<usize>) -> Result<Vec<f32>, Error> {
    let values = values(&plan.base, tensor, part)?;
    let rounded = convert::from_f32(plan.dtype, &values).and_then(|bytes| convert::to_f32(plan.dtype, &bytes));
    Ok(rounded.expect("a floating output"))
}

/// Reads elements of a tensor and checks that they are finite.
fn values(model: &Checkpoint, tensor: &str, part: std::ops::Range<usize>) -> Result<Vec<f32>, Error> {
    let dtype = model.info(tensor).expect("planned from this model").dtype;
    let width = dtype.bitsize() / 8;
    let mut bytes = vec![0; part.len() * width];
    model.read(tensor, part.start * width, &mut bytes)?;
    if let Some((index, value)) = convert::first_not_finite(dtype, &bytes) {
        let (model, tensor) = (model.dir().display().to_string(), tensor.to_owned());
        return Err(Error::NotFinite { model, tensor, index: part.start + index, value });
    }
    Ok(convert::to_f32(dtype, &bytes).expect("checked to be floating"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_signs_with_the_first_column_lowest() {
        let row = [1.0, -1.0, 0.0, 2.0, -0.5, -0.5, -0.5, 0.5, 3.0];
        assert_eq!(pack(&row).collect::<Vec<_>>(), [0b1000_1001, 0b1]);
    }
}
