//! Mixtures of small models that experts or files of hidden states do not fit.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions};
use cl_moe::{BlendConfig, BlendPlan, Error, MixConfig, MixOptions, Plan, mix, router_states_metadata};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const LAYERS: usize = 2;
const HIDDEN: usize = 2;

/// Writes a Llama with these additional tensors and keys of config.json.
fn model(dir: &Path, more: &[&str], keys: Value) -> PathBuf {
    let matrices = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"];
    let of_layer = |layer| matrices.map(|m| format!("model.layers.{layer}.{m}.weight"));
    let names = (0..LAYERS).flat_map(of_layer).chain(["model.embed_tokens.weight".to_owned()]);
    let spec = |name, shape| TensorSpec { name, dtype: Dtype::F32, shape };
    let mut specs: Vec<TensorSpec> = names.map(|name| spec(name, vec![HIDDEN, HIDDEN])).collect();
    specs.extend(more.iter().map(|name| spec((*name).to_owned(), vec![HIDDEN])));
    let writer = CheckpointWriter::create(dir, &specs, WriteOptions::default()).unwrap();
    // Models in different directories differ.
    let value = dir.file_name().unwrap().len() as f32;
    for spec in &specs {
        let count = spec.shape.iter().product();
        writer.write(&spec.name, &value.to_le_bytes().repeat(count)).unwrap();
    }
    let mut config = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 1, "vocab_size": HIDDEN});
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    writer.put_json("config.json", &config).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
    dir.to_owned()
}

fn plan(text: &str) -> Result<Plan, Error> {
    Plan::new(&toml::from_str::<MixConfig>(text).unwrap())
}

fn refused(text: &str) -> String {
    plan(text).err().expect("it is refused").to_string()
}

#[test]
fn an_experts_tensors_of_chosen_modules_are_not_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, more: &[&str]| model(&folder.path().join(name), more, json!({}));
    let (base, plain) = (of("base", &[]), of("plain", &[]));
    let mlp = of("with_mlp", &["model.layers.0.mlp.up_proj.bias", "model.layers.1.mlp.up_proj.bias"]);
    let attention = of("with_attention", &["model.layers.1.self_attn.q_proj.bias"]);
    let text = |head: &str, expert: &Path| {
        format!("base_model = {base:?}\n{head}\n[[experts]]\nmodel = {plain:?}\n[[experts]]\nmodel = {expert:?}\n")
    };
    for modules in ["mlp", "mlp_fg"] {
        let message = refused(&text(&format!("modules = [\"{modules}\"]"), &mlp));
        for part in ["experts[1]", "with_mlp", "2 tensor(s)", "`model.layers.0.mlp.up_proj.bias`", "remove the module"]
        {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    let shared = format!("shared_expert = {{ model = {mlp:?} }}");
    assert!(refused(&text(&shared, &plain)).contains("shared_expert"));
    let message = refused(&text("modules = [\"q_proj\"]", &attention));
    assert!(message.contains("`model.layers.1.self_attn.q_proj.bias`"), "{message}");
    // What is not taken from the expert may differ.
    for (head, expert) in [
        ("modules = [\"k_proj\"]", &attention),
        ("", &attention),
        ("modules = [\"q_proj\"]", &mlp),
        ("modules = [\"q_proj\"]\nlayers = [0]", &attention),
    ] {
        assert!(plan(&text(head, expert)).is_ok(), "{head}");
    }
}

#[test]
fn experts_with_other_positions_or_vocabularies_are_noted() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, keys: Value| model(&folder.path().join(name), &[], keys);
    let base = of("base", json!({"rope_parameters": {"rope_theta": 1e4}}));
    let other = of("other", json!({"rope_parameters": {"rope_theta": 1e6}, "vocab_size": 3}));
    let text = |head: &str| format!("base_model = {base:?}\n{head}\n[[experts]]\nmodel = {other:?}\n");
    let notes = plan(&text("")).unwrap().notes;
    for key in ["`vocab_size` is 3, 2 in the base", "`rope_parameters` is {\"rope_theta\":1000000.0}"] {
        assert!(notes.iter().any(|note| note.contains("experts[0]") && note.contains(key)), "{key}: {notes:?}");
    }
    let message = refused(&text("layers = [1, 0, 1]"));
    assert!(message.contains("layers: names layer 1 twice; name each layer once"), "{message}");
}

#[test]
fn cards_name_transformers_if_it_can_load_the_mixture() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("base"), &[], json!({}));
    for (head, loadable) in [("", true), ("gateless = true", false), ("expert_storage = \"bitdelta\"", false)] {
        let text = format!("base_model = {base:?}\n{head}\n[[experts]]\nmodel = {base:?}\n");
        let out = folder.path().join("out");
        let options = MixOptions { overwrite: true, ..MixOptions::default() };
        mix(&plan(&text).unwrap(), &out, &options, &|_| {}).unwrap();
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert_eq!(card.contains("library_name: transformers\n"), loadable, "{card}");
    }
}

