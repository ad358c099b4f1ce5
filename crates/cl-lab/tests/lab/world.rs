use std::path::{Path, PathBuf};
use std::sync::Once;

use cl_checkpoint::{Checkpoint, Interrupt, Manifest};
use cl_data::Example;
use cl_lab::{Event, LabError, SequenceConfig, SequenceReport, TrainRun, read_sequence, read_train, run_sequence, toy};
use cl_model::{LoadOptions, random_weights};
use cl_torch::tch::{self, Kind};
use serde_json::json;
use tempfile::TempDir;

/// A directory with a narrow two-layer Llama model in `model` and the toy tasks in `data`.
pub struct World {
    folder: TempDir,
}

impl World {
    /// Creates the directory; `stored` is the dtype of the model's file.
    pub fn new(stored: Kind) -> World {
        static THREADS: Once = Once::new();
        // With matrices of 16 columns, synchronizing threads only costs time.
        THREADS.call_once(|| tch::set_num_threads(1));
        let world = World { folder: tempfile::tempdir().unwrap() };
        let config = toy::model_config(16);
        let model = random_weights(&config, 1, LoadOptions::cpu(Kind::Float)).unwrap();
        let files = toy::tokenizer_files();
        model.save(&world.path("model"), stored, &config, &files, Manifest::new("model"), false).unwrap();
        for task in toy::tasks(1, 16, 6) {
            world.task(task.name, &task.train, &task.test);
        }
        world
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a task's directory.
    pub fn task(&self, name: &str, train: &[Example], test: &[Example]) {
        let dir = self.path("data").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("train.json"), json!(train).to_string()).unwrap();
        std::fs::write(dir.join("test.json"), json!(test).to_string()).unwrap();
    }

    /// Configuration of a sequence of `first` and `mood` with LoRA, with the overrides `set`.
    pub fn sequence(&self, set: &[&str]) -> SequenceConfig {
        let text = format!(
            "model = '{}'\ndata = '{}'\ntasks = ['first', 'mood']\n\
             [train]\nepochs = 2\nlearning_rate = 1e-2\n[train.lora]\nr = 2\n[eval]\nmax_new_tokens = 2",
            self.path("model").display(),
            self.path("data").display()
        );
        read_sequence("memory".as_ref(), &text, &owned(set)).unwrap()
    }

    /// Configuration of a round of `first` with LoRA, with the overrides `set`.
    pub fn train(&self, set: &[&str]) -> TrainRun {
        let text = format!(
            "model = '{}'\n[data]\ntrain = '{}'\n[train]\nepochs = 2\nlearning_rate = 1e-2\n[train.lora]\nr = 2",
            self.path("model").display(),
            self.path("data/first").display()
        );
        read_train("memory".as_ref(), &text, &owned(set)).unwrap()
    }

    /// Runs a sequence with output directory `out`.
    pub fn run(&self, config: &SequenceConfig, out: &str) -> Result<SequenceReport, LabError> {
        run_sequence(config, &self.path(out), false, &Interrupt::default(), &mut silent)
    }

    /// Reads a tensor of a model directory.
    pub fn tensor(&self, model: &str, name: &str) -> Vec<f32> {
        Checkpoint::open(&self.path(model)).unwrap().load_f32(name).unwrap()
    }
}

fn owned(set: &[&str]) -> Vec<String> {
    set.iter().map(|s| (*s).to_owned()).collect()
}

pub fn silent(_: Event<'_>) {}
