//! Every example's `run.sh` as somebody runs it, on a model of two narrow layers with random weights.
//!
//! A target of the package cl-cli, whose command the examples run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use cl_checkpoint::{Adapter, Checkpoint, Manifest, TensorSource};
use cl_model::{LoadOptions, random_weights};
use cl_torch::tch::Kind;
use serde_json::{Value, json};
use tempfile::TempDir;

/// ChatML, the system message left to who writes one.
const CHAT_TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                             {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A folder with a model that knows every byte, and room for outputs.
struct World(TempDir);

impl World {
    fn new() -> World {
        let world = World(tempfile::tempdir().unwrap());
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": true, "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32"
        });
        let config = config.as_object().unwrap();
        let model = random_weights(config, 1, LoadOptions::cpu(Kind::Float)).unwrap();
        model.save(&world.path("model"), Kind::Float, config, &tokenizer(), Manifest::new("model"), false).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Stdout of an example's script, which has to succeed.
    fn run(&self, example: &str, args: &[&str]) -> String {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let cl = env!("CARGO_BIN_EXE_cl");
        let output = Command::new("bash")
            .arg(root.join("examples").join(example).join("run.sh"))
            .args(args.iter().map(|name| self.path(name)))
            .env("CL", cl)
            .env("CL_MERGE", format!("{cl} merge"))
            // Kept answers of other runs are none of this one's, and several threads wait for each other beside other tests.
            .env("CL_CACHE", self.path("cache"))
            .env("OMP_NUM_THREADS", "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{example}: {}\n{stderr}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    fn lines(&self, name: &str) -> Vec<Value> {
        self.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Losses of a run's first and last step.
    fn losses(&self, run: &str) -> (f64, f64) {
        let loss = |step: &Value| step["loss"].as_f64().unwrap();
        let steps = self.lines(&format!("{run}/log.jsonl"));
        (loss(&steps[0]), loss(&steps[steps.len() - 1]))
    }

    fn assert_learned(&self, run: &str) {
        let (first, last) = self.losses(run);
        assert!(last < first, "{run}: the loss went from {first} to {last}");
    }
}

/// A tokenizer with a token for each byte, BOS in front, and a chat template.
fn tokenizer() -> Vec<(String, Vec<u8>)> {
    // Byte-level BPE writes printable bytes of Latin-1 as themselves, and the others as characters from 256 on.
    let mut others = 256;
    let byte = |b: u32| match b {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from_u32(b).unwrap(),
        _ => {
            others += 1;
            char::from_u32(others - 1).unwrap()
        }
    };
    let mut vocab: BTreeMap<String, usize> = (0..256).map(byte).enumerate().map(|(i, c)| (c.into(), i)).collect();
    let special = ["<|im_start|>", "<|im_end|>"];
    vocab.extend(special.iter().enumerate().map(|(i, s)| ((*s).to_owned(), 256 + i)));
    let added: Vec<Value> = special
        .iter()
        .map(|s| {
            json!({"id": vocab[*s], "content": s, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false}
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1],
        "model_max_length": 512, "chat_template": CHAT_TEMPLATE
    });
    [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]
        .map(|(name, value)| (name.to_owned(), value.to_string().into_bytes()))
        .into()
}

#[test]
fn own_chats_are_learned_and_talked_about() {
    let world = World::new();
    let said = world.run("own-chats", &["model", "out"]);
    // Only what the assistant says is learned.
    assert!(said.contains("⟦We open at half past six, Tuesday to Sunday.<|im_end|>⟧"), "{said}");
    assert!(said.contains("rows per epoch: 16 of chats"), "{said}");
    world.assert_learned("out");
    Adapter::open(&world.path("out/adapter")).unwrap();
}

#[test]
fn three_data_sets_share_an_epoch() {
    let world = World::new();
    world.run("joint-data", &["model", "out"]);
    world.assert_learned("out");
    let rows = world.lines("out.rows.jsonl");
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows.iter().filter(|row| row["epoch"] == 0) {
        *count.entry(row["dataset"].as_str().unwrap()).or_default() += 1;
    }
    // The largest of the three has 12 rows; none gives fewer, and none is cut in the middle of a pass.
    assert_eq!(count.keys().copied().collect::<Vec<_>>(), ["facts", "instructions", "questions"]);
    assert!(count.values().all(|&rows| (12..=16).contains(&rows)), "{count:?}");
}

#[test]
fn seven_rounds_are_scored_after_each_and_go_on_where_they_stopped() {
    let world = World::new();
    let table = world.run("seven-rounds", &["model", "out"]);
    assert!(table.contains("| LoRA-Rep |"), "{table}");
    let matrix = world.json("out/matrix.json");
    assert_eq!(matrix["rows"].as_array().unwrap().len(), 8, "the base and seven rounds");
    assert_eq!(matrix["columns"].as_array().unwrap().len(), 8, "seven tasks and old knowledge");
    // In the last round a quarter of its 24 rows comes from each earlier task.
    let plan = world.json("out/rounds/7-colour/rows.json").to_string();
    assert!(plan.contains("capital") && plan.contains("letter"), "{plan}");
    assert!(world.run("seven-rounds", &["model", "out"]).contains("| LoRA-Rep |"));
    assert_eq!(world.json("out/matrix.json"), matrix);
}

#[test]
fn two_models_are_merged_by_mergekits_yaml() {
    let world = World(tempfile::tempdir().unwrap());
    let said = world.run("merge-models", &["out"]);
    assert!(said.contains("ties, Yadav et al."), "{said}");
    let merged = Checkpoint::open(&world.path("out")).unwrap();
    assert_eq!(merged.names().len(), 20);
}

#[test]
fn adapters_of_two_people_are_combined_and_blended() {
    let world = World::new();
    let said = world.run("combine-adapters", &["model", "out"]);
    assert!(said.contains("model.layers.1.mlp.down_proj"), "{said}");
    for person in ["ana", "ben"] {
        world.assert_learned(&format!("out/{person}"));
    }
    assert_eq!(world.json("out/sum/adapter_config.json")["r"], 16, "the sum of two of rank 8 has rank 16");
    assert_eq!(world.json("out/ties/adapter_config.json")["r"], 8);
    Checkpoint::open(&world.path("out/model")).unwrap();

    let said = world.run("blend-adapters", &["model", "mixture", "out"]);
    assert!(said.contains("no problems found"), "{said}");
    let inside = std::fs::read_dir(world.path("mixture/mixture")).unwrap().count();
    assert!(inside > 1);
}

#[test]
fn two_runs_are_scored_and_compared() {
    let world = World::new();
    let said = world.run("score-and-compare", &["model", "out"]);
    assert!(said.contains("bakery") && said.contains("old"), "{said}");
    world.assert_learned("out/train");
    let scores = world.json("out/scores.json").to_string();
    assert!(scores.contains("bakery"), "{scores}");
    for run in ["before", "after"] {
        assert_eq!(world.lines(&format!("out/{run}/bakery.jsonl")).len(), 8);
    }
}

/// A configuration whose example is not listed, or an example without its README, is not found by anybody.
#[test]
fn every_example_is_described() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let list = std::fs::read_to_string(examples.join("README.md")).unwrap();
    let mut found = 0;
    for entry in std::fs::read_dir(&examples).unwrap().map(|entry| entry.unwrap()) {
        if entry.path().join("run.sh").is_file() {
            let name = entry.file_name().into_string().unwrap();
            assert!(entry.path().join("README.md").is_file(), "{name} has no README.md");
            assert!(list.contains(&format!("]({name}/README.md)")), "{name} is not in examples/README.md");
            found += 1;
        }
    }
    assert_eq!(found, 7);
}
