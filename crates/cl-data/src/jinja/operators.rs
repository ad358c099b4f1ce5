//! Inserts a size check around every operator and literal in a template that can make a value larger.
//!
//! `{% set x = x ~ x %}` in a loop doubles a text 40 times in 40 steps, and `[0] * 10 ** 15` is a short expression for
//! a huge list. The engine has no hook for operators, so the source is rewritten before it is compiled: `a ~ b` becomes
//! `(a ~ b)|bounded`, where the filter checks the result. The same applies to `+`, `*`, and to lists and maps of
//! variables, whose items can be shared so that comparing two of them takes exponential time. Operands of comparisons,
//! subscripts and keys are checked as well, because namespaces can contain each other in a cycle. A constant on the
//! left of `*` is checked so that the compiler does not evaluate the repetition, once for every occurrence in the
//! source.
//!
//! Positions come from the engine's own parser. The result is parsed again and rejected if anything is left unchecked,
//! so a wrong position leads to an error and never to a missing check.

use minijinja::machinery::ast::{BinOpKind, Call, CallArg, Expr, Filter, Spanned, Stmt};
use minijinja::machinery::{Span, WhitespaceConfig, parse, parse_expr};
use minijinja::{Error, ErrorKind};

use super::limits::{FILTER, MAX_CAPTURED};

/// Number of consecutive operators of one kind, `a ~ b ~ c`, that share a check. With one check for each, chains of a
/// hundred would be nested too deeply for the parser; this way the limit is nearly three hundred.
const CHAIN: usize = 4;

/// Text around an operator that checks its result.
const OPERATOR: [&str; 2] = ["(", ")|bounded"];
/// Text around a list or map that checks it; `[0]` or `.name` may follow.
const LITERAL: [&str; 2] = ["((", ")|bounded)"];

/// Returns the template with checks.
pub(super) fn bounded_template(source: &str, name: &str) -> Result<String, Error> {
    bounded(source, |source| {
        let mut found = Found::default();
        found.statement(&parse(source, name, Default::default(), WhitespaceConfig::default())?, false);
        Ok(found)
    })
}

/// Returns the expression with checks.
pub(super) fn bounded_expression(source: &str) -> Result<String, Error> {
    bounded(source, |source| {
        let mut found = Found::default();
        found.expr(&parse_expr(source)?, 0);
        Ok(found)
    })
}

fn bounded(source: &str, find: impl Fn(&str) -> Result<Found, Error>) -> Result<String, Error> {
    let found = find(source)?;
    found.check()?;
    let bounded = found.with_checks(source);
    if !find(&bounded)?.unchecked.is_empty() {
        return Err(Error::new(
            ErrorKind::SyntaxError,
            "a list or operator that cannot be checked; put it in parentheses",
        ));
    }
    Ok(bounded)
}

