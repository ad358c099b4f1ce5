/// What is wrong with a `rows.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RowPlanProblem {
    /// It is not the JSON of a [`RowPlan`](crate::RowPlan).
    #[error("not a valid rows.json: {source}")]
    Json {
        /// The parser's error.
        r#source: serde_json::Error,
    },
    /// A data set has more rows than is possible, so the file is damaged.
    #[error("lists more than {limit} rows")]
    TooManyRows {
        /// The largest number allowed.
        limit: usize,
    },
    /// Its first epoch no longer yields the rows for which it was written.
    #[error(
        "its first epoch gives different rows than when the round started; the file is damaged, or another version of \
         this program drew them"
    )]
    OtherRows,
}
