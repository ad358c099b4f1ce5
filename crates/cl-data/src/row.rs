use serde_json::{Map, Value};

use crate::Error;

/// A row of a data file, with fields in file order.
pub type Row = Map<String, Value>;

/// Callback that takes a row and its index.
pub(crate) type TakeRow<'a> = &'a mut dyn FnMut(usize, Row) -> Result<(), Error>;
