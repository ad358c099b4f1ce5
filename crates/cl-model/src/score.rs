use cl_adapters::Mode;
use cl_torch::tch::{self, Kind, Tensor};

use crate::{Decoder, ModelError, PackedBatch};

/// Log-probability (natural) of every token of a sequence given those before it, from its second token on, and whether it
/// was the likeliest one.
///
/// # Errors
/// [`ModelError::EmptySequence`], [`ModelError::TokenId`], [`ModelError::Torch`].
pub fn token_log_probs(model: &Decoder, sequences: &[&[u32]]) -> Result<Vec<Vec<(f64, bool)>>, ModelError> {
    let from: Vec<usize> = vec![1; sequences.len()];
    log_probs_from(model, sequences, &from)
}

/// Rows of logits that exist at one time.
const CHUNK: i64 = 256;

/// As [`token_log_probs`], but of the tokens from `from[i]` (at least 1) on.
pub(crate) fn log_probs_from(
    model: &Decoder,
    sequences: &[&[u32]],
    from: &[usize],
) -> Result<Vec<Vec<(f64, bool)>>, ModelError> {
    if sequences.is_empty() {
        return Ok(Vec::new());
    }
    let _no_graph = tch::no_grad_guard();
    let batch = PackedBatch::new(sequences, model.config.vocab_size, model.device)?;
    let x = model.forward(&batch, Mode::Eval)?;
    let mut positions = Vec::new();
    let mut targets = Vec::new();
    for (i, sequence) in sequences.iter().enumerate() {
        for t in from[i].max(1)..sequence.len() {
            positions.push(batch.cu_seqlens[i] + t as i64 - 1);
            targets.push(i64::from(sequence[t]));
        }
    }
    let flat = score_positions(model, &x, &positions, &targets);
    let mut rest = flat.into_iter();
    Ok(sequences
        .iter()
        .zip(from)
        .map(|(s, &f)| rest.by_ref().take(s.len().saturating_sub(f.max(1))).collect())
        .collect())
}

fn score_positions(model: &Decoder, x: &Tensor, positions: &[i64], targets: &[i64]) -> Vec<(f64, bool)> {
    let mut out = Vec::with_capacity(targets.len());
    for (p, t) in positions.chunks(CHUNK as usize).zip(targets.chunks(CHUNK as usize)) {
        let rows = x.index_select(0, &Tensor::from_slice(p).to_device(model.device));
        let target = Tensor::from_slice(t).to_device(model.device).unsqueeze(-1);
        let logp = model.logits(&rows).log_softmax(-1, Kind::Float);
        let values = logp.gather(-1, &target, false).squeeze_dim(-1).to_device(tch::Device::Cpu);
        let best = logp.argmax(-1, true).eq_tensor(&target).squeeze_dim(-1).to_device(tch::Device::Cpu);
        let values = Vec::<f32>::try_from(&values).expect("a vector of f32");
        let best = Vec::<bool>::try_from(&best).expect("a vector of bool");
        out.extend(values.into_iter().map(f64::from).zip(best));
    }
    out
}
