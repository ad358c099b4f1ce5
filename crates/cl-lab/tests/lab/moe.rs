//! Mixtures of experts are computed as defined.

use std::path::{Path, PathBuf};

use cl_adapters::{Mode, RouterRecord, top_k};
use cl_checkpoint::{
    Adapter, Checkpoint, CheckpointWriter, Dtype, Interrupt, Manifest, TensorSource, TensorSpec, WriteOptions, convert,
};
use cl_lab::{run_train, toy};
use cl_model::{Decoder, LoadOptions, PackedBatch, greedy, random_weights, token_log_probs};
use cl_moe::{MixConfig, MixOptions, Plan, mix, parameters};
use cl_torch::tch::{Device, Kind, Tensor};

use crate::world::{World, silent};

const SEQUENCES: [&[u32]; 2] = [&[3, 14, 15, 9, 2, 6, 5, 35, 8], &[27, 18, 28]];

/// The toy model's shape, with an MLP width that is not a multiple of 8, so that sign bits do not fill whole bytes.
fn model_config() -> serde_json::Map<String, serde_json::Value> {
    let mut config = toy::model_config(16);
    config.insert("intermediate_size".to_owned(), 36.into());
    config
}

struct Models(tempfile::TempDir);

impl Models {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Saves the first model, with each matrix replaced by
    /// `change(name, own weight, weight of the model for the seed)`.
    fn save(&self, name: &str, seed: u64, change: &dyn Fn(&str, &Tensor, &Tensor) -> Tensor) {
        let config = model_config();
        let options = LoadOptions::cpu(Kind::Float);
        let (base, other) =
            (random_weights(&config, 1, options).unwrap(), random_weights(&config, seed, options).unwrap());
        let _no_graph = cl_torch::tch::no_grad_guard();
        for ((name, mut t), (_, o)) in base.named_parameters().into_iter().zip(other.named_parameters()) {
            if name.contains("_proj.") {
                t.copy_(&change(&name, &t.copy(), &o));
            }
        }
        let files = toy::tokenizer_files();
        base.save(&self.path(name), Kind::Float, &config, &files, Manifest::new("model"), false).unwrap();
    }

    fn mix(&self, out: &str, experts: &[&str], chosen: usize, init: &str) {
        self.mix_modules(out, experts, chosen, init, "");
    }

    fn mix_modules(&self, out: &str, experts: &[&str], chosen: usize, init: &str, more: &str) {
        let list: String = experts.iter().map(|e| format!("[[experts]]\nmodel = {:?}\n", self.path(e))).collect();
        let base = self.path("base");
        let text =
            format!("base_model = {base:?}\nnum_experts_per_tok = {chosen}\nrouter.init = \"{init}\"\n{more}\n{list}");
        let config: MixConfig = toml::from_str(&text).unwrap();
        mix(&Plan::new(&config).unwrap(), &self.path(out), &MixOptions::default(), &|_| {}).unwrap();
    }

    fn log_probs(&self, name: &str) -> Vec<f64> {
        log_probs(&self.path(name))
    }

    fn load(&self, name: &str) -> Decoder {
        load(&self.path(name))
    }
}

fn load(dir: &Path) -> Decoder {
    Decoder::load(&Checkpoint::open(dir).unwrap(), LoadOptions::cpu(Kind::Float)).unwrap()
}

fn log_probs(dir: &Path) -> Vec<f64> {
    let model = load(dir);
    token_log_probs(&model, &SEQUENCES).unwrap().into_iter().flatten().map(|p| p.0).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// A sequence gets the same scores alone as in a batch, and each generated token is the most likely one when scored.
fn assert_generates_as_it_scores(model: &Decoder) {
    let _no_graph = cl_torch::tch::no_grad_guard();
    let together = token_log_probs(model, &SEQUENCES).unwrap().into_iter().flatten();
    let alone = SEQUENCES.iter().flat_map(|s| token_log_probs(model, &[s]).unwrap().remove(0));
    let [together, alone]: [Vec<f64>; 2] = [together.map(|p| p.0).collect(), alone.map(|p| p.0).collect()];
    assert!(largest_difference(&together, &alone) < 1e-5);
    let generated = greedy(model, &SEQUENCES, 4, &[], &mut |_, _| false).unwrap();
    for (prompt, generated) in SEQUENCES.iter().zip(generated) {
        let mut ids = prompt.to_vec();
        for expected in generated.ids {
            let batch = PackedBatch::new(&[&ids], model.config.vocab_size, Device::Cpu).unwrap();
            let last = model.forward(&batch, Mode::Eval).unwrap().narrow(0, ids.len() as i64 - 1, 1);
            assert_eq!(model.logits(&last).argmax(-1, false).int64_value(&[0]), i64::from(expected));
            ids.push(expected);
        }
    }
}

/// Reads numbers from the `model_info.json` of a mixture.
fn info(dir: &Path) -> impl Fn(&str) -> u64 + use<> {
    let info: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("model_info.json")).unwrap()).unwrap();
    move |key| info[key].as_u64().unwrap()
}

