use cl_torch::tch::{self, Tensor};

use crate::kv_cache::KvCache;
use crate::{Decoder, ModelError, PackedBatch};

/// What a prompt was continued with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// New tokens, without the one that ended the generation.
    pub ids: Vec<u32>,
    /// Whether an end token or `stop` ended it, rather than the limit.
    pub stopped: bool,
}

/// Continues all prompts together, always with the likeliest token (the lowest id among equals).
///
/// The prompts are read as one packed row; then each step adds a token to every unfinished sequence. Generation of a
/// sequence ends at one of `eos`, when `stop(index, ids)` says so, or after `max_new_tokens`.
///
/// # Errors
/// [`ModelError::EmptySequence`], [`ModelError::TokenId`], [`ModelError::Torch`].
pub fn greedy(
    model: &Decoder,
    prompts: &[&[u32]],
    max_new_tokens: usize,
    eos: &[u32],
    stop: &mut dyn FnMut(usize, &[u32]) -> bool,
) -> Result<Vec<Generation>, ModelError> {
    let mut results = vec![Generation { ids: Vec::new(), stopped: false }; prompts.len()];
    if max_new_tokens == 0 || prompts.is_empty() {
        return Ok(results);
    }
    let _no_graph = tch::no_grad_guard();
    let batch = PackedBatch::new(prompts, model.config.vocab_size, model.device)?;
    let mut cache = KvCache::for_prompts(&batch.cu_seqlens, model.device);
    let x = model.prefill(&batch, &mut cache)?;
    let last: Vec<i64> = batch.cu_seqlens[1..].iter().map(|end| end - 1).collect();
    let mut next = likeliest(model, &x.index_select(0, &Tensor::from_slice(&last).to_device(model.device)))?;
    let mut running: Vec<usize> = (0..prompts.len()).collect();
    loop {
        let mut kept = Vec::new();
        for (slot, &index) in running.iter().enumerate() {
            let result = &mut results[index];
            if eos.contains(&next[slot]) {
                result.stopped = true;
                continue;
            }
            result.ids.push(next[slot]);
            result.stopped = stop(index, &result.ids);
            if !result.stopped && result.ids.len() < max_new_tokens {
                kept.push(slot as i64);
            }
        }
        if kept.is_empty() {
            return Ok(results);
        }
        if kept.len() < running.len() {
            cache.keep(&kept);
            running = kept.iter().map(|&s| running[s as usize]).collect();
        }
        let ids: Vec<i64> = kept.iter().map(|&s| i64::from(next[s as usize])).collect();
        let x = model.step(&Tensor::from_slice(&ids).to_device(model.device), &mut cache);
        next = likeliest(model, &x)?;
    }
}

fn likeliest(model: &Decoder, x: &Tensor) -> Result<Vec<u32>, ModelError> {
    let logits = model.logits(x);
    let ids = logits.argmax(-1, true);
    // A NaN is the largest of its row, so it would be taken for an answer.
    let largest = logits.gather(-1, &ids, false);
    if largest.isnan().any().int64_value(&[]) != 0 {
        return Err(ModelError::NotANumber);
    }
    let ids = ids.squeeze_dim(-1).to_device(tch::Device::Cpu);
    let ids = Vec::<i64>::try_from(&ids).expect("argmax of rows is a vector of int64");
    Ok(ids.into_iter().map(|id| id as u32).collect())
}
