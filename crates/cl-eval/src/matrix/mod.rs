//! Scores by round and task, and tables of them.

mod method_table;
pub mod paper;
mod score_matrix;
mod table;

pub use method_table::{Cell, MethodTable};
pub use score_matrix::{Column, Group, ScoreMatrix, mean_of_percentages, ratio_of_means};
pub use table::{Table, summary_table, table_of};
