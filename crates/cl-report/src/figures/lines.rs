//! Line charts over rounds, one panel per task.

use crate::format::Format;
use crate::study::Value;
use crate::svg::{Anchor, Canvas, Paint, SMALL, TEXT, ticks, width};

use super::bars::{axis, half};
use super::legend;

/// The line of a method: its value after each round, starting with the base.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub name: String,
    pub colour: usize,
    pub values: Vec<Option<Value>>,
}

/// The panel of a task.
#[derive(Clone, Debug)]
pub(crate) struct LinePanel {
    pub title: String,
    pub lines: Vec<Line>,
    /// The round that trains on the task.
    pub own: Option<usize>,
    pub chance: Option<f64>,
}

/// Panels that share a legend.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    pub panels: Vec<LinePanel>,
    /// Labels of the horizontal axis, starting with the base.
    pub steps: Vec<String>,
}

const HEIGHT: f64 = 118.0;
/// Size of the labels of the axes.
const TICK: f64 = SMALL - 0.5;
/// Smallest range of scores on an axis.
pub(super) const NARROWEST: f64 = 0.1;

impl Lines {
    pub fn draw(&self, wide: f64) -> Canvas {
        let mut canvas = Canvas::new(wide);
        let names: Vec<(String, usize)> = self.names();
        let mut extras = Vec::new();
        if self.panels.iter().any(|p| p.own.is_some()) {
            extras.push(legend::Extra::Own);
        }
        if self.panels.iter().any(|p| p.shown_chance().is_some()) {
            extras.push(legend::Extra::Chance);
        }
        let mut y = legend::draw(&mut canvas, 4.0, &names, &extras);
        let side_by_side = if wide >= 600.0 { 4.min(self.panels.len()).max(2) } else { 2 };
        let each = (wide - 18.0 * (side_by_side as f64 - 1.0)) / side_by_side as f64;
        let labels = self.panels.iter().flat_map(|panel| panel.ticks().into_iter().map(|(_, text)| width(&text, TICK)));
        let labels = labels.fold(0.0, f64::max) + 6.0;
        for row in self.panels.chunks(side_by_side) {
            for (i, panel) in row.iter().enumerate() {
                self.panel(&mut canvas, panel, (i as f64 * (each + 18.0), y), each, labels);
            }
            y += HEIGHT + 52.0;
        }
        canvas.height = y - 10.0;
        canvas
    }

    fn names(&self) -> Vec<(String, usize)> {
        let mut names: Vec<(String, usize)> = Vec::new();
        for line in self.panels.iter().flat_map(|p| &p.lines) {
            if !names.iter().any(|(name, _)| *name == line.name) {
                names.push((line.name.clone(), line.colour));
            }
        }
        names
    }

    /// Draws a panel; `labels` is the space left of its axis.
    fn panel(&self, canvas: &mut Canvas, panel: &LinePanel, (left, top): (f64, f64), wide: f64, labels: f64) {
        canvas.bold((left, top + 11.0), TEXT, Anchor::Start, Paint::Ink, &panel.title, wide);
        let (top, bottom) = (top + 22.0, top + 22.0 + HEIGHT);
        let (start, end) = (left + labels, left + wide - 6.0);
        let last = self.steps.len().saturating_sub(1).max(1);
        let x = |step: usize| start + (end - start) * step as f64 / last as f64;
        let (low, high) = panel.range();
        let y = |value: f64| bottom - (bottom - top) * ((value - low) / (high - low)).clamp(0.0, 1.0);
        for (tick, text) in panel.ticks() {
            canvas.line((start, y(tick)), (end, y(tick)), Paint::Grid, 1.0, "");
            canvas.text((start - 5.0, y(tick) + 3.5), TICK, Anchor::End, Paint::Muted, &text, 40.0);
        }
        if let Some(own) = panel.own.filter(|&o| o <= last) {
            canvas.line((x(own), top - 4.0), (x(own), bottom), Paint::Muted, 1.0, "4 3");
        }
        if let Some(chance) = panel.shown_chance() {
            canvas.line((start, y(chance)), (end, y(chance)), Paint::Muted, 1.2, "2 2");
        }
        for step in 0..self.steps.len() {
            if step == 0 || step == last || panel.own == Some(step) {
                let text = if step == 0 { "0".to_owned() } else { step.to_string() };
                canvas.text((x(step), bottom + 13.0), TICK, Anchor::Middle, Paint::Muted, &text, 40.0);
            }
        }
        for line in &panel.lines {
            self.line(canvas, panel, line, &x, &y);
        }
    }

    fn line(
        &self,
        canvas: &mut Canvas,
        panel: &LinePanel,
        line: &Line,
        x: &dyn Fn(usize) -> f64,
        y: &dyn Fn(f64) -> f64,
    ) {
        let known: Vec<(usize, &Value)> =
            line.values.iter().enumerate().filter_map(|(i, v)| Some((i, v.as_ref()?))).collect();
        let paint = Paint::Series(line.colour);
        if known.iter().any(|(_, v)| v.spread().is_some()) {
            let upper = known.iter().map(|(i, v)| (x(*i), y(v.mean + half(v, true))));
            let lower = known.iter().rev().map(|(i, v)| (x(*i), y(v.mean - half(v, true))));
            canvas.area(&upper.chain(lower).collect::<Vec<_>>(), paint);
        }
        let points: Vec<(f64, f64)> = known.iter().map(|(i, v)| (x(*i), y(v.mean))).collect();
        canvas.polyline(&points, paint, 1.8, "");
        for (step, value) in known {
            let details = crate::table::Cell::new(Some(value.clone()), Format::Score(4)).details();
            let tip = format!("{}, {}, {}: {details}", panel.title, line.name, self.steps[step]);
            canvas.circle((x(step), y(value.mean)), 2.7, paint, &tip);
        }
    }
}

impl LinePanel {
    /// Returns the ticks of the vertical axis, with their labels.
    fn ticks(&self) -> Vec<(f64, String)> {
        let (low, high) = self.range();
        ticks(low, high, 3).into_iter().map(|tick| (tick, axis(Format::Score(3), tick))).collect()
    }

    /// Returns the score of random guessing if it is in the panel's range.
    fn shown_chance(&self) -> Option<f64> {
        let (low, high) = self.range();
        self.chance.filter(|chance| (low..=high).contains(chance))
    }

    /// Returns the lowest and highest value of the axis, with a margin. A range of constant scores is widened, so that
    /// the axis does not resolve differences that have no meaning.
    fn range(&self) -> (f64, f64) {
        let values = self.lines.iter().flat_map(|l| l.values.iter().flatten());
        let ends = values.flat_map(|v| [v.mean - half(v, true), v.mean + half(v, true)]);
        let (low, high) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return (0.0, 1.0);
        }
        let margin = ((high - low) * 0.08).max((NARROWEST - (high - low)) / 2.0);
        ((low - margin).max(0.0), (high + margin).min(1.0_f64.max(high)))
    }
}
