//! The chunked loss with its closed-form gradient, packing, and activation checkpointing, against plain autograd.

mod common;

use std::sync::{Mutex, MutexGuard};

use cl_adapters::{LoraConfig, Mode, TargetModules};
use cl_data::{Encoded, Packed, pack};
use cl_model::{Decoder, LoadOptions, PackedBatch, supervised_loss};
use cl_torch::tch::{self, Device, Kind, Tensor};
use serde_json::json;

/// Serializes tests that use dropout, which seeds the process-wide random generator.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

fn examples(lengths: &[(usize, usize)]) -> Vec<Encoded> {
    let all: Vec<usize> = lengths.iter().map(|(source, target)| source + target).collect();
    let ids = common::sequences(&all, 61, 7);
    ids.into_iter().zip(lengths).map(|(input_ids, l)| Encoded::new(input_ids, l.0)).collect()
}

fn packed(examples: &[Encoded]) -> Packed {
    pack(&examples.iter().collect::<Vec<_>>())
}

/// The parameters that are trained.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trained {
    /// All weights, including the head.
    All,
    /// Adapters below the head, which is frozen.
    Below,
    /// Adapters below and on the head.
    WithHead,
    /// An adapter on the head only.
    HeadAlone,
    /// An adapter with these settings.
    Settings(&'static str),
}

fn model(tied: bool, trained: Trained, options: LoadOptions, dropout: f64) -> Decoder {
    let bias = matches!(trained, Trained::Settings(text) if text.contains("\"bias\""));
    let config = common::llama(json!({"tie_word_embeddings": tied, "attention_bias": bias}));
    let mut model = common::model(&config, options);
    let names = |n: &[&str]| TargetModules::Names(n.iter().map(|s| (*s).to_owned()).collect());
    let target_modules = match trained {
        Trained::All => {
            model.set_requires_grad(true);
            return model;
        }
        Trained::Below => TargetModules::default(),
        Trained::WithHead => names(&["v_proj", "down_proj", "lm_head"]),
        Trained::HeadAlone => names(&["lm_head"]),
        Trained::Settings(_) => names(&["v_proj", "down_proj"]),
    };
    let lora = match trained {
        Trained::Settings(text) => serde_json::from_str(text).unwrap(),
        _ => LoraConfig::default(),
    };
    let target_modules = if lora.lora_bias { names(&["v_proj", "lm_head"]) } else { target_modules };
    let lora = LoraConfig { r: 3, lora_dropout: dropout, target_modules, ..lora };
    model.add_lora(&lora, 1).unwrap();
    let _no_graph = tch::no_grad_guard();
    for (name, mut t) in model.trainable() {
        t.copy_(&Tensor::from_slice(&common::weight(&name, t.numel())).view_as(&t));
    }
    model
}

/// The loss (a sum) and all gradients, by name.
type Outcome = (f64, Vec<(String, Tensor)>);

fn gradients(model: &Decoder) -> Vec<(String, Tensor)> {
    let grads = model.trainable().into_iter().map(|(name, mut t)| {
        let grad = t.grad();
        assert!(grad.defined(), "{name} has no gradient");
        let copy = grad.copy();
        t.zero_grad();
        (name, copy)
    });
    grads.collect()
}

fn ours(model: &Decoder, packed: &Packed, scale: f64, mode: Mode) -> Outcome {
    let batch = PackedBatch::from_packed(packed, model.config.vocab_size, Device::Cpu).unwrap();
    let x = model.forward(&batch, mode).unwrap();
    let loss = supervised_loss(model, &x, packed, scale, mode).unwrap();
    assert_eq!(loss.tokens, targets(packed).0.len());
    let sum = loss.nll_sum;
    loss.backward().unwrap();
    (sum, gradients(model))
}

/// Positions that are scored and their expected next tokens, directly from the labels.
fn targets(packed: &Packed) -> (Vec<i64>, Vec<i64>) {
    let starts = |t: usize| packed.cu_seqlens.contains(&(t as i64));
    (1..packed.labels.len())
        .filter(|&t| packed.labels[t] != -100 && !starts(t))
        .map(|t| (t as i64 - 1, packed.labels[t]))
        .unzip()
}

