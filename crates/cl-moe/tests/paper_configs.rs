//! The configurations of the paper's mixtures in `examples/configs` match the paper and its tool.

use std::path::{Path, PathBuf};

use cl_moe::{
    BlendConfig, BlendInit, BlendPlan, Error, ExpertStorage, MixConfig, MixModule, Plan, RouterInit, RouterLogits,
    RouterNorm,
};

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/configs").join(name)
}

/// Checks that the only problems are missing models: the base and each expert.
fn only_missing(error: Option<Error>, experts: usize) {
    let Some(Error::Problems(problems)) = error else { panic!("expected problems, got {error:?}") };
    assert!(problems.iter().all(|p| p.kind.to_string().contains("not found")), "{problems:?}");
    assert_eq!(problems.len(), 1 + experts);
}

#[test]
fn four_fully_fine_tuned_models() {
    let config = MixConfig::read(&config("paper_moe_fft.toml")).unwrap();
    let tasks = ["MeetingBank", "Py150", "ScienceQA", "math"];
    let models = tasks.map(|task| PathBuf::from(format!("runs/one_round/{task}/model")));
    assert_eq!(config.experts.iter().map(|e| e.model.clone()).collect::<Vec<_>>(), models);
    assert_eq!((config.top_k(), &config.modules[..]), (2, &[MixModule::Mlp][..]));
    assert_eq!((config.router.init, config.router.seed), (RouterInit::Random, 1399));
    assert_eq!((config.layers.clone(), config.expert_storage), (None, ExpertStorage::Full));
    assert!(config.shared_expert.is_none());
    only_missing(Plan::new(&config).err(), 4);
}

#[test]
fn seven_adapters() {
    let config = BlendConfig::read(&config("paper_moe_lora.toml")).unwrap();
    let names: Vec<String> = config.experts.iter().map(|e| e.name()).collect();
    assert_eq!(names, ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "20Minuten", "math"]);
    assert_eq!((config.top_k(), config.router.init, config.router.seed), (7, BlendInit::Random, 1399));
    assert_eq!((config.router.init.logits(), config.router.norm()), (RouterLogits::Linear, RouterNorm::Sigmoid));
    only_missing(BlendPlan::new(&config, false).err(), 7);
}
