//! cl-data