/// Writes hidden states, row by row for each layer.
fn states(path: &Path, layers: [&[f32]; LAYERS], metadata: Option<HashMap<String, String>>) {
    let bytes = layers.map(|rows| rows.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
    let views = bytes.iter().enumerate().map(|(layer, bytes)| {
        let shape = vec![layers[layer].len() / HIDDEN, HIDDEN];
        (format!("layers.{layer}"), TensorView::new(Dtype::F32, shape, bytes).unwrap())
    });
    safetensors::serialize_to_file(views, metadata, path).unwrap();
}

/// The configuration of a mixture of two experts with these prompts.
fn of_states(folder: &Path, base: &Path, pooling: &str, prompts: [&str; 2]) -> String {
    let file = folder.join("states.safetensors");
    let experts = prompts.map(|prompt| format!("[[experts]]\nmodel = {base:?}\n{prompt}\n"));
    format!(
        "base_model = {base:?}\nrouter = {{ init = \"states\", states = {file:?}{pooling} }}\n{}{}",
        experts[0], experts[1]
    )
}

#[test]
fn states_that_are_no_numbers_or_distinguish_no_experts() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("base"), &[], json!({}));
    let (file, text) = (folder.path().join("states.safetensors"), of_states(folder.path(), &base, "", ["", ""]));
    for value in [f32::NAN, f32::INFINITY] {
        states(&file, [&[1.0, 0.0, 0.0, 1.0], &[1.0, 0.0, 0.0, value]], None);
        let message = refused(&text);
        for part in
            ["states.safetensors", "experts[1]", "base", "layer 1", &value.to_string(), "run `cl moe states` again"]
        {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    let notes = |layers: [&[f32]; LAYERS]| {
        states(&file, layers, None);
        plan(&text).unwrap().notes
    };
    assert!(notes([&[1.0, 0.0, 0.0, 1.0], &[1.0, 0.0, 1.0, 1.0]]).is_empty());
    // Rows are normalized, so their lengths do not count.
    let equal = notes([&[1.0, 0.0, 2.0, 0.0], &[1.0, 0.0, 0.0, 1.0]]);
    assert!(
        equal.len() == 1 && equal[0].contains("equal in layer 0, ") && equal[0].contains("experts[0]"),
        "{equal:?}"
    );
    let everywhere = notes([&[1.0, 0.0, 1.0, 0.0], &[0.0, 1.0, 0.0, 1.0]]);
    assert!(everywhere[0].contains("equal in all layers"), "{everywhere:?}");
    let zero = notes([&[1.0, 0.0, 0.0, 0.0], &[1.0, 0.0, 0.0, 1.0]]);
    assert!(zero.len() == 1 && zero[0].contains("experts[1]") && zero[0].contains("zero in layer 0, "), "{zero:?}");
}

#[test]
fn states_of_something_else_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("base"), &[], json!({}));
    let other = model(&folder.path().join("another"), &[], json!({}));
    let file = folder.path().join("states.safetensors");
    let prompts = ["positive_prompts = [\"2 + 2\"]", "positive_prompts = [\"fn\"]\nnegative_prompts = [\"a\", \"b\"]"];
    let of = |base: &Path, pooling: &str, prompts| of_states(folder.path(), base, pooling, prompts);
    let mean = ", pooling = \"mean\"";
    let own = of(&base, mean, prompts);
    let write = |text: &str| {
        let config: MixConfig = toml::from_str(text).unwrap();
        let base = Checkpoint::open(&config.base_model).unwrap();
        let metadata = router_states_metadata(&config, &base).unwrap();
        assert_eq!(metadata, router_states_metadata(&config, &base).unwrap());
        states(&file, [&[1.0, 0.0, 0.0, 1.0]; LAYERS], Some(metadata));
    };
    write(&own);
    assert!(plan(&own).unwrap().notes.is_empty());
    for (text, parts) in [
        (of(&base, ", pooling = \"last\"", prompts), ["pooling `mean`", "has `last`"]),
        (of(&base, mean, [prompts[1], prompts[0]]), ["other prompts (blake3 ", "than this mixture's (blake3 "]),
        (of(&base, mean, [prompts[0], "positive_prompts = [\"fn\", \"a\"]"]), ["other prompts", "states.safetensors"]),
        (of(&other, mean, prompts), ["another base (blake3 ", "run `cl moe states` again"]),
    ] {
        let message = refused(&text);
        assert!(parts.iter().all(|part| message.contains(part)), "{parts:?}: {message}");
    }
    // What the configuration leaves open is not compared, but said.
    assert!(plan(&of(&base, mean, ["", ""])).unwrap().notes.is_empty());
    let notes = plan(&of(&base, "", prompts)).unwrap().notes;
    assert!(notes.len() == 1 && notes[0].contains("router.pooling is not set; the file's is mean"), "{notes:?}");
    // Other programs' metadata says nothing.
    states(&file, [&[1.0, 0.0, 0.0, 1.0]; LAYERS], Some(HashMap::from([("format".to_owned(), "pt".to_owned())])));
    assert!(plan(&own).is_ok());
}

#[test]
fn adapters_that_name_different_bases_are_noted() {
    let folder = tempfile::tempdir().unwrap();
    let base = model(&folder.path().join("base"), &[], json!({}));
    let adapter = |name: &str, of: &str| {
        let dir = folder.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let bytes = 1f32.to_le_bytes().repeat(HIDDEN);
        let views = [("lora_A", vec![1, HIDDEN]), ("lora_B", vec![HIDDEN, 1])].map(|(factor, shape)| {
            let name = format!("base_model.model.model.layers.0.self_attn.q_proj.{factor}.weight");
            (name, TensorView::new(Dtype::F32, shape, &bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &dir.join("adapter_model.safetensors")).unwrap();
        let config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"],
            "base_model_name_or_path": of});
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        dir
    };
    let [a, b, c] = [("a", "org/one"), ("b", "org/two"), ("c", "org/one")].map(|(name, of)| adapter(name, of));
    let notes = |adapters: [&PathBuf; 2]| {
        let [one, two] = adapters;
        let text = format!(
            "base_model = {base:?}\nrouter.init = \"arrow\"\n[[experts]]\nadapter = {one:?}\n[[experts]]\nadapter = {two:?}\n"
        );
        BlendPlan::new(&toml::from_str::<BlendConfig>(&text).unwrap(), false).unwrap().notes
    };
    assert_eq!(notes([&a, &b]), ["adapters name different bases: org/one, org/two"]);
    assert!(notes([&a, &c]).is_empty());
}
