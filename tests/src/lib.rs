//! Tests over several crates lie in `end_to_end/`; this library is empty.
