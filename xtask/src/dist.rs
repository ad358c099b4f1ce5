//! `cargo xtask dist` and `cargo xtask gpu-check`: a small directory that runs on any machine that has Python with
//! PyTorch, and the GPU check in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{cargo, run as run_command};
use crate::{root, setup};

/// Maximum size of the directory in bytes: it must be possible to copy it to a machine that is lent for minutes.
const LIMIT: u64 = 60 << 20;
const SCRIPT: &str = include_str!("gpu_check.py");
const README: &str = "\
cl-engine     all commands of `cl`, for x86-64 Linux; needs the libraries of libtorch 2.11.0
cl-merge      the merge commands alone; needs no libtorch
gpu_check.py  checks cl-engine on a GPU and measures it: python3 gpu_check.py --help

On a machine with PyTorch 2.11.0 (CUDA 13.0) under python3, and nothing else:

    python3 gpu_check.py                          # at most 8 minutes; writes gpu-check/table.md and results.jsonl
    python3 gpu_check.py --device cpu --small     # the same on a CPU with tiny models: a rehearsal

To run cl-engine itself over the libraries of that PyTorch:

    export CL_LIBTORCH_CUDA=$(python3 -c 'import torch; print(torch.__path__[0])')/lib
    export LD_LIBRARY_PATH=$CL_LIBTORCH_CUDA
    ./cl-engine --help
";

/// Builds the commands and packs them with the check, to `target/dist` or the directory given by `--out`.
pub fn run(arguments: &[String]) -> Result<()> {
    match arguments {
        [] => dist(&default_folder()),
        [flag, folder] if flag == "--out" => dist(Path::new(folder)),
        _ => bail!("expected `cargo xtask dist [--out DIR]`"),
    }
}

/// Runs the GPU check with the given arguments; creates `target/dist` if it is missing.
pub fn gpu_check(arguments: &[String]) -> Result<()> {
    let folder = default_folder();
    if !folder.join("cl-engine").is_file() {
        dist(&folder)?;
    }
    // The script in an earlier `dist` may be older than this one.
    let script = folder.join("gpu_check.py");
    fs::write(&script, SCRIPT).with_context(|| script.display().to_string())?;
    let mut python = Command::new(std::env::var_os("CL_PYTHON").unwrap_or_else(|| "python3".into()));
    // Cargo's library path would put a different libtorch before PyTorch's own.
    python.env_remove("LD_LIBRARY_PATH").arg(&script).args(arguments);
    if !arguments.iter().any(|a| a == "--out" || a.starts_with("--out=")) {
        python.arg("--out").arg(target().join("gpu-check"));
    }
    run_command(python).context("the check of a GPU (CL_PYTHON: a Python with PyTorch 2.11.0)")
}

fn dist(folder: &Path) -> Result<()> {
    setup::run()?;
    run_command(cargo(&["build", "--release", "--locked", "-p", "cl-merge", "--features", "cl-merge/cli"]))?;
    run_command(cargo(&["build", "--release", "--locked", "-p", "cl-cli"]))?;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let copy = |from: PathBuf, name: &str| {
        let to = folder.join(name);
        // A running program cannot be overwritten, but it can be removed.
        fs::remove_file(&to).ok();
        fs::copy(&from, &to).map(|_| ()).with_context(|| format!("copying {} to {}", from.display(), to.display()))
    };
    // The release profile strips them. `cl` is left out, because it would start cl-engine for every command that runs a
    // model.
    for name in ["cl-engine", "cl-merge"] {
        copy(target().join("release").join(name), name)?;
    }
    for name in ["LICENSE-MIT", "LICENSE-APACHE"] {
        copy(root().join(name), name)?;
    }
    fs::write(folder.join("gpu_check.py"), SCRIPT)?;
    fs::write(folder.join("README.txt"), README)?;
    let files = sizes(folder)?;
    for (name, size) in &files {
        println!("{:>7.1} MiB  {name}", mebibytes(*size));
    }
    let total = total(&files)?;
    println!("{:>7.1} MiB  {}", mebibytes(total), folder.display());
    Ok(())
}

/// Returns the total size of the files.
///
/// # Errors
/// Returns an error if it exceeds the limit.
fn total(files: &[(String, u64)]) -> Result<u64> {
    let total = files.iter().map(|(_, size)| size).sum();
    ensure!(total <= LIMIT, "{:.1} MiB, more than the {} allowed", mebibytes(total), LIMIT >> 20);
    Ok(total)
}

/// Returns names and sizes of the files in a directory, which must not contain anything else.
fn sizes(folder: &Path) -> Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        ensure!(entry.file_type()?.is_file(), "{}: {name} is not part of it; remove it", folder.display());
        files.push((name, entry.metadata()?.len()));
    }
    files.sort();
    Ok(files)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn default_folder() -> PathBuf {
    target().join("dist")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_above_the_limit_or_with_other_directories_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("cl-engine")).unwrap();
        file.set_len(LIMIT).unwrap();
        assert_eq!(total(&sizes(folder.path()).unwrap()).unwrap(), LIMIT);
        fs::write(folder.path().join("README.txt"), "x").unwrap();
        let error = total(&sizes(folder.path()).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "60.0 MiB, more than the 60 allowed");
        fs::create_dir(folder.path().join("gpu-check")).unwrap();
        assert!(sizes(folder.path()).unwrap_err().to_string().contains("gpu-check is not part of it"));
    }

    #[test]
    fn every_check_is_documented() {
        let docs = fs::read_to_string(root().join("docs/gpu.md")).unwrap();
        let list = SCRIPT.split_once("\nCHECKS = [\n").unwrap().1.split_once("\n]").unwrap().0;
        let names: Vec<&str> = list.lines().filter_map(|l| l.split('"').nth(1)).collect();
        assert!(names.len() > 10, "{names:?}");
        for name in names {
            assert!(docs.contains(&format!("`{name}`")), "docs/gpu.md does not describe `{name}`");
        }
    }
}
