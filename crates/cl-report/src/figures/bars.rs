//! Horizontal bar charts in groups and panels, with spread, the paper's numbers and the score of random guessing.

use crate::format::{Format, NONE};
use crate::study::Value;
use crate::svg::{Anchor, Canvas, Paint, SMALL, TEXT, ticks, width};

use super::legend;

/// One bar.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub name: String,
    pub value: Option<Value>,
    pub paper: Option<f64>,
    pub colour: usize,
}

/// The bars of one task, or of one method.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub label: String,
    pub bars: Vec<Bar>,
    /// Expected score of random guessing.
    pub chance: Option<f64>,
}

/// Groups that share an axis.
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub title: String,
    pub format: Format,
    pub groups: Vec<Group>,
    /// Whether error bars show the spread over seeds.
    pub seeds: bool,
}

/// Panels that share a legend.
#[derive(Clone, Debug)]
pub(crate) struct Bars {
    pub panels: Vec<Panel>,
}

const BAR: f64 = 13.0;
const GAP: f64 = 2.0;
const BETWEEN: f64 = 12.0;

impl Bars {
    /// Draws the chart at a given width: panels are side by side if there is room, otherwise below each other.
    pub fn draw(&self, wide: f64) -> Canvas {
        let mut canvas = Canvas::new(wide);
        let side_by_side = if wide >= 600.0 { self.panels.len().clamp(1, 2) } else { 1 };
        let mut y = legend::draw(&mut canvas, 4.0, &self.names(), &self.extras());
        let each = (wide - 28.0 * (side_by_side as f64 - 1.0)) / side_by_side as f64;
        for row in self.panels.chunks(side_by_side) {
            let ends = row.iter().enumerate().map(|(i, panel)| {
                let left = i as f64 * (each + 28.0);
                panel.draw(&mut canvas, left, y, each)
            });
            y = ends.fold(y, f64::max) + 14.0;
        }
        canvas.height = y - 8.0;
        canvas
    }

    /// Returns the names in the legend with their colours; none if each bar is labelled.
    fn names(&self) -> Vec<(String, usize)> {
        let mut names: Vec<(String, usize)> = Vec::new();
        for bar in self.panels.iter().flat_map(|p| &p.groups).filter(|g| !g.single()).flat_map(|g| &g.bars) {
            if !names.iter().any(|(name, _)| *name == bar.name) {
                names.push((bar.name.clone(), bar.colour));
            }
        }
        names
    }

    fn extras(&self) -> Vec<legend::Extra> {
        let groups = || self.panels.iter().flat_map(|p| &p.groups);
        let bars = || groups().flat_map(|g| &g.bars);
        let mut extras = Vec::new();
        if bars().any(|b| b.paper.is_some()) {
            extras.push(legend::Extra::Paper);
        }
        if bars().any(|b| b.value.as_ref().is_some_and(|v| v.spread().is_some())) {
            extras.push(legend::Extra::Spread);
        } else if bars().any(|b| b.value.as_ref().is_some_and(|v| v.standard_error.is_some())) {
            extras.push(legend::Extra::Error);
        }
        if groups().any(|g| g.chance.is_some()) {
            extras.push(legend::Extra::Chance);
        }
        extras
    }
}

impl Group {
    /// Whether there is only one bar, which is labelled by the group's label.
    fn single(&self) -> bool {
        self.bars.len() == 1
    }
}

/// Returns half the length of an error bar. If a figure has spreads over seeds, only these are shown, otherwise
/// standard errors, because one mark must not have two meanings.
pub(super) fn half(value: &Value, seeds: bool) -> f64 {
    if seeds { value.spread() } else { value.standard_error }.unwrap_or(0.0)
}

