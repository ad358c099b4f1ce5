//! Scoring and generation: results do not depend on batching, caching or, within its precision, the dtype.

mod common;

use cl_adapters::Mode;
use cl_model::{Decoder, LoadOptions, PackedBatch, greedy, token_log_probs};
use cl_torch::tch::{Kind, Tensor};
use serde_json::{Map, Value, json};

/// One config for each variant of attention.
fn configs() -> Vec<(&'static str, Map<String, Value>)> {
    let of = |family: &str, changes: Value| {
        let mut config = common::llama(json!({"architectures": [family], "num_attention_heads": 4, "hidden_size": 32}));
        config.extend(changes.as_object().unwrap().clone());
        config
    };
    vec![
        ("llama", of("LlamaForCausalLM", json!({}))),
        ("window", of("MistralForCausalLM", json!({"sliding_window": 5, "num_key_value_heads": 2}))),
        (
            "window in one layer",
            of("Qwen2ForCausalLM", json!({"use_sliding_window": true, "sliding_window": 3, "max_window_layers": 1})),
        ),
        ("without positions", of("SmolLM3ForCausalLM", json!({"no_rope_layer_interval": 2, "num_key_value_heads": 4}))),
        (
            "soft caps",
            of("Gemma2ForCausalLM", json!({"head_dim": 8, "sliding_window": null, "query_pre_attn_scalar": 5})),
        ),
        ("soft caps, window", of("Gemma2ForCausalLM", json!({"head_dim": 8, "sliding_window": 5}))),
        ("two kinds of positions", of("Gemma3ForCausalLM", json!({"head_dim": 8, "sliding_window": 6}))),
        ("fused projections", of("Phi3ForCausalLM", json!({"num_key_value_heads": 2, "partial_rotary_factor": 0.5}))),
        ("norms behind", of("Olmo2ForCausalLM", json!({}))),
        ("multipliers", of("GraniteForCausalLM", json!({"attention_multiplier": 0.3, "logits_scaling": 2.0}))),
        ("experts", of("MixtralForCausalLM", json!({"num_local_experts": 4, "num_experts_per_tok": 2}))),
    ]
}

fn slices(sequences: &[Vec<u32>]) -> Vec<&[u32]> {
    sequences.iter().map(Vec::as_slice).collect()
}

/// Logits after the last token, computed without any cache.
fn last_logits(model: &Decoder, ids: &[u32]) -> Tensor {
    let batch = PackedBatch::new(&[ids], model.config.vocab_size, model.device).unwrap();
    let x = model.forward(&batch, Mode::Eval).unwrap();
    model.logits(&x.narrow(0, ids.len() as i64 - 1, 1)).squeeze()
}

#[test]
fn greedy_with_a_cache_equals_greedy_without_over_prompts_of_different_lengths() {
    // Longer than the cache's initial capacity, so that it grows; prompts shorter and longer than the window.
    const NEW: usize = 80;
    for (name, config) in configs() {
        let model = common::model(&config, LoadOptions::cpu(Kind::Float));
        let prompts = common::sequences(&[1, 7, 40, 2, 19], 61, 2);
        // Two texts end early, so that the cache is reduced twice.
        let end = |index: usize| if index % 2 == 1 { 10 * index } else { NEW };
        let together = greedy(&model, &slices(&prompts), NEW, &[], &mut |i, ids| ids.len() == end(i)).unwrap();
        let mut closest = f64::INFINITY;
        for (i, (prompt, generation)) in prompts.iter().zip(&together).enumerate() {
            assert_eq!(generation.ids.len(), end(i).min(NEW));
            assert_eq!(generation.stopped, end(i) <= NEW);
            let mut ids = prompt.clone();
            for &token in &generation.ids {
                let logits = last_logits(&model, &ids);
                let (two, _) = logits.topk(2, 0, true, true);
                let margin = two.double_value(&[0]) - two.double_value(&[1]);
                closest = closest.min(margin);
                // f32 logits near 2 differ by 1e-6 between the two computations; below that margin, the most likely
                // token is arbitrary.
                if margin > 1e-5 {
                    assert_eq!(token, logits.argmax(0, false).int64_value(&[]) as u32, "{name}, prompt {i}");
                }
                ids.push(token);
            }
        }
        eprintln!("{name}: closest decision {closest:.1e}");
    }
}

