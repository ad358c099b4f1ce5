//! Jinja templates and expressions over the fields of a row.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::LazyLock;

use cl_data::jinja::{self, Dialect};
use minijinja::{Environment, Value};
use regex::Regex;

use crate::metrics::python_strip;
use crate::problem::TemplateProblem;

/// The Jinja environment: lm-eval's dialect, with its preprocessing of HellaSwag, MathQA and targets as filters.
static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut environment = jinja::environment(Dialect::LmEval);
    environment.add_filter("hellaswag_clean", |text: Cow<'_, str>| hellaswag_clean(&text));
    environment.add_filter("lm_eval_target", lm_eval_target);
    environment.add_filter("mathqa_choices", |text: Cow<'_, str>| mathqa_choices(&text));
    environment
});

/// A Jinja template.
pub(crate) struct Template(jinja::Template);

impl Template {
    /// Compiles a template. Returns an error if the syntax is invalid or it is too long.
    pub(crate) fn new(source: &str) -> Result<Template, TemplateProblem> {
        jinja::Template::new(&ENVIRONMENT, source).map(Template).map_err(|error| TemplateProblem::Engine { error })
    }

    /// Renders the template for a row. The error names fields that the row lacks.
    pub(crate) fn render(&self, row: &Value) -> Result<String, TemplateProblem> {
        let missing = || missing(&self.0.undeclared_variables(), row);
        self.0.render(row.clone()).map_err(|error| missing().unwrap_or(TemplateProblem::Engine { error }))
    }
}

/// A Jinja expression.
pub(crate) struct Formula(jinja::Expression);

impl Formula {
    /// Compiles an expression. Returns an error if the syntax is invalid or it is too long.
    pub(crate) fn new(source: &str) -> Result<Formula, TemplateProblem> {
        if source.trim_start().starts_with("{{") {
            return Err(TemplateProblem::Braces);
        }
        jinja::Expression::new(&ENVIRONMENT, source).map(Formula).map_err(|error| TemplateProblem::Engine { error })
    }

    /// Evaluates the expression for a row. The error names fields that the row lacks.
    pub(crate) fn value(&self, row: &Value) -> Result<Value, TemplateProblem> {
        let missing = || missing(&self.0.undeclared_variables(), row);
        let value = self.0.evaluate(row.clone());
        let value = value.map_err(|error| missing().unwrap_or(TemplateProblem::Engine { error }))?;
        if value.is_undefined() {
            return Err(missing().unwrap_or(TemplateProblem::NoValue));
        }
        Ok(value)
    }
}

/// Names that are defined independently of the row.
const FUNCTIONS: [&str; 4] = ["range", "dict", "debug", "namespace"];

/// Returns an error naming the undefined fields, if any; the engine's own error does not name them.
fn missing(wanted: &HashSet<String>, row: &Value) -> Option<TemplateProblem> {
    let mut fields: Vec<String> = wanted
        .iter()
        .filter(|name| !FUNCTIONS.contains(&name.as_str()))
        .filter(|name| row.get_attr(name).map_or(true, |v| v.is_undefined()))
        .cloned()
        .collect();
    fields.sort_unstable();
    let has: Vec<String> = row.try_iter().ok()?.map(|k| k.to_string()).collect();
    (!fields.is_empty()).then_some(TemplateProblem::Missing { fields, has })
}

/// Preprocesses HellaSwag's texts as lm-eval does, since their WikiHow part contains `[title]`, `[step]` and the like:
/// strips the text, replaces ` [title]` by a full stop, removes other bracketed text, and replaces two spaces by one.
fn hellaswag_clean(text: &str) -> String {
    static BRACKETS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\[.*?\]").expect("a valid pattern"));
    let text = python_strip(text).replace(" [title]", ". ");
    BRACKETS.replace_all(&text, "").replace("  ", " ")
}

/// Converts a target of digits to a number, as lm-eval does with the rendered `doc_to_target` of multiple choice.
fn lm_eval_target(value: Value) -> Value {
    let digits = value.as_str().filter(|text| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()));
    digits.and_then(|text| text.parse::<u64>().ok()).map_or(value, Value::from)
}

/// Splits MathQA's text of all choices, such as `a ) 38 , b ) 27.5 , … , e ) none of these`, as lm-eval does.
fn mathqa_choices(text: &str) -> Vec<String> {
    // Python's `$` also matches before a final line break.
    static CHOICES: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[abcd] \) (.*?), |e \) (.*?)\n?$").expect("a valid pattern"));
    let text_of = |choice: regex::Captures<'_>| {
        let text = choice.get(1).or(choice.get(2)).map_or("", |m| m.as_str());
        text.trim_end_matches([' ', ',']).to_owned()
    };
    CHOICES.captures_iter(text).map(text_of).collect()
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn render(template: &str) -> Result<String, String> {
        let row = context! { text => "\u{1c} a b\u{85}", list => ["x", "y"], word => "ΌΔΟΣ ÉTÉ" };
        Template::new(template).and_then(|template| template.render(&row)).map_err(|problem| problem.to_string())
    }

    #[test]
    fn python_s_methods() {
        for (template, expected) in [
            ("{{ text.strip() }}|", "a b|"),
            ("{{ text.lstrip() }}|{{ text.rstrip() }}", "a b\u{85}||\u{1c} a b".replace("||", "|").as_str()),
            ("{{ list.index('y') }}\n", "1\n"),
            ("{{ word.capitalize() }}", "Όδος été"),
            ("{{ 'a#b#c'.split('#')[-1] }}", "c"),
            ("{{ gone if gone is defined else list[0] }}", "x"),
            ("<b>{{ '<&' }}", "<b><&"),
        ] {
            assert_eq!(render(template).as_deref(), Ok(expected), "{template}");
        }
        assert_eq!(
            render("{{ none }} {{ true }} {{ ['a', 1.5] }} {{ text | trim }}").unwrap(),
            "None True ['a', 1.5] a b"
        );
    }

    #[test]
    fn errors_name_what_is_missing() {
        assert_eq!(render("{{ gone }}").unwrap_err(), "no `gone`; the row has text, list, word");
        let error = render("{{ list.index('z') }}").unwrap_err();
        assert!(error.contains(r#""z" is not in the list ["x", "y"]"#), "{error}");
        assert!(render("{{ list.index('z') ").unwrap_err().contains("syntax error"));
        assert!(render("{{ list[7].strip() }}").unwrap_err().contains("undefined"));
    }

    #[test]
    fn mathqa_s_choices() {
        // [c[4:].rstrip(" ,") for c in re.findall(r"[abcd] \) .*?, |e \) .*?$", text)]
        for (text, expected) in [
            ("a ) 38 , b ) 1 , 000 , c ) rs . 5 , d ) a ) 4 , e ) none of these", "38|1|rs . 5|a ) 4|none of these"),
            ("['a ) 24', 'b ) 120', 'e ) 1024']", "24'|120'|1024']"),
            ("a ) 1,5 , e ) 2 , \n", "1,5|2"),
            ("a ) x\ny , b ) 2 , e ) 3\n4", "2"),
            ("a ) 1", ""),
        ] {
            assert_eq!(mathqa_choices(text).join("|"), expected, "{text:?}");
        }
    }

    #[test]
    fn hellaswag_s_texts() {
        let text = " How to [x] pay [title] Go. [substeps] Now  \t";
        assert_eq!(hellaswag_clean(text), "How to pay. Go. Now");
        assert_eq!(hellaswag_clean("a [x\ny]   b"), "a [x\ny]  b");
    }
}
