use std::collections::HashSet;

use minijinja::{Environment, Error, ErrorKind, Value};

use super::limits::{check_expression, check_source, evaluate, render};
use super::operators::{bounded_expression, bounded_template};

/// Name of a template in error messages.
const NAME: &str = "<string>";

/// A template that cannot abort the process or exhaust memory; see [the limits](super).
///
/// # Example
/// ```
/// use cl_data::jinja::{Dialect, Template, environment};
/// use minijinja::context;
///
/// let environment = environment(Dialect::LmEval);
/// let template = Template::new(&environment, "{{ question.strip() }}\nAnswer:")?;
/// assert_eq!(template.render(context! { question => " Why? " })?, "Why?\nAnswer:");
///
/// let doubling = "{% set n = namespace(x='xx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}";
/// let error = Template::new(&environment, doubling)?.render(context! {}).unwrap_err();
/// assert!(error.to_string().contains("more than 67108864 bytes"));
/// # Ok::<(), minijinja::Error>(())
/// ```
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Compiles a template for an environment created by [`environment`](super::environment).
    ///
    /// Returns an error if the syntax is invalid or the template is too long.
    pub fn new(environment: &Environment<'static>, source: &str) -> Result<Template, Error> {
        check_source(source).map_err(|message| Error::new(ErrorKind::SyntaxError, message))?;
        let mut environment = environment.clone();
        environment.add_template_owned(NAME, bounded_template(source, NAME)?)?;
        Ok(Template { environment })
    }

    /// Renders the template.
    ///
    /// Returns an error if the template raises one or exceeds a limit.
    pub fn render(&self, context: Value) -> Result<String, Error> {
        render(&self.environment.get_template(NAME)?, context)
    }

    /// Returns the names of variables that the template uses but does not set, including functions.
    pub fn undeclared_variables(&self) -> HashSet<String> {
        self.environment.get_template(NAME).map_or_else(|_| HashSet::new(), |t| t.undeclared_variables(false))
    }
}

/// An expression, as between `{{` and `}}`, with the same limits as a [`Template`].
#[derive(Debug)]
pub struct Expression(minijinja::Expression<'static, 'static>);

impl Expression {
    /// Compiles an expression for an environment created by [`environment`](super::environment).
    ///
    /// Returns an error if the syntax is invalid or the expression is too long.
    pub fn new(environment: &'static Environment<'static>, source: &str) -> Result<Expression, Error> {
        check_expression(source).map_err(|message| Error::new(ErrorKind::SyntaxError, message))?;
        environment.compile_expression_owned(bounded_expression(source)?).map(Expression)
    }

    /// Evaluates the expression.
    ///
    /// Returns an error if the expression raises one or exceeds a limit.
    pub fn evaluate(&self, context: Value) -> Result<Value, Error> {
        evaluate(&self.0, context)
    }

    /// Returns the names of variables that the expression uses, including functions.
    pub fn undeclared_variables(&self) -> HashSet<String> {
        self.0.undeclared_variables(false)
    }
}
