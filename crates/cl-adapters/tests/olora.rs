//! The terms of o-lora against PyTorch and against finite differences. `fixtures/make_olora.py` made the expected
//! values.

use std::path::Path;

use cl_adapters::{Lambda, Linear, Lora, LoraConfig, OloraConfig, Orthogonality, Overlap};
use cl_checkpoint::{Adapter, AdapterConfig, Dtype, Manifest, TensorSpec, write_adapter};
use cl_torch::tch::{self, Device, Kind, Tensor};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    lambda_: f64,
    lambda_2: f64,
    layers: Vec<Layer>,
    terms: Terms,
}

#[derive(Deserialize)]
struct Layer {
    name: String,
    a: Vec<Vec<f64>>,
    b: Vec<Vec<f64>>,
    earlier: Vec<Vec<Vec<f64>>>,
}

#[derive(Deserialize)]
struct Terms {
    l1: Term,
    squared: Term,
    cosine: Term,
    norms: Term,
}

#[derive(Deserialize)]
struct Term {
    value: f64,
    /// Gradients of A and B of every layer, if they have one.
    grads: Vec<[Option<Vec<Vec<f64>>>; 2]>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/olora.json")).unwrap()
}

fn tensor(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).reshape([rows.len() as i64, -1]).to_kind(Kind::Float)
}

/// The fixture's layers with their new adapters.
fn linears(layers: &[Layer]) -> Vec<Linear> {
    let one = |layer: &Layer| {
        let (a, b) = (tensor(&layer.a), tensor(&layer.b));
        let weight = Tensor::zeros([b.size()[0], a.size()[1]], (Kind::Float, Device::Cpu));
        let mut linear = Linear::new(&layer.name, weight, None);
        Lora::start(&mut linear, &LoraConfig { r: a.size()[0], ..Default::default() }, 1).unwrap();
        let lora = linear.lora.as_mut().unwrap();
        let _no_graph = tch::no_grad_guard();
        lora.a.copy_(&a);
        lora.b.copy_(&b);
        linear
    };
    layers.iter().map(one).collect()
}

/// Adapter `index` of the earlier rounds, with the layers that have at least that many adapters.
fn earlier(dir: &Path, layers: &[Layer], index: usize) -> Adapter {
    earlier_with(dir, layers, index, 0.0)
}

/// Like [`earlier`], with all entries of B set to `b`.
fn earlier_with(dir: &Path, layers: &[Layer], index: usize, b: f64) -> Adapter {
    let mut config = AdapterConfig::default();
    let mut tensors = Vec::new();
    for layer in layers.iter().filter(|l| l.earlier.len() > index) {
        let a = tensor(&layer.earlier[index]);
        let rank = a.size()[0];
        config.rank_pattern.push((layer.name.as_str().into(), rank as usize));
        let b = Tensor::full([layer.b.len() as i64, rank], b, (Kind::Float, Device::Cpu));
        for (factor, t) in [("A", a), ("B", b)] {
            let name = format!("base_model.model.{}.lora_{factor}.weight", layer.name);
            let shape = t.size().iter().map(|&d| d as usize).collect();
            tensors.push((TensorSpec { name, dtype: Dtype::F32, shape }, cl_torch::tensor_bytes(&t, Kind::Float)));
        }
    }
    write_adapter(dir, &config, &tensors, Manifest::new("adapter"), true).unwrap();
    Adapter::open(dir).unwrap()
}

fn config(mode: Overlap, lambda: f64, lambda_2: f64) -> OloraConfig {
    OloraConfig { mode, lambda: Lambda::Every(lambda), lambda_2, ..Default::default() }
}

fn all_earlier(fixture: &Fixture) -> (tempfile::TempDir, Vec<Adapter>) {
    let dir = tempfile::tempdir().unwrap();
    let adapters = (0..2).map(|i| earlier(&dir.path().join(i.to_string()), &fixture.layers, i)).collect();
    (dir, adapters)
}

/// Compares f32 with f64: sums of tens of terms near 1.
fn assert_close(got: f64, expected: f64, what: &str) {
    assert!((got - expected).abs() <= 2e-6 * (1.0 + expected.abs()), "{what}: {got}, expected {expected}");
}