/// Computes the whole `(tokens, vocab)` matrix of logits in one graph.
fn plain(model: &Decoder, packed: &Packed, scale: f64) -> Outcome {
    let batch = PackedBatch::from_packed(packed, model.config.vocab_size, Device::Cpu).unwrap();
    let logits = model.logits(&model.forward(&batch, Mode::Eval).unwrap());
    let (positions, labels) = targets(packed);
    let rows = logits.index_select(0, &Tensor::from_slice(&positions));
    let sum = rows.cross_entropy_loss::<&Tensor>(&Tensor::from_slice(&labels), None, tch::Reduction::Sum, -100, 0.0);
    (&sum * scale).backward();
    (sum.double_value(&[]), gradients(model))
}

/// Relative difference of two losses, and largest difference of two gradients relative to the largest element of each
/// tensor (or to a hundredth of the largest of all: queries that attend to one key have only noise as their gradient).
fn compare(a: &Outcome, b: &Outcome) -> (f64, f64) {
    let size = |t: &Tensor| t.abs().max().double_value(&[]);
    let floor = b.1.iter().map(|(_, t)| size(t)).fold(0.0, f64::max) / 100.0;
    let largest = a.1.iter().zip(&b.1).map(|((name, a), (other, b))| {
        assert_eq!(name, other);
        common::largest_difference(a, b) / size(b).max(floor)
    });
    ((a.0 - b.0).abs() / b.0, largest.fold(0.0, f64::max))
}

