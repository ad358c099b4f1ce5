//! Acquisition versus retention: one point per method, and the Pareto front.

use crate::format::Format;
use crate::study::Value;
use crate::svg::{Anchor, Canvas, Paint, SMALL, TEXT, ticks, width};

use super::bars::{Scale, axis, half};
use super::lines::NARROWEST;

/// The point of a method.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub name: String,
    pub colour: usize,
    /// Horizontal axis: new tasks.
    pub new: Value,
    /// Vertical axis: old knowledge.
    pub old: Value,
}

/// The points, with the labels of the axes.
#[derive(Clone, Debug)]
pub(crate) struct Scatter {
    pub points: Vec<Point>,
    pub across: String,
    pub up: String,
    /// Whether error bars show the spread over seeds.
    pub seeds: bool,
}

/// Returns the Pareto front from left to right: the points for which no other is at least as good in both dimensions
/// and better in one.
pub(crate) fn pareto(points: &[(f64, f64)]) -> Vec<usize> {
    let beaten = |i: usize| {
        let (x, y) = points[i];
        points.iter().any(|&(a, b)| a >= x && b >= y && (a > x || b > y))
    };
    let mut front: Vec<usize> = (0..points.len()).filter(|&i| !beaten(i)).collect();
    front.sort_by(|&a, &b| points[a].0.total_cmp(&points[b].0));
    front
}

impl Scatter {
    pub fn draw(&self, wide: f64) -> Canvas {
        let mut canvas = Canvas::new(wide);
        let tall = if wide >= 600.0 { 430.0 } else { 380.0 };
        canvas.height = tall;
        let places: Vec<(f64, f64)> = self.points.iter().map(|p| (p.new.mean, p.old.mean)).collect();
        let across = scale(self.points.iter().map(|p| &p.new), self.seeds, 40.0, wide - 12.0);
        let up = scale(self.points.iter().map(|p| &p.old), self.seeds, tall - 44.0, 26.0);
        for tick in ticks(across.low, across.high, if wide < 500.0 { 4 } else { 7 }) {
            let x = across.x(tick);
            canvas.line((x, 26.0), (x, tall - 44.0), Paint::Grid, 1.0, "");
            canvas.text((x, tall - 29.0), SMALL, Anchor::Middle, Paint::Muted, &axis(Format::Score(3), tick), 50.0);
        }
        for tick in ticks(up.low, up.high, 6) {
            let y = up.x(tick);
            canvas.line((40.0, y), (wide - 12.0, y), Paint::Grid, 1.0, "");
            canvas.text((35.0, y + 3.6), SMALL, Anchor::End, Paint::Muted, &axis(Format::Score(3), tick), 50.0);
        }
        canvas.text((0.0, 14.0), TEXT, Anchor::Start, Paint::Ink, &format!("↑ {}", self.up), wide);
        canvas.text((wide - 12.0, tall - 8.0), TEXT, Anchor::End, Paint::Ink, &format!("{} →", self.across), wide);
        let front = pareto(&places);
        let steps: Vec<(f64, f64)> = front.iter().map(|&i| (across.x(places[i].0), up.x(places[i].1))).collect();
        canvas.polyline(&stairs(&steps), Paint::Muted, 1.4, "5 4");
        let mut taken: Vec<Area> = Vec::new();
        for point in &self.points {
            let (x, y) = (across.x(point.new.mean), up.x(point.old.mean));
            taken.push(Area { left: x - 6.0, top: y - 6.0, right: x + 6.0, bottom: y + 6.0 });
            taken.extend(self.whiskers(&mut canvas, point, &across, &up));
        }
        for (i, point) in self.points.iter().enumerate() {
            let (x, y) = (across.x(point.new.mean), up.x(point.old.mean));
            let radius = if front.contains(&i) { 6.2 } else { 4.8 };
            canvas.circle((x, y), radius, Paint::Series(point.colour), &self.tip(point, front.contains(&i)));
        }
        // Points of the front are labelled first, since they are the most important.
        let order = front.iter().copied().chain((0..self.points.len()).filter(|i| !front.contains(i)));
        for i in order {
            let at = (across.x(places[i].0), up.x(places[i].1));
            label(&mut canvas, &self.points[i].name, at, front.contains(&i), &mut taken);
        }
        canvas
    }

