use ::parquet::errors::ParquetError;

/// What is wrong with a Parquet file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParquetProblem {
    /// The file cannot be decoded, or exceeds a limit on its decompressed size.
    #[error("damaged or truncated Parquet file: {source}")]
    Damaged {
        /// The decoder's error.
        r#source: ParquetError,
    },
    /// The decoder failed on damaged pages.
    #[error("damaged Parquet file: its pages cannot be decoded")]
    Pages,
    /// The file has more or fewer rows than it declares.
    #[error("damaged Parquet file: {found} rows, but its footer says {declared}")]
    RowCount {
        /// Number of rows in its pages.
        found: usize,
        /// Number of rows according to its footer.
        declared: i64,
    },
    /// A column has a type that JSON cannot represent.
    #[error(
        "column `{column}` has type {found}, which JSON cannot represent; supported: text, integers, floats, booleans, \
         and lists and structs of them"
    )]
    Type {
        /// Dotted path of the column.
        column: String,
        /// Its type, in the terms of Parquet.
        found: String,
    },
    /// A column is compressed by an unsupported codec.
    #[error(
        "column `{column}` is compressed with {found}, which is not supported; supported: Snappy, gzip, Zstandard, LZ4, \
         Brotli and none"
    )]
    Codec {
        /// Name of the column.
        column: String,
        /// The codec.
        found: &'static str,
    },
    /// A column is a map.
    #[error("column `{column}` is a map, which is not supported")]
    Map {
        /// Dotted path of the column.
        column: String,
    },
    /// A column is a list that is not laid out as the format specifies.
    #[error("column `{column}` is a list with an unknown layout")]
    ListLayout {
        /// Dotted path of the column.
        column: String,
    },
}
