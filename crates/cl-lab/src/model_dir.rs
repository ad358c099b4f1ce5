//! Model and adapter directories: opened with one order of errors, and what they hold as one number. The number always comes
//! from the files themselves: a manifest says what they held when it was written.

use std::path::Path;

use cl_adapters::AdapterError;
use cl_checkpoint::{Adapter, Checkpoint, LayerKind, TensorSource};
use cl_data::Tokenizer;

use crate::LabError;

/// Opens a model directory. What is wrong with the directory as a whole comes first, its tokenizer last.
pub(crate) fn open_model(dir: &Path) -> Result<(Checkpoint, Tokenizer), LabError> {
    Ok((open_checkpoint(dir)?, Tokenizer::from_dir(dir)?))
}

pub(crate) fn open_checkpoint(dir: &Path) -> Result<Checkpoint, LabError> {
    if dir.is_file() {
        return Err(LabError::NotADirectory { path: dir.to_owned() });
    }
    Ok(Checkpoint::open(dir)?)
}

/// Whether an adapter is of a kind that is built and fits beside a model, without reading a tensor.
pub(crate) fn check_fits(base: &Checkpoint, adapter: &Adapter) -> Result<(), LabError> {
    adapter.check_built()?;
    for module in adapter.modules() {
        let (path, name) = (adapter.dir().to_owned(), module.name.clone());
        // A tied head is the embedding.
        let own = base.info(&format!("{name}.weight"));
        let weight = own.or_else(|| base.info("model.embed_tokens.weight").filter(|_| name == "lm_head"));
        let embedding = module.kind == LayerKind::Embedding;
        let Some(weight) = weight.filter(|_| embedding == name.ends_with("embed_tokens")) else {
            return Err(AdapterError::UnknownModule { path, module: name }.into());
        };
        let &[rows, columns] = weight.shape.as_slice() else {
            return Err(AdapterError::UnknownModule { path, module: name }.into());
        };
        if module.weight_shape() != [rows, columns] {
            let (a, b) = (module.a_shape.clone(), module.b_shape.clone());
            let (output, input) = if embedding { (columns as i64, rows as i64) } else { (rows as i64, columns as i64) };
            return Err(AdapterError::Shape { path, module: name, input, output, a, b }.into());
        }
    }
    Ok(())
}

/// blake3 over what a model computes with.
pub(crate) fn model_hash(dir: &Path) -> Result<String, LabError> {
    Ok(open_checkpoint(dir)?.content_hash()?)
}

/// blake3 over an adapter's weights and config.
pub(crate) fn adapter_hash(dir: &Path) -> Result<String, LabError> {
    Ok(Adapter::open(dir)?.content_hash()?)
}

#[cfg(test)]
mod tests {
    use cl_checkpoint::Manifest;

    use super::*;

    #[test]
    fn an_edited_file_changes_the_hash_whatever_the_manifest_says() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("m");
        let config = crate::toy::model_config(16);
        let options = cl_model::LoadOptions::cpu(cl_torch::tch::Kind::Float);
        let model = cl_model::random_weights(&config, 1, options).unwrap();
        let files = crate::toy::tokenizer_files();
        model.save(&dir, cl_torch::tch::Kind::Float, &config, &files, Manifest::new("model"), false).unwrap();
        let before = model_hash(&dir).unwrap();
        assert_eq!(before, model_hash(&dir).unwrap());
        let text = std::fs::read_to_string(dir.join("tokenizer_config.json")).unwrap();
        std::fs::write(dir.join("tokenizer_config.json"), text + " ").unwrap();
        assert_ne!(before, model_hash(&dir).unwrap());
    }
}
