use anyhow::{Result, ensure};
use cl_cli::arguments::decoding::DecodingArgs;
use cl_model::{Decoder, Decoding, Sampling};

/// Returns the decoding settings, after checking the arguments. The repetition penalty is that of the model's
/// generation_config.json by default, see [`of_model`].
pub fn decoding(args: &DecodingArgs) -> Result<Decoding> {
    ensure!(args.stop.iter().all(|s| !s.is_empty()), "--stop must not be empty");
    let samples = args.temperature.is_some() || args.top_k.is_some() || args.top_p.is_some();
    ensure!(
        samples || args.seed.is_none(),
        "--seed has no effect on greedy decoding; add --temperature, --top-k or --top-p to sample"
    );
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(1.0),
        top_k: args.top_k,
        top_p: args.top_p.unwrap_or(1.0),
        seed: args.seed.unwrap_or(0),
    };
    let penalty = args.repetition_penalty.unwrap_or(1.0);
    let decoding = Decoding { repetition_penalty: penalty, sampling: samples.then_some(sampling) };
    decoding.validate()?;
    Ok(decoding)
}

/// Adds the model's own repetition penalty, unless there is an argument.
pub fn of_model(decoding: Decoding, args: &DecodingArgs, model: &Decoder) -> Decoding {
    let repetition_penalty = args.repetition_penalty.unwrap_or(model.config.repetition_penalty);
    Decoding { repetition_penalty, ..decoding }
}
