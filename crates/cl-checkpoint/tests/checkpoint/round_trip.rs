//! Random models are written and read back.

use std::collections::BTreeMap;
use std::fs;

use cl_checkpoint::{
    Checkpoint, CheckpointWriter, Dtype, Manifest, SafetensorsFile, TensorInfo, TensorSource, TensorSpec, WriteOptions,
    write_safetensors,
};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::{names, spec};

const DTYPES: [Dtype; 15] = [
    Dtype::F64,
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F8_E4M3,
    Dtype::F8_E5M2,
    Dtype::F4,
    Dtype::I64,
    Dtype::I32,
    Dtype::I16,
    Dtype::I8,
    Dtype::U64,
    Dtype::U16,
    Dtype::U8,
    Dtype::BOOL,
];

/// Generates up to eight tensors, some of them empty or scalars, and their bytes.
fn models() -> impl Strategy<Value = Vec<(TensorSpec, Vec<u8>)>> {
    let tensor =
        (r#"[a-zA-Z0-9._/"\\é]{0,12}"#, prop::sample::select(&DTYPES[..]), prop::collection::vec(0..5usize, 0..4));
    prop::collection::vec((tensor, any::<u8>()), 1..8).prop_map(|tensors| {
        let tensors: BTreeMap<String, _> = tensors.into_iter().map(|((n, d, s), seed)| (n, (d, s, seed))).collect();
        tensors
            .into_iter()
            .map(|(name, (dtype, mut shape, seed))| {
                if dtype == Dtype::F4 {
                    shape.push(2); // so that the size is a whole number of bytes
                }
                let size = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                let bytes = (0..size).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
                (TensorSpec { name, dtype, shape }, bytes)
            })
            .collect()
    })
}

fn write(
    dir: &std::path::Path,
    tensors: &[(TensorSpec, Vec<u8>)],
    order: &[usize],
    max_shard_size: u64,
    threads: usize,
) {
    let plan: Vec<TensorSpec> = tensors.iter().map(|t| t.0.clone()).collect();
    let options = WriteOptions { max_shard_size, overwrite: false };
    let writer = CheckpointWriter::create(dir, &plan, options).unwrap();
    std::thread::scope(|scope| {
        for part in order.chunks(order.len().div_ceil(threads)) {
            let writer = &writer;
            scope.spawn(move || part.iter().for_each(|&i| writer.write(&tensors[i].0.name, &tensors[i].1).unwrap()));
        }
    });
    writer.put_json("config.json", &json!({"model_type": "llama"})).unwrap();
    writer.finish(Manifest::new("model")).unwrap();
}

proptest! {
    // Every case syncs several files.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_in_any_order_from_any_threads_is_read_back(
        (tensors, order) in models().prop_flat_map(|t| {
            let order: Vec<usize> = (0..t.len()).collect();
            (Just(t), Just(order).prop_shuffle())
        }),
        max_shard_size in prop_oneof![0..200u64, Just(u64::MAX)],
        threads in 1..4usize,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("model");
        write(&dir, &tensors, &order, max_shard_size, threads);

        let model = Checkpoint::open(&dir).unwrap();
        prop_assert_eq!(model.names().len(), tensors.len());
        for (spec, bytes) in &tensors {
            let info = TensorInfo { dtype: spec.dtype, shape: spec.shape.clone() };
            prop_assert_eq!(model.info(&spec.name), Some(&info));
            prop_assert_eq!(model.bytes(&spec.name).unwrap(), &bytes[..]);
        }
        let mut seen = 0;
        for path in model.files() {
            let file = fs::read(path).unwrap();
            let (header, _) = SafeTensors::read_metadata(&file).unwrap();
            prop_assert_eq!(header % 8, 0, "the data starts aligned");
            let read = SafeTensors::deserialize(&file).unwrap();
            let (count, size) = (read.len(), read.iter().map(|(_, t)| t.data().len() as u64).sum::<u64>());
            let filled = read.iter().filter(|(_, t)| !t.data().is_empty()).count();
            prop_assert!(size <= max_shard_size || filled == 1, "{size} bytes of {filled} tensors in {path:?}");
            for (name, tensor) in read.iter() {
                let (spec, bytes) = tensors.iter().find(|t| t.0.name == name).unwrap();
                prop_assert_eq!((tensor.dtype(), tensor.shape(), tensor.data()), (spec.dtype, &spec.shape[..], &bytes[..]));
                let at = tensor.data().as_ptr() as usize - file.as_ptr() as usize;
                prop_assert_eq!(at % spec.dtype.bitsize().div_ceil(8), 0, "{} is aligned", name);
            }
            seen += count;
        }
        prop_assert_eq!(seen, tensors.len());
        prop_assert_eq!(Manifest::verify(&dir).unwrap(), []);

        // The bytes do not depend on the order of writing or on the number of threads.
        let again = folder.path().join("again");
        write(&again, &tensors, &(0..tensors.len()).collect::<Vec<_>>(), max_shard_size, 1);
        prop_assert_eq!(Manifest::read(&dir).unwrap(), Manifest::read(&again).unwrap());
    }
}

#[test]
fn shards_are_named_and_indexed_as_transformers_does() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    let tensor = |name: &str, size: usize| (spec(name, Dtype::U8, &[size]), vec![7; size]);
    let tensors = [tensor("b", 6), tensor("a", 4), tensor("large", 30), tensor("c", 1)];
    write(&dir, &tensors, &[0, 1, 2, 3], 10, 1);
    let file = |i: usize| format!("model-{i:05}-of-00003.safetensors");
    let expected = ["config.json", "manifest.json", &file(1), &file(2), &file(3), "model.safetensors.index.json"];
    assert_eq!(names(&dir), expected);
    let index: Value = serde_json::from_slice(&fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap();
    let map = json!({"a": file(1), "b": file(1), "c": file(3), "large": file(2)});
    assert_eq!(index, json!({"metadata": {"total_size": 41}, "weight_map": map}));
    // Transformers rejects files that do not specify the framework that wrote them.
    let header = fs::read(dir.join(file(1))).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&header).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn companions_are_those_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    write(&dir, &[(spec("w", Dtype::U8, &[1]), vec![1])], &[0], u64::MAX, 1);
    for name in ["tokenizer.json", "chat_template.jinja", "notes.txt"] {
        fs::write(dir.join(name), "x").unwrap();
    }
    let companions = Checkpoint::open(&dir).unwrap().companion_files().unwrap();
    assert_eq!(companions, [dir.join("tokenizer.json"), dir.join("chat_template.jinja")]);
}

#[test]
fn tensors_are_compared_by_dtype_shape_and_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    // More than one piece of the comparison.
    let n = (1 << 20) + 8;
    let mut other = vec![7; n];
    other[n - 1] = 8;
    let data = [("a", vec![7; n]), ("b", vec![7; n]), ("c", other), ("d", vec![7; n])];
    let specs = data.each_ref().map(|(name, _)| {
        let shape = if *name == "d" { vec![2, n / 2] } else { vec![n] };
        TensorSpec { name: (*name).to_owned(), dtype: Dtype::U8, shape }
    });
    write_safetensors(&path, &specs, |i| data[i].1.clone()).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    for (a, b, same) in [("a", "b", true), ("a", "a", true), ("a", "c", false), ("a", "d", false), ("a", "e", false)] {
        assert_eq!(file.same_bytes(a, b).unwrap(), same, "{a} {b}");
        assert_eq!(file.same_bytes(b, a).unwrap(), same, "{b} {a}");
    }
    assert!(!file.same_bytes("e", "f").unwrap());
}
