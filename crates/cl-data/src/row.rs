use serde_json::{Map, Value};

use crate::Error;

/// A row of a data file, with fields in the order of the file.
pub type Row = Map<String, Value>;

/// Callback that receives the names of a file's columns, and returns those that must be readable.
pub(crate) type UsedColumns<'a> = &'a dyn Fn(&[&str]) -> Vec<String>;

/// Callback that receives a row and its index.
pub(crate) type TakeRow<'a> = &'a mut dyn FnMut(usize, Row) -> Result<(), Error>;
