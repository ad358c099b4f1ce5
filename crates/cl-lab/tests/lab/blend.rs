//! Mixtures of LoRA adapters are computed as defined.

use std::path::PathBuf;

use cl_adapters::{Mode, normal};
use cl_checkpoint::{
    Adapter, AdapterConfig, Checkpoint, Dtype, Interrupt, Manifest, TensorSource, TensorSpec, convert, write_adapter,
};
use cl_lab::{LoadedModel, toy};
use cl_model::{Decoder, LoadOptions, PackedBatch, greedy, random_weights, token_log_probs};
use cl_moe::{BlendConfig, BlendPlan, Mixture, RouterLogits, RouterNorm, blend, mixture_tensors};
use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_train::Precision;

const SEQUENCES: [&[u32]; 2] = [&[3, 14, 15, 9, 2, 6, 5, 35, 8], &[27, 18, 28]];
/// Modules of a layer of the toy model with hidden size 16, with output and input width.
const MODULES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 16, 16),
    ("self_attn.k_proj", 8, 16),
    ("self_attn.v_proj", 8, 16),
    ("self_attn.o_proj", 16, 16),
    ("mlp.gate_proj", 32, 16),
    ("mlp.up_proj", 32, 16),
    ("mlp.down_proj", 16, 32),
];

/// A directory with a randomly initialized base model and adapters `x`, `y`, `z` of different ranks, alphas and
/// targets.
struct Models(tempfile::TempDir);

