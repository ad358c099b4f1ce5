//! Finds or downloads libtorch, and tells cargo where it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{cache, root};

/// The version of libtorch that tch 0.24 requires.
pub const VERSION: &str = "2.11.0";
const SCRIPT: &str = include_str!("trim_libtorch.py");

/// Files that a libtorch with headers must contain.
const NEEDED: [&str; 5] = [
    "lib/libtorch_cpu.so",
    "lib/libc10.so",
    "lib/libtorch.so",
    "include/ATen/ATen.h",
    "include/torch/csrc/autograd/custom_function.h",
];

/// Returns the LIBTORCH exported by the user, as opposed to the one set for this process by cargo's configuration.
pub fn exported_libtorch() -> Option<PathBuf> {
    let value = std::env::var("LIBTORCH").ok().filter(|v| !v.is_empty())?;
    let configured = fs::read_to_string(config_file()).ok().and_then(|t| configured(&t));
    (configured.as_deref() != Some(value.as_str())).then(|| PathBuf::from(value))
}

/// Ensures that there is a libtorch and that `.cargo/libtorch.toml` contains its path; returns its directory.
pub fn run() -> Result<PathBuf> {
    require("c++", &["--version"], "a C++ compiler is needed (on Debian and Ubuntu: apt-get install g++)")?;
    let folder = match exported_libtorch() {
        Some(folder) => {
            check(&folder).with_context(|| {
                format!("the exported LIBTORCH={} cannot be used; unset it to have one fetched", folder.display())
            })?;
            folder
        }
        None => cached()?,
    };
    write_config(&folder)?;
    eprintln!("libtorch {VERSION}: {}", folder.display());
    Ok(folder)
}

/// Returns the cached directory, which is assembled from wheels if it is missing or incomplete.
fn cached() -> Result<PathBuf> {
    let cache = cache()?;
    let folder = cache.join(format!("libtorch-{VERSION}-cpu"));
    if check(&folder).is_ok() {
        return Ok(folder);
    }
    if folder.exists() {
        eprintln!("{}: incomplete, assembling it again", folder.display());
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    require(
        "python3",
        &["-m", "pip", "--version"],
        "python3 with pip is needed to download libtorch (on Debian: apt-get install python3-pip)",
    )?;
    fs::create_dir_all(&cache)
        .with_context(|| format!("{}: cannot be created; set CL_CACHE to another directory", cache.display()))?;
    remove_stale(&cache)?;
    let part = cache.join(format!("libtorch-{VERSION}-cpu.{}.part", std::process::id()));
    fs::create_dir(&part).with_context(|| part.display().to_string())?;
    eprintln!("downloading libtorch {VERSION} from PyPI (about 550 MB, once) to {}", cache.display());
    let made = Command::new("python3").args(["-c", SCRIPT]).arg(&part).status();
    let made = made.context("python3").and_then(|s| if s.success() { check(&part) } else { bail!("python3: {s}") });
    if let Err(error) = made {
        fs::remove_dir_all(&part).ok();
        return Err(error.context("libtorch could not be assembled; no files were left. Run the command again, or export LIBTORCH=<directory of libtorch 2.11.0>"));
    }
    if fs::rename(&part, &folder).is_err() {
        // Another setup has finished first; use its result.
        fs::remove_dir_all(&part).ok();
    }
    check(&folder)?;
    Ok(folder)
}

/// Removes leftovers of killed processes.
fn remove_stale(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pid = name.strip_suffix(".part").and_then(|n| n.rsplit('.').next()).and_then(|p| p.parse::<u32>().ok());
        if let Some(pid) = pid
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            fs::remove_dir_all(&path)
                .or_else(|_| fs::remove_file(&path))
                .with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Checks that a directory contains a libtorch of the right version with its headers.
pub fn check(folder: &Path) -> Result<()> {
    for file in NEEDED {
        let path = folder.join(file);
        let size = fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
        if size == 0 {
            bail!("{}: missing or empty", path.display());
        }
    }
    // A downloaded libtorch has build-version; the torch directory of a Python environment has version.py.
    let version = ["build-version", "version.py"].iter().find_map(|f| fs::read_to_string(folder.join(f)).ok());
    match version {
        Some(text) if text.contains(VERSION) => Ok(()),
        Some(text) => {
            bail!("{}: version {}, expected {VERSION}", folder.display(), text.lines().next().unwrap_or_default())
        }
        None => bail!("{}: neither build-version nor version.py says which version this is", folder.display()),
    }
}

fn config_file() -> PathBuf {
    root().join(".cargo/libtorch.toml")
}

fn configured(text: &str) -> Option<String> {
    let line = text.lines().find_map(|l| l.strip_prefix("LIBTORCH = \""))?;
    Some(line.strip_suffix('"')?.replace("\\\"", "\"").replace("\\\\", "\\"))
}

fn write_config(folder: &Path) -> Result<()> {
    let path = fs::canonicalize(folder).with_context(|| folder.display().to_string())?;
    let quoted = path.display().to_string().replace('\\', "\\\\").replace('"', "\\\"");
    let text =
        format!("# Written by `cargo xtask setup`; .cargo/config.toml takes it in.\n[env]\nLIBTORCH = \"{quoted}\"\n");
    let file = config_file();
    if fs::read_to_string(&file).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let part = file.with_extension("toml.part");
    fs::write(&part, text).and_then(|()| fs::rename(&part, &file)).with_context(|| file.display().to_string())
}

/// Checks that a program can be run.
fn require(program: &str, arguments: &[&str], hint: &str) -> Result<()> {
    let found = Command::new(program).args(arguments).output().is_ok_and(|o| o.status.success());
    if found { Ok(()) } else { bail!("{program} {} does not work: {hint}", arguments.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(version: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in NEEDED {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        fs::write(folder.path().join("build-version"), version).unwrap();
        folder
    }

    #[test]
    fn a_folder_is_checked_for_version_and_files() {
        assert!(check(fake("2.11.0+cpu\n").path()).is_ok());
        let old = fake("2.7.1\n");
        assert!(check(old.path()).unwrap_err().to_string().contains("version 2.7.1, expected 2.11.0"));
        let cut = fake("2.11.0\n");
        fs::write(cut.path().join("lib/libc10.so"), "").unwrap();
        assert!(check(cut.path()).unwrap_err().to_string().contains("libc10.so: missing or empty"));
    }

    #[test]
    fn the_written_configuration_reads_back() {
        let text = "# x\n[env]\nLIBTORCH = \"/a \\\"b\\\"/c\"\n";
        assert_eq!(configured(text).unwrap(), "/a \"b\"/c");
    }
}
