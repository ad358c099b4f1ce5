//! Writes the report directory.

use std::fs;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Manifest, OutputDir};

use crate::error::Error;
use crate::figures::{self, WIDE};
use crate::findings::{Finding, findings};
use crate::page;
use crate::paper::Paper;
use crate::png::Rasterizer;
use crate::results::StudyResults;
use crate::study::Study;
use crate::table::{csv_file, latex_file, markdown_file};
use crate::tables;

/// Summary of a written report.
#[derive(Clone, Debug)]
pub struct Written {
    /// Path of the page.
    pub page: PathBuf,
    /// Number of tables.
    pub tables: usize,
    /// Number of figures that were drawn.
    pub figures: usize,
    /// Findings on the paper's claims.
    pub findings: Vec<Finding>,
}

/// Kind in the manifest, which identifies an existing report.
const KIND: &str = "report";

/// Writes the report of a study to a directory, atomically:
///
/// | file | content |
/// | --- | --- |
/// | `index.html` | the self-contained page |
/// | `tables.md`, `tables.csv`, `tables.tex` | all tables; CSV has one line per cell, LaTeX needs booktabs |
/// | `figures/figure-N.svg`, `figures/figure-N.png` | all figures |
/// | `findings.json` | the paper's claims with estimates and intervals |
/// | `results.json` | the input of the report |
/// | `manifest.json` | hashes of these files |
///
/// An existing report at the path is replaced. Equal results produce equal bytes.
///
/// # Errors
/// Returns [`Error::NotAReport`] if the path contains anything else, the errors of [`StudyResults::check`], and an
/// error if writing fails.
pub fn write(results: &StudyResults, out: &Path) -> Result<Written, Error> {
    results.check()?;
    check_place(out)?;
    let dir = OutputDir::create(out, true)?;
    let study = Study::new(results);
    let paper = Paper::new();
    let (tables, figures, findings) = (tables::all(&study, &paper), figures::all(&study, &paper), findings(results));
    let page = page::render(&study, &tables, &figures, &findings)?;
    let only_tables: Vec<_> = tables.iter().map(|(_, t)| t.clone()).collect();
    let files = [
        ("index.html", page),
        ("tables.md", markdown_file(&results.name, &only_tables)),
        ("tables.csv", csv_file(&only_tables)),
        ("tables.tex", latex_file(&results.name, &only_tables)),
        ("findings.json", json(&findings)),
        ("results.json", json(results)),
    ];
    for (name, content) in files {
        save(&dir.path().join(name), content.as_bytes())?;
    }
    let folder = dir.path().join("figures");
    fs::create_dir(&folder).map_err(io(&folder))?;
    let rasterizer = Rasterizer::new();
    let mut drawn = 0;
    for (_, figure) in &figures {
        let Some(chart) = &figure.chart else { continue };
        let canvas = chart.draw(WIDE);
        let title = format!("{}. {}", figure.label, figure.title);
        save(&folder.join(format!("{}.svg", figure.id)), canvas.file(&title).as_bytes())?;
        let picture = rasterizer.png(&canvas.light(&title));
        let picture = picture.map_err(|problem| Error::Raster { figure: figure.label.clone(), problem })?;
        save(&folder.join(format!("{}.png", figure.id)), &picture)?;
        drawn += 1;
    }
    dir.finish(Manifest::new(KIND))?;
    Ok(Written { page: out.join("index.html"), tables: only_tables.len(), figures: drawn, findings })
}

/// Checks that the path is free or contains an earlier report.
///
/// # Errors
/// Returns [`Error::NotAReport`] otherwise.
pub fn check_place(out: &Path) -> Result<(), Error> {
    let empty = fs::read_dir(out).map_or(out.symlink_metadata().is_err(), |mut entries| entries.next().is_none());
    let earlier = || Manifest::read(out).is_ok_and(|manifest| manifest.kind == KIND);
    if empty || earlier() { Ok(()) } else { Err(Error::NotAReport { path: out.to_owned() }) }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).expect("names and numbers") + "\n"
}

fn save(path: &Path, content: &[u8]) -> Result<(), Error> {
    fs::write(path, content).map_err(io(path))
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<'_> {
    move |source| Error::Checkpoint(cl_checkpoint::Error::Io { path: path.to_owned(), source })
}
