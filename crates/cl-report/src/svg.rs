//! Drawing of SVG. Shapes have colours by class, so that a page can restyle them, and by attribute, so that any viewer
//! shows them.

use std::fmt::Write;

/// Number of colours for methods; the first is the base model's.
pub(crate) const COLOURS: usize = 16;

/// Colours on a light and on a dark background: grey, then hues that are distinguishable with all common kinds of
/// colour blindness (those of Okabe and Ito, followed by darker and lighter ones).
const SERIES: [(&str, &str); COLOURS] = [
    ("#8c8c8c", "#9a9a9a"),
    ("#0072b2", "#4ba3dc"),
    ("#d55e00", "#ee8336"),
    ("#009e73", "#2fbf95"),
    ("#cc79a7", "#dd94bb"),
    ("#e69f00", "#edb53c"),
    ("#56b4e9", "#86cbf2"),
    ("#7b61c4", "#a18cdf"),
    ("#8f6b3d", "#b8925f"),
    ("#0b5d4b", "#67a896"),
    ("#99325e", "#cf6f98"),
    ("#5f7d0e", "#9cba4a"),
    ("#2f3f94", "#8794e0"),
    ("#b9a06a", "#d6c295"),
    ("#a8322e", "#e0706b"),
    ("#4f9a96", "#7ec4c0"),
];

/// Eleven steps from loss to gain, with no change in the middle: orange to blue.
const RAMP: [(&str, &str); 11] = [
    ("#d9773f", "#a8501d"),
    ("#e69566", "#8d4720"),
    ("#f0b38f", "#6f3c20"),
    ("#f7d0b8", "#553220"),
    ("#fbe8dc", "#3d2a21"),
    ("#f4f4f2", "#2a2a2c"),
    ("#e0ecf6", "#22303d"),
    ("#c0daef", "#233e56"),
    ("#98c4e5", "#234c70"),
    ("#6dabd9", "#215b8b"),
    ("#4590c9", "#2069a3"),
];

/// A colour, by its role.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Paint {
    /// Text and axes.
    Ink,
    /// Secondary text.
    Muted,
    /// Grid lines.
    Grid,
    /// Background.
    Ground,
    /// A method, by its colour's index.
    Series(usize),
    /// A step of the ramp, from −1 (loss) to 1 (gain).
    Ramp(f64),
}

impl Paint {
    fn class(self) -> String {
        match self {
            Paint::Ink => "ink".to_owned(),
            Paint::Muted => "muted".to_owned(),
            Paint::Grid => "grid".to_owned(),
            Paint::Ground => "ground".to_owned(),
            Paint::Series(i) => format!("s{}", i % COLOURS),
            Paint::Ramp(t) => format!("r{}", step(t)),
        }
    }

    fn colours(self) -> (&'static str, &'static str) {
        match self {
            Paint::Ink => ("#1d1d1f", "#ececee"),
            Paint::Muted => ("#63636b", "#a5a5ad"),
            Paint::Grid => ("#dededf", "#3a3a3e"),
            Paint::Ground => ("#ffffff", "#1a1a1c"),
            Paint::Series(i) => SERIES[i % COLOURS],
            Paint::Ramp(t) => RAMP[step(t)],
        }
    }
}

fn step(t: f64) -> usize {
    ((t.clamp(-1.0, 1.0) * 5.0).round() + 5.0) as usize
}

/// Alignment of a text relative to its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing.
pub(crate) struct Canvas {
    pub width: f64,
    pub height: f64,
    body: String,
}

/// Size of ordinary text, in pixels.
pub(crate) const TEXT: f64 = 12.0;
/// Size of numbers next to shapes, in pixels.
pub(crate) const SMALL: f64 = 10.5;

impl Canvas {
    /// Creates a drawing; its height is set once it is known.
    pub fn new(width: f64) -> Canvas {
        Canvas { width, height: 0.0, body: String::new() }
    }

