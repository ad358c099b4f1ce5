//! The heat map of a routing report: layers by experts, one panel a task.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::{RouterReport, RoutingReport};

const CELL: [usize; 2] = [64, 18]; // width, height
const MARGIN: [usize; 2] = [64, 72]; // left, top
const GAP: usize = 24; // between panels

/// An SVG with a panel for each task: a row a layer, a column an expert, each cell the mean share of a token's gates over the
/// layer's routers.
pub(crate) fn heat_map(report: &RoutingReport) -> String {
    let layers = layers(report);
    let (experts, panels) = (report.experts.len(), report.tasks.len());
    let panel = experts * CELL[0] + GAP;
    let (width, height) = (MARGIN[0] + panels * panel, MARGIN[1] + layers.len() * CELL[1] + GAP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"18\" font-size=\"13\">Share of a token's gates, by layer and expert</text>\n"
    );
    for (row, (layer, _)) in layers.iter().enumerate() {
        let y = MARGIN[1] + row * CELL[1] + CELL[1] - 5;
        text(&mut svg, MARGIN[0] - 6, y, "end", &format!("layer {layer}"));
    }
    for (p, task) in report.tasks.iter().enumerate() {
        let left = MARGIN[0] + p * panel;
        text(&mut svg, left, MARGIN[1] - 26, "start", &task.task);
        for (e, expert) in report.experts.iter().enumerate() {
            text(&mut svg, left + e * CELL[0] + CELL[0] / 2, MARGIN[1] - 8, "middle", &shortened(expert));
        }
        for (row, (_, routers)) in layers.iter().enumerate() {
            for e in 0..experts {
                let share = mean_share(routers, &task.task, e);
                cell(&mut svg, left + e * CELL[0], MARGIN[1] + row * CELL[1], share);
            }
        }
    }
    svg + "</svg>\n"
}

fn layers(report: &RoutingReport) -> BTreeMap<usize, Vec<&RouterReport>> {
    let mut layers: BTreeMap<usize, Vec<&RouterReport>> = BTreeMap::new();
    for router in &report.routers {
        layers.entry(router.layer.unwrap_or(0)).or_default().push(router);
    }
    layers
}

fn mean_share(routers: &[&RouterReport], task: &str, expert: usize) -> f64 {
    let shares = routers.iter().filter_map(|r| r.by_task.get(task)).map(|routing| routing.gate_share[expert]);
    shares.sum::<f64>() / routers.len() as f64
}

/// White for 0 to dark blue for 1, with the number on it.
fn cell(svg: &mut String, x: usize, y: usize, share: f64) {
    let shade = |end: f64| (255.0 + (end - 255.0) * share.clamp(0.0, 1.0)).round() as u8;
    let (red, green, blue) = (shade(8.0), shade(48.0), shade(107.0));
    let ink = if share > 0.5 { "white" } else { "black" };
    let _ = writeln!(
        svg,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"rgb({red},{green},{blue})\"/>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"{ink}\">{share:.2}</text>",
        CELL[0] - 1,
        CELL[1] - 1,
        x + CELL[0] / 2,
        y + CELL[1] - 5
    );
}

fn text(svg: &mut String, x: usize, y: usize, anchor: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{content}</text>");
}

/// What fits above a column.
fn shortened(name: &str) -> String {
    if name.chars().count() <= 10 { name.to_owned() } else { name.chars().take(9).chain(['…']).collect() }
}
