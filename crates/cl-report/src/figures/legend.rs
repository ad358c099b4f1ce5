//! The legend above a figure: names and marks, in as many lines as needed.

use crate::svg::{Anchor, Canvas, Paint, TEXT, width};

/// Marks in addition to the colours of the methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extra {
    /// The paper's number.
    Paper,
    /// Standard deviation over seeds.
    Spread,
    /// Standard error over documents.
    Error,
    /// Expected score of random guessing.
    Chance,
    /// The round that trains on a task.
    Own,
}

impl Extra {
    fn words(self) -> &'static str {
        match self {
            Extra::Paper => "paper",
            Extra::Spread => "± sd over seeds",
            Extra::Error => "± standard error",
            Extra::Chance => "chance",
            Extra::Own => "the task’s own round",
        }
    }
}

/// Draws the legend and returns the vertical position of its lower edge.
pub(super) fn draw(canvas: &mut Canvas, top: f64, names: &[(String, usize)], extras: &[Extra]) -> f64 {
    if names.is_empty() && extras.is_empty() {
        return top;
    }
    let (mut x, mut y) = (0.0, top);
    let limit = canvas.width - 40.0;
    let mut place = |text: &str| {
        let needed = 20.0 + width(text, TEXT).min(limit) + 14.0;
        if x > 0.0 && x + needed > canvas.width + 14.0 {
            (x, y) = (0.0, y + 20.0);
        }
        let here = (x, y);
        x += needed;
        here
    };
    let methods: Vec<(f64, f64)> = names.iter().map(|(name, _)| place(name)).collect();
    let marks: Vec<(f64, f64)> = extras.iter().map(|extra| place(extra.words())).collect();
    for ((x, y), (name, colour)) in methods.into_iter().zip(names) {
        canvas.rect((x, y + 2.0), (13.0, 11.0), Paint::Series(*colour), "");
        canvas.text((x + 19.0, y + 11.5), TEXT, Anchor::Start, Paint::Ink, name, limit);
    }
    let mut bottom = y;
    for ((x, y), extra) in marks.into_iter().zip(extras) {
        mark(canvas, x, y, *extra);
        canvas.text((x + 19.0, y + 11.5), TEXT, Anchor::Start, Paint::Muted, extra.words(), limit);
        bottom = y;
    }
    bottom + 28.0
}

fn mark(canvas: &mut Canvas, x: f64, y: f64, extra: Extra) {
    match extra {
        Extra::Paper => canvas.diamond((x + 7.0, y + 7.5), 4.6, ""),
        Extra::Spread | Extra::Error => {
            canvas.line((x, y + 7.5), (x + 14.0, y + 7.5), Paint::Ink, 1.2, "");
            for end in [x, x + 14.0] {
                canvas.line((end, y + 4.5), (end, y + 10.5), Paint::Ink, 1.2, "");
            }
        }
        Extra::Chance => canvas.line((x + 7.0, y + 1.0), (x + 7.0, y + 14.0), Paint::Muted, 1.3, "2 2"),
        Extra::Own => canvas.line((x + 7.0, y + 1.0), (x + 7.0, y + 14.0), Paint::Muted, 1.0, "4 3"),
    }
}
