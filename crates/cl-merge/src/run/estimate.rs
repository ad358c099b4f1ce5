//! Estimates of a merge before it runs.

use std::time::{Duration, Instant};

use super::options::{MergeOptions, threads};
use crate::Error;
use crate::methods::merge_runs;
use crate::plan::Plan;
use crate::plan::work::{PlannedTensor, Work};

/// Estimates of I/O, memory and time of a merge.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// Number of tensor bytes in all inputs.
    pub bytes_read: u64,
    /// Number of tensor bytes in the output.
    pub bytes_written: u64,
    /// Peak memory in bytes.
    pub peak_memory: usize,
    /// Time, extrapolated from merging one tensor without writing it.
    pub time: Duration,
    /// The tensor used for the measurement; `None` if all tensors are copied.
    pub measured_on: Option<String>,
}

/// Assumed write rate in bytes per second; the actual rate is only known from writing.
const WRITE_RATE: f64 = 1e9;
/// Cost, in elements, that is sufficient for a measurement.
const ENOUGH: f64 = 300_000.0;

/// Estimates a merge by merging one of its tensors.
///
/// # Errors
/// Returns an error if reading that tensor fails, or [`Error::Problems`] if memory is not enough.
pub fn estimate(plan: &Plan, options: &MergeOptions) -> Result<Estimate, Error> {
    let peak_memory = plan.peak_memory(options)?;
    let cost = |tensor: &PlannedTensor| cost(plan, tensor);
    let total: f64 = plan.tensors.iter().map(cost).sum();
    // The cheapest tensor that is large enough to be typical.
    let sample =
        plan.tensors.iter().filter(|t| cost(t) > 0.0).min_by(|a, b| distance(cost(a)).total_cmp(&distance(cost(b))));
    let mut time = plan.bytes_written() as f64 / WRITE_RATE;
    if let Some(tensor) = sample
        && let Work::Merge(segments) = &tensor.work
    {
        let started = Instant::now();
        for segment in segments {
            let group = plan.group(tensor, segment);
            merge_runs(&*segment.method, &group, |(), _, _| (), |_, ()| Ok(()))?;
        }
        time += started.elapsed().as_secs_f64() * total / cost(tensor) / threads(options) as f64;
    }
    Ok(Estimate {
        bytes_read: plan.bytes_read(),
        bytes_written: plan.bytes_written(),
        peak_memory,
        time: Duration::from_secs_f64(time),
        measured_on: sample.map(|t| t.spec.name.clone()),
    })
}

/// Returns how far a cost is from [`ENOUGH`]; a cost that is too low counts more than one that is too high.
fn distance(cost: f64) -> f64 {
    if cost >= ENOUGH { cost / ENOUGH } else { 1e6 * ENOUGH / cost }
}

fn cost(plan: &Plan, tensor: &PlannedTensor) -> f64 {
    match &tensor.work {
        Work::Copy(_) => 0.0,
        Work::Merge(segments) => segments.iter().map(|s| s.method.cost(&plan.group(tensor, s))).sum(),
    }
}