#[test]
fn prompts_that_begin_alike_are_continued_as_each_alone() {
    const NEW: usize = 30;
    for (name, config) in configs() {
        let model = common::model(&config, LoadOptions::cpu(Kind::Float));
        let header = &common::sequences(&[90], 61, 9)[0];
        let tails = common::sequences(&[1, 6, 6, 25], 61, 10);
        let mut prompts: Vec<Vec<u32>> = tails.iter().map(|t| [header.as_slice(), t].concat()).collect();
        prompts.extend([header.clone(), header.clone()]); // the shortest one, twice
        let together = greedy(&model, &slices(&prompts), NEW, &[], &mut |i, ids| ids.len() == 10 + 5 * i).unwrap();
        for (i, (prompt, generation)) in prompts.iter().zip(&together).enumerate() {
            let end = NEW.min(10 + 5 * i);
            let alone = &greedy(&model, &[prompt], end, &[], &mut |_, _| false).unwrap()[0].ids;
            let differs = alone.iter().zip(&generation.ids).position(|(a, b)| a != b);
            if let Some(at) = differs {
                // Sums are computed in another order; which of two closer logits is larger is arbitrary.
                let (two, _) = last_logits(&model, &[prompt, &alone[..at]].concat()).topk(2, 0, true, true);
                assert!(two.double_value(&[0]) - two.double_value(&[1]) < 1e-5, "{name}, prompt {i}, token {at}");
            } else {
                assert_eq!(generation.ids, *alone, "{name}, prompt {i}");
            }
        }
    }
}

#[test]
fn an_end_token_ends_a_generation_and_is_not_part_of_it() {
    let model = common::model(&configs()[0].1, LoadOptions::cpu(Kind::Float));
    let prompts = common::sequences(&[5, 3], 61, 4);
    let free = greedy(&model, &slices(&prompts), 6, &[], &mut |_, _| false).unwrap();
    assert!(free.iter().all(|g| g.ids.len() == 6 && !g.stopped));
    let eos = free[0].ids[3];
    let ended = greedy(&model, &slices(&prompts), 6, &[eos], &mut |_, _| false).unwrap();
    for (free, ended) in free.iter().zip(&ended) {
        let expected = free.ids.iter().position(|&id| id == eos);
        assert_eq!(ended.stopped, expected.is_some());
        assert_eq!(ended.ids, free.ids[..expected.unwrap_or(6)]);
    }
    assert!(greedy(&model, &slices(&prompts), 0, &[], &mut |_, _| false).unwrap()[1].ids.is_empty());
    assert!(greedy(&model, &[], 6, &[], &mut |_, _| false).unwrap().is_empty());
}

#[test]
fn scores_do_not_move_with_the_composition_of_a_batch() {
    for (name, config) in configs() {
        let model = common::model(&config, LoadOptions::cpu(Kind::Float));
        let sequences = common::sequences(&[9, 2, 33, 1, 300, 12], 61, 3);
        let together = token_log_probs(&model, &slices(&sequences)).unwrap();
        let reversed: Vec<&[u32]> = sequences.iter().rev().map(Vec::as_slice).collect();
        let mut backwards = token_log_probs(&model, &reversed).unwrap();
        backwards.reverse();
        let mut largest = 0f64;
        for (i, sequence) in sequences.iter().enumerate() {
            let alone = token_log_probs(&model, &[sequence]).unwrap();
            assert_eq!(alone[0].len(), sequence.len() - 1);
            for other in [&together[i], &backwards[i]] {
                for (a, b) in alone[0].iter().zip(other) {
                    largest = largest.max((a.0 - b.0).abs());
                }
            }
        }
        eprintln!("{name}: largest difference {largest:.1e}");
        // Log-probabilities near 4; the same f32 products in blocks of another size.
        assert!(largest < 1e-5, "{name}: {largest}");
    }
}

