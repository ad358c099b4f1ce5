//! Jinja templates, rendered as Python programs render them, and safe to use with untrusted templates.
//!
//! One [`environment`] serves chat templates and the templates of evaluation tasks; its [`Dialect`] is the Python
//! program that it agrees with. A template that exceeds one of these limits is an error; it never aborts the process or
//! exhausts memory:
//!
//! | limit | what it prevents |
//! | --- | --- |
//! | [`MAX_SOURCE`] bytes of a template, [`MAX_TOKENS`] tokens of one tag, [`MAX_ELIF`] `elif` branches | stack overflow: the engine parses and compiles chains by recursion |
//! | [`MAX_STEPS`] instructions, [`MAX_CHAT_STEPS`] of a chat template | endless loops; deeply nested values, which are dropped by recursion |
//! | [`MAX_SIZE`] bytes of the output and of each value that an operator, literal, filter or method takes or makes, list items included | `x ~ x` in a loop, `[0] * 10 ** 12`, `indent(99999999999)`, `'{:>9999999999}'.format(1)` |
//! | [`MAX_DEPTH`] levels of nested lists | stack overflow: values are formatted by recursion |
//! | [`MAX_WORK`] bytes of all these values in one rendering | many values, each within its limit |
//! | [`MAX_CAPTURED`] bytes of text inside macros and captured blocks | text repeated into a variable, which no value's limit sees before the capture ends |
//!
//! Operators and literals are checked by a filter that is inserted around them before a template is compiled, because
//! the engine has no hook for them; at most four operands of MAX_SIZE bytes are concatenated before the filter runs. A
//! rendering uses at most about 1 GiB. Time is limited by instructions and MAX_WORK; looking up items in long
//! concatenated lists is not counted, so a hostile template can still run for minutes.
//!
//! Templates cannot include, import or extend others. A chain of nearly three hundred `~` or `+` is nested too deeply.

mod environment;
mod json;
mod limits;
mod operators;
mod template;

pub use environment::{Dialect, environment};
pub(crate) use limits::on_large_stack;
pub use limits::{
    MAX_CAPTURED, MAX_CHAT_STEPS, MAX_DEPTH, MAX_ELIF, MAX_SIZE, MAX_SOURCE, MAX_STEPS, MAX_TOKENS, MAX_WORK,
};
pub use template::{Expression, Template};
