//! Statistical comparison of two runs, document by document.

mod bootstrap;
mod compare;
mod mcnemar;

pub use bootstrap::{Estimate, Resampling, paired_difference};
pub use compare::{Comparison, Means, MetricComparison, TaskComparison, compare, prediction_files};
pub use mcnemar::{McNemar, mcnemar};