#[test]
fn mixtures_compute_what_their_definition_says() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own.copy());
    // With standard deviation 0.02, an MLP contributes next to nothing; twenty times as much makes differences visible.
    let of_mlp =
        |name: &str, own: &Tensor, other: &Tensor| if name.contains(".mlp.") { other * 20.0 } else { own.copy() };
    models.save("x", 2, &of_mlp);
    models.save("y", 3, &of_mlp);
    assert!(largest_difference(&models.log_probs("base"), &models.log_probs("x")) > 1e-3);

    // A mixture of equal experts equals that expert for any router, because gates sum to 1.
    models.mix("equal", &["x", "x", "x"], 2, "random");
    // f32 sums of three weights in a different order.
    assert!(largest_difference(&models.log_probs("equal"), &models.log_probs("x")) < 1e-5);
    // A mixture of one expert equals that expert.
    models.mix("one", &["y"], 1, "random");
    assert!(largest_difference(&models.log_probs("one"), &models.log_probs("y")) < 1e-6);
    // A router without preferences selects the first expert.
    models.mix("first", &["y", "x"], 1, "uniform");
    assert!(largest_difference(&models.log_probs("first"), &models.log_probs("y")) < 1e-6);

    // With equal gates, the output is the mean of all experts' outputs. If only the down projections differ, this
    // equals a model with the mean of the down projections.
    let down = |name: &str| name.contains("down_proj");
    let scaled = |name: &str, own: &Tensor| if name.contains(".mlp.") { own * 20.0 } else { own.copy() };
    models.save("p", 4, &|name, own, other| if down(name) { other * 20.0 } else { scaled(name, own) });
    models.save("q", 5, &|name, own, other| if down(name) { other * 20.0 } else { scaled(name, own) });
    let of = |seed| random_weights(&model_config(), seed, LoadOptions::cpu(Kind::Float)).unwrap();
    let (p, q) = (of(4), of(5));
    let weight = |model: &Decoder, name: &str| {
        let (_, t) = model.named_parameters().into_iter().find(|(n, _)| n == name).unwrap();
        t * 20.0
    };
    let mean = |name: &str, own: &Tensor, _: &Tensor| {
        if down(name) { (weight(&p, name) + weight(&q, name)) / 2.0 } else { scaled(name, own) }
    };
    models.save("mean", 6, &mean);
    models.mix("both", &["p", "q"], 2, "uniform");
    assert!(largest_difference(&models.log_probs("both"), &models.log_probs("mean")) < 1e-5);
}

/// Settings of `modules` and `layers`, with the parts of tensor names and the layers that are then mixed.
const LAYOUTS: [(&str, &[&str], &[usize]); 5] = [
    ("modules = ['q_proj']", &["q_proj"], &[0, 1]),
    ("modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj']", &["self_attn"], &[0, 1]),
    ("modules = ['mlp_fg']", &["mlp"], &[0, 1]),
    ("modules = ['mlp', 'v_proj']\nlayers = [1]", &["mlp", "v_proj"], &[1]),
    ("modules = ['mlp']\nlayers = [0]", &["mlp"], &[0]),
];

fn is_of(name: &str, parts: &[&str], layers: &[usize]) -> bool {
    let in_layer = layers.iter().any(|layer| name.contains(&format!("layers.{layer}.")));
    in_layer && parts.iter().any(|part| name.contains(&format!(".{part}.")))
}

