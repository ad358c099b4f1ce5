//! Three tasks in sequence with o-lora: the overlap of the rounds' adapters, and the scores, as a function of λ.
//!
//! ```text
//! cargo run -p cl-examples --example olora_overlap [FIGURE.svg]
//! ```
//!
//! Overlap is the mean squared cosine between rows of A of different rounds, over layers and pairs of rounds; 0 if the
//! input directions of all rounds are orthogonal. It takes about three minutes on two cores and needs no network and no
//! data.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cl_adapters::{Lambda, OloraConfig, Overlap};
use cl_checkpoint::{Adapter, Dtype, Interrupt, TensorSource, convert};
use cl_eval::{Group, ScoreMatrix};
use cl_lab::{Limits, SequenceConfig, run_sequence};
use cl_torch::tch;
use cl_train::TrainConfig;
use plotters::prelude::*;
use world::{pretrain, say, sequence, write_data};

mod world;

const TASKS: [&str; 3] = ["first", "mood", "largest"];
const MODES: [(&str, Overlap, [f64; 4]); 3] = [
    ("l1", Overlap::L1, [1e-4, 1e-3, 1e-2, 1e-1]),
    ("squared", Overlap::Squared, [1e-3, 1e-2, 1e-1, 1.0]),
    ("cosine", Overlap::Cosine, [1e-1, 1.0, 1e1, 1e2]),
];

/// One sequence's outcome.
struct Point {
    lambda: f64,
    overlap: f64,
    new: f64,
}

fn main() -> Result<()> {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("data");
    write_data(&data)?;
    eprintln!("pretraining a small Llama on facts and on the form of the tasks' questions");
    let base = pretrain(folder.path(), &data)?;

    let run = |name: &str, mode: Overlap, lambda: f64| -> Result<Point> {
        eprintln!("{name}, lambda {lambda}");
        let out = folder.path().join(format!("{name}-{lambda}"));
        let report =
            run_sequence(&orthogonal(&base, &data, mode, lambda), &out, false, &Interrupt::default(), &mut say)?;
        Ok(Point { lambda, overlap: overlap_of_rounds(&out)?, new: new_knowledge(&report.matrix)? })
    };
    let plain = run("plain", Overlap::Cosine, 0.0)?;
    println!("{:<8} {:>8} {:>9} {:>14}", "mode", "lambda", "overlap", "new knowledge");
    println!("{:<8} {:>8} {:>9.5} {:>14.3}", "any", 0, plain.overlap, plain.new);
    let mut curves = Vec::new();
    for (name, mode, lambdas) in MODES {
        let points = lambdas.iter().map(|&lambda| run(name, mode, lambda)).collect::<Result<Vec<_>>>()?;
        for point in &points {
            println!("{name:<8} {:>8} {:>9.5} {:>14.3}", point.lambda, point.overlap, point.new);
        }
        curves.push((name, points));
    }
    match std::env::args().nth(1) {
        Some(path) => draw(Path::new(&path), plain.overlap, &curves),
        None => Ok(()),
    }
}

/// The three tasks in order, in short.
fn orthogonal(base: &Path, data: &Path, mode: Overlap, lambda: f64) -> SequenceConfig {
    let config = sequence(base, data, &TASKS);
    let olora = OloraConfig { mode, lambda: Lambda::Every(lambda), ..OloraConfig::default() };
    let train = TrainConfig { epochs: 10, olora: Some(olora), ..config.train };
    SequenceConfig { limit: Limits { train: Some(160), test: Some(50), ..Limits::default() }, train, ..config }
}

/// Mean score over all tasks after the last round.
fn new_knowledge(matrix: &ScoreMatrix) -> Result<f64> {
    matrix.mean(matrix.rows.len() - 1, Group::New).context("every task is scored")
}

/// Mean over pairs of rounds and over layers of the mean squared cosine between rows of A.
fn overlap_of_rounds(out: &Path) -> Result<f64> {
    let dirs: Vec<PathBuf> =
        TASKS.iter().enumerate().map(|(i, task)| out.join(format!("rounds/{}-{task}/adapter", i + 1))).collect();
    let rounds = dirs.iter().map(|dir| unit_rows(dir)).collect::<Result<Vec<_>>>()?;
    let (mut sum, mut count) = (0.0, 0);
    for (i, later) in rounds.iter().enumerate() {
        for earlier in &rounds[..i] {
            for (a, p) in later.iter().zip(earlier) {
                let cosines = a.iter().flat_map(|a| p.iter().map(move |p| dot(a, p)));
                sum += cosines.map(|c| c * c).sum::<f64>() / (a.len() * p.len()) as f64;
                count += 1;
            }
        }
    }
    Ok(sum / f64::from(count))
}

/// Of every module the rows of A, divided by their lengths.
fn unit_rows(dir: &Path) -> Result<Vec<Vec<Vec<f64>>>> {
    let adapter = Adapter::open(dir)?;
    let of_module = |module: &cl_checkpoint::AdapterModule| -> Result<Vec<Vec<f64>>> {
        let values = convert::to_f32(Dtype::F32, adapter.bytes(&module.factors()[0])?).context("factors are f32")?;
        let unit = |row: &[f32]| {
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let length = dot(&row, &row).sqrt();
            row.iter().map(|x| x / length).collect()
        };
        Ok(values.chunks(module.a_shape[1]).map(unit).collect())
    };
    adapter.modules().into_iter().map(of_module).collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Overlap over λ, both logarithmic, and the overlap without a penalty as a line.
fn draw(path: &Path, plain: f64, curves: &[(&str, Vec<Point>)]) -> Result<()> {
    let area = SVGBackend::new(path, (720, 440)).into_drawing_area();
    area.fill(&WHITE)?;
    let points = || curves.iter().flat_map(|(_, points)| points);
    let least = points().map(|p| p.overlap).fold(plain, f64::min) / 2.0;
    let (first, last) = points().fold((f64::MAX, 0.0), |(a, b): (f64, f64), p| (a.min(p.lambda), b.max(p.lambda)));
    let mut chart = ChartBuilder::on(&area)
        .caption("Overlap between rounds", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d((first / 2.0..last * 2.0).log_scale(), (least..plain * 2.0).log_scale())?;
    let power = |x: &f64| format!("{x:e}");
    chart
        .configure_mesh()
        .x_desc("λ")
        .y_desc("mean cos² between rows of A")
        .x_label_formatter(&power)
        .y_label_formatter(&power)
        .draw()?;
    chart
        .draw_series(LineSeries::new([(first / 2.0, plain), (last * 2.0, plain)], BLACK.stroke_width(1)))?
        .label("λ = 0")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLACK));
    for (i, (name, points)) in curves.iter().enumerate() {
        let color = Palette99::pick([0, 1, 3][i]).to_rgba();
        let places: Vec<(f64, f64)> = points.iter().map(|p| (p.lambda, p.overlap)).collect();
        chart
            .draw_series(LineSeries::new(places, color.stroke_width(2)).point_size(4))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .position(SeriesLabelPosition::LowerLeft)
        .draw()?;
    Ok(area.present()?)
}
