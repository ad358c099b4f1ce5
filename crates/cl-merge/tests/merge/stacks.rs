//! Models with several layer stacks, and models with tied and untied embeddings.

use std::path::Path;

use cl_checkpoint::TensorSource;
use cl_merge::{Error, MergeConfig, MergeFile, Plan};
use serde_json::json;

use super::{run, values, write_model};

fn config(text: &str) -> MergeConfig {
    MergeFile::from_toml(text).unwrap_or_else(|e| panic!("{e}")).stages.remove(0)
}

/// Returns the problems of a merge as one text.
fn problems(text: &str) -> String {
    match Plan::new(&config(text)) {
        Err(error @ Error::Problems(_)) => error.to_string(),
        other => panic!("{:?}", other.err()),
    }
}

/// Merges two models, of ones and of zeros, with weights from 0 to 1 over the layers, so that merged values are the
/// relative positions of layers.
fn places(folder: &Path, names: &[&str]) -> Vec<(String, Vec<f32>)> {
    for (model, value) in [("ones", 1.0), ("zeros", 0.0)] {
        let tensors: Vec<_> = names.iter().map(|name| ((*name).to_owned(), vec![1], vec![value])).collect();
        write_model(&folder.join(model), json!({"model_type": "any"}), &tensors);
    }
    let text = format!(
        "method = {{ linear = {{ normalize = false }} }}\nprofile = \"mergekit\"\n[[models]]\nmodel = {:?}\nweight = [0.0, 1.0]\n\
         [[models]]\nmodel = {:?}\nweight = 1.0\n",
        folder.join("ones"),
        folder.join("zeros")
    );
    let (_folder, out) = run(&config(&text));
    values(&out)
}

#[test]
fn every_stack_has_its_own_gradient_over_its_outermost_layers() {
    let folder = tempfile::tempdir().unwrap();
    let expected = [
        ("decoder.block.0.layer.0.w", 0.0),
        ("decoder.block.0.layer.2.w", 0.0),
        ("decoder.block.1.layer.1.w", 0.5),
        ("decoder.block.2.layer.1.w", 1.0),
        ("encoder.block.0.layer.1.w", 0.0),
        ("encoder.block.1.layer.0.w", 1.0),
        ("model.layers.0.mlp.experts.3.w", 0.0),
        ("model.layers.4.mlp.experts.1.w", 1.0),
        ("shared.w", 0.0),
        ("visual.merger.mlp.2.w", 0.0),
    ];
    let merged = places(folder.path(), &expected.map(|(name, _)| name));
    let expected: Vec<_> = expected.iter().map(|(name, place)| ((*name).to_owned(), vec![*place])).collect();
    assert_eq!(merged, expected);
}

#[test]
fn slices_are_for_models_with_one_stack() {
    let folder = tempfile::tempdir().unwrap();
    let slices = |model: &Path| {
        format!(
            "method = \"passthrough\"\n[[slices]]\n[[slices.sources]]\nmodel = {model:?}\nlayer_range = [0, 2]\n\
             [[slices]]\n[[slices.sources]]\nmodel = {model:?}\nlayer_range = [1, 2]\n"
        )
    };
    let write = |name: &str, tensors: &[&str]| {
        let tensors: Vec<_> = tensors.iter().map(|name| ((*name).to_owned(), vec![1], vec![1.0])).collect();
        write_model(&folder.path().join(name), json!({"model_type": "any", "num_layers": 2}), &tensors);
        folder.path().join(name)
    };
    let both = write("both", &["model.layers.0.w", "model.layers.1.w", "visual.blocks.0.w", "visual.blocks.3.w"]);
    let found = problems(&slices(&both));
    assert!(found.contains("both has 2 stacks of layers: `model.layers.` with 2, `visual.blocks.` with 4;"), "{found}");
    assert!(found.lines().count() == 2 && found.contains("`models`"), "{found}");
    // Experts are parts of a layer, and so are T5's inner layers.
    for names in [
        ["model.layers.0.mlp.experts.0.w", "model.layers.1.mlp.experts.1.w"],
        ["encoder.block.0.layer.0.w", "encoder.block.1.layer.1.w"],
    ] {
        let one = write(&format!("one {}", names[0]), &names);
        let (_folder, out) = run(&config(&slices(&one)));
        let third = names[1].replacen(".1.", ".2.", 1);
        assert_eq!(out.names(), [names[0], names[1], &third]);
        assert_eq!(out.config()["num_layers"], 3);
    }
}

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Writes a model of two embeddings, with or without a head, and with the given `tie_word_embeddings`.
fn write_head(dir: &Path, embed: [f32; 2], head: Option<[f32; 2]>, tied: bool) {
    let mut tensors = vec![(EMBED.to_owned(), vec![2, 1], embed.to_vec())];
    tensors.extend(head.map(|head| (HEAD.to_owned(), vec![2, 1], head.to_vec())));
    write_model(dir, json!({"model_type": "llama", "tie_word_embeddings": tied}), &tensors);
}

