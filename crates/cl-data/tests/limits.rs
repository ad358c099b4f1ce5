//! Templates that would hang, abort or exhaust memory are errors that name the file and say what is too large.

use std::process::Command;

use cl_data::{ChatTemplate, Message};

/// Hostile templates, each with a part of the expected error message.
fn hostile() -> Vec<(String, &'static str)> {
    let of = |text: &str, part| (text.to_owned(), part);
    vec![
        (format!("{{{{ {}1 }}}}", "-".repeat(200_000)), "more than 2000 tokens"),
        (format!("{{{{ {}1 }}}}", "not ".repeat(60_000)), "more than 2000 tokens"),
        (format!("{{{{ 1{} }}}}", "+1".repeat(50_000)), "more than 2000 tokens"),
        (format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(20_000)), "more than 2000 tokens"),
        (format!("{{{{ messages{} }}}}", "[0]".repeat(50_000)), "more than 2000 tokens"),
        (format!("{{{{ '}}}}'{} }}}}", "|trim".repeat(50_000)), "more than 2000 tokens"),
        (format!("{{{{ {}1{} }}}}", "(".repeat(900), ")".repeat(900)), "recursion"),
        (format!("{{% if 0 %}}{}{{% endif %}}", "{%elif 0%}".repeat(20_000)), "more than 500 `elif`"),
        (format!("{}{}", "{% if 1 %}".repeat(9000), "{% endif %}".repeat(9000)), "recursion"),
        ("x".repeat(300_000), "300000 bytes"),
        of("{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}", "too many steps"),
        of("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion limit"),
        of("{{ range(999999999) | length }}", "999999999 numbers"),
        of("{{ 'a' | indent(99999999999, true) }}", "indent: 99999999999"),
        of("{{ 'a' | indent(width=99999999999, first=true) }}", "indent: 99999999999"),
        of("{{ ('\\n' * 9000000) | indent(9000) }}", "indent: the result would have"),
        of("{{ [1] | slice(99999999999) }}", "slice: 99999999999"),
        of("{{ [1] | batch(99999999999, 0) }}", "batch: 99999999999"),
        of("{{ [1] | tojson(indent=99999999999) }}", "tojson: 99999999999"),
        of("{{ '{:>9999999999}'.format(1) }}", "format: a width"),
        of("{{ '{:.9999999999f}'.format(1.5) }}", "format: a width"),
        of("{{ '%9999999999d' | format(1) }}", "format: a width"),
        of("{{ 'x' * 99999999999 }}", "repeated string is too large"),
        of("{{ ([0] * 999999999999) | list }}", "67108864 bytes"),
        of("{{ [0] * 999999999999 }}", "67108864 bytes"),
        of("{{ ','.join(['x'] * 999999999999) }}", "67108864 bytes"),
        of("{{ ('x' * 60000).replace('x', 'y' * 60000) }}", "replace: the result would have"),
        of("{{ ('x' * 60000) | replace('', 'y' * 60000) }}", "replace: the result would have"),
        of("{{ 'abc'.count('') }}", "count of an empty text"),
        of("{% set x %}{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}", "536870912 bytes"),
        of("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "67108864 bytes"),
        of(
            "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
            "deeper",
        ),
        (nested("[n.x]"), "deeper"),
        (nested("{'a': n.x}"), "deeper"),
        (nested("n.x + [n.x]"), "67108864 bytes"),
        (nested("dict(a=n.x)"), "deeper"),
        (nested("namespace(a=n.x)"), "too many steps"),
        (doubled("n.x ~ n.x"), "67108864 bytes"),
        (doubled("n.x + n.x"), "67108864 bytes"),
        (doubled("n.x * 2"), "67108864 bytes"),
        (doubled("'%s%s' | format(n.x, n.x)"), "67108864 bytes"),
        (doubled("n.x.join([n.x, n.x])"), "67108864 bytes"),
        (doubled("(n.x, n.x)"), "67108864 bytes"),
        (doubled("[n.x] + [n.x]"), "67108864 bytes"),
        (doubled("{'a': n.x, 'b': n.x}"), "67108864 bytes"),
        (doubled("dict(a=n.x, b=n.x)"), "67108864 bytes"),
        of(&circle("{{ a == b }}"), "deeper"),
        of(&circle("{{ a in {} }}"), "deeper"),
        of(&circle("{{ {a: 1} }}"), "deeper"),
        of(&circle("{{ a is eq(b) }}"), "deeper"),
        of(&circle("{% for x in [a, b] %}{{ loop.changed(x) }}{% endfor %}"), "deeper"),
        of("{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('xx') }}", "67108864 bytes"),
        (
            format!(
                "{{% set x = 'xx' %}}{}{{{{ x[0] }}}}{}",
                "{% with x = x ~ x %}".repeat(40),
                "{% endwith %}".repeat(40)
            ),
            "67108864 bytes",
        ),
        (format!("{{{{ 'x' * 60000000{} }}}}", " ~ 'x' * 60000000".repeat(200)), "67108864 bytes"),
        (format!("{{% set x = 'x' * 60000000 %}}{{{{ x{} }}}}", " ~ x".repeat(250)), "67108864 bytes"),
        of("{{ 1 in [0] * 10 ** 15 }}", "67108864 bytes"),
        of("{{ 1 is in([0] * 10 ** 15) }}", "67108864 bytes"),
        of("{{ [0] * 10 ** 15 == [0] * 10 ** 15 }}", "67108864 bytes"),
        of("{{ ([0] * 10 ** 15)[10 ** 14] }}", "67108864 bytes"),
        of("{% set a, b = [0] * 10 ** 15 %}", "67108864 bytes"),
        (format!("{{% set x %}}{}{{% endset %}}", "x".repeat(20_000)), "16384 bytes"),
        (format!("{{% macro f() %}}{}{{% endmacro %}}", "x".repeat(20_000)), "16384 bytes"),
        (format!("{{{{ messages{} }}}}", " ~ messages".repeat(900)), "recursion"),
        of("{% include 'chat' %}", "no other templates"),
    ]
}