#[test]
fn values_and_gradients_are_pytorchs() {
    let fixture = fixture();
    let (_dir, adapters) = all_earlier(&fixture);
    let (lambda, lambda_2) = (fixture.lambda_, fixture.lambda_2);
    for (config, term) in [
        (config(Overlap::L1, lambda, 0.0), &fixture.terms.l1),
        (config(Overlap::Squared, lambda, 0.0), &fixture.terms.squared),
        (config(Overlap::Cosine, lambda, 0.0), &fixture.terms.cosine),
        (config(Overlap::Cosine, 0.0, lambda_2), &fixture.terms.norms),
    ] {
        let linears = linears(&fixture.layers);
        let what = format!("{config:?}");
        let orthogonality = Orthogonality::new(linears.iter(), &adapters, &config).unwrap();
        let value = orthogonality.backward(&linears.iter().collect::<Vec<_>>()).unwrap();
        assert_close(value, term.value, &what);
        for (linear, grads) in linears.iter().zip(&term.grads) {
            let lora = linear.lora.as_ref().unwrap();
            for (factor, expected) in [&lora.a, &lora.b].into_iter().zip(grads) {
                let Some(expected) = expected else {
                    assert!(!factor.grad().defined(), "{what}: {} learns from nothing", linear.name);
                    continue;
                };
                let got: Vec<f64> = Vec::try_from(factor.grad().flatten(0, -1).to_kind(Kind::Double)).unwrap();
                for (got, expected) in got.into_iter().zip(expected.concat()) {
                    assert_close(got, expected, &what);
                }
            }
        }
    }
}

#[test]
fn gradients_are_slopes() {
    let fixture = fixture();
    let (_dir, adapters) = all_earlier(&fixture);
    for mode in [Overlap::L1, Overlap::Squared, Overlap::Cosine] {
        let config = config(mode, 1.0, 0.5);
        let linears = linears(&fixture.layers);
        let all: Vec<&Linear> = linears.iter().collect();
        let orthogonality = Orthogonality::new(linears.iter(), &adapters, &config).unwrap();
        orthogonality.backward(&all).unwrap();
        for linear in &linears {
            let a = linear.lora.as_ref().unwrap().a.shallow_clone();
            let gradient = a.grad().double_value(&[1, 2]);
            // Half a per mille of the value: far above f32's rounding, and small enough not to cross the kink of |x|.
            let step = 1e-3;
            let value_at = |shift: f64| {
                let _no_graph = tch::no_grad_guard();
                let _ = a.narrow(0, 1, 1).narrow(1, 2, 1).g_add_scalar_(shift);
                let overlap = orthogonality.overlap(&all).unwrap().double_value(&[]);
                let norm = |l: &&Linear| {
                    let lora = l.lora.as_ref().unwrap();
                    lora.a.norm().double_value(&[]) + lora.b.norm().double_value(&[])
                };
                overlap + 0.5 * all.iter().map(norm).sum::<f64>()
            };
            let (above, below) = (value_at(step), value_at(-2.0 * step));
            value_at(step);
            let slope = (above - below) / (2.0 * step);
            // f32 values up to 300 have a last bit of 3e-5, and the slope divides the difference of two of them by
            // 2e-3.
            assert!(
                (slope - gradient).abs() < 0.04 + 0.01 * gradient.abs(),
                "{mode:?} {}: {slope} {gradient}",
                linear.name
            );
        }
    }
}

