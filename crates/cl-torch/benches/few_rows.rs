//! Times products of few rows with all weights of a small model, by `linear` and by libtorch's own operator:
//! `cargo bench -p cl-torch --bench few_rows`.
//!
//! The weights have the shapes of SmolLM2-135M's 30 layers and head, in f32 and bf16. Prints milliseconds, the best of
//! five passes.

use std::time::Instant;

use cl_torch::linear;
use cl_torch::tch::{Device, Kind, Tensor};

const LAYERS: usize = 30;
/// Outputs and inputs of the linear layers of one decoder layer.
const SHAPES: [[i64; 2]; 7] = [[576, 576], [192, 576], [192, 576], [576, 576], [1536, 576], [1536, 576], [576, 1536]];
const HEAD: [i64; 2] = [49152, 576];

fn main() {
    let random = |shape: [i64; 2], kind| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
    println!("| rows | libtorch, f32 | `linear`, f32 | libtorch, bf16 | `linear`, bf16 |");
    println!("| ---: | ---: | ---: | ---: | ---: |");
    let weights = [Kind::Float, Kind::BFloat16].map(|kind| {
        let layers = (0..LAYERS).flat_map(|_| SHAPES).chain([HEAD]).map(|shape| random(shape, kind));
        (kind, layers.collect::<Vec<_>>())
    });
    for rows in [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192] {
        let mut line = vec![rows.to_string()];
        for (kind, weights) in &weights {
            let inputs: Vec<Tensor> = weights.iter().map(|w| random([rows, w.size()[1]], *kind)).collect();
            for own in [false, true] {
                let pass = || {
                    let started = Instant::now();
                    for (x, w) in inputs.iter().zip(weights) {
                        let _ = if own { linear(x, w, None) } else { x.linear::<&Tensor>(w, None) };
                    }
                    started.elapsed().as_secs_f64() * 1e3
                };
                pass();
                line.push(format!("{:.1}", (0..5).map(|_| pass()).fold(f64::INFINITY, f64::min)));
            }
        }
        println!("| {} |", line.join(" | "));
    }
}