/// Results of searching a template.
#[derive(Default)]
struct Found {
    /// Operators and literals without a check, and the text to insert around each.
    unchecked: Vec<(Span, [&'static str; 2])>,
    /// Number of bytes of captured text.
    captured: usize,
    /// A tag that requires other templates.
    other_template: Option<&'static str>,
}

impl Found {
    fn check(&self) -> Result<(), Error> {
        let error = |message: String| Err(Error::new(ErrorKind::SyntaxError, message));
        if let Some(tag) = self.other_template {
            return error(format!("`{tag}`: there are no other templates"));
        }
        if self.captured > MAX_CAPTURED {
            return error(format!("more than {MAX_CAPTURED} bytes of text in macros and captured blocks"));
        }
        Ok(())
    }

    fn with_checks(&self, source: &str) -> String {
        // Where several end at the same position, the inner one is closed first: they were found from the outside in.
        let opened = self.unchecked.iter().map(|(span, [before, _])| (span.start_offset, *before));
        let closed = self.unchecked.iter().rev().map(|(span, [_, after])| (span.end_offset, *after));
        let mut inserted: Vec<(u32, &str)> = closed.chain(opened).collect();
        inserted.sort_by_key(|(offset, _)| *offset);
        let (mut out, mut at) = (String::with_capacity(source.len() + 6 * inserted.len()), 0);
        for (offset, text) in inserted {
            out.push_str(&source[at..offset as usize]);
            out.push_str(text);
            at = offset as usize;
        }
        out + &source[at..]
    }

    fn statements(&mut self, statements: &[Stmt<'_>], captured: bool) {
        statements.iter().for_each(|s| self.statement(s, captured));
    }

    /// Searches a statement. `captured` means that its output goes into a variable.
    fn statement(&mut self, statement: &Stmt<'_>, captured: bool) {
        match statement {
            Stmt::Template(s) => self.statements(&s.children, captured),
            Stmt::EmitExpr(s) => self.expr(&s.expr, 0),
            Stmt::EmitRaw(s) => self.captured += if captured { s.raw.len() } else { 0 },
            Stmt::ForLoop(s) => {
                self.expr(&s.iter, 0);
                self.optional(&s.filter_expr);
                self.statements(&s.body, captured || s.recursive);
                self.statements(&s.else_body, captured || s.recursive);
            }
            Stmt::IfCond(s) => {
                self.expr(&s.expr, 0);
                self.statements(&s.true_body, captured);
                self.statements(&s.false_body, captured);
            }
            Stmt::WithBlock(s) => {
                s.assignments.iter().for_each(|(_, value)| self.expr(value, 0));
                self.statements(&s.body, captured);
            }
            Stmt::Set(s) => match (&s.target, &s.expr) {
                // `{% set a, b = x, y %}` does not create a list that persists.
                (Expr::List(_), Expr::List(values)) => values.items.iter().for_each(|value| self.expr(value, 0)),
                _ => self.expr(&s.expr, 0),
            },
            Stmt::SetBlock(s) => {
                self.optional(&s.filter);
                self.statements(&s.body, true);
            }
            Stmt::AutoEscape(s) => {
                self.expr(&s.enabled, 0);
                self.statements(&s.body, captured);
            }
            Stmt::FilterBlock(s) => {
                self.expr(&s.filter, 0);
                self.statements(&s.body, true);
            }
            Stmt::Block(s) => self.statements(&s.body, true), // `self.name()` captures it
            Stmt::Macro(s) => {
                s.defaults.iter().for_each(|value| self.expr(value, 0));
                self.statements(&s.body, true);
            }
            Stmt::CallBlock(s) => {
                self.call(&s.call);
                s.macro_decl.defaults.iter().for_each(|value| self.expr(value, 0));
                self.statements(&s.macro_decl.body, true);
            }
            Stmt::Do(s) => self.call(&s.call),
            Stmt::Import(_) | Stmt::FromImport(_) => self.other_template = Some("import"),
            Stmt::Extends(_) => self.other_template = Some("extends"),
            Stmt::Include(_) => self.other_template = Some("include"),
            Stmt::Continue(_) | Stmt::Break(_) => {}
        }
    }

    fn optional(&mut self, expr: &Option<Expr<'_>>) {
        expr.iter().for_each(|e| self.expr(e, 0));
    }

    fn call(&mut self, call: &Spanned<Call<'_>>) {
        if matches!(&call.expr, Expr::GetAttr(method) if method.name == "changed") {
            self.operands(&call.args); // of `loop.changed`: they are compared with those of the previous iteration
        }
        self.expr(&call.expr, 0);
        self.args(&call.args);
    }

    fn operands(&mut self, args: &[CallArg<'_>]) {
        for arg in args {
            match arg {
                CallArg::Pos(e) | CallArg::Kwarg(_, e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => {
                    self.operand(e)
                }
            }
        }
    }

    /// Records an operand that has no check of its own.
    fn operand(&mut self, expr: &Expr<'_>) {
        let is_checked = match expr {
            Expr::BinOp(s) if is_unbounded(s.op) => true,
            Expr::Filter(s) => is_check(s),
            Expr::List(_) | Expr::Map(_) => true,
            _ => is_constant(expr),
        };
        if !is_checked {
            self.unchecked.push((between(first(expr), expr.span()), OPERATOR));
        }
    }

    fn args(&mut self, args: &[CallArg<'_>]) {
        for arg in args {
            match arg {
                CallArg::Pos(e) | CallArg::Kwarg(_, e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => {
                    self.expr(e, 0)
                }
            }
        }
    }

    /// Searches an expression. `checked` is the number of consecutive operators, starting with this one, that the check
    /// around the expression covers.
    fn expr(&mut self, expr: &Expr<'_>, checked: usize) {
        match expr {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::BinOp(s) => {
                let chain = if is_unbounded(s.op) { self.check_of(s.span(), OPERATOR, checked) } else { 0 };
                let continues = s.op as u8 != BinOpKind::Mul as u8
                    && matches!(&s.left, Expr::BinOp(left) if left.op as u8 == s.op as u8);
                if let BinOpKind::Mul = s.op
                    && is_constant(&s.left)
                {
                    self.check_of(between(s.span(), s.left.span()), OPERATOR, 0);
                }
                if compares(s.op) {
                    self.operand(&s.left);
                    self.operand(&s.right);
                }
                self.expr(&s.left, if continues { chain.saturating_sub(1) } else { 0 });
                self.expr(&s.right, 0);
            }
            Expr::List(s) => {
                if s.as_const().is_none() {
                    self.check_of(s.span(), LITERAL, checked);
                }
                s.items.iter().for_each(|item| self.expr(item, 0));
            }
            Expr::Map(s) => {
                if s.as_const().is_none() {
                    self.check_of(s.span(), LITERAL, checked);
                }
                s.keys.iter().for_each(|key| self.operand(key));
                s.keys.iter().chain(&s.values).for_each(|item| self.expr(item, 0));
            }
            Expr::Filter(s) => {
                s.expr.iter().for_each(|e| self.expr(e, if is_check(s) { CHAIN } else { 0 }));
                self.args(&s.args);
            }
            Expr::Test(s) => {
                self.operands(&s.args);
                self.expr(&s.expr, 0);
                self.args(&s.args);
            }
            Expr::Slice(s) => {
                self.expr(&s.expr, 0);
                [&s.start, &s.stop, &s.step].into_iter().for_each(|e| self.optional(e));
            }
            Expr::UnaryOp(s) => self.expr(&s.expr, 0),
            Expr::Compare(s) => {
                self.operand(&s.expr);
                s.ops.iter().for_each(|op| self.operand(&op.expr));
                self.expr(&s.expr, 0);
                s.ops.iter().for_each(|op| self.expr(&op.expr, 0));
            }
            Expr::IfExpr(s) => {
                self.expr(&s.test_expr, 0);
                self.expr(&s.true_expr, 0);
                self.optional(&s.false_expr);
            }
            Expr::GetAttr(s) => self.expr(&s.expr, 0),
            Expr::GetItem(s) => {
                self.operand(&s.subscript_expr);
                self.expr(&s.expr, 0);
                self.expr(&s.subscript_expr, 0);
            }
            Expr::Call(s) => self.call(s),
        }
    }

    /// Records an expression that has no check yet, and returns how many consecutive operators its check covers.
    fn check_of(&mut self, span: Span, around: [&'static str; 2], checked: usize) -> usize {
        if checked == 0 {
            self.unchecked.push((span, around));
            return CHAIN;
        }
        checked
    }
}

fn is_unbounded(op: BinOpKind) -> bool {
    matches!(op, BinOpKind::Add | BinOpKind::Concat | BinOpKind::Mul)
}

fn compares(op: BinOpKind) -> bool {
    use BinOpKind as B;
    matches!(op, B::Eq | B::Ne | B::Lt | B::Lte | B::Gt | B::Gte | B::In)
}

fn is_check(filter: &Filter<'_>) -> bool {
    filter.name == FILTER && filter.args.is_empty()
}

/// Whether the compiler may replace an expression by its value, unless a check inside prevents it.
fn is_constant(expr: &Expr<'_>) -> bool {
    match expr {
        Expr::Const(_) => true,
        Expr::List(s) => s.as_const().is_some(),
        Expr::Map(s) => s.as_const().is_some(),
        Expr::UnaryOp(s) => is_constant(&s.expr),
        Expr::BinOp(s) => !is_unbounded(s.op) && is_constant(&s.left) && is_constant(&s.right),
        Expr::Compare(s) => is_constant(&s.expr) && s.ops.iter().all(|op| is_constant(&op.expr)),
        _ => false,
    }
}

/// Returns the first token of an expression; enclosing parentheses may be omitted.
fn first(expr: &Expr<'_>) -> Span {
    match expr {
        Expr::BinOp(s) => first(&s.left),
        Expr::Filter(s) => s.expr.as_ref().map_or(s.span(), first),
        Expr::Test(s) => first(&s.expr),
        Expr::GetAttr(s) => first(&s.expr),
        Expr::GetItem(s) => first(&s.expr),
        Expr::Slice(s) => first(&s.expr),
        Expr::Call(s) => first(&s.expr),
        Expr::Compare(s) => first(&s.expr),
        Expr::IfExpr(s) => first(&s.true_expr),
        Expr::Var(_) | Expr::Const(_) | Expr::UnaryOp(_) | Expr::List(_) | Expr::Map(_) => expr.span(),
    }
}

fn between(first: Span, last: Span) -> Span {
    Span { start_offset: first.start_offset, ..last }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_stand_around_what_grows() {
        for (source, expected) in [
            ("a ~ b", "(a ~ b)|bounded"),
            ("(a)+ (b)", "((a)+ (b))|bounded"),
            ("-a * b + c", "((-a * b)|bounded + c)|bounded"),
            ("a ~ b ~ c ~ d", "(a ~ b ~ c ~ d)|bounded"),
            ("a ~ b ~ c ~ d ~ e ~ f", "((a ~ b)|bounded ~ c ~ d ~ e ~ f)|bounded"),
            ("x in [0] * 10 ** 9", "(x)|bounded in (([0])|bounded * 10 ** 9)|bounded"),
            ("(2 ** 9) * 'x'", "(((2 ** 9)|bounded) * 'x')|bounded"),
            ("m.role == 'user' and (a).b != c", "(m.role)|bounded == 'user' and ((a).b)|bounded != (c)|bounded"),
            ("a < (b|trim) < c[d.e][0]", "(a)|bounded < ((b|trim)|bounded) < (c[(d.e)|bounded][0])|bounded"),
            ("a is eq(b) or loop.changed(c)", "a is eq((b)|bounded) or loop.changed((c)|bounded)"),
            ("(a + b)[0]", "((a + b)|bounded)[0]"),
            ("[a, b][0]|trim ~ {'é': a}.b", "((([a, b])|bounded)[0]|trim ~ (({'é': a})|bounded).b)|bounded"),
            ("a + [b]", "(a + (([b])|bounded))|bounded"),
            ("[1, 'a'] == (1 - 2)", "[1, 'a'] == (1 - 2)"),
            ("f(a, k=b + c) if a ~ b else c", "f(a, k=(b + c)|bounded) if (a ~ b)|bounded else c"),
        ] {
            assert_eq!(bounded_expression(source).unwrap(), expected, "{source}");
        }
        let source = "{% set a, b = x, y ~ z %}\n{%- for a, b in c + d if a ~ b is eq 'x' %}{{ a }}{% endfor %}";
        let expected = "{% set a, b = x, (y ~ z)|bounded %}\n{%- for a, b in (c + d)|bounded if (a ~ b is eq 'x')|bounded %}{{ a }}{% endfor %}";
        assert_eq!(bounded_template(source, "t").unwrap(), expected);
    }

    #[test]
    fn long_chains_parse() {
        let source = vec!["a"; 250].join(" ~ ");
        assert_eq!(bounded_expression(&source).unwrap().matches(FILTER).count(), 63);
    }
}