/// Two namespaces that contain each other: comparing or hashing them would not terminate.
fn circle(used: &str) -> String {
    let makes = "{% set a = namespace() %}{% set b = namespace() %}{% set a.x = b %}{% set b.x = a %}";
    format!("{makes}{used}")
}

/// Repeatedly makes a value of two copies of itself, and compares two such values.
fn doubled(made: &str) -> String {
    let twice = |name: &str| {
        format!(
            "{{% set n.x = 'xx' %}}{{% for i in range(60) %}}{{% set n.x = {made} %}}{{% endfor %}}{{% set {name} = n.x %}}"
        )
    };
    format!("{{% set n = namespace() %}}{}{}{{{{ a == b }}}}", twice("a"), twice("b"))
}

/// Nests a value into itself as often as the limit of steps allows: dropping it must not overflow the stack either.
fn nested(grown: &str) -> String {
    let head = "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(9999) %}{% set n.x = ";
    format!("{head}{grown} %}}{{% endfor %}}{{% endfor %}}")
}

#[test]
#[ignore = "run by the test below, in little memory"]
fn hostile_chat_templates_are_errors() {
    let messages = [Message::new("user", "Why?")];
    for (text, part) in hostile() {
        let error = ChatTemplate::new(&text, &[]).and_then(|t| t.render(&messages, true)).map(|out| out.len());
        let message = error.expect_err(&text[..text.len().min(80)]).to_string();
        assert!(message.contains(part) && message.starts_with("chat template: "), "{:.80}: {message:.300}", text);
        assert!(message.len() < 2000, "{:.80}: {} bytes of message", text, message.len());
    }
}

/// The limits also hold if memory is scarce: 3 GiB of address space, including the stacks of tests and renderings.
#[cfg(unix)] // sets limits by a shell
#[test]
fn hostile_chat_templates_are_errors_in_little_memory() {
    let limited = "ulimit -v 3145728 && exec \"$0\" --ignored --exact hostile_chat_templates_are_errors";
    let output = Command::new("sh").args(["-c", limited]).arg(std::env::current_exe().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_model_s_template_is_a_regular_file_of_bounded_size_and_named_in_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat_template.jinja");
    let message = || {
        let template = ChatTemplate::from_dir(folder.path()).and_then(|t| t.unwrap().render::<String>(&[], true));
        template.unwrap_err().to_string()
    };
    std::fs::write(&path, "{{ 'a' | indent(99999999999, true) }}").unwrap();
    assert!(message().contains("chat_template.jinja: ") && message().contains("indent"), "{}", message());
    std::fs::write(&path, "x".repeat(300_000)).unwrap();
    assert!(message().contains("chat_template.jinja: has more than 262144 bytes"), "{}", message());
    std::fs::write(&path, b"caf\xe9").unwrap();
    assert!(message().contains("byte 3 is not valid UTF-8"), "{}", message());
    std::fs::remove_file(&path).unwrap();
    if cfg!(unix) {
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(message().contains("is a FIFO"), "{}", message());
    }
}

#[test]
fn a_long_conversation_is_far_from_the_bounds() {
    let template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | trim }}{% else %}{{ m.content }}\
                    {% endif %}{{ loop.index }} of {{ messages | length }}{% endfor %}";
    let messages: Vec<Message> = (0..2000).map(|i| Message::new("user", format!(" {i}"))).collect();
    let text = ChatTemplate::new(template, &[]).unwrap().render(&messages, false).unwrap();
    assert!(text.ends_with("19992000 of 2000"));
}
