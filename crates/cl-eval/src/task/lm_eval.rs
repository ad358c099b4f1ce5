//! Few-shot examples that are part of a task in lm-evaluation-harness, read from an installed copy.

use std::path::{Path, PathBuf};
use std::process::Command;

use cl_checkpoint::files::{MAX_CONFIG, read_text};
use cl_data::Row;
use serde::Deserialize;

use super::rows::Document;
use crate::error::Error;
use crate::problem::{LmEvalProblem, shortened};

/// Few-shot examples from a task's YAML file.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// The file.
    pub path: PathBuf,
    /// Hexadecimal blake3 hash of the file.
    pub hash: String,
    /// The examples, in file order.
    pub rows: Vec<Row>,
}

/// The part of a task's YAML file that is used.
#[derive(Deserialize)]
struct TaskYaml {
    fewshot_config: FewShotConfig,
}

#[derive(Deserialize)]
struct FewShotConfig {
    samples: Vec<Row>,
}

/// Finds the directory of the Python package `lm_eval`. `given` is the directory itself, a task's YAML file in it, or a
/// Python interpreter such as `python3`, which is run to find the directory.
///
/// # Errors
/// Returns [`Error::LmEval`] if `given` is none of these, or lm-eval is not installed for the interpreter.
pub fn find_lm_eval(given: &Path) -> Result<PathBuf, Error> {
    let wrong = |problem| Error::LmEval { path: given.to_owned(), problem };
    let is_yaml = given.extension().is_some_and(|e| e == "yaml" || e == "yml");
    if given.is_dir() || (is_yaml && given.exists()) {
        return Ok(given.to_owned());
    }
    let name = given.file_name().unwrap_or_default().to_string_lossy();
    if !name.starts_with("python") {
        return Err(wrong(LmEvalProblem::NotLmEval));
    }
    // Do not `import lm_eval`, which would load PyTorch.
    let program =
        "import importlib.util as u; s = u.find_spec('lm_eval'); print(s.submodule_search_locations[0] if s else '')";
    let output = Command::new(given).args(["-c", program]).output();
    let output = output.map_err(|source| wrong(LmEvalProblem::NotStarted { source }))?;
    let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if folder.is_empty() {
        return Err(wrong(LmEvalProblem::NotInstalled));
    }
    Ok(PathBuf::from(folder))
}

/// Reads a task's few-shot examples: `fewshot_config.samples` of its YAML file. `lm_eval` is the package's directory or
/// its parent, the file itself, or a Python interpreter ([`find_lm_eval`]); `yaml` is the file's path within the
/// package.
///
/// # Errors
/// Returns [`Error::LmEval`] if there is no such file or it has no examples, and [`Error::File`] if it cannot be read.
///
/// # Example
/// ```
/// # let folder = tempfile::tempdir()?;
/// let package = folder.path();
/// std::fs::create_dir_all(package.join("tasks/sums"))?;
/// let yaml = "task: sums\nfewshot_config:\n  samples:\n  - question: 1 + 1?\n    target: The answer is 2.\n";
/// std::fs::write(package.join("tasks/sums/sums.yaml"), yaml)?;
/// let samples = cl_eval::lm_eval_samples(package, "tasks/sums/sums.yaml")?;
/// assert_eq!(samples.rows[0]["target"], "The answer is 2.");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn lm_eval_samples(lm_eval: &Path, yaml: &str) -> Result<Samples, Error> {
    let found = find_lm_eval(lm_eval)?;
    let candidates = [found.join(yaml), found.join("lm_eval").join(yaml), found.clone()];
    let Some(path) = candidates.into_iter().find(|p| p.exists() && !p.is_dir()) else {
        return Err(Error::LmEval { path: found, problem: LmEvalProblem::NoFile { yaml: yaml.to_owned() } });
    };
    let wrong = |problem| Error::LmEval { path: path.clone(), problem };
    let text = read_text(&path, MAX_CONFIG)?;
    let task: TaskYaml =
        serde_saphyr::from_str(&text).map_err(|e| wrong(LmEvalProblem::Yaml { message: shortened(&e.to_string()) }))?;
    if task.fewshot_config.samples.is_empty() {
        return Err(wrong(LmEvalProblem::NoSamples));
    }
    let hash = blake3::hash(text.as_bytes()).to_hex().to_string();
    Ok(Samples { path, hash, rows: task.fewshot_config.samples })
}

impl Samples {
    pub(crate) fn documents(self) -> Vec<Document> {
        let document = |(index, row)| Document { path: self.path.clone(), index, row };
        self.rows.into_iter().enumerate().map(document).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_how_to_get_it() {
        let folder = tempfile::tempdir().unwrap();
        let message = |given: &Path| lm_eval_samples(given, "tasks/a.yaml").unwrap_err().to_string();
        assert!(message(folder.path()).contains("has no tasks/a.yaml"), "{}", message(folder.path()));
        assert!(message(&folder.path().join("nowhere")).contains("or a Python"));
        assert!(message(&folder.path().join("python3")).contains("cannot be started"));
        let file = folder.path().join("a.yaml");
        for (text, part) in [
            ("task: a\n", "fewshot_config"),
            ("fewshot_config:\n  samples: []\n", "is empty"),
            ("fewshot_config: &a [*a]\n", "no task with"),
        ] {
            std::fs::write(&file, text).unwrap();
            assert!(message(&file).contains(part) && message(&file).contains("a.yaml"), "{}", message(&file));
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_python_is_asked_for_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.yaml"), "fewshot_config:\n  samples:\n  - {q: 1}\n").unwrap();
        let python = folder.path().join("python3");
        std::fs::write(&python, format!("#!/bin/sh\necho {}\n", folder.path().display())).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&python, executable).unwrap();
        assert_eq!(lm_eval_samples(&python, "a.yaml").unwrap().rows[0]["q"], 1);
        std::fs::write(&python, "#!/bin/sh\necho\n").unwrap();
        assert!(lm_eval_samples(&python, "a.yaml").unwrap_err().to_string().contains("pip install lm-eval"));
    }
}
