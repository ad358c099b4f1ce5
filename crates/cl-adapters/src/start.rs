//! Initialization of the factors of a new adapter.

use cl_torch::tch::{Kind, Tensor};

use crate::random::{normal, uniform};
use crate::{InitLoraWeights, LoraConfig, Weight};

/// A `[rows, columns]` matrix of normal numbers with mean 0. Several matrices of one layer need different names.
fn normal_matrix(seed: u64, name: &str, shape: [i64; 2], deviation: f64) -> Tensor {
    let values = normal(seed, name, (shape[0] * shape[1]) as usize);
    Tensor::from_slice(&values).reshape(shape) * deviation
}

/// Initializes A `[r, in]` and B `[out, r]` of a linear layer, in f32 on the weight's device.
pub(crate) fn linear(name: &str, weight: &Weight, config: &LoraConfig, seed: u64) -> [Tensor; 2] {
    let [output, input] = weight.shape();
    let (r, device) = (config.rank(name), weight.device());
    let zero = || Tensor::zeros([output, r], (Kind::Float, device));
    match config.init_lora_weights {
        // Kaiming-uniform with a = √5.
        InitLoraWeights::Kaiming => {
            let values = uniform(seed, name, (r * input) as usize, 1.0 / (input as f64).sqrt());
            [Tensor::from_slice(&values).reshape([r, input]).to_device(device), zero()]
        }
        InitLoraWeights::Gaussian => [normal_matrix(seed, name, [r, input], 1.0 / r as f64).to_device(device), zero()],
        InitLoraWeights::Orthogonal => orthogonal(seed, name, r, [input, output]).map(|t| t.to_device(device)),
        InitLoraWeights::Pissa { niter } => {
            let weight = weight.to_kind(Kind::Double);
            let (u, s, v) = match niter {
                None => largest(&weight, r),
                Some(rounds) => iterated(&weight, &normal_matrix(seed, name, [input, r], 1.0), rounds),
            };
            let root = (s / config.scaling(name)).sqrt();
            [(v * &root).tr(), u * &root].map(|t| t.to_kind(Kind::Float).contiguous())
        }
        InitLoraWeights::Olora => {
            let (q, r_factor) = Tensor::linalg_qr(&weight.to_kind(Kind::Float), "reduced");
            [r_factor.narrow(0, 0, r), q.narrow(1, 0, r)].map(|t| t.contiguous())
        }
    }
}

/// Initializes A and B of an embedding as in PEFT: A `[r, tokens]` is zero, B `[out, r]` standard normal.
pub(crate) fn embedding(name: &str, weight: &Tensor, config: &LoraConfig, seed: u64) -> [Tensor; 2] {
    let (tokens, width) = weight.size2().expect("an embedding is a matrix");
    let (r, device) = (config.rank(name), weight.device());
    let b = normal_matrix(seed, name, [width, r], 1.0).to_device(device);
    [Tensor::zeros([r, tokens], (Kind::Float, device)), b]
}

/// A is made from the even rows of a random orthogonal matrix, and B from the odd rows, so that `B·A` is zero. The
/// factor of one tenth is PEFT's.
fn orthogonal(seed: u64, name: &str, r: i64, [input, output]: [i64; 2]) -> [Tensor; 2] {
    let draw = |what: &str, shape, deviation| {
        normal_matrix(seed, &format!("{name}.{what}"), shape, deviation).to_kind(Kind::Double)
    };
    let (q, _) = Tensor::linalg_qr(&draw("rotation", [r, r], 1.0), "reduced");
    let (even, odd) = (q.slice(0, 0, r, 2), q.slice(0, 1, r, 2));
    let a = draw("A", [input, r / 2], 0.1).matmul(&even).tr();
    let b = draw("B", [output, r / 2], 0.1).matmul(&odd);
    [a, b].map(|t| t.to_kind(Kind::Float).contiguous())
}