    pub fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: Paint, tip: &str) {
        let size =
            format!(r#"x="{}" y="{}" width="{}" height="{}" rx="1.5""#, n(x), n(y), n(width.max(0.5)), n(height));
        self.shape("rect", &format!("{size} {}", filled(fill)), tip);
    }

    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), stroke: Paint, width: f64, dashes: &str) {
        let ends = format!(r#"x1="{}" y1="{}" x2="{}" y2="{}""#, n(x1), n(y1), n(x2), n(y2));
        let dashes = if dashes.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dashes}""#) };
        self.shape("line", &format!("{ends} {}{dashes}", stroked(stroke, width)), "");
    }

    pub fn polyline(&mut self, points: &[(f64, f64)], stroke: Paint, width: f64, dashes: &str) {
        let dashes = if dashes.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dashes}""#) };
        let attributes = format!(
            r#"points="{}" fill="none" stroke-linejoin="round" {}{dashes}"#,
            list(points),
            stroked(stroke, width)
        );
        self.shape("polyline", &attributes, "");
    }

    /// Draws a translucent area.
    pub fn area(&mut self, points: &[(f64, f64)], fill: Paint) {
        self.shape("polygon", &format!(r#"points="{}" fill-opacity="0.16" {}"#, list(points), filled(fill)), "");
    }

    pub fn circle(&mut self, (x, y): (f64, f64), radius: f64, fill: Paint, tip: &str) {
        let place = format!(r#"cx="{}" cy="{}" r="{}""#, n(x), n(y), n(radius));
        self.shape("circle", &format!("{place} {}", outlined(fill, Paint::Ground)), tip);
    }

    /// Draws the mark of the paper's numbers: a hollow diamond.
    pub fn diamond(&mut self, (x, y): (f64, f64), radius: f64, tip: &str) {
        let points = list(&[(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]);
        self.shape("polygon", &format!(r#"points="{points}" {}"#, outlined(Paint::Ground, Paint::Ink)), tip);
    }

    /// Draws a line of text. If it is longer than `limit` pixels, it is shortened, and a tooltip shows it in full.
    pub fn text(&mut self, (x, y): (f64, f64), size: f64, anchor: Anchor, fill: Paint, text: &str, limit: f64) {
        self.words((x, y), size, anchor, fill, text, limit, "");
    }

    pub fn bold(&mut self, (x, y): (f64, f64), size: f64, anchor: Anchor, fill: Paint, text: &str, limit: f64) {
        self.words((x, y), size, anchor, fill, text, limit, r#" font-weight="700""#);
    }

    /// Draws a line of text that rises to the right, starting at a point.
    pub fn slanted(&mut self, (x, y): (f64, f64), size: f64, fill: Paint, text: &str, limit: f64) {
        let turn = format!(r#" transform="rotate(-40 {} {})""#, n(x), n(y));
        self.words((x, y), size, Anchor::Start, fill, text, limit, &turn);
    }

    fn words(
        &mut self,
        (x, y): (f64, f64),
        size: f64,
        anchor: Anchor,
        fill: Paint,
        text: &str,
        limit: f64,
        more: &str,
    ) {
        let shown = shorten(text, size, limit);
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => r#" text-anchor="middle""#,
            Anchor::End => r#" text-anchor="end""#,
        };
        let title = if shown == text { String::new() } else { format!("<title>{}</title>", escape(text)) };
        let place = format!(r#"x="{}" y="{}" font-size="{}""#, n(x), n(y), n(size));
        let _ = writeln!(self.body, "<text {place}{anchor}{more} {}>{title}{}</text>", filled(fill), escape(&shown));
    }

    fn shape(&mut self, name: &str, attributes: &str, tip: &str) {
        let _ = if tip.is_empty() {
            writeln!(self.body, "<{name} {attributes}/>")
        } else {
            writeln!(self.body, "<{name} {attributes}><title>{}</title></{name}>", escape(tip))
        };
    }

    /// Returns SVG for embedding in a page, whose style sheet defines the colours.
    pub fn inline(&self, class: &str, title: &str) -> String {
        let (width, height) = (n(self.width), n(self.height));
        format!(
            r#"<svg class="{class}" viewBox="0 0 {width} {height}" role="img" aria-label="{}">{}{}</svg>"#,
            escape(title),
            "\n",
            self.body
        )
    }

    /// Returns a separate SVG file, which follows the viewer's light or dark colour scheme.
    pub fn file(&self, title: &str) -> String {
        let style = format!("<style>@media (prefers-color-scheme: dark) {{ {} }}</style>\n", rules(Theme::Dark));
        self.document(title, &style)
    }

    /// Returns a separate SVG file in light colours without a style sheet, for rasterizing.
    pub fn light(&self, title: &str) -> String {
        self.document(title, "")
    }

    fn document(&self, title: &str, style: &str) -> String {
        const MARGIN: f64 = 16.0;
        let (width, height) = (n(self.width + 2.0 * MARGIN), n(self.height + 2.0 * MARGIN));
        let (corner, ground) = (n(-MARGIN), filled(Paint::Ground));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"{corner} {corner} {width} {height}\" \
             font-family=\"system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif\" role=\"img\">\n\
             <title>{}</title>\n{style}<rect x=\"{corner}\" y=\"{corner}\" width=\"{width}\" height=\"{height}\" {ground}/>\n{}</svg>\n",
            escape(title),
            self.body
        )
    }
}

/// Light or dark colours.
#[derive(Clone, Copy)]
pub(crate) enum Theme {
    Light,
    Dark,
}

/// Returns style rules that colour drawings: `.f-` for fills, `.k-` for strokes.
pub(crate) fn rules(theme: Theme) -> String {
    let roles = [Paint::Ink, Paint::Muted, Paint::Grid, Paint::Ground];
    let series = (0..COLOURS).map(Paint::Series);
    let ramp = (0..RAMP.len()).map(|i| Paint::Ramp((i as f64 - 5.0) / 5.0));
    let rule = |paint: Paint| {
        let (light, dark) = paint.colours();
        let colour = match theme {
            Theme::Light => light,
            Theme::Dark => dark,
        };
        format!(".f-{0}{{fill:{colour}}}.k-{0}{{stroke:{colour}}}", paint.class())
    };
    roles.into_iter().chain(series).chain(ramp).map(rule).collect()
}

fn filled(paint: Paint) -> String {
    format!(r#"class="f-{}" fill="{}""#, paint.class(), paint.colours().0)
}

fn stroked(paint: Paint, width: f64) -> String {
    format!(r#"class="k-{}" stroke="{}" stroke-width="{}""#, paint.class(), paint.colours().0, n(width))
}

fn outlined(fill: Paint, stroke: Paint) -> String {
    let (fill_colour, stroke_colour) = (fill.colours().0, stroke.colours().0);
    let classes = format!(r#"class="f-{} k-{}""#, fill.class(), stroke.class());
    format!(r#"{classes} fill="{fill_colour}" stroke="{stroke_colour}" stroke-width="1.2""#)
}

/// Formats a coordinate with no more digits than are visible.
fn n(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

fn list(points: &[(f64, f64)]) -> String {
    points.iter().map(|(x, y)| format!("{},{}", n(*x), n(*y))).collect::<Vec<_>>().join(" ")
}

/// Escapes text for use as content or attribute of XML. Control characters, which XML forbids, become spaces.
pub(crate) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            '\'' => safe += "&#39;",
            c if c.is_control() || matches!(c, '\u{FFFE}' | '\u{FFFF}') => safe.push(' '),
            c => safe.push(c),
        }
    }
    safe
}

/// Estimates the width of a text in common sans-serif fonts in pixels; an upper bound for most texts.
pub(crate) fn width(text: &str, size: f64) -> f64 {
    let em = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ':' | '\'' | '|' => 0.32,
        'm' | 'w' | 'M' | 'W' | '%' => 0.94,
        c if c.is_uppercase() => 0.69,
        c if (c as u32) >= 0x2E80 => 1.0,
        _ => 0.6,
    };
    text.chars().map(em).sum::<f64>() * size
}

/// Shortens a text with an ellipsis to at most `limit` pixels.
pub(crate) fn shorten(text: &str, size: f64, limit: f64) -> String {
    if width(text, size) <= limit {
        return text.to_owned();
    }
    let mut short = String::new();
    for c in text.chars() {
        if width(&short, size) + width("…", size) + size * 0.9 > limit {
            break;
        }
        short.push(c);
    }
    short.trim_end().to_owned() + "…"
}

/// Returns about `count` round positions between two values.
pub(crate) fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count.max(1) as f64;
    if !rough.is_finite() || rough <= 0.0 {
        return vec![low];
    }
    let unit = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|s| s * unit).find(|s| *s >= rough * 0.999).unwrap_or(10.0 * unit);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_positions() {
        let close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(&ticks(0.0, 1.0, 5), &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]));
        assert!(close(&ticks(-0.41, 0.1, 4), &[-0.4, -0.2, 0.0]), "{:?}", ticks(-0.41, 0.1, 4));
        assert_eq!(ticks(0.5, 0.5, 4), [0.5]);
    }

    #[test]
    fn drawings_are_xml() {
        let mut canvas = Canvas::new(10.0);
        canvas.rect((0.0, 0.0), (1.0, 1.0), Paint::Series(1), "a < b\u{0}");
        canvas.circle((0.0, 0.0), 1.0, Paint::Series(2), "c");
        let text = canvas.light("<t>");
        for line in text.lines() {
            assert!(line.matches("class=").count() <= 1, "{line}");
        }
        assert!(text.contains("<title>a &lt; b </title>") && text.contains("<title>&lt;t&gt;</title>"), "{text}");
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(shorten("short", 12.0, 100.0), "short");
        let short = shorten("a very long name of a method", 12.0, 80.0);
        assert!(short.ends_with('…') && width(&short, 12.0) <= 80.0, "{short}");
    }
}
