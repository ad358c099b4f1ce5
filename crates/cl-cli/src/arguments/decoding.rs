//! Decoding arguments, shared by `cl generate` and `cl chat`.

/// Decoding arguments of `cl generate` and `cl chat`.
#[derive(clap::Args)]
pub struct DecodingArgs {
    /// Sampling temperature [default: greedy decoding; 1 with --top-k or --top-p].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample only from the K most likely tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample only from the most likely tokens whose probabilities sum to P (nucleus sampling).
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Repetition penalty: positive logits of tokens in prompt and output are divided by R, negative ones multiplied
    /// [default: that of generation_config.json, or 1].
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Random seed of sampling [default: 0].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Stop sequence, which can be a special token: the output ends before it; can be repeated.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}
