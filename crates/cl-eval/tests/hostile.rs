//! Untrusted files: task files whose templates would hang or abort, files that are not task files, and a megabyte of
//! TOML on one line. Each is an error that names the file and the key.

use std::path::{Path, PathBuf};
use std::process::Command;

use cl_eval::{TaskOptions, load_task};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("rows.jsonl", "{\"question\": \"Why?\", \"n\": 3}\n");
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    #[cfg(unix)]
    fn fifo(&self, name: &str) {
        let _ = std::fs::remove_file(self.path(name));
        assert!(Command::new("mkfifo").arg(self.path(name)).status().unwrap().success());
    }

    /// Returns the error of loading a task with this description.
    fn refused(&self, description: &str) -> String {
        self.write("task.toml", description);
        let path = self.path("task.toml");
        let loaded = load_task(path.to_str().unwrap(), self.0.path(), TaskOptions::default());
        loaded.map(|t| t.len()).expect_err(&description[..description.len().min(200)]).to_string()
    }
}

fn written(prompt: &str) -> String {
    let prompt = toml::Value::from(prompt);
    format!(
        "name = 't'\nmetric = 'exact_match'\nfiles.eval = ['rows']\n[generation]\nprompt = {prompt}\ntarget = 'a'\n"
    )
}

fn chosen(choices: &str) -> String {
    let choices = toml::Value::from(choices);
    format!(
        "name = 't'\nmetric = 'acc'\nfiles.eval = ['rows']\n[multiple_choice]\ncontext = 'c'\nchoices = {choices}\n\
         gold = '0'\n"
    )
}

#[test]
fn templates_have_bounds() {
    let folder = Folder::new();
    let prompts = [
        (format!("{{{{ {}1 }}}}", "-".repeat(200_000)), "more than 2000 tokens"),
        (format!("{{{{ {}n }}}}", "not ".repeat(50_000)), "more than 2000 tokens"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}".into(),
            "too many steps",
        ),
        ("{{ question | indent(99999999999, true) }}".into(), "indent: 99999999999"),
        ("{{ [1] | slice(99999999999) }}".into(), "slice: 99999999999"),
        ("{{ '{:>9999999999}'.format(1) }}".into(), "format: a width"),
        ("{{ ([0] * 999999999999) | list }}".into(), "67108864 bytes"),
        ("{{ [0] * 999999999999 }}".into(), "67108864 bytes"),
        ("{{ question.count('') }}".into(), "count of an empty text"),
    ];
    // A value that is nested into itself again and again: neither its size nor dropping it may crash the process.
    let nested = [
        ("[n.x]", "deeper"),
        ("{'a': n.x}", "deeper"),
        ("{'a': [n.x]}", "deeper"),
        ("(n.x, n.x)", "67108864 bytes"),
        ("n.x + [n.x]", "67108864 bytes"),
        ("n.x ~ n.x ~ 'x'", "67108864 bytes"),
    ]
    .map(|(grown, part)| {
        let head = "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(9999) %}{% set n.x = ";
        (format!("{head}{grown} %}}{{% endfor %}}{{% endfor %}}"), part)
    });
    for (prompt, part) in prompts.into_iter().chain(nested) {
        let message = folder.refused(&written(&prompt));
        assert!(message.contains(part) && message.contains("generation.prompt"), "{prompt:.80}: {message:.300}");
        assert!(message.contains(folder.0.path().to_str().unwrap()), "{message:.300}");
        assert!(message.len() < 1000, "{prompt:.80}: {message:.300}");
    }
    for (choices, part) in [
        ("-".repeat(200_000) + "1", "more than 2000 tokens"),
        ("['a'] * 999999999999".to_owned(), "67108864 bytes"),
        ("['a'] | slice(99999999999)".to_owned(), "slice: 99999999999"),
        ("['a' in [0] * 10 ** 15]".to_owned(), "67108864 bytes"),
    ] {
        let message = folder.refused(&chosen(&choices));
        assert!(message.contains(part) && message.contains("multiple_choice.choices"), "{choices:.80}: {message:.300}");
    }
}

#[test]
fn an_error_in_toml_does_not_echo_a_long_line() {
    let folder = Folder::new();
    let long = format!("name = 't'\nmetric = 'x{}'\n", "y".repeat(100_000));
    let message = folder.refused(&long);
    assert!(message.contains("line 2") && message.contains("task.toml"), "{message:.300}");
    assert!(message.len() < 1000, "{} bytes", message.len());
    let message = folder.refused("name = 't'\nmetric = 'nonsense'\n");
    assert!(message.contains("line 2") && message.contains("nonsense") && message.contains("rouge_l"), "{message}");
}

#[cfg(unix)]
#[test]
fn only_regular_files_of_bounded_size_are_read() {
    let folder = Folder::new();
    folder.fifo("task.toml");
    let loaded = |name: &str| {
        let path = folder.path(name);
        let path = if name.starts_with('/') { Path::new(name) } else { &path };
        load_task(path.to_str().unwrap(), folder.0.path(), TaskOptions::default()).err().unwrap().to_string()
    };
    assert!(loaded("task.toml").contains("task.toml: is a FIFO"), "{}", loaded("task.toml"));
    std::fs::remove_file(folder.path("task.toml")).unwrap();
    folder.fifo("rows.jsonl");
    assert!(folder.refused(&written("{{ question }}")).contains("rows.jsonl: is a FIFO"));
    assert!(loaded("rows.jsonl").contains("is a FIFO"));
    std::fs::remove_file(folder.path("rows.jsonl")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", folder.path("rows.jsonl")).unwrap();
    assert!(loaded("rows.jsonl").contains("is a device"), "{}", loaded("rows.jsonl"));
    folder.write("large.toml", &format!("name = '{}'", "x".repeat(17 << 20)));
    assert!(loaded("large.toml").contains("large.toml: has more than 16777216 bytes"));
}