impl Panel {
    /// Draws the panel and returns the vertical position of its lower edge.
    fn draw(&self, canvas: &mut Canvas, left: f64, top: f64, wide: f64) -> f64 {
        let mut y = top;
        if !self.title.is_empty() {
            canvas.bold((left, y + 14.0), TEXT + 1.0, Anchor::Start, Paint::Ink, &self.title, wide);
            y += 24.0;
        }
        let above = wide < 340.0 && !self.groups.iter().all(Group::single); // labels above the bars
        let longest = self.groups.iter().map(|g| width(&g.label, TEXT)).fold(0.0, f64::max);
        let label = if above { 0.0 } else { (longest + 10.0).min(wide * 0.42) };
        let scale = self.scale(left + label, wide - label);
        let first = y;
        let bottom = y + self.groups.iter().map(|g| height(g, above)).sum::<f64>() - BETWEEN + 4.0;
        for tick in self.ticks(&scale, if wide < 400.0 { 4 } else { 6 }) {
            let x = scale.x(tick);
            let zero = tick.abs() < 1e-12;
            let paint = if zero { Paint::Muted } else { Paint::Grid };
            canvas.line((x, first - 2.0), (x, bottom), paint, if zero { 1.2 } else { 1.0 }, "");
            canvas.text((x, bottom + 14.0), SMALL, Anchor::Middle, Paint::Muted, &axis(self.format, tick), 80.0);
        }
        for group in &self.groups {
            if above {
                canvas.bold((left, y + 11.0), TEXT, Anchor::Start, Paint::Ink, &group.label, wide);
                y += 17.0;
            } else {
                let middle = y + (group.bars.len() as f64 * (BAR + GAP) - GAP) / 2.0;
                canvas.text(
                    (left + label - 8.0, middle + 4.0),
                    TEXT,
                    Anchor::End,
                    Paint::Ink,
                    &group.label,
                    label - 8.0,
                );
            }
            for bar in &group.bars {
                self.bar(canvas, &scale, group, bar, y);
                y += BAR + GAP;
            }
            if let Some(x) = group.chance.filter(|c| (scale.low..=scale.high).contains(c)).map(|c| scale.x(c)) {
                let upper = y - group.bars.len() as f64 * (BAR + GAP);
                canvas.line((x, upper - 2.0), (x, y), Paint::Muted, 1.3, "2 2");
            }
            y += BETWEEN - GAP;
        }
        bottom + 20.0
    }

    fn bar(&self, canvas: &mut Canvas, scale: &Scale, group: &Group, bar: &Bar, y: f64) {
        let zero = scale.x(0.0);
        let middle = y + BAR / 2.0;
        let mut end = zero;
        if let Some(value) = &bar.value {
            let (x, half) = (scale.x(value.mean), half(value, self.seeds));
            canvas.rect((zero.min(x), y), ((x - zero).abs(), BAR), Paint::Series(bar.colour), &self.tip(group, bar));
            if half > 0.0 {
                let (a, b) = (scale.x(value.mean - half), scale.x(value.mean + half));
                canvas.line((a, middle), (b, middle), Paint::Ink, 1.2, "");
                canvas.line((a, middle - 3.0), (a, middle + 3.0), Paint::Ink, 1.2, "");
                canvas.line((b, middle - 3.0), (b, middle + 3.0), Paint::Ink, 1.2, "");
                end = if value.mean < 0.0 { a } else { b };
            } else {
                end = x;
            }
        }
        let negative = bar.value.as_ref().is_some_and(|v| v.mean < 0.0);
        let text = bar.value.as_ref().map_or(NONE.to_owned(), |v| short(self.format, v.mean));
        if let Some(paper) = bar.paper {
            let x = scale.x(paper);
            let tip = format!("{}, {}: paper {}", group.label, bar.name, self.format.text(paper));
            canvas.diamond((x, middle), 4.6, &tip);
            // Move the number if it would cover the paper's mark; otherwise it stays next to its bar.
            let (away, reach) = (if negative { end - x } else { x - end }, width(&text, SMALL) + 10.0);
            if (-9.0..reach).contains(&away) {
                end = if negative { end.min(x - 4.6) } else { end.max(x + 4.6) };
            }
        }
        let (x, anchor) = if negative { (end - 5.0, Anchor::End) } else { (end + 5.0, Anchor::Start) };
        canvas.text((x, middle + 3.8), SMALL, anchor, Paint::Muted, &text, 200.0);
    }

