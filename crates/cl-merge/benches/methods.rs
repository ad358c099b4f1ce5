//! Time of each method on one tensor in memory, with one thread: `cargo bench -p cl-merge`.
//!
//! Does not include reading, rounding and writing; for complete merges see `cargo xtask bench merge`.

use cl_merge::methods::{Consensus, Divisor, Linear, Rescale, Sce, Sign, Slerp, Sparsify, TaskVectors};
use cl_merge::select::keep_largest_changes;
use cl_merge::{MergeMethod, Stream, TensorGroup, Values, merge_tensor};
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    divan::main();
}

/// A matrix of a 135M Llama.
const SHAPE: [usize; 2] = [1536, 576];
const MODELS: usize = 7;

/// Values as bf16 weights have: few digits, many equal differences.
fn values(seed: u64) -> Vec<f32> {
    let mut random = vec![0; SHAPE[0] * SHAPE[1]];
    Stream::new(seed, "bench", "model").fill(0, &mut random);
    let bf16 = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    random.iter().enumerate().map(|(i, r)| bf16((i % 997) as f32 * 1e-4 + f32::from(*r) * 1e-7)).collect()
}

fn with_group(bencher: Bencher<'_, '_>, models: usize, f: impl Fn(&TensorGroup<'_>) + Sync) {
    let base = values(0);
    let tuned: Vec<Vec<f32>> = (1..=models as u64).map(values).collect();
    let values = tuned.iter().map(|x| Values::from_slice("model", x)).collect();
    let group = TensorGroup::new("w", &SHAPE, Some(Values::from_slice("base", &base)), values);
    bencher.counter(ItemsCount::new(models * base.len())).bench_local(|| f(&group));
}

fn merge(bencher: Bencher<'_, '_>, models: usize, method: &dyn MergeMethod) {
    with_group(bencher, models, |group| drop(divan::black_box(merge_tensor(method, group))));
}

fn task_vectors(sparsify: Sparsify, rescale: Rescale) -> TaskVectors {
    TaskVectors {
        weights: vec![1.0; MODELS],
        lambda: 1.0,
        sparsify,
        rescale,
        consensus: Some(Consensus { sign: Sign::Sum, weighted: true }),
        divisor: Divisor::Weight,
        seed: 42,
    }
}

#[divan::bench]
fn linear(bencher: Bencher<'_, '_>) {
    merge(bencher, MODELS, &Linear { weights: vec![1.0; MODELS], normalize: true });
}

#[divan::bench]
fn slerp(bencher: Bencher<'_, '_>) {
    merge(bencher, 1, &Slerp { t: 0.5 });
}

#[divan::bench]
fn ties(bencher: Bencher<'_, '_>) {
    merge(bencher, MODELS, &task_vectors(Sparsify::Magnitude { density: vec![0.2; MODELS] }, Rescale::None));
}

#[divan::bench]
fn dare_ties(bencher: Bencher<'_, '_>) {
    merge(bencher, MODELS, &task_vectors(Sparsify::Random { density: vec![0.2; MODELS] }, Rescale::Density));
}

#[divan::bench]
fn dare_ties_to_the_norm(bencher: Bencher<'_, '_>) {
    merge(bencher, MODELS, &task_vectors(Sparsify::Random { density: vec![0.2; MODELS] }, Rescale::Norm));
}

#[divan::bench]
fn della(bencher: Bencher<'_, '_>) {
    let sparsify = Sparsify::Ranked { density: vec![0.4; MODELS], epsilon: vec![0.1; MODELS] };
    merge(bencher, MODELS, &task_vectors(sparsify, Rescale::Density));
}

#[divan::bench]
fn sce(bencher: Bencher<'_, '_>) {
    merge(bencher, MODELS, &Sce { select_topk: 0.2 });
}

/// Finding the thresholds of a trim.
#[divan::bench]
fn keep_largest(bencher: Bencher<'_, '_>) {
    let k = vec![SHAPE[0] * SHAPE[1] / 5; MODELS];
    with_group(bencher, MODELS, |group| drop(divan::black_box(keep_largest_changes(group, &k))));
}

/// Random numbers of a mask.
#[divan::bench]
fn random(bencher: Bencher<'_, '_>) {
    let mut out = vec![0; SHAPE[0] * SHAPE[1]];
    let stream = Stream::new(42, "w", "model");
    bencher.counter(ItemsCount::new(out.len())).bench_local(|| stream.fill(0, divan::black_box(&mut out)));
}

/// Random numbers of one piece.
#[divan::bench]
fn random_numbers(bencher: Bencher<'_, '_>) {
    let stream = Stream::new(42, "bench", "model");
    let mut out = vec![0; cl_merge::PIECE];
    bencher.counter(ItemsCount::new(out.len())).bench_local(|| stream.fill(divan::black_box(0), &mut out));
}
