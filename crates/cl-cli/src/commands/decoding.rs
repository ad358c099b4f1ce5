use anyhow::{Result, ensure};
use cl_model::{Decoding, Sampling};

/// Decoding arguments of `cl generate` and `cl chat`.
#[derive(clap::Args)]
pub struct DecodingArgs {
    /// Sampling temperature [default: greedy decoding; 1 with --top-k or --top-p].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Sample only from the K most likely tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample only from the most likely tokens whose probabilities sum to P (nucleus sampling).
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Repetition penalty: positive logits of tokens in prompt and output are divided by R, negative ones multiplied.
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,
    /// Random seed of sampling [default: 0].
    #[arg(long)]
    seed: Option<u64>,
    /// Stop string: the text ends before it; may be repeated.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}

impl DecodingArgs {
    /// The settings, checked.
    pub fn decoding(&self) -> Result<Decoding> {
        ensure!(self.stop.iter().all(|s| !s.is_empty()), "--stop must not be empty");
        let samples = self.temperature.is_some() || self.top_k.is_some() || self.top_p.is_some();
        ensure!(
            samples || self.seed.is_none(),
            "--seed has no effect on greedy decoding; add --temperature, --top-k or --top-p to sample"
        );
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k,
            top_p: self.top_p.unwrap_or(1.0),
            seed: self.seed.unwrap_or(0),
        };
        let decoding = Decoding { repetition_penalty: self.repetition_penalty, sampling: samples.then_some(sampling) };
        decoding.validate()?;
        Ok(decoding)
    }
}
