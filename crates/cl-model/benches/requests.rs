//! Times the requests of a file and prints the responses, for comparison with other programs.
//!
//! `cargo bench -p cl-model --bench requests -- MODEL REQUESTS.jsonl [f32|bf16] [batch tokens] > ANSWERS.jsonl`
//!
//! Each line of the requests is `{"context": …, "continuation": …}` or
//! `{"prompt": …, "max_new_tokens": …, "stop": […]}`; the corresponding line of the output is a sum of
//! log-probabilities or a text. Durations are printed to stderr.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use cl_checkpoint::Checkpoint;
use cl_data::Tokenizer;
use cl_eval::{BoxError, GenerateRequest, LanguageModel, LoglikelihoodRequest};
use cl_model::{Decoder, LoadOptions, Scorer};
use cl_torch::tch::Kind;
use serde_json::Value;

fn main() -> Result<(), BoxError> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [model, requests, rest @ ..] = args.as_slice() else {
        eprintln!("MODEL REQUESTS.jsonl [f32|bf16] [batch tokens]: nothing to measure without them");
        return Ok(());
    };
    let dir = Path::new(model);
    let kind = if rest.first().is_some_and(|d| d == "bf16") { Kind::BFloat16 } else { Kind::Float };
    let model = Decoder::load(&Checkpoint::open(dir)?, LoadOptions::cpu(kind))?;
    let tokenizer = Tokenizer::from_dir(dir)?;
    let mut scorer = Scorer::new(&model, &tokenizer);
    if let Some(tokens) = rest.get(1) {
        scorer.batch_tokens = tokens.parse()?;
    }
    let (mut score, mut write) = (Vec::new(), Vec::new());
    for line in std::fs::read_to_string(requests)?.lines() {
        let row: Value = serde_json::from_str(line)?;
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        if row.get("continuation").is_some() {
            score.push(LoglikelihoodRequest { context: text("context"), continuation: text("continuation") });
        } else {
            let stop = row["stop"].as_array().into_iter().flatten().filter_map(|s| s.as_str().map(str::to_owned));
            let max_new_tokens = row["max_new_tokens"].as_u64().unwrap_or(256) as usize;
            write.push(GenerateRequest { prompt: text("prompt"), max_new_tokens, stop: stop.collect() });
        }
    }
    let mut answers: Vec<Value> = vec![Value::Null; score.len().max(write.len())];
    let start = Instant::now();
    scorer.loglikelihood(&score, &mut |i, l| {
        answers[i] = l.sum.into();
        Ok(())
    })?;
    scorer.generate(&write, &mut |i, text| {
        answers[i] = text.into();
        Ok(())
    })?;
    eprintln!("{} requests in {:.2} s", answers.len(), start.elapsed().as_secs_f64());
    let mut out = std::io::stdout().lock();
    answers.iter().try_for_each(|a| writeln!(out, "{a}"))?;
    Ok(())
}