#[test]
fn experts_of_any_modules_and_layers_compute_what_their_definition_says() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own * 10.0);
    for (i, (settings, parts, layers)) in LAYOUTS.into_iter().enumerate() {
        let name = |what: &str| format!("{what}{i}");
        let mixed = |n: &str| is_of(n, parts, layers);
        let tuned = |n: &str, own: &Tensor, other: &Tensor| if mixed(n) { other * 10.0 } else { own * 10.0 };
        models.save(&name("x"), 2, &tuned);
        models.save(&name("y"), 3, &tuned);
        let (x, y) = (name("x"), name("y"));
        let base = models.log_probs("base");
        assert!(largest_difference(&base, &models.log_probs(&x)) > 1e-3, "{settings}");

        // Experts equal to the base give the base; equal experts give that model; a single expert gives its model.
        models.mix_modules(&name("base"), &["base", "base", "base"], 2, "random", settings);
        assert!(largest_difference(&models.log_probs(&name("base")), &base) < 1e-5, "{settings}");
        models.mix_modules(&name("equal"), &[&x, &x, &x], 2, "random", settings);
        assert!(largest_difference(&models.log_probs(&name("equal")), &models.log_probs(&x)) < 1e-5, "{settings}");
        models.mix_modules(&name("one"), &[&y], 1, "random", settings);
        assert!(largest_difference(&models.log_probs(&name("one")), &models.log_probs(&y)) < 1e-6, "{settings}");
        // Ties are resolved in favour of the first expert.
        models.mix_modules(&name("first"), &[&y, &x], 1, "uniform", settings);
        assert!(largest_difference(&models.log_probs(&name("first")), &models.log_probs(&y)) < 1e-6, "{settings}");
        // A different router gives a different model.
        models.mix_modules(&name("both"), &[&x, &y], 2, "uniform", settings);
        models.mix_modules(&name("random"), &[&x, &y], 1, "random", settings);
        let random = models.log_probs(&name("random"));
        assert!(largest_difference(&random, &models.log_probs(&name("both"))) > 1e-4, "{settings}");
        if !parts.contains(&"mlp") || settings.contains("mlp_fg") {
            // Linear modules with equal gates equal one module with the mean of the weights.
            let of = |seed| random_weights(&model_config(), seed, LoadOptions::cpu(Kind::Float)).unwrap();
            let (p, q) = (of(2), of(3));
            let weight = |model: &Decoder, name: &str| {
                model.named_parameters().into_iter().find(|(n, _)| n == name).unwrap().1 * 10.0
            };
            let mean = |n: &str, own: &Tensor, _: &Tensor| {
                if mixed(n) { (weight(&p, n) + weight(&q, n)) / 2.0 } else { own * 10.0 }
            };
            models.save(&name("mean"), 4, &mean);
            let difference = largest_difference(&models.log_probs(&name("both")), &models.log_probs(&name("mean")));
            assert!(difference < 1e-5, "{settings}: {difference}");
        }

        // Saving it again keeps the logits; generation agrees with scoring; a batch agrees with its sequences alone.
        let model = models.load(&name("random"));
        let config = Checkpoint::open(&models.path(&name("random"))).unwrap().config().clone();
        model.save(&models.path(&name("again")), Kind::Float, &config, &[], Manifest::new("model"), false).unwrap();
        assert_eq!(models.log_probs(&name("again")), random);
        assert_generates_as_it_scores(&model);
        // Every router is recorded in a forward pass, and model_info.json counts all parameters.
        let mut model = models.load(&name("random"));
        let log = model.record_routers();
        token_log_probs(&model, &SEQUENCES[..1]).unwrap();
        let recorded: Vec<String> = log.take().into_iter().map(|r| format!("{}.weight", r.router)).collect();
        let routers: Vec<String> = model.routers().into_iter().map(|(name, _)| name).collect();
        assert!(!routers.is_empty() && routers.iter().all(|r| recorded.contains(r)), "{routers:?} {recorded:?}");
        let number = info(&models.path(&name("random")));
        let total: usize = model.named_parameters().iter().map(|(_, t)| t.numel()).sum();
        assert_eq!(number("total_parameters"), total as u64);
        let of_routers: usize = model.routers().iter().map(|(_, t)| t.numel()).sum();
        assert_eq!(number("router_parameters"), of_routers as u64);
    }
}

#[test]
fn a_shared_expert_is_added_whatever_the_router_says() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own * 10.0);
    // If routed and shared expert are the same, the output of a module is 1 + 0.5 times that of the expert.
    for (i, (modules, scaled, class)) in [
        ("modules = ['mlp']", &["down_proj"] as &[&str], "Qwen2MoeForCausalLM"),
        ("modules = ['mlp']\nlayers = [1]", &["down_proj"], "Qwen2MoeForCausalLM"),
        ("architecture = 'moetify'", &["down_proj"], "MoeLlamaForCausalLM"),
        ("modules = ['q_proj', 'o_proj']", &["q_proj", "o_proj"], "MoeLlamaForCausalLM"),
        ("modules = ['mlp_fg']", &["gate_proj", "up_proj", "down_proj"], "MoeLlamaForCausalLM"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = |what: &str| format!("{what}{i}");
        let layers = if modules.contains("layers") { &[1][..] } else { &[0, 1] };
        let factor = |n: &str| if is_of(n, scaled, layers) { 15.0 } else { 10.0 };
        models.save(&name("expected"), 2, &|n, own, _| own * factor(n));
        let shared =
            format!("{modules}\nshared_expert = {{ model = {:?}, residual_scale = 0.5 }}", models.path("base"));
        models.mix_modules(&name("mix"), &["base", "base"], 1, "random", &shared);
        let difference = largest_difference(&models.log_probs(&name("mix")), &models.log_probs(&name("expected")));
        assert!(difference < 1e-5, "{modules}: {difference}");

        let model = models.load(&name("mix"));
        assert!(model.routers().iter().all(|(_, t)| t.size()[0] == 2), "the shared expert has no row");
        let config = Checkpoint::open(&models.path(&name("mix"))).unwrap().config().clone();
        assert_eq!(config["architectures"][0], class);
        if class == "Qwen2MoeForCausalLM" {
            assert_eq!((&config["num_experts"], &config["qkv_bias"]), (&2.into(), &false.into()));
        } else {
            assert_eq!((&config["num_local_experts"], &config["always_on"]), (&3.into(), &true.into()));
        }
        let again = models.path(&name("again"));
        model.save(&again, Kind::Float, &config, &[], Manifest::new("model"), false).unwrap();
        assert_eq!(log_probs(&again), models.log_probs(&name("mix")));
        assert_generates_as_it_scores(&model);
        let number = info(&models.path(&name("mix")));
        let number = |key: &str| number(&format!("{key}_parameters"));
        let total: usize = model.named_parameters().iter().map(|(_, t)| t.numel()).sum();
        assert_eq!(number("total"), total as u64);
        assert_eq!(number("active"), number("stem") + number("router") + number("expert") / 2);
    }
}