#[test]
fn half_precision_scores_are_close_to_f32() {
    // Rounding may select another expert, which computes another function.
    for (name, config) in configs().into_iter().filter(|(name, _)| *name != "experts") {
        let sequences = common::sequences(&[20, 64, 3], 61, 5);
        let scores = |kind: Kind| token_log_probs(&common::model(&config, LoadOptions::cpu(kind)), &slices(&sequences));
        let exact = scores(Kind::Float).unwrap();
        // bf16 keeps 8 bits, f16 11: each of some twenty roundings is off by 2^-9 or 2^-12 of values near 2.
        for (kind, bound) in [(Kind::BFloat16, 0.1), (Kind::Half, 0.0125)] {
            let half = scores(kind).unwrap();
            let pairs = exact.iter().flatten().zip(half.iter().flatten());
            let differences: Vec<f64> = pairs.map(|(a, b)| (a.0 - b.0).abs()).collect();
            let largest = differences.iter().copied().fold(0.0, f64::max);
            let mean = differences.iter().sum::<f64>() / differences.len() as f64;
            // Gemma's norms double queries and keys here, so scores and their rounding errors are four times as large.
            let bound = if name.starts_with("soft caps") { 4.0 * bound } else { bound };
            eprintln!("{name} {kind:?}: largest difference {largest:.1e}, mean {mean:.1e}");
            assert!(largest < bound && mean < bound / 4.0, "{name} {kind:?}: {largest}, {mean}");
        }
    }
}

#[test]
fn scores_are_log_probabilities_of_one_distribution() {
    let model = common::model(&configs()[1].1, LoadOptions::cpu(Kind::Float));
    let prefix = &common::sequences(&[7], 61, 6)[0];
    let every: Vec<Vec<u32>> = (0..61).map(|t| [prefix.as_slice(), &[t]].concat()).collect();
    let scores = token_log_probs(&model, &slices(&every)).unwrap();
    let sum: f64 = scores.iter().map(|s| s.last().unwrap().0.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "61 f32 numbers add up to {sum}");
    let likeliest = scores.iter().filter(|s| s.last().unwrap().1).count();
    assert_eq!(likeliest, 1, "one token is the likeliest");
}

#[test]
fn what_is_no_sequence_of_the_vocabulary_is_an_error() {
    let model = common::model(&configs()[0].1, LoadOptions::cpu(Kind::Float));
    let empty = token_log_probs(&model, &[&[1], &[]]).unwrap_err().to_string();
    assert!(empty.starts_with("sequence 1 is empty"), "{empty}");
    let outside = greedy(&model, &[&[1, 61]], 3, &[], &mut |_, _| false).unwrap_err().to_string();
    assert!(outside.contains("token id 61") && outside.contains("61;"), "{outside}");
}

#[test]
fn a_model_that_computes_nan_answers_nothing() {
    let model = common::model(&configs()[0].1, LoadOptions::cpu(Kind::Float));
    let (_, weight) = model.named_parameters().into_iter().find(|(n, _)| n.ends_with("norm.weight")).unwrap();
    let _ = weight.get(0).fill_(f64::NAN);
    let message = greedy(&model, &[&[1, 2]], 3, &[], &mut |_, _| false).unwrap_err().to_string();
    assert!(message.contains("NaN") && message.contains("cl check"), "{message}");
    let scored = token_log_probs(&model, &[&[1, 2, 3]]).unwrap_err().to_string();
    assert!(scored.contains("NaN"), "{scored}");
}

#[test]
fn hidden_states_are_observed_layer_by_layer() {
    let model = common::model(&configs()[0].1, LoadOptions::cpu(Kind::Float));
    let batch = PackedBatch::new(&[&[3, 1, 4], &[1, 5]], model.config.vocab_size, model.device).unwrap();
    let mut seen = Vec::new();
    let x = model.forward_observed(&batch, Mode::Eval, &mut |index, x| seen.push((index, x.copy()))).unwrap();
    assert_eq!(seen.iter().map(|s| s.0).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(seen.iter().all(|s| s.1.size() == [5, 32]));
    assert_eq!(seen[2].1, x);
    let (_, table) = model.named_parameters().into_iter().find(|(n, _)| n == "model.embed_tokens.weight").unwrap();
    assert_eq!(seen[0].1.get(0), table.get(3), "layer 0 is entered by the embeddings");
}