fn mean(folder: &Path, models: [&str; 2]) -> String {
    let [a, b] = models.map(|model| folder.join(model));
    format!("method = \"linear\"\n[[models]]\nmodel = {a:?}\n[[models]]\nmodel = {b:?}\n")
}

#[test]
fn a_stored_copy_of_tied_embeddings_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    write_head(&folder.path().join("tied"), [1.0, 2.0], None, true);
    write_head(&folder.path().join("copy"), [3.0, 6.0], Some([3.0, 6.0]), true);
    for models in [["tied", "copy"], ["copy", "tied"], ["copy", "copy"]] {
        let text = mean(folder.path(), models);
        assert!(Plan::new(&config(&text)).unwrap().notes.iter().any(|note| note.contains("copy of them")));
        let (_folder, out) = run(&config(&text));
        let expected = if models[0] == models[1] { vec![3.0, 6.0] } else { vec![2.0, 4.0] };
        assert_eq!(values(&out), [(EMBED.to_owned(), expected)]);
        assert_eq!(out.config()["tie_word_embeddings"], true);
    }
}

/// The weights agree with mergekit's. According to mergekit's config.json, the output is tied if the base is.
#[test]
fn tied_embeddings_are_the_head_where_other_models_have_one() {
    let folder = tempfile::tempdir().unwrap();
    write_head(&folder.path().join("tied"), [1.0, 2.0], None, true);
    write_head(&folder.path().join("untied"), [3.0, 6.0], Some([5.0, 8.0]), false);
    // Transformers does not tie embedding and head if they are stored with different values.
    write_head(&folder.path().join("differs"), [3.0, 6.0], Some([5.0, 8.0]), true);
    let embed = (EMBED.to_owned(), vec![2.0, 4.0]);
    for models in [["tied", "untied"], ["untied", "tied"], ["tied", "differs"]] {
        let text = mean(folder.path(), models);
        assert!(Plan::new(&config(&text)).unwrap().notes.iter().any(|note| note.contains("merged as its head")));
        let (_folder, out) = run(&config(&text));
        assert_eq!(values(&out), [(HEAD.to_owned(), vec![3.0, 5.0]), embed.clone()], "{models:?}");
        assert_eq!(out.config()["tie_word_embeddings"], false);
        // This does not depend on the policy for tensors that not all models have.
        let (_folder, out) = run(&config(&format!("extra_tensors = \"union\"\n{text}")));
        assert_eq!(values(&out), [(HEAD.to_owned(), vec![3.0, 5.0]), embed.clone()], "{models:?}");
    }
    write_head(&folder.path().join("lost"), [1.0, 2.0], None, false);
    let found = problems(&mean(folder.path(), ["untied", "lost"]));
    assert!(found.lines().count() == 2 && found.contains("lost: has no lm_head.weight"), "{found}");
    assert!(found.contains("tie_word_embeddings"), "{found}");
}
