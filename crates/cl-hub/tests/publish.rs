//! Models and adapters prepared for the Hub.

use std::path::{Path, PathBuf};

use cl_checkpoint::{CheckpointWriter, Dtype, Manifest, OutputDir, TensorSpec, WriteOptions};
use cl_hub::{Content, Hub, HubError, Publication, PublishOptions, publish};
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn with(dir: &Path, change: impl FnOnce(&mut PublishOptions)) -> Result<Publication, HubError> {
    let hub = Hub { endpoint: String::new(), cache: dir.join("none"), token: None, offline: true };
    let mut options = PublishOptions { repo: "me/x".to_owned(), ..PublishOptions::default() };
    change(&mut options);
    publish(dir, &hub, &options)
}

fn front(publication: &Publication) -> String {
    publication.card.split("---\n").nth(1).unwrap().to_owned()
}

fn file(publication: &Publication, name: &str) -> Vec<u8> {
    match &publication.files.iter().find(|file| file.name == name).unwrap().content {
        Content::File(path) => std::fs::read(path).unwrap(),
        Content::Bytes(bytes) => bytes.clone(),
    }
}

fn json_of(publication: &Publication, name: &str) -> Value {
    serde_json::from_slice(&file(publication, name)).unwrap()
}

/// Writes a safetensors file with one tensor of zeros for each name and shape.
fn weights(path: &Path, tensors: &[(&str, &str, usize)]) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape, elements) in tensors {
        let shape: Value = serde_json::from_str(shape).unwrap();
        header.insert(
            (*name).to_owned(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * elements]}),
        );
        end += 4 * elements;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &vec![0; end]].concat();
    std::fs::write(path, bytes).unwrap();
}

/// Writes an adapter, with a manifest if it has sources.
fn adapter(dir: &Path, base: &str, keys: Value, sources: &[(&str, &str)]) -> PathBuf {
    std::fs::create_dir_all(dir.parent().unwrap()).unwrap();
    let out = OutputDir::create(dir, true).unwrap();
    let of = |factor: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.{factor}.weight");
    let tensors = [(&*of("lora_A"), "[1, 2]", 2), (&*of("lora_B"), "[2, 1]", 2)];
    weights(&out.path().join("adapter_model.safetensors"), &tensors);
    let mut config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"],
        "base_model_name_or_path": base});
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    std::fs::write(out.path().join("adapter_config.json"), config.to_string()).unwrap();
    let mut manifest = Manifest::new("adapter");
    for (role, path) in sources {
        manifest = manifest.with_source(role, Path::new(path), None);
    }
    out.finish(manifest).unwrap();
    if sources.is_empty() {
        std::fs::remove_file(dir.join("manifest.json")).unwrap();
    }
    dir.to_owned()
}

/// Writes a model with this manifest and card.
fn model(dir: &Path, architecture: &str, manifest: Manifest, card: &str) -> PathBuf {
    let spec = TensorSpec { name: "w".to_owned(), dtype: Dtype::F32, shape: vec![1] };
    let writer = CheckpointWriter::create(dir, &[spec], WriteOptions::default()).unwrap();
    writer.write("w", &0f32.to_le_bytes()).unwrap();
    writer.put_json("config.json", &json!({"architectures": [architecture]})).unwrap();
    if !card.is_empty() {
        writer.put_file("README.md", card.as_bytes()).unwrap();
    }
    writer.finish(manifest).unwrap();
    dir.to_owned()
}

const CARD: &str = "---\nlanguage: de\nlicense: mit\ntags:\n- mytag\nbase_model: org/ll\ndatasets:\n- org/mydata\nwidget:\n\
                    - text: \"a: b\"\n---\n# My adapter\nText.\n";