#[test]
fn lambda_has_a_default_for_each_mode_and_a_written_table_reads_back() {
    for (text, lambda) in [("", 100.0), ("mode = 'cosine'", 100.0), ("mode = 'l1'", 0.5), ("mode = 'squared'", 0.5)] {
        let config: OloraConfig = toml::from_str(text).unwrap();
        assert_eq!(config.lambda, Lambda::Every(lambda), "{text}");
        assert_eq!(toml::from_str::<OloraConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
    }
    let given: OloraConfig = toml::from_str("lambda = 0.5").unwrap();
    assert_eq!((given.mode, given.lambda), (Overlap::Cosine, Lambda::Every(0.5)));
    assert!(toml::from_str::<OloraConfig>("lamda = 0.5").unwrap_err().to_string().contains("lamda"));
}

#[test]
fn a_lambda_of_zero_computes_nothing_and_lists_go_on_with_their_last() {
    let fixture = fixture();
    let (_dir, adapters) = all_earlier(&fixture);
    let linears = linears(&fixture.layers);
    let orthogonality = Orthogonality::new(linears.iter(), &adapters, &config(Overlap::L1, 0.0, 0.0)).unwrap();
    assert_eq!(orthogonality.backward(&linears.iter().collect::<Vec<_>>()).unwrap(), 0.0);
    assert!(linears.iter().all(|l| !l.lora.as_ref().unwrap().a.grad().defined()));
    let list = Lambda::Rounds(vec![0.0, 0.5, 5.0]);
    assert_eq!([0, 1, 2, 7].map(|earlier| list.of_round(earlier)), [0.0, 0.5, 5.0, 5.0]);
    // Without earlier adapters, there is no penalty.
    let first = Orthogonality::new(linears.iter(), &[], &config(Overlap::L1, 0.5, 0.0)).unwrap();
    assert!(first.overlap(&linears.iter().collect::<Vec<_>>()).is_none());
}

/// Adapters that were initialized from the weight, and combined adapters, can have rows of zeros.
#[test]
fn a_row_of_zeros_has_a_finite_gradient() {
    let fixture = fixture();
    let (_dir, adapters) = all_earlier(&fixture);
    let linears = linears(&fixture.layers);
    for linear in &linears {
        let _no_graph = tch::no_grad_guard();
        let _ = linear.lora.as_ref().unwrap().a.narrow(0, 0, 1).zero_();
    }
    let orthogonality = Orthogonality::new(linears.iter(), &adapters, &config(Overlap::Cosine, 1.0, 0.5)).unwrap();
    assert!(orthogonality.backward(&linears.iter().collect::<Vec<_>>()).unwrap().is_finite());
    for linear in &linears {
        let gradient = linear.lora.as_ref().unwrap().a.grad();
        assert!(gradient.isfinite().all().int64_value(&[]) == 1, "{}", linear.name);
    }
}

/// With `stack`, the whole earlier adapter is part of the model.
#[test]
fn another_b_is_another_hash() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let linears = linears(&fixture.layers);
    let hash = |b: f64| {
        let adapters = [earlier_with(&dir.path().join(b.to_string()), &fixture.layers, 0, b)];
        Orthogonality::new(linears.iter(), &adapters, &OloraConfig::default()).unwrap().hash().to_owned()
    };
    assert_ne!(hash(0.0), hash(1.0));
}

#[test]
fn orthogonal_rows_cost_nothing_and_equal_ones_all() {
    let dir = tempfile::tempdir().unwrap();
    let layer = |a: [[f64; 4]; 2]| Layer {
        name: "x.q_proj".to_owned(),
        a: a.iter().map(|r| r.to_vec()).collect(),
        b: vec![vec![1.0, 0.0]; 3],
        earlier: vec![vec![vec![3.0, 0.0, 0.0, 0.0]]],
    };
    for (a, expected) in
        [([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 5.0]], 0.0), ([[7.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]], 1.0)]
    {
        let layers = [layer(a)];
        let adapters = [earlier(dir.path().join("e").as_path(), &layers, 0)];
        let linears = linears(&layers);
        let orthogonality = Orthogonality::new(linears.iter(), &adapters, &config(Overlap::Cosine, 1.0, 0.0)).unwrap();
        let overlap = orthogonality.overlap(&linears.iter().collect::<Vec<_>>()).unwrap().double_value(&[]);
        assert!((overlap - expected).abs() < 1e-6, "{overlap}, expected {expected}");
    }
}

#[test]
fn ranges_and_shapes_are_checked() {
    for (text, part) in [
        ("lambda = -1.0", "olora.lambda = [-1.0]"),
        ("lambda = []", "olora.lambda = []"),
        ("lambda = [0.5, nan]", "olora.lambda"),
        ("lambda_2 = -0.5", "olora.lambda_2 = -0.5"),
    ] {
        let config: OloraConfig = toml::from_str(text).unwrap();
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    assert!(toml::from_str::<OloraConfig>("mode = 'l2'").is_err());
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let mut wide = Layer { name: "a.q_proj".to_owned(), a: vec![], b: vec![vec![0.0]; 4], earlier: vec![] };
    wide.earlier.push(vec![vec![1.0; 6]]);
    let adapters = [earlier(&dir.path().join("wide"), &[wide], 0)];
    let linears = linears(&fixture.layers);
    let error = Orthogonality::new(linears.iter(), &adapters, &OloraConfig::default()).err().unwrap().to_string();
    assert!(error.contains("a.q_proj") && error.contains("[1, 6]") && error.contains("wide"), "{error}");
}
