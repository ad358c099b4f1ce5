//! Runs a model on tasks: predictions, scores, results.

mod evaluate;
mod files;
mod group_scores;
mod method_runs;
mod predictions;
mod rescore;
mod response_cache;
mod results;
mod scores;

pub use evaluate::{DEFAULT_BATCH_SEQUENCES, DEFAULT_BATCH_TOKENS, Observe, Open, evaluate, evaluate_all};
pub use group_scores::aggregate_group;
pub use method_runs::method_table;
pub use predictions::Prediction;
pub use rescore::{rescore, score_file};
pub use response_cache::{Answer, ResponseCache, TokenRequest};
pub use results::{GroupResult, RunSettings, TaskResult, harness_metric, results, write_results};
pub use scores::Scores;