#[test]
fn an_existing_cards_front_matter_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let dir = adapter(&folder.path().join("a"), "org/ll", json!({}), &[]);
    let systems = [
        CARD.to_owned(),
        CARD.replace('\n', "\r\n"),
        format!("\u{feff}{CARD}"),
        format!("\u{feff}{}", CARD.replace('\n', "\r\n")),
    ];
    for card in systems {
        std::fs::write(dir.join("README.md"), card).unwrap();
        let publication = with(&dir, |options| options.datasets.push("org/more".to_owned())).unwrap();
        assert_eq!(
            front(&publication),
            "language: de\nlicense: mit\ntags:\n- \"mytag\"\n- \"lora\"\nbase_model: org/ll\ndatasets:\n- \"org/mydata\"\n- \
             \"org/more\"\nwidget:\n- text: \"a: b\"\nlibrary_name: \"peft\"\npipeline_tag: \"text-generation\"\n\
             base_model_relation: \"adapter\"\n"
        );
        assert!(publication.card.ends_with("---\n# My adapter\nText.\n"), "{}", publication.card);
        assert!(publication.notes.is_empty(), "{:?}", publication.notes);
    }
    // What is given for this publication takes precedence.
    let publication = with(&dir, |options| {
        options.license = Some("apache-2.0".to_owned());
        options.base_models.push("org/other".to_owned());
    });
    let front = front(&publication.unwrap());
    assert!(front.contains("license: \"apache-2.0\"\n") && front.contains("base_model:\n- \"org/other\"\n"), "{front}");
    assert!(!front.contains("mit") && !front.contains("org/ll"), "{front}");

    std::fs::write(dir.join("README.md"), "---\na: [\n---\n").unwrap();
    let message = with(&dir, |_| {}).unwrap_err().to_string();
    assert!(
        message.contains("README.md") && message.contains("are not YAML") && message.contains("correct"),
        "{message}"
    );
}

#[test]
fn a_published_adapter_names_its_base_on_the_hub() {
    let folder = tempfile::tempdir().unwrap();
    let (base, pinned) = (folder.path().join("base"), format!("org/ll@{COMMIT}"));
    let base = base.to_str().unwrap();
    let old = json!({"revision": "old", "other": {"b": 1, "a": 0.5}});
    for (name, sources, given, revision) in [
        ("given", vec![("base", base)], vec!["org/ll".to_owned()], Value::Null),
        ("pinned", vec![("base", base)], vec![format!("org/ll@{COMMIT}")], COMMIT.into()),
        ("known", vec![("base", pinned.as_str())], vec![], COMMIT.into()),
        ("without", vec![], vec!["org/ll".to_owned()], Value::Null),
    ] {
        let dir = adapter(&folder.path().join(name), base, old.clone(), &sources);
        let publication = with(&dir, |options| options.base_models = given).unwrap();
        assert!(front(&publication).contains("base_model:\n- \"org/ll\"\n"), "{name}");
        let config = json_of(&publication, "adapter_config.json");
        assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&json!("org/ll"), &revision), "{name}");
        assert_eq!((&config["other"], &config["r"]), (&old["other"], &json!(1)));
        assert!(!publication.notes.iter().any(|note| note.contains("adapter_config.json")), "{:?}", publication.notes);
        let out = folder.path().join(format!("{name}-out"));
        publication.write(&out).unwrap();
        assert!(sources.is_empty() || Manifest::verify(&out).unwrap().is_empty(), "{name}");
        let own = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        assert!(own.contains(base), "the directory itself is unchanged");
    }
    for sources in [&[][..], &[("base", pinned.as_str())]] {
        let dir = adapter(&folder.path().join("kept"), "org/ll", json!({"revision": "v1"}), sources);
        let config = file(&with(&dir, |_| {}).unwrap(), "adapter_config.json");
        assert_eq!(config, std::fs::read(dir.join("adapter_config.json")).unwrap());
    }
    let dir = adapter(&folder.path().join("pinned-now"), "org/ll", json!({}), &[("base", &pinned)]);
    assert_eq!(json_of(&with(&dir, |_| {}).unwrap(), "adapter_config.json")["revision"], COMMIT);

    let cached = format!("/cache/models--org--ll/snapshots/{COMMIT}");
    let dir = adapter(&folder.path().join("cached"), &cached, json!({}), &[]);
    let config = json_of(&with(&dir, |_| {}).unwrap(), "adapter_config.json");
    assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&json!("org/ll"), &json!(COMMIT)));

    let unknown = adapter(&folder.path().join("unknown"), base, json!({}), &[("base", base)]);
    let publication = with(&unknown, |_| {}).unwrap();
    assert_eq!(json_of(&publication, "adapter_config.json")["base_model_name_or_path"], base);
    let note = publication.notes.iter().find(|note| note.contains("adapter_config.json")).unwrap();
    assert!(note.contains(base) && note.contains("--base-model ORG/NAME"), "{note}");
}

