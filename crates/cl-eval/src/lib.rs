//! cl-eval
