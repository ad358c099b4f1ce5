//! Heat maps: numbers in coloured cells.

use crate::svg::{Anchor, Canvas, Paint, SMALL, TEXT, width};

/// One cell.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeatCell {
    pub text: String,
    /// Colour, from −1 (loss) to 1 (gain); `None` if there is no number.
    pub tone: Option<f64>,
    pub tip: String,
    /// Whether the cell has a frame.
    pub framed: bool,
}

/// One grid of cells.
#[derive(Clone, Debug)]
pub(crate) struct Grid {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<(String, Vec<HeatCell>)>,
}

/// Grids, side by side if there is room.
#[derive(Clone, Debug)]
pub(crate) struct Heat {
    pub grids: Vec<Grid>,
    /// Label of the colour scale.
    pub legend: String,
    /// Start of the colour scale: −1, or 0 if there are no losses.
    pub lowest: f64,
}

impl Heat {
    pub fn draw(&self, wide: f64) -> Canvas {
        let mut canvas = Canvas::new(wide);
        let mut y = self.scale(&mut canvas);
        let columns = self.grids.iter().map(|g| g.columns.len()).max().unwrap_or(0);
        let side_by_side = if wide >= 600.0 && columns <= 9 { self.grids.len().clamp(1, 2) } else { 1 };
        let each = (wide - 24.0 * (side_by_side as f64 - 1.0)) / side_by_side as f64;
        for row in self.grids.chunks(side_by_side) {
            let ends: Vec<f64> =
                row.iter().enumerate().map(|(i, g)| g.draw(&mut canvas, i as f64 * (each + 24.0), y, each)).collect();
            y = ends.into_iter().fold(y, f64::max) + 18.0;
        }
        canvas.height = y - 10.0;
        canvas
    }

    fn scale(&self, canvas: &mut Canvas) -> f64 {
        for step in 0..11 {
            canvas.rect(
                (step as f64 * 13.0, 4.0),
                (13.0, 11.0),
                Paint::Ramp(self.lowest + (1.0 - self.lowest) * f64::from(step) / 10.0),
                "",
            );
        }
        let beside = width(&self.legend, TEXT) <= canvas.width - 155.0;
        let at = if beside { (151.0, 14.0) } else { (0.0, 31.0) };
        canvas.text(at, TEXT, Anchor::Start, Paint::Muted, &self.legend, canvas.width);
        if beside { 30.0 } else { 46.0 }
    }
}

const CELL: f64 = 23.0;

impl Grid {
    fn draw(&self, canvas: &mut Canvas, left: f64, top: f64, wide: f64) -> f64 {
        let mut y = top;
        if !self.title.is_empty() {
            canvas.bold((left, y + 12.0), TEXT + 1.0, Anchor::Start, Paint::Ink, &self.title, wide);
            y += 22.0;
        }
        let longest = self.rows.iter().map(|(name, _)| width(name, TEXT)).fold(0.0, f64::max);
        let label = (longest + 10.0).min(wide * 0.34);
        let cell = ((wide - label) / self.columns.len().max(1) as f64).min(72.0);
        let widest = self.columns.iter().map(|c| width(c, SMALL)).fold(0.0, f64::max);
        let flat = widest <= cell - 4.0;
        let head = if flat { 18.0 } else { (widest.min(110.0) * 0.643 + 14.0).max(18.0) };
        for (i, name) in self.columns.iter().enumerate() {
            let x = left + label + i as f64 * cell;
            if flat {
                canvas.text((x + cell / 2.0, y + 12.0), SMALL, Anchor::Middle, Paint::Muted, name, cell);
            } else {
                // The names of the last columns would otherwise extend beyond the drawing.
                let room = ((canvas.width - x - cell / 2.0) / 0.766 - 6.0).clamp(30.0, 110.0);
                canvas.slanted((x + cell / 2.0, y + head - 5.0), SMALL, Paint::Muted, name, room);
            }
        }
        y += head;
        for (name, cells) in &self.rows {
            canvas.text((left + label - 8.0, y + 15.5), TEXT, Anchor::End, Paint::Ink, name, label - 8.0);
            for (i, one) in cells.iter().enumerate() {
                one.draw(canvas, left + label + i as f64 * cell, y, cell);
            }
            y += CELL;
        }
        y
    }
}

impl HeatCell {
    fn draw(&self, canvas: &mut Canvas, x: f64, y: f64, wide: f64) {
        let Some(tone) = self.tone else {
            canvas.text((x + wide / 2.0, y + 15.0), SMALL, Anchor::Middle, Paint::Muted, "–", wide);
            return;
        };
        canvas.rect((x + 0.5, y + 0.5), (wide - 1.0, CELL - 1.0), Paint::Ramp(tone), &self.tip);
        if self.framed {
            let corners = [
                (x + 1.5, y + 1.5),
                (x + wide - 1.5, y + 1.5),
                (x + wide - 1.5, y + CELL - 1.5),
                (x + 1.5, y + CELL - 1.5),
                (x + 1.5, y + 1.5),
            ];
            canvas.polyline(&corners, Paint::Ink, 1.4, "");
        }
        let size = if width(&self.text, SMALL) <= wide - 2.0 { SMALL } else { 8.5 };
        if width(&self.text, size) <= wide + 1.0 {
            canvas.text((x + wide / 2.0, y + 15.2), size, Anchor::Middle, Paint::Ink, &self.text, wide + 8.0);
        }
    }
}