/// Adapters are written for the fused experts of Transformers 5 where PEFT would misread them; further rounds, earlier
/// adapters and folding see the experts' modules, as they were trained.
#[test]
fn adapters_of_experts_go_on_as_they_were_trained() {
    let world = World::new(Kind::Float);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own * 10.0);
    models.save("x", 2, &|_, _, other| other * 10.0);
    let shared = format!("modules = ['mlp']\nshared_expert = {{ model = {:?} }}", models.path("base"));
    for (mix, settings, fused) in [("mixtral", "", false), ("qwen2", shared.as_str(), true)] {
        models.mix_modules(mix, &["base", "x"], 1, "random", settings);
        let model = format!("model='{}'", models.path(mix).display());
        let run = |out: &str, set: &[&str]| {
            let config = world.train(&[&[model.as_str(), "train.max_steps=2"], set].concat());
            let out = world.path(format!("{mix}-{out}"));
            run_train(&config, &out, false, &Interrupt::default(), &mut silent).unwrap();
            let text = std::fs::read_to_string(out.join("adapter/adapter_config.json")).unwrap();
            (
                Adapter::open(&out.join("adapter")).unwrap(),
                text.contains("target_parameters"),
                log_probs(&out.join("model")),
            )
        };
        let all = "train.lora.target_modules='all-linear'";
        assert_eq!(run("plain", &[all]).1, fused);
        let (first, is_fused, probs) = run("first", &[all, "train.lora.use_rslora=true"]);
        assert!(is_fused, "PEFT scales rsLoRA of Mixtral's experts wrongly");
        assert!(first.modules().iter().any(|m| m.name.contains(".experts.1.")));
        assert!(first.modules().iter().all(|m| m.rank() == 2));
        assert!(first.config().rank_pattern.is_empty() && first.config().alpha_pattern.is_empty());
        let mut loaded = load(&models.path(mix));
        loaded.load_lora(&first, 0.0).unwrap();
        let applied: Vec<f64> =
            token_log_probs(&loaded, &SEQUENCES).unwrap().into_iter().flatten().map(|p| p.0).collect();
        assert!(largest_difference(&applied, &probs) < 1e-5);

        // Steps of almost no length, so that the factors stay what they were.
        let initial = format!("train.initial_adapter='{}'", first.dir().display());
        let (second, _, _) = run("second", &[&initial, "train.learning_rate=1e-30"]);
        assert_eq!((second.config(), second.names()), (first.config(), first.names()));
        for name in first.names() {
            let [a, b] = [&first, &second].map(|a| convert::to_f32(Dtype::F32, a.bytes(name).unwrap()).unwrap());
            // Zeros of experts that had no token may have moved by a step.
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-28), "{name}");
        }
        let earlier = format!("train.olora={{earlier=['{}']}}", first.dir().display());
        assert!(run("third", &[all, &earlier]).0.modules().len() == first.modules().len());
    }
}

#[test]
fn task_vectors_give_the_directions_of_updates() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own.copy());
    let wave = |count: i64, step: f64| (Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin();
    let direction = |of_attention: bool| wave(16, if of_attention { 1.3 } else { 2.1 });
    // Updates of rank one. Those of gate_proj and up_proj, which share a router, have the same direction.
    let tune = |name: &str, own: &Tensor, _: &Tensor| match own.size()[..] {
        [rows, 16] if is_of(name, &["gate_proj", "up_proj", "q_proj"], &[0, 1]) => {
            own + wave(rows, 0.7).outer(&direction(name.contains("q_proj"))) * 0.01
        }
        _ => own.copy(),
    };
    models.save("tuned", 1, &tune);
    models.mix_modules("mix", &["base", "tuned"], 1, "task_vectors", "modules = ['mlp', 'q_proj']");
    let (model, base) = (models.load("mix"), models.load("base"));
    let _no_graph = cl_torch::tch::no_grad_guard();
    let parameters = base.named_parameters();
    let gate_of = |layer: &str| {
        let name = format!("model.layers.{layer}.mlp.gate_proj.weight");
        parameters.iter().find(|(own, _)| *own == name).unwrap().1.mean_dim(0, false, Kind::Float)
    };
    assert_eq!(model.routers().len(), 4);
    for (name, router) in model.routers() {
        let expected = direction(name.contains("q_proj"));
        let expected = &expected / expected.norm();
        let (of_base, row) = (router.get(0), router.get(1));
        assert_eq!(of_base.abs().max().double_value(&[]), 0.0, "{name}: no update");
        let cosine = row.dot(&expected).double_value(&[]);
        // In f32 weights of magnitude 0.02, an update of 0.01 is represented with an error of 1e-6.
        assert!((cosine.abs() - 1.0).abs() < 1e-5, "{name}: {cosine}");
        let gate = gate_of(name.split('.').nth(2).unwrap());
        assert!(row.dot(&gate).double_value(&[]) <= 0.0, "{name}: the sign");
    }
}

