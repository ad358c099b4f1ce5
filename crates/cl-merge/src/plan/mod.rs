//! Every output tensor with its sources and its method, before a byte is written.

mod draft;
mod extra;
pub(crate) mod inputs;
mod output;
#[expect(clippy::module_inception, reason = "the plan is what this module makes")]
mod plan;
mod token_table;
mod tokens;
mod vocabulary;
pub(crate) mod work;

pub use plan::Plan;
