//! Builds `docs` as a book. Pages link to files of the repository that are not part of the book; such links point to
//! the repository given by `CL_REPOSITORY`, or become plain text if it is not set.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::run as run_command;
use crate::root;

/// Builds the book into `target/book`.
pub fn run() -> Result<()> {
    let mut mdbook = std::process::Command::new("mdbook");
    mdbook.args(["build", "docs"]).current_dir(root());
    run_command(mdbook).context("mdbook builds the book: cargo install --locked mdbook")?;
    let repository = std::env::var("CL_REPOSITORY").ok().filter(|url| !url.is_empty());
    let book = root().join("target/book");
    let pages = pages(&book)?;
    for page in &pages {
        let html = fs::read_to_string(page)?;
        let folder = page.strip_prefix(&book)?.parent().unwrap_or(Path::new(""));
        let exists = |file: &Path| root().join(file).exists();
        fs::write(page, resolve_links(&html, &Path::new("docs").join(folder), repository.as_deref(), &exists))?;
    }
    eprintln!("target/book/index.html: {} pages", pages.len());
    Ok(())
}

fn pages(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut pages = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            pages.extend(self::pages(&path)?);
        } else if path.extension().is_some_and(|e| e == "html") {
            pages.push(path);
        }
    }
    Ok(pages)
}

/// Rewrites links that lead out of `docs`, on a page in `folder` of the repository: they point to the online
/// repository, or are removed if there is none.
fn resolve_links(html: &str, folder: &Path, repository: Option<&str>, exists: &dyn Fn(&Path) -> bool) -> String {
    let mut out = String::with_capacity(html.len());
    let mut rest = html;
    while let Some(start) = rest.find("<a href=\"../") {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let parts = rest["<a href=\"".len()..].split_once('"').and_then(|(link, tail)| {
            let (_, tail) = tail.split_once('>')?;
            let (text, tail) = tail.split_once("</a>")?;
            Some((link, text, tail))
        });
        let Some((link, text, tail)) = parts else { break };
        match (file_outside(link, folder, exists), repository) {
            (None, _) => out.push_str(&rest[..rest.len() - tail.len()]),
            (Some(_), None) => out.push_str(text),
            (Some(file), Some(url)) => out.push_str(&format!("<a href=\"{url}/{file}\">{text}</a>")),
        }
        rest = tail;
    }
    out + rest
}

/// Returns the file of the repository that a link leads to, with its anchor, unless it is a page of the book.
fn file_outside(link: &str, folder: &Path, exists: &dyn Fn(&Path) -> bool) -> Option<String> {
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let mut file = PathBuf::new();
    for part in folder.join(path).components() {
        match part {
            Component::ParentDir => drop(file.pop()),
            part => file.push(part),
        }
    }
    // mdBook assumes that every linked page is part of the book.
    let page = file.with_extension("md");
    if !exists(&file) && exists(&page) {
        file = page;
    }
    let outside = exists(&file) && !file.starts_with("docs");
    outside.then(|| file.display().to_string() + &anchor.map(|a| format!("#{a}")).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str =
        "<a href=\"../../crates/x/README.html#y\">x</a>, <a href=\"../faq.html\">q</a>, <a href=\"../../src\">s</a>.";

    fn exists(file: &Path) -> bool {
        ["crates/x/README.md", "docs/faq.md", "src"].iter().any(|f| file == Path::new(f))
    }

    #[test]
    fn links_out_of_the_book_lead_to_the_repository_or_are_text() {
        let folder = Path::new("docs/decisions");
        let with = resolve_links(PAGE, folder, Some("https://example.org/blob/main"), &exists);
        assert_eq!(
            with,
            "<a href=\"https://example.org/blob/main/crates/x/README.md#y\">x</a>, <a href=\"../faq.html\">q</a>, \
             <a href=\"https://example.org/blob/main/src\">s</a>."
        );
        assert_eq!(resolve_links(PAGE, folder, None, &exists), "x, <a href=\"../faq.html\">q</a>, s.");
    }
}
