//! The heat map of a routing report: layers by experts, with one panel per task.

use std::collections::BTreeMap;

use cl_report::{HeatMap, Picture, draw_heat_maps};

use crate::{LabError, RouterReport, RoutingReport};

/// Draws one panel per task, with a row per layer and a column per expert; each cell is the mean gate share over the
/// routers of the layer.
pub(crate) fn heat_map(report: &RoutingReport) -> Result<Picture, LabError> {
    let mut layers: BTreeMap<usize, Vec<&RouterReport>> = BTreeMap::new();
    for router in &report.routers {
        layers.entry(router.layer.unwrap_or(0)).or_default().push(router);
    }
    let grid = |task: &str| {
        let row = |(layer, routers): (&usize, &Vec<&RouterReport>)| {
            let shares = (0..report.experts.len()).map(|expert| mean_share(routers, task, expert));
            (format!("layer {layer}"), shares.collect())
        };
        HeatMap { title: task.to_owned(), columns: report.experts.clone(), rows: layers.iter().map(row).collect() }
    };
    let grids: Vec<HeatMap> = report.tasks.iter().map(|task| grid(&task.task)).collect();
    Ok(draw_heat_maps("Share of a token's gates, by layer and expert", "share of a token's gates", &grids)?)
}

fn mean_share(routers: &[&RouterReport], task: &str, expert: usize) -> Option<f64> {
    let shares = routers.iter().filter_map(|r| r.by_task.get(task)).map(|routing| routing.gate_share[expert]);
    (!routers.is_empty()).then(|| shares.sum::<f64>() / routers.len() as f64)
}