#[test]
fn without_a_gate_a_module_is_the_mean_of_its_experts_outputs() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    let _no_graph = cl_torch::tch::no_grad_guard();
    models.save("base", 1, &|_, own, _| own * 10.0);
    for (name, seed) in [("x", 2), ("y", 3), ("z", 4)] {
        models.save(name, seed, &|_, own, other| own * 10.0 + other.sign() * 0.05);
    }
    let experts = ["x", "y", "z"];
    let batch = PackedBatch::new(&SEQUENCES, models.load("base").config.vocab_size, Device::Cpu).unwrap();
    let linear = "modules = ['mlp_fg', 'q_proj', 'k_proj', 'v_proj', 'o_proj']";
    for (i, (modules, storage)) in [
        ("", "full"),
        ("layers = [1]", "full"),
        ("", "lowrank:1000"),
        ("", "bitdelta"),
        (linear, "full"),
        (linear, "lowrank:1000"),
        (linear, "bitdelta"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = |what: &str| format!("{what}{i}");
        let list: String = experts.iter().map(|e| format!("[[experts]]\nmodel = {:?}\n", models.path(e))).collect();
        let base = models.path("base");
        let text = format!("base_model = {base:?}\ngateless = true\nexpert_storage = '{storage}'\n{modules}\n{list}");
        let config: MixConfig = toml::from_str(&text).unwrap();
        mix(&Plan::new(&config).unwrap(), &models.path(&name("mix")), &MixOptions::default(), &|_| {}).unwrap();
        let mut model = models.load(&name("mix"));
        if modules != linear {
            // Compute each expert separately on the input of the layer.
            let dense = experts.map(|expert| models.load(expert));
            for (layer, x) in model.feed_forward_inputs(&batch).unwrap().iter().enumerate().skip(1) {
                let outputs = dense.each_ref().map(|expert| expert.feed_forward(layer, x));
                let mean = Tensor::stack(&outputs, 0).mean_dim(0, false, Kind::Float);
                let error = ((model.feed_forward(layer, x) - &mean).norm() / mean.norm()).double_value(&[]);
                // f32 sums in a different order, and factorized differences.
                assert!(error < 1e-5, "{modules} {storage}: {error}");
                assert!(((&outputs[0] - &mean).norm() / mean.norm()).double_value(&[]) > 1e-2);
            }
        } else {
            // The mean of the outputs of linear experts is the output of the mean of their weights.
            let weights = experts.map(|expert| models.load(expert).named_parameters());
            let mean = |n: &str, own: &Tensor, _: &Tensor| {
                let of = |all: &Vec<(String, Tensor)>| all.iter().find(|(name, _)| name == n).unwrap().1.copy();
                if n.contains("_proj.") {
                    weights.iter().map(of).reduce(|a, b| a + b).unwrap() / 3.0
                } else {
                    own.copy()
                }
            };
            models.save(&name("mean"), 9, &mean);
            let difference = largest_difference(&models.log_probs(&name("mix")), &models.log_probs(&name("mean")));
            assert!(difference < 1e-4, "{storage}: {difference}");
        }
        assert_generates_as_it_scores(&model);
        let log = model.record_routers();
        token_log_probs(&model, &SEQUENCES[..1]).unwrap();
        assert!(log.take().is_empty() && model.routers().is_empty());
        let number = info(&models.path(&name("mix")));
        assert_eq!((number("router_parameters"), number("active_parameters")), (0, number("total_parameters")));
        let checkpoint = Checkpoint::open(&models.path(&name("mix"))).unwrap();
        assert_eq!(parameters(&checkpoint), number("total_parameters"));
        assert_eq!(
            (&checkpoint.config()["gateless"], &checkpoint.config()["num_experts_per_tok"]),
            (&true.into(), &3.into())
        );
        let buffer = checkpoint
            .load_f32("model.layers.1.mlp.router")
            .or(checkpoint.load_f32("model.layers.1.mlp.up_proj.router"));
        assert_eq!(buffer.unwrap(), [1.0 / 3.0; 3]);
        if storage == "full" {
            let config = checkpoint.config();
            model.save(&models.path(&name("again")), Kind::Float, config, &[], Manifest::new("model"), false).unwrap();
            assert_eq!(models.log_probs(&name("again")), models.log_probs(&name("mix")));
        }
    }
    // A gateless mixture must have equal weights.
    let error = Decoder::load(&changed(&models, "mix0"), LoadOptions::cpu(Kind::Float)).err().unwrap().to_string();
    assert!(
        error.contains("gateless = true, but tensor `model.layers.0.mlp.router` holds 0.5; expected 0.33"),
        "{error}"
    );
}

