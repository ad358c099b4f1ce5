//! Planning: determines every output tensor with its sources and method, before anything is written.

mod draft;
mod extra;
mod head;
pub(crate) mod inputs;
mod output;
#[expect(clippy::module_inception, reason = "the plan is what this module makes")]
mod plan;
mod token_table;
mod tokens;
mod vocabulary;
pub(crate) mod work;

pub use plan::Plan;
#[cfg(feature = "cli")]
pub(crate) use plan::notes_without_models;
pub(crate) use plan::problems_without_stages;
