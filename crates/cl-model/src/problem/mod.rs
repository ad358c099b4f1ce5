//! Problems of a `config.json` as structured values; [`ModelError::Config`](crate::ModelError::Config) adds the
//! directory.
//!
//! ```
//! use cl_model::problem::ConfigProblem;
//! use cl_model::{ModelConfig, ModelError};
//!
//! let json = serde_json::json!({
//!     "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
//!     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 3
//! });
//! let read = ModelConfig::from_json("model".as_ref(), json.as_object().unwrap());
//! let Err(ModelError::Config { problem, .. }) = read else { panic!("it was read") };
//! assert!(matches!(problem, ConfigProblem::HeadGroups { num_attention_heads: 4, num_key_value_heads: 3 }));
//! assert_eq!(problem.to_string(), "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3");
//! ```

mod config;
mod experts;
mod rope;

pub use config::ConfigProblem;
pub use experts::ExpertsProblem;
pub use rope::RopeProblem;
