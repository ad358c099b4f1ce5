//! Scores by round and task, and tables of them.

pub mod paper;
mod score_matrix;
mod table;

pub use score_matrix::{Column, Group, ScoreMatrix, mean_of_percentages, ratio_of_means};
pub use table::{Table, summary_table, table_of};