/// Copies a gateless mixture, changing the weight of the first expert in the first layer.
fn changed(models: &Models, name: &str) -> Checkpoint {
    let from = Checkpoint::open(&models.path(name)).unwrap();
    let spec = |name: &&str| {
        let info = from.info(name).unwrap();
        TensorSpec { name: (*name).to_owned(), dtype: info.dtype, shape: info.shape.clone() }
    };
    let specs: Vec<TensorSpec> = from.names().iter().map(spec).collect();
    let writer = CheckpointWriter::create(&models.path("changed"), &specs, WriteOptions::default()).unwrap();
    for spec in &specs {
        let mut bytes = from.bytes(&spec.name).unwrap().to_vec();
        if spec.name == "model.layers.0.mlp.router" {
            bytes[..4].copy_from_slice(&0.5f32.to_le_bytes());
        }
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.put_json("config.json", &serde_json::Value::Object(from.config().clone())).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
    Checkpoint::open(&models.path("changed")).unwrap()
}

#[test]
fn one_global_router_decides_for_all_modules() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own * 10.0);
    for (name, seed) in [("x", 2), ("y", 3)] {
        models.save(name, seed, &|_, _, other| other * 10.0);
    }
    for (i, (modules, storage)) in [
        ("modules = ['mlp']", "full"),
        ("modules = ['mlp_fg', 'q_proj', 'k_proj', 'v_proj', 'o_proj']", "full"),
        ("modules = ['mlp', 'o_proj']\nlayers = [1]", "full"),
        ("modules = ['mlp', 'v_proj']", "lowrank:1000"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = |what: &str| format!("{what}{i}");
        let settings = format!("global_router = true\nexpert_storage = '{storage}'\n{modules}");
        // A mixture of equal experts equals that expert; ties are resolved in favour of the first expert.
        models.mix_modules(&name("one"), &["x"], 1, "random", &settings);
        let one = models.log_probs(&name("one"));
        assert!(largest_difference(&one, &models.log_probs("base")) > 1e-3);
        for (experts, chosen, init) in [(&["x", "x", "x"][..], 2, "random"), (&["x", "y"][..], 1, "uniform")] {
            let out = format!("{}-{init}", name("same"));
            models.mix_modules(&out, experts, chosen, init, &settings);
            // f32 factors and sums in a different order, with weights of ten times the usual size.
            assert!(largest_difference(&models.log_probs(&out), &one) < 1e-4, "{settings} {init}");
        }
        models.mix_modules(&name("mix"), &["x", "y", "base"], 2, "random", &settings);
        let mut model = models.load(&name("mix"));
        let routers = model.routers();
        assert_eq!(
            routers.iter().map(|(name, t)| (name.as_str(), t.size())).collect::<Vec<_>>(),
            [("model.router.weight", vec![3, 16])]
        );
        assert_generates_as_it_scores(&model);
        let number = info(&models.path(&name("mix")));
        assert_eq!(number("router_parameters"), 3 * 16);
        assert_eq!(parameters(&Checkpoint::open(&models.path(&name("mix"))).unwrap()), number("total_parameters"));

        // The router is evaluated once per token, and its gradient is the same with activation recomputation.
        let log = model.record_routers();
        let batch = PackedBatch::new(&SEQUENCES, model.config.vocab_size, Device::Cpu).unwrap();
        model.train_routers();
        let gradients = [false, true].map(|recompute| {
            model.activation_checkpointing = recompute;
            let mut router = model.routers().remove(0).1;
            router.zero_grad();
            let y = model.forward(&batch, Mode::Train { seed: 1 }).unwrap();
            y.square().mean(Kind::Float).backward();
            router.grad().copy()
        });
        assert_eq!(log.take().len(), 2);
        let [plain, recomputed] = &gradients;
        let difference = (plain - recomputed).abs().max().double_value(&[]);
        let size = plain.abs().max().double_value(&[]);
        assert!(size > 0.0 && difference <= 1e-5 * size, "{settings}: {difference} of {size}");
    }
}

/// Settings of modules, and an expert storage that represents the test's differences without loss.
const DELTAS: [(&str, &str); 6] = [
    ("", "lowrank:2"),
    ("modules = ['mlp', 'v_proj']\nlayers = [1]", "lowrank:2"),
    ("modules = ['mlp_fg', 'q_proj', 'k_proj', 'v_proj', 'o_proj']", "lowrank:2"),
    // More than the rank of any matrix: nothing is truncated.
    ("", "lowrank:1000"),
    ("", "bitdelta"),
    ("modules = ['mlp_fg', 'q_proj', 'k_proj', 'v_proj', 'o_proj']", "bitdelta"),
];

