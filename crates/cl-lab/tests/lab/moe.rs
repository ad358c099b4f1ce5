//! Mixtures of experts compute what their definition says.

use std::path::{Path, PathBuf};

use cl_checkpoint::{Checkpoint, Manifest};
use cl_lab::toy;
use cl_model::{Decoder, LoadOptions, random_weights, token_log_probs};
use cl_moe::{MixConfig, MixOptions, Plan, mix};
use cl_torch::tch::{Kind, Tensor};

const SEQUENCES: [&[u32]; 2] = [&[3, 14, 15, 9, 2, 6, 5, 35, 8], &[27, 18, 28]];

struct Models(tempfile::TempDir);

impl Models {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The first model with its MLPs' tensors changed by `change(name, weight, seed's weight)`.
    fn save(&self, name: &str, seed: u64, change: &dyn Fn(&str, &Tensor, &Tensor) -> Tensor) {
        let config = toy::model_config(16);
        let options = LoadOptions::cpu(Kind::Float);
        let (base, other) =
            (random_weights(&config, 1, options).unwrap(), random_weights(&config, seed, options).unwrap());
        let _no_graph = cl_torch::tch::no_grad_guard();
        for ((name, mut t), (_, o)) in base.named_parameters().into_iter().zip(other.named_parameters()) {
            if name.contains(".mlp.") {
                t.copy_(&change(&name, &t.copy(), &o));
            }
        }
        let files = toy::tokenizer_files();
        base.save(&self.path(name), Kind::Float, &config, &files, Manifest::new("model"), false).unwrap();
    }

    fn mix(&self, out: &str, experts: &[&str], chosen: usize, init: &str) {
        let list: String = experts.iter().map(|e| format!("[[experts]]\nmodel = {:?}\n", self.path(e))).collect();
        let base = self.path("base");
        let text = format!("base_model = {base:?}\nnum_experts_per_tok = {chosen}\nrouter.init = \"{init}\"\n{list}");
        let config: MixConfig = toml::from_str(&text).unwrap();
        mix(&Plan::new(&config).unwrap(), &self.path(out), &MixOptions::default(), &|_| {}).unwrap();
    }

    fn log_probs(&self, name: &str) -> Vec<f64> {
        log_probs(&self.path(name))
    }
}

fn log_probs(dir: &Path) -> Vec<f64> {
    let model = Decoder::load(&Checkpoint::open(dir).unwrap(), LoadOptions::cpu(Kind::Float)).unwrap();
    token_log_probs(&model, &SEQUENCES).unwrap().into_iter().flatten().map(|p| p.0).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn mixtures_compute_what_their_definition_says() {
    cl_torch::tch::set_num_threads(1);
    let models = Models(tempfile::tempdir().unwrap());
    models.save("base", 1, &|_, own, _| own.copy());
    // Weights of 0.02 make an MLP that adds next to nothing; twenty times as much is seen.
    models.save("x", 2, &|_, _, other| other * 20.0);
    models.save("y", 3, &|_, _, other| other * 20.0);
    assert!(largest_difference(&models.log_probs("base"), &models.log_probs("x")) > 1e-3);

    // Equal experts are that model, whatever the router says: weights add up to 1.
    models.mix("equal", &["x", "x", "x"], 2, "random");
    // f32 sums of three weights in another order.
    assert!(largest_difference(&models.log_probs("equal"), &models.log_probs("x")) < 1e-5);
    // One expert is its model.
    models.mix("one", &["y"], 1, "random");
    assert!(largest_difference(&models.log_probs("one"), &models.log_probs("y")) < 1e-6);
    // A router that prefers nobody takes the first expert.
    models.mix("first", &["y", "x"], 1, "uniform");
    assert!(largest_difference(&models.log_probs("first"), &models.log_probs("y")) < 1e-6);

    // All experts at equal weights are the mean of their outputs: where only the down projections differ, those of a model
    // with the mean of these.
    let down = |name: &str| name.contains("down_proj");
    models.save("p", 4, &|name, own, other| if down(name) { other * 20.0 } else { own * 20.0 });
    models.save("q", 5, &|name, own, other| if down(name) { other * 20.0 } else { own * 20.0 });
    let of = |seed| random_weights(&toy::model_config(16), seed, LoadOptions::cpu(Kind::Float)).unwrap();
    let (p, q) = (of(4), of(5));
    let weight = |model: &Decoder, name: &str| {
        let (_, t) = model.named_parameters().into_iter().find(|(n, _)| n == name).unwrap();
        t * 20.0
    };
    let mean = |name: &str, own: &Tensor, _: &Tensor| {
        if down(name) { (weight(&p, name) + weight(&q, name)) / 2.0 } else { own * 20.0 }
    };
    models.save("mean", 6, &mean);
    models.mix("both", &["p", "q"], 2, "uniform");
    assert!(largest_difference(&models.log_probs("both"), &models.log_probs("mean")) < 1e-5);
}
