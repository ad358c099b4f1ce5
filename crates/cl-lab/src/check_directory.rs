use std::path::Path;

use cl_checkpoint::{Adapter, Checkpoint, Error, Manifest, ManifestProblem, TensorSource, convert};
use cl_data::Tokenizer;
use cl_model::Decoder;
use cl_moe::{Mixture, parameters};

use crate::findings::note;
use crate::model_dir::mixture_error;
use crate::{Finding, LabError};

/// Checks the directory of a model, an adapter or a mixture of adapters: all headers, names and shapes against the
/// config, the tokenizer, all values for NaN and infinities, and all files against the manifest, if there is one.
pub fn check_directory(dir: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let has = |name: &str| dir.join(name).exists();
    if has("adapter_config.json") {
        check_adapter(dir, &mut findings);
    } else if Mixture::is_mixture(dir) {
        check_mixture(dir, &mut findings);
    } else if has("config.json") || has("model.safetensors") || has("manifest.json") {
        check_whole_model(dir, &mut findings);
    } else {
        findings.push(Finding::Problem(LabError::NothingToCheck { path: dir.to_owned() }));
    }
    if has("manifest.json")
        && let Some(differences) = note(Manifest::verify(dir), &mut findings)
    {
        let wrong = |path, what| Finding::Problem(LabError::Manifest { path, what });
        findings.extend(differences.into_iter().map(|difference| match difference {
            ManifestProblem::Missing(path) => wrong(path, "listed in manifest.json, but missing"),
            ManifestProblem::Changed(path) => wrong(path, "differs from manifest.json"),
            ManifestProblem::Unlisted(path) => {
                Finding::Fact(format!("{}: not listed in manifest.json", path.display()))
            }
        }));
    }
    findings
}

fn check_whole_model(dir: &Path, findings: &mut Vec<Finding>) {
    let tokenizer = note(Tokenizer::from_dir(dir), findings);
    let Some(checkpoint) = note(Checkpoint::open(dir), findings) else { return };
    if let Some(config) = note(Decoder::check(&checkpoint), findings) {
        findings.push(Finding::Fact(format!(
            "model: {:?} family, {} layers, hidden size {}, {:.1} M parameters, vocabulary {}",
            config.family,
            config.num_hidden_layers,
            config.hidden_size,
            parameters(&checkpoint) as f64 / 1e6,
            config.vocab_size
        )));
        let tokens = tokenizer.map_or(0, |t| t.vocab_size());
        if tokens as i64 > config.vocab_size {
            let (path, rows) = (dir.to_owned(), config.vocab_size);
            findings.push(Finding::Problem(LabError::Vocabulary { path, tokens, rows }));
        }
    }
    note(checkpoint.check_all_finite(), findings);
}

fn check_adapter(dir: &Path, findings: &mut Vec<Finding>) {
    let Some(adapter) = note(Adapter::open(dir), findings) else { return };
    note(adapter.check_built(), findings);
    let config = adapter.config();
    findings.push(Finding::Fact(format!(
        "adapter: {} on {} modules, r {}, lora_alpha {}, base {}",
        config.peft_type,
        adapter.modules().len(),
        config.r,
        config.lora_alpha,
        config.base_model_name_or_path.as_deref().unwrap_or("unknown")
    )));
    check_finite(&dir.join("adapter_model.safetensors"), &adapter, findings);
}

fn check_mixture(dir: &Path, findings: &mut Vec<Finding>) {
    let Some(mixture) = note(Mixture::open(dir).map_err(mixture_error(dir)), findings) else { return };
    let config = mixture.config();
    findings.push(Finding::Fact(format!(
        "mixture: {} adapters on {} modules, {} per token, base {}",
        config.experts.len(),
        config.modules.len(),
        config.num_experts_per_tok,
        config.base_model_name_or_path
    )));
    check_finite(&dir.join("mixture_model.safetensors"), &mixture, findings);
}

/// Reports the first non-finite value of each tensor.
fn check_finite(path: &Path, source: &impl TensorSource, findings: &mut Vec<Finding>) {
    for name in source.names() {
        let values = source.info(name).zip(source.bytes(name).ok()).and_then(|(i, b)| convert::to_f32(i.dtype, b));
        let bad = values.iter().flatten().enumerate().find(|(_, v)| !v.is_finite());
        if let Some((index, &value)) = bad {
            let (path, tensor) = (path.to_owned(), name.to_owned());
            findings.push(Finding::Problem(Error::NotFinite { path, tensor, index, value }.into()));
        }
    }
}
