//! Measures the cost of o-lora's penalties relative to a training step: `cargo bench -p cl-train --bench olora`.
//!
//! The model is a Llama with the shape of SmolLM2-135M and random weights, with LoRA of rank 8 on every linear layer
//! and seven earlier adapters. A step has 4 examples of 128 tokens.

use std::time::Instant;

use cl_adapters::{Lambda, Linear, LoraConfig, Mode, OloraConfig, Orthogonality, Overlap, save_lora};
use cl_checkpoint::{Adapter, Manifest};
use cl_data::{Encoded, pack};
use cl_model::{Decoder, LoadOptions, PackedBatch, random_weights, supervised_loss};
use cl_torch::tch::Kind;
use serde_json::json;

const EARLIER: u64 = 7;

struct World {
    model: Decoder,
    earlier: Vec<Adapter>,
}

fn world() -> World {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2
    });
    let config = config.as_object().expect("an object");
    let mut model = random_weights(config, 1, LoadOptions::cpu(Kind::Float)).expect("a valid configuration");
    let lora = LoraConfig::default();
    let folder = tempfile::tempdir().expect("a folder");
    let mut earlier = Vec::new();
    for seed in 1..=EARLIER {
        let dir = folder.path().join(seed.to_string());
        model.add_lora(&lora, seed).expect("targets of its own");
        save_lora(&dir, model.sites(), &[], &lora, "base", Manifest::new("adapter"), false).expect("an empty folder");
        earlier.push(Adapter::open(&dir).expect("just written"));
    }
    model.add_lora(&lora, EARLIER + 1).expect("targets of its own");
    World { model, earlier }
}

/// Forward and backward pass of a step.
fn step(world: &World) {
    let example = Encoded::new((0..128).map(|i| i * 379 % 49152).collect(), 96);
    let packed = pack(&[&example; 4]);
    let mode = Mode::Train { seed: 1 };
    let batch = PackedBatch::from_packed(&packed, 49152, world.model.device).expect("ids of the vocabulary");
    let x = world.model.forward(&batch, mode).expect("a forward pass");
    let loss = supervised_loss(&world.model, &x, &packed, 1.0, mode).expect("a loss");
    loss.backward().expect("a backward pass");
}

/// Median time in seconds of several runs, after one warm-up run.
fn median(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let started = Instant::now();
            f();
            started.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

fn main() {
    // Without this flag, `cargo test` would run the benchmark.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let world = world();
    let linears: Vec<&Linear> = world.model.linears().collect();
    let of_step = median(5, || step(&world));
    println!("a step's passes: {:.0} ms", 1e3 * of_step);
    for (mode, lambda_2) in
        [(Overlap::L1, 0.0), (Overlap::Squared, 0.0), (Overlap::Cosine, 0.0), (Overlap::Cosine, 0.1)]
    {
        let config = OloraConfig { mode, lambda: Lambda::Every(0.5), lambda_2, ..Default::default() };
        let term = Orthogonality::new(linears.iter().copied(), &world.earlier, &config).expect("fitting shapes");
        let seconds = median(15, || {
            term.backward(&linears).expect("gradients");
        });
        println!("{mode:?}, lambda_2 {lambda_2}: {:.2} ms, {:.2} % of it", 1e3 * seconds, 100.0 * seconds / of_step);
    }
}