    /// Draws the error bars of a point, and returns the areas that they cover.
    fn whiskers(&self, canvas: &mut Canvas, point: &Point, across: &Scale, up: &Scale) -> Vec<Area> {
        let (x, y) = (point.new.mean, point.old.mean);
        let (a, b) = (half(&point.new, self.seeds), half(&point.old, self.seeds));
        let bars = [
            (a > 0.0).then(|| ((across.x(x - a), up.x(y)), (across.x(x + a), up.x(y)))),
            (b > 0.0).then(|| ((across.x(x), up.x(y + b)), (across.x(x), up.x(y - b)))),
        ];
        let mut covered = Vec::new();
        for (start, end) in bars.into_iter().flatten() {
            canvas.line(start, end, Paint::Series(point.colour), 1.2, "");
            covered.push(Area { left: start.0 - 1.5, top: start.1 - 1.5, right: end.0 + 1.5, bottom: end.1 + 1.5 });
        }
        covered
    }

    fn tip(&self, point: &Point, front: bool) -> String {
        let details = |value: &Value| crate::table::Cell::new(Some(value.clone()), Format::Score(4)).details();
        let front = if front { "; on the Pareto front" } else { "" };
        format!("{}: {} {}; {} {}{front}", point.name, self.across, details(&point.new), self.up, details(&point.old))
    }
}

/// Returns the Pareto front as a step line.
fn stairs(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut path = Vec::new();
    for (i, &(x, y)) in points.iter().enumerate() {
        if i > 0 {
            path.push((points[i - 1].0, y));
        }
        path.push((x, y));
    }
    path
}

fn scale<'v>(values: impl Iterator<Item = &'v Value>, seeds: bool, start: f64, end: f64) -> Scale {
    let ends = values.flat_map(|v| [v.mean - half(v, seeds), v.mean + half(v, seeds)]);
    let (low, high) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
    let margin = ((high - low) * 0.09).max((NARROWEST - (high - low)) / 2.0);
    Scale { low: low - margin, high: high + margin, left: start, right: end }
}

#[derive(Clone, Copy)]
struct Area {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

impl Area {
    fn overlap(&self, other: &Area) -> f64 {
        let wide = (self.right.min(other.right) - self.left.max(other.left)).max(0.0);
        wide * (self.bottom.min(other.bottom) - self.top.max(other.top)).max(0.0)
    }
}

/// Places a label where it overlaps least with existing marks.
fn label(canvas: &mut Canvas, name: &str, (x, y): (f64, f64), bold: bool, taken: &mut Vec<Area>) {
    let limit = canvas.width * 0.45;
    let wide = width(name, SMALL + 0.5).min(limit) * if bold { 1.06 } else { 1.0 };
    let mut best: Option<(f64, Area)> = None;
    for (ring, distance) in [(0.0, 9.0), (1.0, 20.0), (2.0, 32.0)] {
        for (dx, dy) in
            [(1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (0.8, -0.9), (0.8, 0.9), (-0.8, -0.9), (-0.8, 0.9)]
        {
            let left = x
                + dx * distance
                + if dx > 0.0 {
                    0.0
                } else if dx < 0.0 {
                    -wide
                } else {
                    -wide / 2.0
                };
            let middle = y + dy * (distance + 3.0);
            let area = Area { left, top: middle - 6.5, right: left + wide, bottom: middle + 6.5 };
            let outside = (2.0 - left).max(0.0)
                + (area.right - canvas.width + 2.0).max(0.0)
                + (20.0 - area.top).max(0.0)
                + (area.bottom - canvas.height + 44.0).max(0.0);
            let covered: f64 = taken.iter().map(|t| t.overlap(&area)).sum();
            let cost = covered + outside * 60.0 + ring * 12.0;
            if best.as_ref().is_none_or(|(least, _)| cost < *least - 1e-9) {
                best = Some((cost, area));
            }
        }
    }
    let Some((_, area)) = best else { return };
    let from = ((area.left + area.right) / 2.0, (area.top + area.bottom) / 2.0);
    let nearest = (x.clamp(area.left, area.right), y.clamp(area.top, area.bottom));
    if (nearest.0 - x).hypot(nearest.1 - y) > 14.0 {
        canvas.line((x, y), nearest, Paint::Muted, 0.8, "");
    }
    let at = (area.left, from.1 + 4.0);
    if bold {
        canvas.bold(at, SMALL + 0.5, Anchor::Start, Paint::Ink, name, limit);
    } else {
        canvas.text(at, SMALL + 0.5, Anchor::Start, Paint::Ink, name, limit);
    }
    taken.push(area);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front() {
        let points = [(0.5, 0.5), (0.6, 0.4), (0.4, 0.4), (0.6, 0.3), (0.3, 0.9)];
        assert_eq!(pareto(&points), [4, 0, 1]);
        assert_eq!(pareto(&[(1.0, 1.0), (1.0, 1.0)]), [0, 1], "equal points do not beat each other");
    }
}