#[test]
fn experts_as_differences_compute_what_whole_ones_do() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own * 10.0);
    for (i, (settings, storage)) in DELTAS.into_iter().enumerate() {
        let name = |what: &str| format!("{what}{i}");
        let tuned = |_: &str, own: &Tensor, other: &Tensor| {
            let low_rank = || other.narrow(1, 0, 2).matmul(&other.narrow(0, 0, 2)) * 100.0;
            own * 10.0 + if storage == "bitdelta" { other.sign() * 0.05 } else { low_rank() }
        };
        let (x, y, z) = (name("x"), name("y"), name("z"));
        for (model, seed) in [(&x, 2), (&y, 3), (&z, 4)] {
            models.save(model, seed, &tuned);
        }
        let experts = [x.as_str(), &y, &z];
        let stored = format!("{settings}\nexpert_storage = '{storage}'");
        models.mix_modules(&name("full"), &experts, 2, "random", settings);
        models.mix_modules(&name("delta"), &experts, 2, "random", &stored);
        let (full, delta) = (models.log_probs(&name("full")), models.log_probs(&name("delta")));
        assert!(largest_difference(&models.log_probs("base"), &full) > 1e-2, "{settings}");
        // f32 factors and sums in a different order, with weights of up to ten times the usual size.
        let difference = largest_difference(&full, &delta);
        assert!(difference < 2e-4, "{settings} {storage}: {difference}");

        // Experts equal to the base give the base; factors and scales of zero represent this exactly.
        models.mix_modules(&name("none"), &["base", "base"], 2, "random", &stored);
        assert!(largest_difference(&models.log_probs(&name("none")), &models.log_probs("base")) < 1e-5, "{storage}");

        // Generation agrees with scoring.
        let model = models.load(&name("delta"));
        assert_generates_as_it_scores(&model);
        let _no_graph = cl_torch::tch::no_grad_guard();

        // The feed-forward block computed separately agrees with that of the layers.
        let batch = PackedBatch::new(&SEQUENCES[..1], model.config.vocab_size, Device::Cpu).unwrap();
        let whole = models.load(&name("full"));
        for (layer, input) in whole.feed_forward_inputs(&batch).unwrap().iter().enumerate() {
            let (a, b) = (model.feed_forward(layer, input), whole.feed_forward(layer, input));
            assert!(((a - &b).abs().max() / b.abs().max()).double_value(&[]) < 1e-5, "{settings} {storage}");
        }

        // The number of bytes is that of the files.
        let dir = models.path(&name("delta"));
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let bytes: usize = checkpoint.names().iter().map(|n| checkpoint.info(n).unwrap().byte_len()).sum();
        let number = info(&dir);
        // A sign counts as one parameter, however it is stored.
        assert_eq!(parameters(&checkpoint), number("total_parameters"));
        if storage == "bitdelta" {
            let mixed = |n: &&&str| n.ends_with(".experts.delta_sign");
            let of_base = |n: &&str| {
                let module = n.trim_end_matches(".experts.delta_sign");
                checkpoint.info(&format!("{module}.weight")).unwrap().elements() + 1
            };
            let names = checkpoint.names();
            let expected: usize = names.iter().filter(mixed).map(of_base).sum::<usize>() * experts.len();
            assert_eq!(number("expert_parameters"), expected as u64);
        }
        assert_eq!(number("total_bytes"), bytes as u64);
        let base = Checkpoint::open(&models.path("base")).unwrap();
        let of_base: usize = base.names().iter().map(|n| base.info(n).unwrap().byte_len()).sum();
        assert_eq!(number("base_bytes"), of_base as u64);
        assert!(number("expert_bytes") < bytes as u64 - of_base as u64, "routers are no experts");

        let config = checkpoint.config().clone();
        let error = model.save(&models.path("again"), Kind::Float, &config, &[], Manifest::new("model"), false);
        assert!(error.unwrap_err().to_string().contains("stored as differences from the base"));
    }
}

#[test]
fn what_a_low_rank_cuts_off_is_no_more_than_has_to_be() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own * 10.0);
    models.save("x", 2, &|_, own, other| own * 10.0 + other);
    let mut last = f64::INFINITY;
    for rank in [1, 2, 4, 8, 16] {
        let out = format!("rank{rank}");
        models.mix_modules(&out, &["x"], 1, "random", &format!("expert_storage = 'lowrank:{rank}'"));
        let stored = Checkpoint::open(&models.path(&out)).unwrap();
        let name = "model.layers.0.mlp.up_proj";
        let factor = |part: &str| {
            let name = format!("{name}.experts.{part}");
            let shape: Vec<i64> = stored.info(&name).unwrap().shape.iter().map(|&d| d as i64).collect();
            Tensor::from_slice(&stored.load_f32(&name).unwrap()).reshape(shape).get(0).to_kind(Kind::Double)
        };
        let weight = |model: &str| {
            let checkpoint = Checkpoint::open(&models.path(model)).unwrap();
            let shape: Vec<i64> =
                checkpoint.info(&format!("{name}.weight")).unwrap().shape.iter().map(|&d| d as i64).collect();
            Tensor::from_slice(&checkpoint.load_f32(&format!("{name}.weight")).unwrap())
                .reshape(shape)
                .to_kind(Kind::Double)
        };
        let difference = weight("x") - weight("base");
        let rest = (&difference - factor("delta_u").tr().matmul(&factor("delta_v"))).norm().double_value(&[]);
        // Eckart and Young: the error is the norm of the truncated singular values.
        let values: Vec<f64> = Vec::try_from(difference.svd(true, false).1).unwrap();
        let expected = values.iter().skip(rank).map(|s| s * s).sum::<f64>().sqrt();
        // f32 factors, with a difference of norm near 1.
        assert!((rest - expected).abs() < 1e-5 * difference.norm().double_value(&[]), "{rank}: {rest} {expected}");
        assert!(rest < last);
        last = rest;
    }
}

