//! Size and error of experts stored as differences from the base: bytes, the error of every feed-forward block on the
//! activations of a text, and the error of the text's log-probabilities.
//!
//! ```text
//! cargo run -p cl-examples --example expert_storage -- BASE STORAGE,STORAGE,... EXPERT EXPERT... [SCORES.csv] [FIGURE.svg]
//! ```
//!
//! `STORAGE` is as `cl moe mix --experts` has it, BASE and EXPERTs are model directories. All are compared with the mixture whose
//! experts are whole; two experts for each token, random routers, f32. The figure has the error over the bytes of an expert. With a
//! file of scores it has these as well: lines `storage,difference,low,high` with the difference of a score from that of whole
//! experts, and its interval, as `cl eval compare` gives them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use cl_checkpoint::Checkpoint;
use cl_data::Tokenizer;
use cl_model::{Decoder, LoadOptions, PackedBatch, token_log_probs};
use cl_moe::{ExpertConfig, ExpertStorage, MixConfig, MixOptions, ModelBytes, Plan, mix};
use cl_torch::tch::{Device, Kind, Tensor, no_grad_guard};
use plotters::coord::Shift;
use plotters::prelude::*;

const TEXT: &str = "The town lies where two rivers meet. Every spring the water rises to the second step of the mill, and every autumn \
                    the mayor promises a higher wall. Question: A farmer has 12 sheep and buys 7 more. How many sheep does he have? \
                    Answer: 12 + 7 = 19, so he has 19 sheep.\n\ndef area(width, height):\n    return width * height\n\nThe committee \
                    decided to leave interest rates unchanged, since inflation has slowed in most regions while hiring held up.";

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let figure = arguments.pop_if(|last| last.ends_with(".svg"));
    let scores = match arguments.pop_if(|last| last.ends_with(".csv")) {
        Some(path) => read_scores(&std::fs::read_to_string(&path)?).with_context(|| path)?,
        None => Vec::new(),
    };
    let [base, storages, experts @ ..] = arguments.as_slice() else {
        anyhow::bail!("expected BASE STORAGE,STORAGE,... EXPERT EXPERT...");
    };
    ensure!(experts.len() >= 2, "{} experts; two or more are needed", experts.len());
    let storages: Vec<ExpertStorage> =
        storages.split(',').map(|s| s.parse().map_err(anyhow::Error::msg)).collect::<Result<_>>()?;
    let _no_graph = no_grad_guard();
    let folder = tempfile::tempdir()?;
    let mut config: MixConfig = MixConfig {
        base_model: PathBuf::from(base),
        architecture: None,
        num_experts_per_tok: Some(2),
        gateless: false,
        global_router: false,
        modules: vec![cl_moe::MixModule::Mlp],
        layers: None,
        dtype: None,
        expert_storage: ExpertStorage::Full,
        router: cl_moe::RouterConfig::default(),
        shared_expert: None,
        experts: experts.iter().map(expert).collect(),
    };
    let ids = Tokenizer::from_dir(Path::new(base))?.encode(TEXT, true)?;
    let (whole, bytes, _) = make(&config, &folder.path().join("full"))?;
    let batch = PackedBatch::new(&[&ids], whole.config.vocab_size, Device::Cpu)?;
    let inputs = whole.feed_forward_inputs(&batch)?;
    let expected: Vec<Tensor> = inputs.iter().enumerate().map(|(layer, x)| whole.feed_forward(layer, x)).collect();
    let log_probs = scored(&whole, &ids)?;
    drop(whole);

    println!("{} experts, {} tokens", experts.len(), ids.len());
    println!(
        "{:<14} {:>9} {:>9} {:>11} {:>11} {:>12} {:>9}",
        "experts", "MB", "to base", "mean error", "largest", "|Δ log p|", "seconds"
    );
    let row = |name: String, bytes: ModelBytes, errors: [f64; 2], difference: f64, seconds: f64| {
        let ratio = bytes.total_bytes as f64 / bytes.base_bytes as f64;
        let mb = bytes.total_bytes as f64 / 1e6;
        let [mean, largest] = errors;
        println!("{name:<14} {mb:>9.1} {ratio:>9.2} {mean:>11.2e} {largest:>11.2e} {difference:>12.2e} {seconds:>9.1}");
    };
    row("full".to_owned(), bytes, [0.0; 2], 0.0, 0.0);
    // What the experts' training makes of the layers: the error of leaving it out.
    let unchanged =
        errors(&Decoder::load(&Checkpoint::open(Path::new(base))?, LoadOptions::cpu(Kind::Float))?, &inputs, &expected);
    println!("{:<14} {:>9} {:>9} {:>11.2e} {:>11.2e}", "base alone", "", "", unchanged[0], unchanged[1]);
    let share = |bytes: ModelBytes| bytes.expert_bytes as f64 / experts.len() as f64 / bytes.base_bytes as f64;
    let (full, mut points) = (share(bytes), Vec::new());
    for storage in storages {
        config.expert_storage = storage;
        let dir = folder.path().join("stored");
        let (model, bytes, seconds) = make(&config, &dir)?;
        let [mean, largest] = errors(&model, &inputs, &expected);
        let differences = scored(&model, &ids)?.into_iter().zip(&log_probs).map(|(a, b)| (a - b).abs());
        row(storage.to_string(), bytes, [mean, largest], differences.sum::<f64>() / log_probs.len() as f64, seconds);
        points.push(Point { storage, bytes: share(bytes), mean, largest });
        drop(model);
        std::fs::remove_dir_all(&dir)?;
    }
    let Some(path) = figure else { return Ok(()) };
    let height = if scores.is_empty() { 440 } else { 680 };
    let area = SVGBackend::new(&path, (720, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(440);
    draw_errors(&upper, full, unchanged[0], &points)?;
    if !scores.is_empty() {
        draw_scores(&lower, full, &points, &scores)?;
    }
    Ok(area.present()?)
}

/// The score of a mixture, compared with that of whole experts.
struct Score {
    storage: ExpertStorage,
    difference: f64,
    low: f64,
    high: f64,
}

fn read_scores(text: &str) -> Result<Vec<Score>> {
    let read = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let [storage, difference, low, high] = fields.as_slice() else {
            anyhow::bail!("{line:?}: expected storage,difference,low,high");
        };
        let storage = storage.parse().map_err(anyhow::Error::msg)?;
        Ok(Score { storage, difference: difference.parse()?, low: low.parse()?, high: high.parse()? })
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(read).collect()
}

/// Mean and largest relative error of a model's feed-forward blocks.
fn errors(model: &Decoder, inputs: &[Tensor], expected: &[Tensor]) -> [f64; 2] {
    let of_layer = |(layer, (x, y)): (usize, (&Tensor, &Tensor))| {
        ((model.feed_forward(layer, x) - y).norm() / y.norm()).double_value(&[])
    };
    let errors: Vec<f64> = inputs.iter().zip(expected).enumerate().map(of_layer).collect();
    [errors.iter().sum::<f64>() / errors.len() as f64, errors.iter().copied().fold(0.0, f64::max)]
}

/// A way to store experts, and what it saves and costs.
struct Point {
    storage: ExpertStorage,
    /// Bytes of one expert over those of the base.
    bytes: f64,
    /// Mean error of the layers.
    mean: f64,
    /// That of the worst layer.
    largest: f64,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Range of the bytes of one expert, and where seven of them and the base take twice the base's bytes.
fn range(full: f64, points: &[Point]) -> (std::ops::Range<f64>, f64) {
    let bound = 1.0 / 7.0;
    let least = points.iter().map(|p| p.bytes).fold(bound, f64::min) / 1.5;
    (least..full * 1.5, bound)
}

/// Differences of scores over the bytes of one expert, with their intervals.
fn draw_scores(area: &Area<'_>, full: f64, points: &[Point], scores: &[Score]) -> Result<()> {
    let (bytes, bound) = range(full, points);
    let most = scores.iter().map(|s| s.high.max(-s.low)).fold(0.01, f64::max) * 1.2;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(bytes.clone().log_scale(), -most..most)?;
    chart
        .configure_mesh()
        .x_desc("bytes of one expert, relative to the base's")
        .y_desc("difference of the score")
        .x_label_formatter(&|x| format!("{x:.2}"))
        .y_label_formatter(&|y| format!("{y:+.2}"))
        .draw()?;
    chart.draw_series(LineSeries::new([(bound, -most), (bound, most)], BLACK.stroke_width(1)))?;
    chart.draw_series(LineSeries::new([(full, -most), (full, most)], RED.stroke_width(1)))?;
    chart.draw_series(LineSeries::new([(bytes.start, 0.0), (bytes.end, 0.0)], RED.stroke_width(1)))?;
    let color = Palette99::pick(3).to_rgba();
    for score in scores {
        let point = points.iter().find(|p| p.storage == score.storage);
        let x = point.with_context(|| format!("{} has a score, but is not among the storages", score.storage))?.bytes;
        chart.draw_series(LineSeries::new([(x, score.low), (x, score.high)], color.stroke_width(2)))?;
        chart.draw_series([Circle::new((x, score.difference), 4, color.filled())])?;
        let name =
            EmptyElement::at((x, score.difference)) + Text::new(score.storage.to_string(), (8, -6), ("sans-serif", 12));
        chart.draw_series([name])?;
    }
    Ok(())
}

/// Errors over the bytes of one expert, both logarithmic: ranks as curves, one bit a weight as points.
fn draw_errors(area: &Area<'_>, full: f64, unchanged: f64, points: &[Point]) -> Result<()> {
    let (bytes, bound) = range(full, points);
    let (low, high) = points.iter().fold((f64::MAX, 0.0), |(a, b): (f64, f64), p| (a.min(p.mean), b.max(p.largest)));
    let (low, high) = (10f64.powf(low.log10().floor()), high.max(unchanged) * 1.5);
    let mut chart = ChartBuilder::on(area)
        .caption("Experts as differences from the base", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(bytes.clone().log_scale(), (low..high).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bytes of one expert, relative to the base's")
        .y_desc("relative error of a feed-forward block")
        .x_label_formatter(&|x| format!("{x:.2}"))
        .y_label_formatter(&|y| format!("{y:.0e}"))
        .draw()?;
    for (at, name, color) in
        [(bound, "seven experts and the base: 2.0 times the base", BLACK), (full, "full: no error", RED)]
    {
        chart
            .draw_series(LineSeries::new([(at, low), (at, high)], color.stroke_width(1)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color));
    }
    chart
        .draw_series(LineSeries::new([(bytes.start, unchanged), (bytes.end, unchanged)], BLUE.stroke_width(1)))?
        .label("the base alone, mean of layers")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLUE));
    let (ranks, bits): (Vec<&Point>, Vec<&Point>) =
        points.iter().partition(|p| matches!(p.storage, ExpertStorage::LowRank(_)));
    for (name, of, color) in [
        ("mean of layers", (|p: &Point| p.mean) as fn(&Point) -> f64, Palette99::pick(0).to_rgba()),
        ("worst layer", |p| p.largest, Palette99::pick(1).to_rgba()),
    ] {
        let place = |p: &&Point| (p.bytes, of(p));
        chart
            .draw_series(LineSeries::new(ranks.iter().map(place), color.stroke_width(2)).point_size(4))?
            .label(format!("lowrank, {name}"))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart
            .draw_series(bits.iter().map(|p| TriangleMarker::new(place(p), 7, color.filled())))?
            .label(format!("bitdelta, {name}"))
            .legend(move |(x, y)| TriangleMarker::new((x + 10, y), 6, color.filled()));
    }
    let label = |p: &&Point| match p.storage {
        ExpertStorage::LowRank(rank) => format!("R = {rank}"),
        other => other.to_string(),
    };
    chart.draw_series(points.iter().map(|p| {
        EmptyElement::at((p.bytes, p.mean)) + Text::new(label(&p), (-14, 8), ("sans-serif", 12).into_font())
    }))?;
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .position(SeriesLabelPosition::LowerLeft)
        .draw()?;
    Ok(())
}

fn expert(dir: &String) -> ExpertConfig {
    ExpertConfig { model: PathBuf::from(dir), positive_prompts: Vec::new(), negative_prompts: Vec::new() }
}

/// The mixture, its bytes, and how long it took to write.
fn make(config: &MixConfig, out: &Path) -> Result<(Decoder, ModelBytes, f64)> {
    let plan = Plan::new(config)?;
    let start = Instant::now();
    let summary = mix(&plan, out, &MixOptions::default(), &|_| {})?;
    let seconds = start.elapsed().as_secs_f64();
    let model = Decoder::load(&Checkpoint::open(out)?, LoadOptions::cpu(Kind::Float))?;
    Ok((model, summary.info.bytes.context("a mixture of models has bytes")?, seconds))
}

/// Log-probabilities of a text's tokens.
fn scored(model: &Decoder, ids: &[u32]) -> Result<Vec<f64>> {
    Ok(token_log_probs(model, &[ids])?.into_iter().flatten().map(|p| p.0).collect())
}