/// Returns the r largest singular values of an f64 matrix and their vectors as `(out, r)`, `(r)`, `(in, r)`. They are
/// computed from the eigenvectors of the smaller Gram matrix, which is many times faster, and does not lose accuracy in
/// the largest values.
fn largest(weight: &Tensor, r: i64) -> (Tensor, Tensor, Tensor) {
    let (output, input) = weight.size2().expect("a matrix");
    if input < output {
        let (v, s, u) = largest(&weight.tr(), r);
        return (u, s, v);
    }
    let (values, vectors) = weight.matmul(&weight.tr()).linalg_eigh("L");
    let r = r.min(output);
    // Eigenvalues are in ascending order.
    let u = vectors.narrow(1, output - r, r).flip([1]);
    let s = values.narrow(0, output - r, r).flip([0]).clamp_min(0.0).sqrt();
    let v = weight.tr().matmul(&u) / s.clamp_min(f64::MIN_POSITIVE);
    (u, s, v)
}

/// Approximates [`largest`] by rounds of subspace iteration from `start` `(in, r)` (Halko, Martinsson and Tropp, 2011).
fn iterated(weight: &Tensor, start: &Tensor, rounds: u32) -> (Tensor, Tensor, Tensor) {
    let basis = |x: Tensor| Tensor::linalg_qr(&x, "reduced").0;
    let mut q = basis(weight.matmul(&start.to_kind(Kind::Double).to_device(weight.device())));
    for _ in 0..rounds {
        q = basis(weight.matmul(&basis(weight.tr().matmul(&q))));
    }
    let (u, s, v) = largest(&q.tr().matmul(weight), q.size()[1]);
    (q.matmul(&u), s, v)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(output: i64, input: i64) -> Tensor {
        normal_matrix(3, "w", [output, input], 1.0)
    }

    fn config(init: InitLoraWeights) -> LoraConfig {
        LoraConfig { r: 4, lora_alpha: 8.0, init_lora_weights: init, ..Default::default() }
    }

    fn largest_of(t: &Tensor) -> f64 {
        t.abs().max().double_value(&[])
    }

    #[test]
    fn orthogonal_factors_are_not_zero_but_their_product_is() {
        let [a, b] = linear("w", &weight(10, 6).into(), &config(InitLoraWeights::Orthogonal), 1);
        assert!(largest_of(&a) > 0.01 && largest_of(&b) > 0.01);
        // Entries near 0.1; products of four of them in f32.
        assert!(largest_of(&b.matmul(&a)) < 1e-8);
    }

    #[test]
    fn pissa_starts_as_the_best_approximation() {
        for (output, input) in [(10, 6), (6, 10)] {
            let w = weight(output, input);
            let (u, s, v) = w.svd(true, true);
            let best = (u.narrow(1, 0, 4) * s.narrow(0, 0, 4)).matmul(&v.narrow(1, 0, 4).tr());
            // For such a small matrix, many rounds of iteration give the same result.
            for init in [InitLoraWeights::Pissa { niter: None }, InitLoraWeights::Pissa { niter: Some(400) }] {
                let config = config(init);
                let [a, b] = linear("w", &w.shallow_clone().into(), &config, 1);
                let product = b.matmul(&a) * config.scaling("w");
                // Values near 2 in f32.
                assert!(largest_of(&(product - &best)) < 2e-5, "{init:?}");
                // Both factors contain the square root of the singular values.
                assert!((a.norm().double_value(&[]) - b.norm().double_value(&[])).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn olora_starts_with_orthonormal_columns_of_the_weight() {
        let w = weight(10, 6);
        let [a, b] = linear("w", &w.shallow_clone().into(), &config(InitLoraWeights::Olora), 1);
        assert!(largest_of(&(b.tr().matmul(&b) - Tensor::eye(4, (Kind::Float, w.device())))) < 1e-6);
        // The first columns of the product are those of the weight.
        assert!(largest_of(&(b.matmul(&a) - &w).narrow(1, 0, 4)) < 1e-5);
    }

    #[test]
    fn numbers_depend_on_seed_and_name() {
        let draw = |seed, name| normal_matrix(seed, name, [100, 100], 2.0);
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert!(draw(1, "a") != draw(2, "a") && draw(1, "a") != draw(1, "b"));
        // Five standard errors of 10,000 draws.
        assert!((draw(1, "a").std(true).double_value(&[]) - 2.0).abs() < 0.08);
        assert!(draw(1, "a").mean(Kind::Float).double_value(&[]).abs() < 0.1);
    }
}
