//! Reads the YAML of `mergekit-moe` unchanged. Everything in it that is not supported is an error that names it, and is
//! never ignored silently.

use std::path::PathBuf;

use serde::Deserialize;

use crate::problem::{ConfigProblem, MergekitProblem};
use crate::{
    ExpertConfig, ExpertStorage, FloatType, MixArchitecture, MixConfig, Pooling, RouterConfig, RouterInit,
    SharedExpert, config,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    base_model: PathBuf,
    #[serde(default = "hidden")]
    gate_mode: String,
    dtype: Option<FloatType>,
    experts: Vec<Expert>,
    experts_per_token: Option<usize>,
    shared_experts: Option<Vec<Expert>>,
    architecture: Option<String>,
    /// Our extension: mergekit-moe always stores experts in full.
    #[serde(default)]
    expert_storage: ExpertStorage,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expert {
    source_model: PathBuf,
    positive_prompts: Option<Vec<String>>,
    negative_prompts: Option<Vec<String>>,
    noise_scale: Option<f64>,
    residual_scale: Option<f64>,
}

fn hidden() -> String {
    "hidden".to_owned()
}

/// Reads a YAML document.
pub(crate) fn from_yaml(text: &str) -> Result<MixConfig, ConfigProblem> {
    let document: Document = serde_saphyr::from_str(text).map_err(|e| ConfigProblem::Yaml(Box::new(e)))?;
    let mut problems = Vec::new();
    let mut refuse = |set: bool, what| {
        if set {
            problems.push(MergekitProblem::NotSupported { what });
        }
    };
    let shared = document.shared_experts.unwrap_or_default();
    refuse(shared.len() > 1, "more than one of `shared_experts`");
    refuse(shared.iter().any(|e| e.noise_scale.is_some_and(|s| s != 0.0)), "`noise_scale` of a shared expert");
    let architecture = document.architecture.as_deref().map(str::to_lowercase);
    let architecture = match architecture.as_deref() {
        Some("mixtral") => Some(MixArchitecture::Mixtral),
        Some("qwen" | "qwen moe") => Some(MixArchitecture::Qwen2Moe),
        other => {
            refuse(other.is_some(), "an `architecture` other than mixtral and qwen");
            None
        }
    };
    refuse(document.experts.iter().any(|e| e.noise_scale.is_some_and(|s| s != 0.0)), "`noise_scale`");
    refuse(document.experts.iter().any(|e| e.residual_scale.is_some_and(|s| s != 1.0)), "`residual_scale`");
    let (init, pooling) = match document.gate_mode.as_str() {
        "random" | "uniform_random" => (RouterInit::Random, None),
        "hidden" | "hidden_last" => (RouterInit::States, Some(Pooling::Last)),
        "hidden_avg" => (RouterInit::States, Some(Pooling::Mean)),
        "cheap_embed" => (RouterInit::States, Some(Pooling::Embeddings)),
        other => {
            problems.push(MergekitProblem::GateMode { mode: other.to_owned() });
            (RouterInit::Random, None)
        }
    };
    if !problems.is_empty() {
        return Err(ConfigProblem::Mergekit(problems));
    }
    let expert = |e: Expert| ExpertConfig {
        model: e.source_model,
        positive_prompts: e.positive_prompts.unwrap_or_default(),
        negative_prompts: e.negative_prompts.unwrap_or_default(),
    };
    Ok(MixConfig {
        base_model: document.base_model,
        architecture,
        num_experts_per_tok: document.experts_per_token,
        modules: config::mlp(),
        layers: None,
        expert_storage: document.expert_storage,
        shared_expert: shared.into_iter().next().map(|e| SharedExpert {
            model: e.source_model,
            residual_scale: e.residual_scale.unwrap_or(1.0),
            positive_prompts: e.positive_prompts.unwrap_or_default(),
            negative_prompts: e.negative_prompts.unwrap_or_default(),
        }),
        dtype: document.dtype,
        gateless: false,
        global_router: false,
        router: RouterConfig { init, pooling, ..RouterConfig::default() },
        experts: document.experts.into_iter().map(expert).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_becomes_a_mixture_and_what_is_not_built_is_named() {
        let text = "base_model: b\ngate_mode: random\nexperts_per_token: 1\ndtype: bfloat16\nexperts:\n  - source_model: x\n    \
                    positive_prompts: [\"a\", \"b\"]\n  - source_model: y\n";
        let config = from_yaml(text).unwrap();
        assert_eq!((config.num_experts_per_tok, config.router.init), (Some(1), RouterInit::Random));
        assert_eq!(config.architecture(), MixArchitecture::Mixtral);
        for experts in 1..=3 {
            let text = format!("base_model: b\nexperts:\n{}", "  - source_model: x\n".repeat(experts));
            assert_eq!(from_yaml(&text).unwrap().top_k(), experts.min(2));
        }
        assert_eq!(config.experts[0].positive_prompts, ["a", "b"]);
        for (mode, pooling) in
            [("hidden", Pooling::Last), ("hidden_avg", Pooling::Mean), ("cheap_embed", Pooling::Embeddings)]
        {
            let config = from_yaml(&text.replace("random", mode)).unwrap();
            assert_eq!((config.router.init, config.router.pooling), (RouterInit::States, Some(pooling)), "{mode}");
        }
        let shared = "shared_experts:\n  - source_model: z\n    residual_scale: 0.1\n    positive_prompts: [\"c\"]\n";
        let config = from_yaml(&format!("{text}{shared}")).unwrap();
        let expected = SharedExpert {
            model: PathBuf::from("z"),
            residual_scale: 0.1,
            positive_prompts: vec!["c".to_owned()],
            negative_prompts: Vec::new(),
        };
        assert_eq!(config.shared_expert, Some(expected));
        assert_eq!(config.architecture(), MixArchitecture::Qwen2Moe);
        assert_eq!(
            from_yaml(&format!("{text}architecture: qwen\n")).unwrap().architecture,
            Some(MixArchitecture::Qwen2Moe)
        );
        let message = from_yaml(&format!("{text}architecture: deepseek\n")).unwrap_err().to_string();
        assert!(message.contains("other than mixtral and qwen"), "{message}");
        assert_eq!(from_yaml(&format!("{text}shared_experts: []\n")).unwrap().shared_expert, None);
        let nulls = "base_model: b\ngate_mode: random\nexperts_per_token:\nshared_experts: null\nexperts:\n  - source_model: x\n    \
                     positive_prompts: null\n    negative_prompts:\n";
        let absent = "base_model: b\ngate_mode: random\nexperts:\n  - source_model: x\n";
        assert_eq!(from_yaml(nulls).unwrap(), from_yaml(absent).unwrap());
        let several = format!("{text}    noise_scale: 0.1\n{shared}  - source_model: z\n");
        let message = from_yaml(&several).unwrap_err().to_string();
        for part in ["`noise_scale`", "more than one of `shared_experts`"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(from_yaml("base_model: b\nexpert: []\n").unwrap_err().to_string().contains("expert"));
    }
}