#[test]
fn the_chunked_loss_and_all_gradients_equal_plain_cross_entropy() {
    // 630 supervised tokens are two full chunks of 256 rows and a partial one; 7 are a single chunk.
    for lengths in [&[(20, 300), (0, 2), (3, 330), (5, 0), (0, 1)][..], &[(3, 4), (1, 2), (2, 1)][..]] {
        let packed = packed(&examples(lengths));
        for (tied, trained) in [
            (false, Trained::All),
            (true, Trained::All),
            (false, Trained::Below),
            (true, Trained::Below),
            (false, Trained::WithHead),
            (false, Trained::HeadAlone),
            (false, Trained::Settings(r#"{"modules_to_save": ["embed_tokens", "lm_head", "norm"]}"#)),
            (true, Trained::Settings(r#"{"modules_to_save": ["embed_tokens"]}"#)),
            (true, Trained::Settings(r#"{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": true}"#)),
            (true, Trained::Settings(r#"{"bias": "all"}"#)),
            (false, Trained::Settings(r#"{"lora_bias": true}"#)),
            (
                false,
                Trained::Settings(r#"{"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [60, 7, 31]}}"#),
            ),
            (true, Trained::Settings(r#"{"trainable_token_indices": [7, 3, 31]}"#)),
        ] {
            let model = model(tied, trained, LoadOptions::cpu(Kind::Float), 0.0);
            let scale = 1.0 / 37.0;
            let (loss, gradient) = compare(&ours(&model, &packed, scale, Mode::Eval), &plain(&model, &packed, scale));
            eprintln!("tied {tied}, {trained:?}: loss {loss:.1e}, gradients {gradient:.1e}");
            // f32 sums of up to 630 terms in another order.
            assert!(loss < 1e-6 && gradient < 1e-5, "tied {tied}, {trained:?}: {loss}, {gradient}");
        }
    }
}

#[test]
fn every_family_has_the_loss_and_the_gradients_of_plain_cross_entropy() {
    let packed = packed(&examples(&[(20, 100), (3, 120), (1, 60)]));
    for (family, changes) in [
        ("Gemma2ForCausalLM", json!({"head_dim": 8, "sliding_window": 9, "final_logit_softcapping": 6.0})),
        ("Gemma3ForCausalLM", json!({"head_dim": 8, "sliding_window": 9, "final_logit_softcapping": 5.0})),
        ("Phi3ForCausalLM", json!({"partial_rotary_factor": 0.5})),
        ("Olmo2ForCausalLM", json!({"num_key_value_heads": 2})),
        ("GraniteForCausalLM", json!({"logits_scaling": 2.5, "residual_multiplier": 0.3, "embedding_multiplier": 4.0})),
        ("MixtralForCausalLM", json!({"num_local_experts": 3, "num_experts_per_tok": 2})),
    ] {
        let mut config = common::llama(json!({"architectures": [family]}));
        config.extend(changes.as_object().unwrap().clone());
        let mut model = common::model(&config, LoadOptions::cpu(Kind::Float));
        model.set_requires_grad(true);
        let exact = plain(&model, &packed, 0.01);
        let (loss, gradient) = compare(&ours(&model, &packed, 0.01, Mode::Eval), &exact);
        eprintln!("{family}: loss {loss:.1e}, gradients {gradient:.1e}");
        // f32 sums of up to 280 terms in another order.
        assert!(loss < 1e-6 && gradient < 1e-5, "{family}: {loss}, {gradient}");
        model.activation_checkpointing = true;
        let (loss, gradient) = compare(&ours(&model, &packed, 0.01, Mode::Train { seed: 1 }), &exact);
        assert!(loss < 1e-6 && gradient < 1e-5, "{family}, recomputed: {loss}, {gradient}");
    }
}

#[test]
fn gradients_in_bf16_stay_close_to_f32() {
    let packed = packed(&examples(&[(20, 300), (3, 330)]));
    let options = LoadOptions { weights: Kind::Float, ..LoadOptions::cpu(Kind::BFloat16) };
    for tied in [false, true] {
        let run = |options| ours(&model(tied, Trained::All, options, 0.0), &packed, 1.0 / 630.0, Mode::Eval);
        let (half, exact) = (run(options), run(LoadOptions::cpu(Kind::Float)));
        let mut largest = 0f64;
        for ((name, a), (_, b)) in half.1.iter().zip(&exact.1) {
            assert_eq!(a.kind(), Kind::Float, "gradients arrive in the dtype that the weights are kept in");
            let error = (a - b).norm().double_value(&[]) / b.norm().double_value(&[]);
            largest = largest.max(error);
            // Two layers forward and backward with 2^-9 at each rounding; the gradients of norms are sums that largely
            // cancel.
            assert!(error < 0.1, "tied {tied}, {name}: {error}");
        }
        eprintln!("tied {tied}: largest relative error {largest:.1e}");
        assert!((half.0 - exact.0).abs() / exact.0 < 2e-3);
    }
}

#[test]
fn a_packed_batch_gives_the_losses_and_gradients_of_its_examples_alone() {
    let examples = examples(&[(4, 9), (0, 5), (7, 1), (1, 1), (0, 1), (2, 40)]);
    for window in [None, Some(3)] {
        let mut config = common::llama(json!({"architectures": ["MistralForCausalLM"], "sliding_window": window}));
        config.insert("tie_word_embeddings".into(), json!(true));
        let mut model = common::model(&config, LoadOptions::cpu(Kind::Float));
        model.set_requires_grad(true);
        let whole = packed(&examples);
        let together = ours(&model, &whole, 1.0, Mode::Eval);
        let mut sum: Option<Outcome> = None;
        for (i, example) in examples.iter().enumerate() {
            let alone = packed(std::slice::from_ref(example));
            if targets(&alone).0.is_empty() {
                continue;
            }
            let alone = ours(&model, &alone, 1.0, Mode::Eval);
            // The example's contribution to the packed batch: everything else is not scored.
            let mut only = whole.clone();
            let own = whole.cu_seqlens[i]..whole.cu_seqlens[i + 1];
            (0..).zip(&mut only.labels).filter(|(t, _)| !own.contains(t)).for_each(|(_, label)| *label = -100);
            let (loss, gradient) = compare(&ours(&model, &only, 1.0, Mode::Eval), &alone);
            // The same f32 products in blocks of another size.
            assert!(loss < 1e-6 && gradient < 1e-5, "example {i}, window {window:?}: {loss}, {gradient}");
            sum = Some(match sum {
                None => alone,
                Some((l, g)) => (l + alone.0, g.into_iter().zip(alone.1).map(|((n, a), (_, b))| (n, a + b)).collect()),
            });
        }
        let (loss, gradient) = compare(&together, &sum.unwrap());
        eprintln!("window {window:?}: loss {loss:.1e}, gradients {gradient:.1e}");
        assert!(loss < 1e-6 && gradient < 1e-5, "window {window:?}: {loss}, {gradient}");
    }
}

#[test]
fn recomputed_activations_give_bit_equal_losses_and_gradients_with_dropout() {
    let _turn = one_at_a_time();
    let packed = packed(&examples(&[(4, 9), (2, 30)]));
    let whole = Trained::Settings(
        r#"{"modules_to_save": ["embed_tokens", "norm"], "trainable_token_indices": {"lm_head": [3]}}"#,
    );
    for (trained, dropout) in [(Trained::All, 0.0), (Trained::Below, 0.3), (Trained::WithHead, 0.3), (whole, 0.3)] {
        let mut model = model(false, trained, LoadOptions::cpu(Kind::Float), dropout);
        let mut run = |recomputed: bool, seed: u64| {
            model.activation_checkpointing = recomputed;
            ours(&model, &packed, 1.0, Mode::Train { seed })
        };
        let (plain, recomputed) = (run(false, 5), run(true, 5));
        assert_eq!(plain.0, recomputed.0, "{trained:?}");
        for ((name, a), (_, b)) in plain.1.iter().zip(&recomputed.1) {
            assert_eq!(a, b, "{trained:?} {name}");
        }
        assert_eq!(run(false, 5).0, plain.0, "the seed decides");
        assert_eq!(run(false, 6).0 == plain.0, dropout == 0.0, "{trained:?}: another seed drops others");
    }
}

#[test]
fn dropout_changes_the_loss_in_training_only_and_not_on_average() {
    let _turn = one_at_a_time();
    let packed = packed(&examples(&[(4, 9), (2, 30)]));
    for trained in [Trained::Below, Trained::HeadAlone] {
        let without = model(false, trained, LoadOptions::cpu(Kind::Float), 0.0);
        let with = model(false, trained, LoadOptions::cpu(Kind::Float), 0.1);
        let exact = ours(&without, &packed, 1.0, Mode::Eval).0;
        assert_eq!(ours(&with, &packed, 1.0, Mode::Eval).0, exact);
        // Training computes sums in another order than evaluation without a graph.
        let trained_loss = ours(&without, &packed, 1.0, Mode::Train { seed: 1 }).0;
        assert!((trained_loss - exact).abs() < 1e-6 * exact, "{trained_loss} {exact}");
        let draws: Vec<f64> = (0..64).map(|seed| ours(&with, &packed, 1.0, Mode::Train { seed }).0 / exact).collect();
        let mean = draws.iter().sum::<f64>() / 64.0;
        let deviation = (draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / 63.0).sqrt();
        assert!(deviation > 1e-4, "{trained:?}: the masks differ");
        // Five standard errors, and half a percent by which noise inside a convex loss raises the mean.
        assert!((mean - 1.0).abs() < 5.0 * deviation / 8.0 + 5e-3, "{trained:?}: mean {mean}, deviation {deviation}");
    }
}

#[test]
fn nothing_supervised_is_no_loss_and_a_strange_label_an_error() {
    let model = model(true, Trained::All, LoadOptions::cpu(Kind::Float), 0.0);
    let mut packed = packed(&examples(&[(4, 0), (0, 1)]));
    let batch = PackedBatch::from_packed(&packed, 61, Device::Cpu).unwrap();
    let x = model.forward(&batch, Mode::Eval).unwrap();
    let loss = supervised_loss(&model, &x, &packed, 1.0, Mode::Eval).unwrap();
    assert_eq!((loss.nll_sum, loss.tokens), (0.0, 0));
    loss.backward().unwrap();
    packed.labels[2] = 61;
    let error = supervised_loss(&model, &x, &packed, 1.0, Mode::Eval).err().unwrap().to_string();
    assert!(error.contains("token id 61"), "{error}");
}