#[test]
fn modules_that_cannot_be_mixed_are_named() {
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own.copy());
    let refused = |more: &str| {
        let base = models.path("base");
        let text = format!("base_model = {base:?}\nnum_experts_per_tok = 1\n{more}\n[[experts]]\nmodel = {base:?}\n");
        Plan::new(&toml::from_str::<MixConfig>(&text).unwrap()).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(refused("modules = []").contains("modules: expected one or more of"));
    assert!(refused("modules = ['q_proj', 'q_proj']").contains("at most once"));
    assert!(refused("modules = ['mlp', 'mlp_fg']").contains("keep one"));
    let shared = |scale: &str| {
        refused(&format!("shared_expert = {{ model = {:?}, residual_scale = {scale} }}", models.path("base")))
    };
    assert!(shared("0.0").contains("shared_expert.residual_scale: 0; expected a finite number"));
    assert_eq!(shared("0.1"), "");
    assert!(refused("shared_expert = { model = 'nowhere' }").contains("shared_expert: nowhere"));
    let delta = |storage: &str| {
        let shared = format!("shared_expert = {{ model = {:?} }}", models.path("base"));
        refused(&format!("expert_storage = '{storage}'\n{shared}"))
    };
    assert!(delta("bitdelta").contains("expert_storage: experts stored as differences have no shared expert"));
    assert!(refused("layers = [2]").contains("there is no layer 2; the base has 2"));
    assert!(refused("layers = []").contains("layers: is empty"));
    assert!(refused("modules = ['o_proj']\nrouter.init = 'states'").contains("remove o_proj"));
    assert!(refused("modules = ['o_proj']\nrouter.init = 'task_vectors'").contains("remove o_proj"));
    assert!(refused("global_router = true\nrouter.init = 'task_vectors'").contains("remove global_router"));
    assert_eq!(refused("modules = ['o_proj']\nlayers = [1]"), "");
    assert_eq!(refused("modules = ['o_proj']\nglobal_router = true\nrouter.init = 'random'"), "");
    let both = refused("gateless = true\nglobal_router = true");
    assert!(both.contains("gateless: cannot be combined with global_router; keep one"), "{both}");
    let shared = format!("shared_expert = {{ model = {:?} }}", models.path("base"));
    assert!(refused(&format!("global_router = true\n{shared}")).contains("cannot be combined with shared_expert"));
    assert!(
        refused("gateless = true\nrouter.init = 'base'").contains("router: with gateless = true there is no router")
    );
    let qwen = |more: &str| refused(&format!("architecture = 'qwen2_moe'\n{more}"));
    assert!(qwen("").contains("architecture = \"qwen2_moe\" needs a shared expert"));
    assert_eq!(qwen(&format!("layers = [1]\n{shared}")), "");
    let gated = "positive_prompts = ['a'], ".to_owned() + &shared[18..];
    let gated = refused(&format!("architecture = 'moetify'\nrouter.init = 'states'\nshared_expert = {{ {gated}"));
    assert!(gated.contains("shared_expert.positive_prompts: architecture = \"moetify\" has no gate"), "{gated}");
    let attention = qwen(&format!("modules = ['mlp', 'q_proj']\n{shared}"));
    assert!(
        attention.contains("modules: architecture = \"qwen2_moe\" supports only experts of whole MLPs"),
        "{attention}"
    );
    assert!(
        refused("architecture = 'mixtral'\nlayers = [1]").contains("layers: architecture = \"mixtral\" has experts")
    );
    assert!(refused("architecture = 'mixtral'\ngateless = true").contains("has a router in every layer"));
    assert!(refused("architecture = 'mixtral'\nexpert_storage = 'bitdelta'").contains("supports only full experts"));
}

/// Measures how often a router selects different experts when more tokens are processed at once: 16,384 tokens in
/// sequences of 128, a model with four layers and eight experts, two experts per token.
/// `cargo test -p cl-lab --test lab moe::flip_rate -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, minutes of bf16 on a CPU"]
fn flip_rate_over_batch_sizes() {
    let models = Models(tempfile::tempdir().unwrap());
    let config = serde_json::json!({
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 4096, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5
    });
    let config = config.as_object().unwrap();
    let model = random_weights(config, 1, LoadOptions::cpu(Kind::Float)).unwrap();
    model.save(&models.path("m"), Kind::Float, config, &[], Manifest::new("model"), false).unwrap();
    let sequences: Vec<Vec<u32>> =
        (0..128).map(|s| (0..128).map(|t| (s * 7919 + t * t * 31 + t * 97) % 4096).collect()).collect();
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let _no_graph = cl_torch::tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        let checkpoint = Checkpoint::open(&models.path("m")).unwrap();
        let mut model = Decoder::load(&checkpoint, LoadOptions::cpu(kind)).unwrap();
        let log = model.record_routers();
        let selections = |tokens: usize| -> Tensor {
            let mut of_layers: [Vec<Tensor>; 4] = std::array::from_fn(|_| Vec::new());
            for batch in sequences.chunks(tokens / 128) {
                let batch = PackedBatch::new(batch, 4096, Device::Cpu).unwrap();
                let _ = model.forward(&batch, Mode::Eval).unwrap();
                let selected = |r: &RouterRecord| top_k(&r.logits, r.top_k).sort(-1, false).0;
                log.take().iter().zip(&mut of_layers).for_each(|(r, of_layer)| of_layer.push(selected(r)));
            }
            Tensor::stack(&of_layers.iter().map(|parts| Tensor::cat(parts, 0)).collect::<Vec<_>>(), 0)
        };
        let reference = selections(256);
        for tokens in [256, 1024, 4096, 16_384] {
            let flipped = selections(tokens).not_equal_tensor(&reference).any_dim(-1, false).to_kind(Kind::Double);
            let rate = flipped.mean(Kind::Double).double_value(&[]);
            eprintln!("{kind:?}, {tokens} tokens a batch: {rate:.1e} of decisions differ from those at 256");
            if tokens == 256 {
                assert_eq!(rate, 0.0, "the same batches decide the same");
            }
        }
    }
}