#[test]
fn a_mixture_with_trained_routers_has_the_bases_of_the_mixture() {
    let folder = tempfile::tempdir().unwrap();
    let (base, expert) = (format!("org/ll@{COMMIT}"), format!("org/math@{COMMIT}"));
    let mixed = Manifest::new("model")
        .with_config(json!({"mix": {}}))
        .with_source("base", Path::new(&base), None)
        .with_source("expert", Path::new(&expert), None);
    let mixture = model(&folder.path().join("mixture"), "MixtralForCausalLM", mixed, "");
    let routers =
        |of: &Path| Manifest::new("model").with_config(json!({"train_router": {}})).with_source("mixture", of, None);
    let trained = model(&folder.path().join("trained"), "MixtralForCausalLM", routers(&mixture), "");
    let text = front(&with(&trained, |_| {}).unwrap());
    for part in [
        "library_name: \"transformers\"",
        "relation: \"merge\"",
        "- \"org/ll\"\n- \"org/math\"\n",
        "- \"moe\"\n- \"merge\"\n",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // A mixture that somebody else made.
    let theirs = model(&folder.path().join("theirs"), "MixtralForCausalLM", routers(Path::new(&expert)), "");
    let text = front(&with(&theirs, |_| {}).unwrap());
    assert!(text.contains("relation: \"finetune\"\nbase_model:\n- \"org/math\"\ntags:\n- \"moe\"\n"), "{text}");
}

#[test]
fn models_that_transformers_cannot_load_do_not_name_it() {
    let folder = tempfile::tempdir().unwrap();
    let local = folder.path().join("ll");
    let card =
        "---\nbase_model:\n- \"m/ll\"\n- \"org/math\"\nlibrary_name: transformers\ntags:\n- moe\n- merge\n---\n# M\n";
    for (architecture, loadable) in [
        ("MixtralForCausalLM", true),
        ("Qwen2MoeForCausalLM", true),
        ("MoeLlamaForCausalLM", false),
        ("MoeMistralForCausalLM", false),
        ("DeltaMoeLlamaForCausalLM", false),
        ("DeltaMoeMistralForCausalLM", false),
    ] {
        for card in ["", card] {
            let manifest = Manifest::new("model")
                .with_config(json!({"mix": {}}))
                .with_source("base", &local, None)
                .with_source("expert", Path::new("m/ll"), None);
            let dir = folder.path().join(format!("{architecture}{}", card.len()));
            let text = front(&with(&model(&dir, architecture, manifest, card), |_| {}).unwrap());
            assert_eq!(text.contains("library_name"), loadable, "{text}");
            assert!(text.contains("moe") && text.contains("merge"), "{text}");
            // A path of a source is not a repository, even if it looks like one.
            assert_eq!((text.contains("m/ll"), text.contains("org/math")), (false, !card.is_empty()), "{text}");
        }
    }
}

#[test]
fn what_cannot_be_published_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let blend = folder.path().join("blend");
    std::fs::create_dir(&blend).unwrap();
    std::fs::write(blend.join("mixture_config.json"), "{}").unwrap();
    let message = with(&blend, |_| {}).unwrap_err().to_string();
    assert!(message.contains("blend") && message.contains("mixture of adapters is not supported yet"), "{message}");

    let dir = adapter(&folder.path().join("a"), "org/ll", json!({}), &[]);
    let publication = with(&dir, |_| {}).unwrap();
    let message = publication.write(&dir).unwrap_err().to_string();
    assert!(message.contains("already exists; move it, or choose another output"), "{message}");
    assert!(!message.contains("--overwrite"), "{message}");
}
