//! Heat maps of numbers other than scores, in the style of the report's figures.

use crate::error::Error;
use crate::figures::heat::{Grid, Heat, HeatCell};
use crate::png::Rasterizer;

/// Width of a drawing, in units of the drawing.
const WIDE: f64 = 760.0;

/// A grid of numbers in `[0, 1]`.
#[derive(Clone, Debug, PartialEq)]
pub struct HeatMap {
    /// Text above the grid.
    pub title: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Names of the rows, with a number for each column; `None` is shown as a dash.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

/// A drawing in two formats.
#[derive(Clone, Debug)]
pub struct Picture {
    /// SVG, which follows the viewer's light or dark colour scheme.
    pub svg: String,
    /// PNG, in light colours.
    pub png: Vec<u8>,
}

/// Draws heat maps, side by side if there is room. `title` names the drawing, and `legend` describes its colours.
///
/// ```
/// let map = cl_report::HeatMap {
///     title: "math".to_owned(),
///     columns: vec!["expert 0".to_owned(), "expert 1".to_owned()],
///     rows: vec![("layer 0".to_owned(), vec![Some(0.25), Some(0.75)])],
/// };
/// let picture = cl_report::draw_heat_maps("Routing", "share of gates", &[map])?;
/// assert!(picture.svg.contains("0.75") && picture.png.starts_with(b"\x89PNG"));
/// # Ok::<(), cl_report::Error>(())
/// ```
///
/// # Errors
/// Returns [`Error::Raster`] if the drawing is too large to be rasterized.
pub fn draw_heat_maps(title: &str, legend: &str, maps: &[HeatMap]) -> Result<Picture, Error> {
    let most = maps.iter().flat_map(|m| &m.rows).flat_map(|row| row.1.iter().flatten()).copied().fold(0.0, f64::max);
    let legend = format!("{legend}, from 0 to {most:.2}");
    let heat = Heat { grids: maps.iter().map(|map| grid(map, most)).collect(), legend, lowest: 0.0 };
    let canvas = heat.draw(WIDE);
    let raster = |problem| Error::Raster { figure: title.to_owned(), problem };
    let png = Rasterizer::new().png(&canvas.light(title)).map_err(raster)?;
    Ok(Picture { svg: canvas.file(title), png })
}

fn grid(map: &HeatMap, most: f64) -> Grid {
    let cell = |(column, value): (&String, &Option<f64>), row: &str| HeatCell {
        text: value.map_or_else(String::new, |v| format!("{v:.2}")),
        tone: value.map(|v| if most > 0.0 { (v / most).clamp(0.0, 1.0) } else { 0.0 }),
        tip: value.map_or_else(String::new, |v| format!("{}, {row}, {column}: {v:.4}", map.title)),
        framed: false,
    };
    let row = |(name, values): &(String, Vec<Option<f64>>)| {
        (name.clone(), map.columns.iter().zip(values).map(|pair| cell(pair, name)).collect())
    };
    Grid { title: map.title.clone(), columns: map.columns.clone(), rows: map.rows.iter().map(row).collect() }
}
