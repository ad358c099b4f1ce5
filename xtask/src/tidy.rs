//! Checks of the repository's rules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::command::cargo;
use crate::root;

/// Crates that never link libtorch, and depend on a command-line parser only with their feature `cli`.
pub const LIGHT: [&str; 7] = ["cl-checkpoint", "cl-data", "cl-hub", "cl-merge", "cl-moe", "cl-eval", "cl-report"];

/// Files in which `unsafe` is allowed, with the reason.
const UNSAFE: [(&str, &str); 3] = [
    ("crates/cl-torch/src/", "the border to libtorch"),
    ("crates/cl-checkpoint/src/safetensors_file.rs", "memory-mapping a file"),
    ("crates/cl-checkpoint/src/gguf/reader.rs", "memory-mapping a file"),
];

/// Checks all rules and reports every violation.
pub fn run() -> Result<()> {
    let files = files()?;
    let mut problems = Vec::new();
    for file in &files {
        let Ok(text) = fs::read_to_string(root().join(file)) else { continue };
        problems.extend(text_problems(file, &text));
        if file.ends_with(".md") {
            problems.extend(link_problems(file, &text));
        }
    }
    problems.extend(size_problems(&files));
    problems.extend(crate_problems());
    problems.extend(readme_problems());
    let summary = fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap_or_default();
    problems.extend(book_problems(&files, &summary));
    problems.extend(dependency_problems()?);
    for problem in &problems {
        eprintln!("{problem}");
    }
    if problems.is_empty() {
        eprintln!("tidy: {} files, no problem", files.len());
        return Ok(());
    }
    bail!("{} rules broken", problems.len())
}

/// Returns tracked and new files, except those ignored by git.
fn files() -> Result<Vec<String>> {
    let listed = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    match listed {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
        }
        _ => bail!("git ls-files does not work here; tidy needs a checkout"),
    }
}

fn text_problems(file: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if !file.ends_with(".rs") {
        return problems;
    }
    // A lint requires `allow` for `unsafe`; this check limits where the `allow` may be.
    let exempt = UNSAFE.iter().any(|(place, _)| file.starts_with(place));
    // Assembled here, so that this file does not violate its own rules.
    let (unfinished, allowed) = (["FIX", "ME"].concat(), ["allow(unsafe", "_code)"].concat());
    for (i, line) in text.lines().enumerate() {
        if line.contains(&unfinished) {
            problems.push(format!("{file}:{}: unfinished work: {unfinished}", i + 1));
        }
        if line.contains(&allowed) && !exempt {
            problems.push(format!("{file}:{}: unsafe code outside the places that may have it", i + 1));
        }
    }
    problems
}

/// Checks that links to files of the repository resolve.
fn link_problems(file: &str, text: &str) -> Vec<String> {
    let folder = Path::new(file).parent().unwrap_or(Path::new(""));
    text.match_indices("](")
        .filter_map(|(at, _)| text[at + 2..].split(')').next())
        .map(|link| link.split('#').next().unwrap_or_default())
        .filter(|link| !link.is_empty() && !link.contains("://") && !link.contains(' '))
        .filter(|link| !root().join(folder).join(link).exists())
        .map(|link| format!("{file}: link to {link}, which does not exist"))
        .collect()
}

fn size_problems(files: &[String]) -> Vec<String> {
    files
        .iter()
        .filter(|f| fs::metadata(root().join(f)).is_ok_and(|m| m.len() > 3_000_000))
        .map(|f| format!("{f}: larger than 3 MB"))
        .collect()
}

/// Checks that every crate has a README.
fn crate_problems() -> Vec<String> {
    let mut problems = Vec::new();
    let crates: Vec<PathBuf> =
        fs::read_dir(root().join("crates")).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    for dir in crates {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !dir.join("README.md").is_file() {
            problems.push(format!("crates/{name}: no README.md"));
        }
    }
    problems
}

fn readme_problems() -> Vec<String> {
    let text = fs::read_to_string(root().join("README.md")).unwrap_or_default();
    ["cargo xtask reproduce", "cargo xtask test", "cargo xtask setup", "cargo xtask fetch-smollm2"]
        .iter()
        .filter(|command| !text.contains(*command))
        .map(|command| format!("README.md: does not show `{command}`"))
        .collect()
}

/// Checks that every page of `docs` is part of the book.
fn book_problems(files: &[String], summary: &str) -> Vec<String> {
    let pages = files.iter().filter_map(|file| file.strip_prefix("docs/")).filter(|page| page.ends_with(".md"));
    pages
        .filter(|page| *page != "SUMMARY.md" && !summary.contains(&format!("]({page})")))
        .map(|page| format!("docs/SUMMARY.md: does not list {page}"))
        .collect()
}

fn dependency_problems() -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for name in LIGHT.iter().filter(|n| root().join("crates").join(n).is_dir()) {
        let all = tree(name, &["--all-features"])?;
        for heavy in ["torch-sys", "tch"] {
            if all.contains(&heavy.to_owned()) {
                problems
                    .push(format!("{name} links libtorch (through {heavy}); it must not, not even behind a feature"));
            }
        }
        if tree(name, &[])?.contains(&"clap".to_owned()) {
            problems.push(format!("{name} brings clap without its feature `cli`"));
        }
    }
    Ok(problems)
}

/// Returns the names of all packages that a crate is built from.
fn tree(name: &str, extra: &[&str]) -> Result<Vec<String>> {
    let mut command = cargo(&["tree", "--quiet", "--edges", "normal,build", "--prefix", "none", "--package", name]);
    let output = command.args(extra).output()?;
    if !output.status.success() {
        bail!("cargo tree --package {name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(|l| l.split(' ').next()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_work_and_stray_unsafe_are_found() {
        let text = ["// FIX", "ME\n#![allow(unsafe", "_code)]\n"].concat();
        assert_eq!(text_problems("crates/cl-data/src/x.rs", &text).len(), 2);
        assert_eq!(text_problems("crates/cl-torch/src/x.rs", &text).len(), 1);
        assert!(text_problems("docs/x.md", &text).is_empty());
    }

    #[test]
    fn pages_outside_of_the_book_are_found() {
        let files = ["docs/SUMMARY.md", "docs/a.md", "docs/b/c.md", "README.md", "docs/x.svg"].map(str::to_owned);
        assert_eq!(book_problems(&files, "- [A](a.md)"), ["docs/SUMMARY.md: does not list b/c.md"]);
    }

    #[test]
    fn dead_links_are_found() {
        let text = "[a](README.md) [b](nowhere.md#x) [c](https://example.org) [d](#here)";
        let problems = link_problems("README.md", text);
        assert_eq!(problems, ["README.md: link to nowhere.md, which does not exist"]);
    }
}
