use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Manifest, ManifestProblem};
use cl_lab::toy;
use cl_model::{LoadOptions, random_weights};
use cl_torch::tch::Kind;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A directory with a narrow two-layer Llama model in `model`, the toy tasks in `data`, and configurations. Commands
/// run inside it with relative paths, so that the contents of two worlds can be compared byte for byte.
pub struct World {
    folder: TempDir,
    cache: TempDir,
}

/// LoRA on two tasks, with 12 steps per round.
const LORA: &str = r#"
model = "model"
data = "data"
tasks = ["first", "mood"]
[train]
epochs = 3
micro_batch_size = 4
learning_rate = 1e-2
save_steps = 2
[train.lora]
r = 2
[eval]
old = ["homes.jsonl"]
max_new_tokens = 2
"#;

/// One round of LoRA, with 12 steps.
const TRAIN: &str = r#"
model = "model"
[data]
train = "data/first"
[train]
epochs = 3
micro_batch_size = 4
learning_rate = 1e-2
save_steps = 2
[train.lora]
r = 2
"#;

impl World {
    pub fn new() -> World {
        let world = World { folder: tempfile::tempdir().unwrap(), cache: tempfile::tempdir().unwrap() };
        world.model("model", 1);
        for task in toy::tasks(1, 16, 6) {
            world.write(&format!("data/{}/train.json", task.name), &json!(task.train).to_string());
            world.write(&format!("data/{}/test.json", task.name), &json!(task.test).to_string());
        }
        let questions: Vec<String> = toy::facts(1).questions[0].1[..6].iter().map(|q| json!(q).to_string()).collect();
        world.write("data/homes.jsonl", &questions.join("\n"));
        world.write("lora.toml", LORA);
        world.write("full.toml", &LORA.replace("[train.lora]\nr = 2", "[train.full]"));
        world.write("train.toml", TRAIN);
        world
    }

    /// Writes a model directory with random weights.
    pub fn model(&self, name: &str, seed: u64) {
        let config = toy::model_config(16);
        let model = random_weights(&config, seed, LoadOptions::cpu(Kind::Float)).unwrap();
        let files = toy::tokenizer_files();
        model.save(&self.path(name), Kind::Float, &config, &files, Manifest::new("model"), false).unwrap();
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    /// Reads the lines of a JSONL file.
    pub fn lines(&self, name: &str) -> Vec<Value> {
        self.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Returns the rows that a run used.
    pub fn rows(&self, run: &str) -> Vec<Value> {
        self.ok(["data", "rows", run]).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub fn copy_dir(&self, from: &str, to: &str) {
        std::fs::create_dir_all(self.path(to)).unwrap();
        for file in std::fs::read_dir(self.path(from)).unwrap() {
            let file = file.unwrap().path();
            std::fs::copy(&file, self.path(to).join(file.file_name().unwrap())).unwrap();
        }
    }

    /// Creates a command to run in this world. It uses one thread, since more would compete with tests running in
    /// parallel.
    pub fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> std::process::Command {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cl"));
        command.args(args).current_dir(self.folder.path()).env("OMP_NUM_THREADS", "1");
        // Do not reuse answers of earlier worlds.
        command.env("CL_CACHE", self.cache.path());
        command
    }

    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> CommandOutput {
        CommandOutput::of(&mut self.command(args))
    }

    /// Returns stdout of a command that must succeed.
    pub fn ok<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> String {
        let run = self.run(args);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.stdout
    }

    /// Returns stderr of a command that must fail with an error of its own: exit code 1, nothing on stdout.
    pub fn fails<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> String {
        let run = self.run(args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{}", run.stderr);
        assert!(run.stderr.contains("error: "), "{}", run.stderr);
        for part in ["panicked", "stack backtrace", "Exception raised", "frame #", "\u{1b}"] {
            assert!(!run.stderr.contains(part), "{part}: {}", run.stderr);
        }
        run.stderr
    }
}

/// Exit code and output of a command.
pub struct CommandOutput {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl CommandOutput {
    pub fn of(command: &mut std::process::Command) -> CommandOutput {
        CommandOutput::from(command.output().unwrap())
    }

    /// Collects the output of a process whose output is piped.
    pub fn of_child(process: std::process::Child) -> CommandOutput {
        CommandOutput::from(process.wait_with_output().unwrap())
    }

    fn from(output: std::process::Output) -> CommandOutput {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        CommandOutput { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// Returns every file below a directory with its content, without the wall-clock seconds of logs.
pub fn content(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = files(dir)
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            let bytes = std::fs::read(&path).unwrap();
            let bytes = if name.ends_with("log.jsonl") { without_seconds(&bytes) } else { bytes };
            (name, bytes)
        })
        .collect();
    files.sort();
    files
}

fn without_seconds(log: &[u8]) -> Vec<u8> {
    let step = |line: &str| {
        let mut step: Map<String, Value> = serde_json::from_str(line).unwrap();
        step.remove("seconds").unwrap();
        json!(step).to_string() + "\n"
    };
    std::str::from_utf8(log).unwrap().lines().map(step).collect::<String>().into_bytes()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Checks that two directories contain the same files with the same bytes, except for wall-clock seconds.
pub fn assert_same(a: &Path, b: &Path) {
    let (a, b) = (content(a), content(b));
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    for (a, b) in a.iter().zip(&b) {
        assert!(a == b, "{} differs", a.0);
    }
}

/// Checks that directories below `dir` with a manifest are complete.
pub fn assert_whole(dir: &Path) {
    for manifest in files(dir).into_iter().filter(|f| f.ends_with("manifest.json")) {
        // Skip directories that are still being written next to their final location.
        if manifest.components().any(|c| c.as_os_str().to_string_lossy().ends_with(".part")) {
            continue;
        }
        let problems = Manifest::verify(manifest.parent().unwrap()).unwrap();
        let listed = |p: &ManifestProblem| !matches!(p, ManifestProblem::Unlisted(_));
        assert!(!problems.iter().any(listed), "{problems:?}");
    }
}

/// Edits the header of a safetensors file; its data are kept.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let file = std::fs::read(path).unwrap();
    let data = data_start(&file);
    let mut header = serde_json::from_slice(&file[8..data]).unwrap();
    edit(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length, header.as_slice(), &file[data..]].concat()).unwrap();
}

/// Overwrites one f32 value of a tensor.
pub fn set_value(path: &Path, tensor: &str, index: usize, value: f32) {
    let mut file = std::fs::read(path).unwrap();
    let data = data_start(&file);
    let header: Value = serde_json::from_slice(&file[8..data]).unwrap();
    let start = data + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 4 * index;
    file[start..start + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(path, file).unwrap();
}

fn data_start(file: &[u8]) -> usize {
    8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize
}
