use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use cl_checkpoint::files::write_file_with;
use serde::{Deserialize, Serialize};

use crate::lines::read_lines;
use crate::{Error, RowRef};

/// One used row, as a line of the audit file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRow {
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Place in the epoch, from 0.
    pub position: usize,
    /// Name of the data set.
    pub dataset: String,
    /// Row of its file, from 0.
    pub row: usize,
}

/// Writes which rows a round used, an epoch at a time; an epoch that is in the file already is not written again. Epochs are
/// appended: a kill leaves a part of the last one, which [`Audit::open`] drops.
pub struct Audit {
    path: PathBuf,
    epochs: std::collections::BTreeSet<u64>,
}

impl Audit {
    /// Opens or starts the file; an epoch that a kill cut off is dropped.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, rows_per_epoch: usize) -> Result<Audit, Error> {
        let mut kept = Vec::new();
        let mut epochs = std::collections::BTreeSet::new();
        if path.exists() {
            let rows = read_audit(path)?;
            for epoch in rows.iter().map(|r| r.epoch).collect::<std::collections::BTreeSet<_>>() {
                let of_epoch: Vec<&AuditRow> = rows.iter().filter(|r| r.epoch == epoch).collect();
                if of_epoch.len() == rows_per_epoch {
                    epochs.insert(epoch);
                    kept.extend(of_epoch.into_iter().cloned());
                }
            }
        }
        write_file_with(path, |file| write_rows(file, &kept))?;
        Ok(Audit { path: path.to_owned(), epochs })
    }

    /// Adds an epoch's rows.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_epoch(&mut self, epoch: u64, names: &[String], rows: &[RowRef]) -> Result<(), Error> {
        if !self.epochs.insert(epoch) {
            return Ok(());
        }
        let lines: Vec<AuditRow> = rows
            .iter()
            .enumerate()
            .map(|(position, r)| AuditRow { epoch, position, dataset: names[r.dataset].clone(), row: r.row })
            .collect();
        OpenOptions::new()
            .append(true)
            .open(&self.path)
            .and_then(|mut f| write_rows(&mut f, &lines))
            .map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

fn write_rows(file: &mut File, rows: &[AuditRow]) -> std::io::Result<()> {
    let mut out = BufWriter::new(file);
    for row in rows {
        serde_json::to_writer(&mut out, row)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Reads an audit file; a last line that a kill cut off is left out.
///
/// # Errors
/// [`Error::Io`].
pub fn read_audit(path: &Path) -> Result<Vec<AuditRow>, Error> {
    let mut rows = Vec::new();
    for line in read_lines(path)? {
        if let Ok(row) = serde_json::from_slice(&line?.bytes) {
            rows.push(row);
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_off_epoch_is_written_again_and_a_whole_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let rows = [RowRef { dataset: 0, row: 4 }, RowRef { dataset: 0, row: 1 }];
        let names = ["t".to_owned()];
        let mut audit = Audit::open(&path, 2).unwrap();
        audit.write_epoch(0, &names, &rows).unwrap();
        audit.write_epoch(1, &names, &rows).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let mut audit = Audit::open(&path, 2).unwrap();
        audit.write_epoch(0, &names, &rows).unwrap();
        audit.write_epoch(1, &names, &rows).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        assert_eq!(read_audit(&path).unwrap()[1].row, 1);
    }
}