    /// Returns round tick positions in the unit in which numbers are formatted.
    fn ticks(&self, scale: &Scale, count: usize) -> Vec<f64> {
        let unit = match self.format {
            Format::Seconds if scale.high >= 3600.0 => 3600.0,
            Format::Seconds if scale.high >= 60.0 => 60.0,
            _ => 1.0,
        };
        ticks(scale.low / unit, scale.high / unit, count).into_iter().map(|tick| tick * unit).collect()
    }

    fn tip(&self, group: &Group, bar: &Bar) -> String {
        let name = if bar.name == group.label { bar.name.clone() } else { format!("{}, {}", group.label, bar.name) };
        let paper = bar.paper.map(|value| crate::paper::Printed { value, swapped: false });
        let details = crate::table::Cell::new(bar.value.clone(), self.format).beside(paper).details();
        let panel = if self.title.is_empty() { String::new() } else { format!(" ({})", self.title) };
        format!("{name}{panel}: {details}")
    }

    /// Returns a scale from the lowest to the highest number, including zero, with room for the numbers next to the
    /// bars.
    fn scale(&self, left: f64, wide: f64) -> Scale {
        let bars = || self.groups.iter().flat_map(|g| &g.bars);
        let ends = bars().flat_map(|b| {
            let value = b.value.as_ref().map(|v| [v.mean - half(v, self.seeds), v.mean + half(v, self.seeds)]);
            value.into_iter().flatten().chain(b.paper)
        });
        let (mut low, mut high) = ends.fold((0.0f64, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
        if low == high {
            high = 1.0;
        }
        // A score, time or size cannot be negative, so the error bar does not extend the axis below zero.
        if !matches!(self.format, Format::Percent | Format::Signed) {
            low = low.max(0.0);
        }
        let texts = |sign: bool| {
            let of = bars().filter_map(|b| b.value.as_ref()).filter(move |v| (v.mean < 0.0) == sign);
            of.map(|v| width(&short(self.format, v.mean), SMALL) + 12.0).fold(if sign { 0.0 } else { 22.0 }, f64::max)
        };
        let before = if low < 0.0 { texts(true) } else { 2.0 };
        Scale { low, high, left: left + before, right: left + wide - texts(false) }
    }
}

/// Formats a number next to a bar; three decimals are enough.
fn short(format: Format, value: f64) -> String {
    match format {
        Format::Score(_) => Format::Score(3).text(value),
        Format::Percent if value.abs() >= 0.1 => format!("{:+.0}%", 100.0 * value).replace('-', "−"),
        other => other.text(value),
    }
}

/// Formats a number on an axis.
pub(super) fn axis(format: Format, tick: f64) -> String {
    match format {
        Format::Score(_) => {
            let text = format!("{tick:.3}");
            text.trim_end_matches('0').trim_end_matches('.').replace("-", "−")
        }
        Format::Percent => {
            let text = format!("{:.1}", 100.0 * tick);
            format!("{}%", text.trim_end_matches('0').trim_end_matches('.')).replace("-0%", "0%").replace('-', "−")
        }
        Format::Signed => format!("{tick:+.2}").replace('-', "−"),
        other if tick == 0.0 => other.text(0.0).split(' ').next().unwrap_or_default().trim_end_matches(".0").to_owned(),
        other => other.text(tick).replace(".0 ", " "),
    }
}

fn height(group: &Group, above: bool) -> f64 {
    group.bars.len() as f64 * (BAR + GAP) - GAP + BETWEEN + if above { 17.0 } else { 0.0 }
}

/// Maps values to pixels.
pub(super) struct Scale {
    pub low: f64,
    pub high: f64,
    pub left: f64,
    pub right: f64,
}

impl Scale {
    pub fn x(&self, value: f64) -> f64 {
        let share = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.left + share * (self.right - self.left)
    }
}