impl Models {
    fn new() -> Models {
        tch::set_num_threads(1); // such small products are faster on one thread
        let models = Models(tempfile::tempdir().unwrap());
        let config = toy::model_config(16);
        let base = random_weights(&config, 1, LoadOptions::cpu(Kind::Float)).unwrap();
        {
            let _no_graph = tch::no_grad_guard();
            // With standard deviation 0.02, layers contribute next to nothing; ten times as much makes differences
            // visible.
            for (_, mut t) in base.named_parameters().into_iter().filter(|(n, _)| n.contains("_proj")) {
                let _ = t.g_mul_scalar_(10.0);
            }
        }
        let files = toy::tokenizer_files();
        base.save(&models.path("base"), Kind::Float, &config, &files, Manifest::new("model"), false).unwrap();
        models.adapter("x", AdapterConfig { r: 2, lora_alpha: 4.0, ..Default::default() }, &|_| true);
        let rank_pattern = vec![("down_proj".into(), 5)];
        models.adapter(
            "y",
            AdapterConfig { r: 3, lora_alpha: 2.0, use_rslora: true, rank_pattern, ..Default::default() },
            &|_| true,
        );
        models
            .adapter("z", AdapterConfig { r: 1, lora_alpha: 1.0, ..Default::default() }, &|m| m != "self_attn.v_proj");
        models
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn adapter(&self, name: &str, config: AdapterConfig, targeted: &dyn Fn(&str) -> bool) {
        let mut tensors = Vec::new();
        for layer in 0..2 {
            for (module, output, input) in MODULES.into_iter().filter(|m| targeted(m.0)) {
                let module = format!("model.layers.{layer}.{module}");
                let rank = config.rank(&module);
                for (part, shape) in [("lora_A", [rank, input]), ("lora_B", [output, rank])] {
                    let tensor = format!("base_model.model.{module}.{part}.weight");
                    let values: Vec<f32> =
                        normal(7, &format!("{name} {tensor}"), shape[0] * shape[1]).iter().map(|v| 0.3 * v).collect();
                    let spec = TensorSpec { name: tensor, dtype: Dtype::F32, shape: shape.to_vec() };
                    tensors.push((spec, convert::from_f32(Dtype::F32, &values).unwrap()));
                }
            }
        }
        write_adapter(&self.path(name), &config, &tensors, Manifest::new("adapter"), false).unwrap();
    }

    fn blend(&self, out: &str, adapters: &[&str], settings: &str) {
        let list: String = adapters.iter().map(|a| format!("[[experts]]\nadapter = {:?}\n", self.path(a))).collect();
        let config: BlendConfig =
            toml::from_str(&format!("base_model = {:?}\n{settings}\n{list}", self.path("base"))).unwrap();
        blend(&BlendPlan::new(&config, false).unwrap(), &self.path(out), false, &Interrupt::default()).unwrap();
    }

    fn base(&self) -> Decoder {
        Decoder::load(&Checkpoint::open(&self.path("base")).unwrap(), LoadOptions::cpu(Kind::Float)).unwrap()
    }

    fn mixture(&self, name: &str) -> Decoder {
        let mut model = self.base();
        model.load_mixture(&Mixture::open(&self.path(name)).unwrap()).unwrap();
        model
    }

    fn adapted(&self, name: &str) -> Decoder {
        let mut model = self.base();
        model.load_lora(&Adapter::open(&self.path(name)).unwrap(), 0.0).unwrap();
        model
    }

    /// The base plus a weighted sum of adapters, with each update as a dense matrix.
    fn folded(&self, parts: &[(&str, f64)]) -> Decoder {
        let model = self.base();
        let _no_graph = tch::no_grad_guard();
        for (name, factor) in parts {
            let adapter = Adapter::open(&self.path(name)).unwrap();
            for (tensor, mut weight) in model.named_parameters() {
                if let Some(update) = update(&adapter, tensor.trim_end_matches(".weight")) {
                    let _ = weight.g_add_(&(update * *factor).to_kind(Kind::Float));
                }
            }
        }
        model
    }
}

#[test]
fn equal_gates_that_add_up_to_one_give_the_mean_of_the_adapters_outputs() {
    let models = Models::new();
    models.blend("mean", &["x", "y", "z"], "router.init = 'uniform'\nrouter.norm = 'softmax'");
    let third = 1.0 / 3.0;
    let folded = log_probs(&models.folded(&[("x", third), ("y", third), ("z", third)]));
    let difference = largest_difference(&log_probs(&models.mixture("mean")), &folded);
    assert!(difference < 1e-5, "{difference:.1e}"); // f32 sums in a different order
}

/// `s·B·A` in f64, if the adapter has the module.
fn update(adapter: &Adapter, module: &str) -> Option<Tensor> {
    let of = adapter.modules().into_iter().find(|m| m.name == module)?.factors();
    let [a, b] = of.map(|name| cl_torch::load_tensor(adapter, &name, Kind::Double, Device::Cpu).unwrap());
    Some(b.matmul(&a) * adapter.config().scaling(module))
}

fn log_probs(model: &Decoder) -> Vec<f64> {
    token_log_probs(model, &SEQUENCES).unwrap().into_iter().flatten().map(|p| p.0).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn one_expert_and_equal_experts_are_that_adapter() {
    let models = Models::new();
    let (base, x) = (log_probs(&models.base()), log_probs(&models.adapted("x")));
    assert!(largest_difference(&base, &x) > 1e-2, "an adapter makes a difference");
    models.blend("one", &["x"], "router.norm = 'softmax'\nnum_experts_per_tok = 1");
    assert!(largest_difference(&log_probs(&models.mixture("one")), &x) < 1e-6);
    // Gates sum to 1; the f32 sums run over three times the rank.
    for k in [2, 3] {
        let name = format!("equal{k}");
        models.blend(&name, &["x", "x", "x"], &format!("router.norm = 'softmax'\nnum_experts_per_tok = {k}"));
        assert!(largest_difference(&log_probs(&models.mixture(&name)), &x) < 1e-5);
    }
}

#[test]
fn a_router_of_zeros_halves_every_update_and_ties_go_to_the_first_experts() {
    let models = Models::new();
    models.blend("half", &["x", "y", "z"], "router.init = 'uniform'");
    let folded = log_probs(&models.folded(&[("x", 0.5), ("y", 0.5), ("z", 0.5)]));
    let difference = largest_difference(&log_probs(&models.mixture("half")), &folded);
    assert!(difference < 1e-5, "{difference:.1e}"); // f32 sums in a different order
    models.blend("first", &["y", "x", "z"], "router.init = 'uniform'\nnum_experts_per_tok = 2");
    let folded = log_probs(&models.folded(&[("y", 0.5), ("x", 0.5)]));
    assert!(largest_difference(&log_probs(&models.mixture("first")), &folded) < 1e-5);
}

/// Reference for one module, computed from the definition in f64, for each token and expert.
fn reference(
    models: &Models,
    mixture: &Mixture,
    module: &str,
    weight: &Tensor,
    x: &Tensor,
    experts: &[&str],
) -> Tensor {
    let config = mixture.config();
    let (weight, x) = (weight.to_kind(Kind::Double), x.to_kind(Kind::Double));
    let updates: Vec<Option<Tensor>> =
        experts.iter().map(|e| update(&Adapter::open(&models.path(e)).unwrap(), module)).collect();
    let router = &mixture_tensors(module)[2];
    let router =
        mixture.info(router).map(|_| cl_torch::load_tensor(mixture, router, Kind::Double, Device::Cpu).unwrap());
    let mut rows = Vec::new();
    for t in 0..x.size()[0] {
        let x = x.get(t);
        let logit = |e: usize| match config.router_logits {
            RouterLogits::Linear => router.as_ref().unwrap().get(e as i64).dot(&x).double_value(&[]),
            RouterLogits::Absolute => router.as_ref().unwrap().get(e as i64).dot(&x).double_value(&[]).abs(),
            RouterLogits::UpdateNorm => updates[e].as_ref().map_or(0.0, |u| u.mv(&x).norm().double_value(&[])),
        };
        let logits: Vec<f64> = (0..experts.len()).map(logit).collect();
        let mut order: Vec<usize> = (0..experts.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order.truncate(config.num_experts_per_tok);
        let sum = |f: &dyn Fn(f64) -> f64| order.iter().map(|&e| f(logits[e])).sum::<f64>();
        let mut y = weight.mv(&x);
        for &e in &order {
            let gate = match config.router_norm {
                RouterNorm::Sigmoid => 1.0 / (1.0 + (-logits[e]).exp()),
                RouterNorm::Softmax => logits[e].exp() / sum(&f64::exp),
                RouterNorm::Sum => logits[e] / (sum(&|v| v) + 1e-6),
            };
            if let Some(update) = &updates[e] {
                y += update.mv(&x) * gate;
            }
        }
        rows.push(y);
    }
    Tensor::stack(&rows, 0)
}

#[test]
fn one_product_over_all_experts_equals_the_definition_in_f64() {
    let models = Models::new();
    let experts = ["x", "y", "z"];
    let mut largest = 0f64;
    for (init, norms) in [
        ("random", &["sigmoid", "softmax"][..]), // not `sum`: logits of both signs may sum to nearly 0
        ("arrow", &["sigmoid", "softmax", "sum"][..]),
        ("spectr", &["sigmoid", "softmax", "sum"][..]),
    ] {
        for (norm, k) in norms.iter().flat_map(|norm| (1..=3).map(move |k| (norm, k))) {
            let name = format!("{init}-{norm}-{k}");
            models.blend(
                &name,
                &experts,
                &format!("num_experts_per_tok = {k}\nrouter = {{ init = '{init}', norm = '{norm}' }}"),
            );
            let (mixture, model) = (Mixture::open(&models.path(&name)).unwrap(), models.mixture(&name));
            for layer in model.linears().filter(|l| l.mixture.is_some()) {
                let input = layer.widths().0;
                let x = Tensor::from_slice(&normal(3, &layer.name, 5 * input as usize)).reshape([5, input]);
                let expected = reference(&models, &mixture, &layer.name, layer.weight.dense().unwrap(), &x, &experts);
                for mode in [Mode::Eval, Mode::Train { seed: 1 }] {
                    let y = layer.forward(&x, mode).to_kind(Kind::Double);
                    largest = largest.max((y - &expected).abs().max().double_value(&[]));
                }
            }
        }
    }
    eprintln!("largest difference {largest:.1e}");
    // Values are up to ten, and sums have 32 products in f32.
    assert!(largest < 1e-5, "{largest}");
}

#[test]
fn prototypes_are_rows_of_length_one_that_an_experts_own_direction_selects() {
    let models = Models::new();
    models.blend("arrow", &["x", "y", "z"], "router.init = 'arrow'");
    let mixture = Mixture::open(&models.path("arrow")).unwrap();
    assert_eq!(
        (mixture.config().router_norm, mixture.config().router_logits),
        (RouterNorm::Softmax, RouterLogits::Absolute)
    );
    for (module, experts) in &mixture.config().modules {
        let router = cl_torch::load_tensor(&mixture, &mixture_tensors(module)[2], Kind::Double, Device::Cpu).unwrap();
        for (e, adapter) in (0..).zip(["x", "y", "z"]) {
            let row = router.get(e);
            let Some(update) = update(&Adapter::open(&models.path(adapter)).unwrap(), module) else {
                assert_eq!((experts.ranks[e as usize], row.norm().double_value(&[])), (0, 0.0));
                continue;
            };
            // The leading right singular vector is the direction that the update stretches most.
            let stretched = update.mv(&row).norm().double_value(&[]);
            let (_, values, _) = update.svd(true, true);
            assert!((row.norm().double_value(&[]) - 1.0).abs() < 1e-6);
            assert!((stretched / values.double_value(&[0]) - 1.0).abs() < 1e-6, "{stretched}");
        }
    }
}

#[test]
fn general_knowledge_is_subtracted_from_updates() {
    let models = Models::new();
    let general = format!("general_adapters = [{:?}, {:?}]", models.path("y"), models.path("z"));
    // With one expert, the result is its update minus the mean of the general ones; z has no v_proj.
    models.blend("pure", &["x"], &format!("num_experts_per_tok = 1\nrouter.norm = 'softmax'\n{general}"));
    let folded = log_probs(&models.folded(&[("x", 1.0), ("y", -0.5), ("z", -0.5)]));
    let difference = largest_difference(&log_probs(&models.mixture("pure")), &folded);
    assert!(difference < 1e-5, "{difference:.1e}"); // f32 sums in a different order
    // This also applies to modules for which the expert has no update.
    models.blend("partial", &["z"], &format!("num_experts_per_tok = 1\nrouter.norm = 'softmax'\n{general}"));
    let folded = log_probs(&models.folded(&[("y", -0.5), ("z", 0.5)]));
    assert!(largest_difference(&log_probs(&models.mixture("partial")), &folded) < 1e-5);
    // Prototypes are computed from the difference, and logits are divided by the temperature.
    models.blend("arrow", &["x", "y"], &format!("router = {{ init = 'arrow', temperature = 2.0 }}\n{general}"));
    let mixture = Mixture::open(&models.path("arrow")).unwrap();
    let of = |name: &str, module: &str| update(&Adapter::open(&models.path(name)).unwrap(), module);
    for module in mixture.config().modules.keys() {
        let (y, z) = (of("y", module).unwrap(), of("z", module));
        let mean = (&y + z.unwrap_or_else(|| y.zeros_like())) / 2.0;
        let pure = of("x", module).unwrap() - mean;
        let row =
            cl_torch::load_tensor(&mixture, &mixture_tensors(module)[2], Kind::Double, Device::Cpu).unwrap().get(0);
        let stretched = pure.mv(&(&row * 2.0)).norm().double_value(&[]);
        let (_, values, _) = pure.svd(true, true);
        assert!((stretched / values.double_value(&[0]) - 1.0).abs() < 1e-6, "{module}: {stretched}");
    }
    let sources = std::fs::read_to_string(models.path("arrow").join("manifest.json")).unwrap();
    assert_eq!(sources.matches("\"general\"").count(), 2, "{sources}");
}

#[test]
fn experts_are_extracted_from_models() {
    let models = Models::new();
    models
        .folded(&[("x", 1.0)])
        .save(
            &models.path("tuned"),
            Kind::Float,
            &toy::model_config(16),
            &toy::tokenizer_files(),
            Manifest::new("model"),
            false,
        )
        .unwrap();
    let tuned = models.path("tuned");
    let config = |expert: &str| -> BlendConfig {
        let settings = "num_experts_per_tok = 1\nrouter.norm = 'softmax'";
        toml::from_str(&format!("base_model = {:?}\n{settings}\n[[experts]]\n{expert}", models.path("base"))).unwrap()
    };
    let plan = BlendPlan::new(&config(&format!("model = {tuned:?}\nrank = 2")), false).unwrap();
    blend(&plan, &models.path("m"), false, &Interrupt::default()).unwrap();
    // x has rank 2; the remaining difference is the f32 rounding of the tuned weights.
    let difference = largest_difference(&log_probs(&models.mixture("m")), &log_probs(&models.adapted("x")));
    assert!(difference < 1e-4, "{difference:.1e}");
    assert_eq!(Mixture::open(&models.path("m")).unwrap().config().experts[0].name, "tuned");
    let manifest = std::fs::read_to_string(models.path("m").join("manifest.json")).unwrap();
    assert!(manifest.contains("\"tuned\"") && !manifest.contains("/adapter"), "{manifest}");

    let refused = |expert: String| BlendPlan::new(&config(&expert), false).err().unwrap().to_string();
    assert!(refused(format!("model = {tuned:?}")).contains("experts[0]: expected `adapter`, or `model` with `rank`"));
    assert!(refused("rank = 2".to_owned()).contains("expected `adapter`"));
    let same = refused(format!("model = {:?}\nrank = 2", models.path("base")));
    assert!(same.contains("experts[0]") && same.contains("base"), "{same}");
    for (router, message) in [
        ("init = 'random', temperature = 2.0", "is used only with init"),
        ("init = 'arrow', temperature = 0.0", "0; expected a positive"),
    ] {
        let base = models.path("base");
        let text =
            format!("base_model = {base:?}\nrouter = {{ {router} }}\n[[experts]]\nadapter = {:?}", models.path("x"));
        let problem = BlendPlan::new(&toml::from_str(&text).unwrap(), false).err().unwrap().to_string();
        assert!(problem.contains(message), "{problem}");
    }
}

#[test]
fn written_again_it_has_the_same_bytes_and_loaded_again_the_same_logits() {
    let models = Models::new();
    let settings = "num_experts_per_tok = 2\nrouter.init = 'arrow'";
    models.blend("m1", &["x", "y"], settings);
    models.blend("m2", &["x", "y"], settings);
    for file in ["mixture_config.json", "mixture_model.safetensors", "manifest.json"] {
        let read = |name: &str| std::fs::read(models.path(name).join(file)).unwrap();
        assert!(read("m1") == read("m2"), "{file}");
    }
    assert_eq!(log_probs(&models.mixture("m1")), log_probs(&models.mixture("m2")));
    assert!(Manifest::verify(&models.path("m1")).unwrap().is_empty());

    let open = |adapter: &str| {
        LoadedModel::open(&models.path("base"), Some(&models.path(adapter)), Precision::F32, None, Device::Cpu).unwrap()
    };
    let mut loaded = open("m1");
    assert_eq!(log_probs(&loaded.model), log_probs(&models.mixture("m1")));
    // Adapters and mixtures replace each other on the same loaded model.
    loaded.set_adapter(Some(&models.path("x"))).unwrap();
    assert_eq!(log_probs(&loaded.model), log_probs(&models.adapted("x")));
    assert_ne!(loaded.fingerprint, open("m1").fingerprint);
    loaded.set_adapter(Some(&models.path("m2"))).unwrap();
    assert_eq!(log_probs(&loaded.model), log_probs(&models.mixture("m1")));
    loaded.set_adapter(None).unwrap();
    assert_eq!(log_probs(&loaded.model), log_probs(&models.base()));
}

#[test]
fn generation_equals_scoring_and_a_batch_its_sequences_alone() {
    let models = Models::new();
    for (init, k) in [("random", 3), ("arrow", 1), ("spectr", 2)] {
        models.blend(init, &["x", "y", "z"], &format!("num_experts_per_tok = {k}\nrouter.init = '{init}'"));
        let model = models.mixture(init);
        let _no_graph = tch::no_grad_guard();
        let together = greedy(&model, &SEQUENCES, 6, &[], &mut |_, _| false).unwrap();
        for (prompt, generated) in SEQUENCES.iter().zip(&together) {
            let mut ids = prompt.to_vec();
            for expected in &generated.ids {
                let batch = PackedBatch::new(&[&ids], model.config.vocab_size, Device::Cpu).unwrap();
                let last = model.forward(&batch, Mode::Eval).unwrap().narrow(0, ids.len() as i64 - 1, 1);
                let next = model.logits(&last).argmax(-1, false).int64_value(&[0]);
                assert_eq!(next, i64::from(*expected), "{init}");
                ids.push(next as u32);
            }
        }
        let alone: Vec<f64> =
            SEQUENCES.iter().flat_map(|s| token_log_probs(&model, &[s]).unwrap().remove(0)).map(|p| p.0).collect();
        assert!(largest_difference(&alone, &log_probs(&model)) < 1e-5);
    }
}

#[test]
fn gradients_reach_the_routers_and_nothing_else() {
    let models = Models::new();
    for settings in ["", "num_experts_per_tok = 2\nrouter.norm = 'softmax'", "router.init = 'arrow'"] {
        let name = format!("m{}", settings.len());
        models.blend(&name, &["x", "y", "z"], settings);
        let mut model = models.mixture(&name);
        for activation_checkpointing in [false, true] {
            model.activation_checkpointing = activation_checkpointing;
            let routers = model.trainable();
            assert_eq!(routers.len(), 14);
            assert!(routers.iter().all(|(name, t)| name.ends_with(".lora_router.weight") && t.size()[0] == 3));
            routers.iter().for_each(|(_, t)| t.shallow_clone().zero_grad());
            let batch = PackedBatch::new(&SEQUENCES, model.config.vocab_size, Device::Cpu).unwrap();
            let x = model.forward(&batch, Mode::Train { seed: 1 }).unwrap();
            model.logits(&x).log_softmax(-1, Kind::Float).select(1, 5).sum(Kind::Float).backward();
            for (name, router) in routers {
                let gradient = router.grad();
                assert!(gradient.defined() && gradient.abs().max().double_value(&[]) > 0.0, "{name}");
                assert!(gradient.isfinite().all().int64_value(&[]) == 1, "{name}");
            }
        }
        for layer in model.linears().filter(|l| l.mixture.is_some()) {
            let mixture = layer.mixture.as_ref().unwrap();
            for frozen in [layer.weight.dense().unwrap(), &mixture.a, &mixture.b] {
                assert!(!frozen.requires_grad() && !frozen.grad().defined());
            }
        }
    }
}

#[test]
fn half_precision_computes_about_the_same() {
    let models = Models::new();
    models.blend("m", &["x", "y"], "router.init = 'arrow'");
    let mixture = Mixture::open(&models.path("m")).unwrap();
    let base = Checkpoint::open(&models.path("base")).unwrap();
    let mut half = Decoder::load(&base, LoadOptions::cpu(Kind::BFloat16)).unwrap();
    half.load_mixture(&mixture).unwrap();
    // bf16 has 8 bits of mantissa.
    assert!(largest_difference(&log_probs(&half), &log_probs(&models.mixture("m"))) < 0.3);
}

#[test]
fn a_mixture_of_another_base_or_with_other_contents_is_refused() {
    let models = Models::new();
    models.blend("m", &["x", "y"], "");
    let config = toy::model_config(16);
    let other = random_weights(&config, 2, LoadOptions::cpu(Kind::Float)).unwrap();
    other
        .save(&models.path("other"), Kind::Float, &config, &toy::tokenizer_files(), Manifest::new("model"), false)
        .unwrap();
    let open = |model: &str| {
        let loaded = LoadedModel::open(&models.path(model), Some(&models.path("m")), Precision::F32, None, Device::Cpu);
        loaded.map(|_| ()).map_err(|e| e.to_string())
    };
    open("base").unwrap();
    let message = open("other").unwrap_err();
    assert!(message.contains("is a mixture for the base") && message.contains("cl moe blend"), "{message}");

    let file = models.path("m").join("mixture_config.json");
    let text = std::fs::read_to_string(&file).unwrap();
    for (from, to, part) in [
        ("\"format_version\": 1", "\"format_version\": 2", "format_version is 2"),
        ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 3", "num_experts_per_tok is 3, with 2 experts"),
        ("\"sigmoid\"", "\"tanh\"", "tanh"),
        ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", "is missing"),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&file, text.replace(from, to)).unwrap();
        let message = open("base").unwrap_err();
        assert!(message.contains(part), "{message}");
    }
}

/// Times seven adapters of rank 8 on all linear layers of a model of SmolLM2-135M's shape, with 512 tokens in f32,
/// alternating with the base.
/// `cargo test -p cl-lab --test lab blend::time -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, about a minute and 1 GB"]
fn time_of_a_forward_pass_beside_the_bases() {
    tch::set_num_threads(2);
    let models = Models(tempfile::tempdir().unwrap());
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": true
    });
    let config = config.as_object().unwrap().clone();
    let base = random_weights(&config, 1, LoadOptions::cpu(Kind::Float)).unwrap();
    base.save(&models.path("base"), Kind::Float, &config, &[], Manifest::new("model"), false).unwrap();
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    for (seed, name) in names.iter().enumerate() {
        let lora = cl_adapters::LoraConfig { r: 8, ..Default::default() };
        let mut model = models.base();
        model.add_lora(&lora, seed as u64).unwrap();
        cl_adapters::save_lora(&models.path(name), model.sites(), &[], &lora, "base", Manifest::new("adapter"), false)
            .unwrap();
    }
    let mixture = |out: &str, settings: &str| {
        models.blend(out, &names, settings);
        models.mixture(out)
    };
    let rows = [
        ("base", models.base()),
        ("one adapter", models.adapted("a")),
        ("seven, all", mixture("all", "")),
        ("seven, top 2", mixture("two", "num_experts_per_tok = 2\nrouter.norm = 'softmax'")),
    ];
    let ids: Vec<u32> = (0..512).map(|i| i * 97 % 49152).collect();
    let batch = PackedBatch::new(&[&ids], 49152, Device::Cpu).unwrap();
    let mut times = vec![Vec::new(); rows.len()];
    let _no_graph = tch::no_grad_guard();
    for _ in 0..15 {
        for ((_, model), times) in rows.iter().zip(&mut times) {
            let start = std::time::Instant::now();
            let _ = model.forward(&batch, Mode::Eval).unwrap();
            times.push(start.elapsed().as_secs_f64());
        }
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    for ((name, _), of_row) in rows.iter().zip(&times) {
        let (median, fastest) = (of_row[7], of_row[0]);
        let (by_median, by_fastest) = (median / times[0][7], fastest / times[0][0]);
        eprintln!("{name}: median {median:.3} s ({by_median:.3}), fastest {fastest:.3} s ({by_fastest:.3})");
    }
}
