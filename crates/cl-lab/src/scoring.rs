use std::path::Path;

use cl_checkpoint::{Adapter, Checkpoint};
use cl_data::Tokenizer;
use cl_eval::{Scores, Task, evaluate};
use cl_model::{Decoder, LoadOptions, Scorer};
use cl_torch::tch::{Device, Kind};
use cl_train::Precision;

use crate::hash::{adapter_hash, model_hash};
use crate::{EvalConfig, Event, LabError, Observer};

/// A model with its tokenizer, ready to be asked.
pub struct LoadedModel {
    /// The model.
    pub model: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Hash of the files it was made from, and the dtype it computes in.
    pub fingerprint: String,
}

impl LoadedModel {
    /// Loads a model directory, with an adapter beside it when one is given.
    ///
    /// # Errors
    /// Anything wrong with either directory.
    pub fn open(
        dir: &Path,
        adapter: Option<&Path>,
        precision: Precision,
        device: Device,
    ) -> Result<LoadedModel, LabError> {
        let kind = match precision {
            Precision::F32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let tokenizer = Tokenizer::from_dir(dir)?;
        let options = LoadOptions { weights: kind, compute: kind, device };
        let mut model = Decoder::load(&Checkpoint::open(dir)?, options)?;
        let mut fingerprint = model_hash(dir)?[..32].to_owned();
        if let Some(adapter) = adapter {
            model.load_lora(&Adapter::open(adapter)?, 0.0)?;
            fingerprint += &format!("+{}", &adapter_hash(adapter)?[..32]);
        }
        fingerprint += match precision {
            Precision::F32 => ":f32",
            Precision::Bf16 => ":bf16",
        };
        Ok(LoadedModel { model, tokenizer, fingerprint })
    }
}

/// Scores a model on every task; predictions go to `out/<task>.jsonl`, and those that are there already are kept.
///
/// # Errors
/// Anything the model or the files raise.
pub fn score_model(
    loaded: &LoadedModel,
    tasks: &[Box<dyn Task>],
    config: &EvalConfig,
    out: &Path,
    observer: &mut Observer<'_>,
) -> Result<Vec<Scores>, LabError> {
    let mut scorer = Scorer::new(&loaded.model, &loaded.tokenizer);
    scorer.batch_tokens = config.batch_tokens;
    scorer.batch_sequences = config.batch_sequences;
    scorer.fingerprint = Some(loaded.fingerprint.clone());
    tasks
        .iter()
        .map(|task| {
            let name = task.name().to_owned();
            let predictions = out.join(format!("{name}.jsonl"));
            let mut progress = |done, all| observer(Event::Scored { task: &name, done, all });
            Ok(evaluate(task.as_ref(), &mut scorer, &predictions, &mut progress)?)
        })
        .collect()
}
