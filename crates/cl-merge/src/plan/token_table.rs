//! An embedding with its rows in another tokenizer's order, computed while it is read.

use std::sync::{Arc, Mutex};

use cl_checkpoint::problem::TensorProblem;
use cl_checkpoint::{Dtype, Error, TensorInfo, TensorSource, convert};

use super::inputs::SharedSource;
use crate::tensor::READ;

/// The source of a row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Row {
    /// A row of one of the tables.
    Of {
        /// Which table.
        table: usize,
        /// Its row.
        row: usize,
    },
    /// The mean of rows, possibly of several tables.
    Mean(Vec<(usize, usize)>),
    /// Zeros.
    Zero,
}

/// One input's token table.
pub(crate) struct Table {
    pub(crate) source: SharedSource,
    pub(crate) tensor: String,
    pub(crate) dtype: Dtype,
}

/// A table `[rows, …]` of f32, assembled from rows of other tables.
pub(crate) struct TokenTable {
    tables: Arc<Vec<Table>>,
    rows: Vec<Row>,
    columns: usize,
    info: TensorInfo,
    /// The mean of all rows, which fills the padding rows; computed on first use.
    mean: Mutex<Option<Arc<Vec<f32>>>>,
}

impl TokenTable {
    /// Creates a table of these rows, padded with their mean up to `shape`.
    pub(crate) fn new(tables: Arc<Vec<Table>>, rows: Vec<Row>, shape: Vec<usize>) -> TokenTable {
        let columns = shape[1..].iter().product();
        let info = TensorInfo { dtype: Dtype::F32, shape };
        TokenTable { tables, rows, columns, info, mean: Mutex::default() }
    }

    /// Returns the memory that it holds, in bytes.
    pub(crate) fn held(&self) -> usize {
        self.rows.len() * size_of::<Row>() + 4 * self.columns
    }

    /// Reads whole rows.
    fn whole_rows(&self, from: usize, out: &mut [f32]) -> Result<(), Error> {
        let columns = self.columns;
        let mut done = 0;
        let mut rows = out.chunks_mut(columns);
        let count = rows.len();
        while done < count {
            match self.rows.get(from + done) {
                Some(Row::Of { table, row }) => {
                    // Consecutive rows are read at once.
                    let next =
                        |n: &usize| self.rows.get(from + done + n) == Some(&Row::Of { table: *table, row: row + n });
                    let together = (1..count - done).take_while(next).count() + 1;
                    let values = self.read_rows(*table, *row, together)?;
                    for part in values.chunks(columns) {
                        rows.next().expect("counted").copy_from_slice(part);
                    }
                    done += together;
                    continue;
                }
                Some(Row::Mean(of)) => {
                    let mut sum = vec![0.0f64; columns];
                    for (table, row) in of {
                        let values = self.read_rows(*table, *row, 1)?;
                        sum.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(v));
                    }
                    let row = rows.next().expect("counted");
                    row.iter_mut().zip(sum).for_each(|(o, s)| *o = (s / of.len() as f64) as f32);
                }
                Some(Row::Zero) => rows.next().expect("counted").fill(0.0),
                None => rows.next().expect("counted").copy_from_slice(&self.mean()?),
            }
            done += 1;
        }
        Ok(())
    }

    fn read_rows(&self, table: usize, row: usize, count: usize) -> Result<Vec<f32>, Error> {
        let Table { source, tensor, dtype } = &self.tables[table];
        let size = dtype.bitsize() / 8 * self.columns;
        let mut bytes = vec![0; count * size];
        source.read(tensor, row * size, &mut bytes)?;
        let values = convert::to_f32(*dtype, &bytes).or_else(|| convert::f8_to_f32(*dtype, &bytes));
        Ok(values.expect("the plan takes floating tensors only"))
    }

    fn mean(&self) -> Result<Arc<Vec<f32>>, Error> {
        let mut known = self.mean.lock().expect("no panic while held");
        if let Some(mean) = &*known {
            return Ok(mean.clone());
        }
        let mut sum = vec![0.0f64; self.columns];
        let together = (READ / self.columns.max(1)).max(1);
        for from in (0..self.rows.len()).step_by(together) {
            let mut values = vec![0.0; together.min(self.rows.len() - from) * self.columns];
            self.whole_rows(from, &mut values)?;
            for row in values.chunks(self.columns) {
                sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
            }
        }
        let mean = Arc::new(sum.iter().map(|s| (s / self.rows.len() as f64) as f32).collect::<Vec<f32>>());
        *known = Some(mean.clone());
        Ok(mean)
    }
}

impl TensorSource for TokenTable {
    fn names(&self) -> Vec<&str> {
        vec![""]
    }

    fn info(&self, _name: &str) -> Option<&TensorInfo> {
        Some(&self.info)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], Error> {
        let problem = Box::new(TensorProblem::Computed);
        Err(Error::Tensor { path: "token table".into(), tensor: name.to_owned(), problem })
    }

    fn read(&self, _name: &str, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        let (start, columns) = (offset / 4, self.columns);
        let (first, last) = (start / columns, (start + out.len() / 4).div_ceil(columns));
        let mut values = vec![0.0; (last - first) * columns];
        self.whole_rows(first, &mut values)?;
        for (bytes, value) in out.chunks_exact_mut(4).zip(&values[start - first * columns..]) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }
}
