//! cl-lab
