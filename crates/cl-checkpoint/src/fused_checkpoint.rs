//! Models whose experts are stored fused, as Transformers 5 has them in memory: one tensor per projection and layer.
//!
//! `save_pretrained` stores one tensor per expert, but mergekit-moe 0.1.5 with Transformers 5 stores the fused tensors
//! (`Mixtral`, Qwen2-MoE and Qwen3-MoE, `transformers/conversion_mapping.py`):
//!
//! | | shape | parts |
//! | --- | --- | --- |
//! | `mlp.experts.gate_up_proj` | `[E, 2·I, H]` | for each expert, the gate's rows, then those of the up projection |
//! | `mlp.experts.down_proj` | `[E, H, I]` | for each expert, the down projection |
//! | `mlp.gate.weight` | `[E, H]` | the router, which Mixtral stores as `block_sparse_moe.gate.weight` |
//!
//! Each part is contiguous in the file, so that it can be read as a tensor of its own, without a copy.

use serde_json::{Map, Value};

use crate::TensorInfo;
use crate::fused_experts::{Layout, OF_EXPERTS};

/// A part of a stored tensor under a name of its own.
pub(crate) struct Part {
    /// The name of the part.
    pub(crate) name: String,
    pub(crate) info: TensorInfo,
    /// The first byte in the stored tensor.
    pub(crate) start: usize,
}

/// Returns the naming scheme of a model's experts; `None` for families that are not read from fused tensors.
pub(crate) fn layout(config: &Map<String, Value>) -> Option<Layout> {
    match config.get("model_type")?.as_str()? {
        "mixtral" => Some(Layout::Mixtral),
        "qwen2_moe" | "qwen3_moe" => Some(Layout::Mlp),
        _ => None,
    }
}

/// Returns the parts of a stored tensor; none if it is not one of fused experts.
pub(crate) fn parts(layout: Layout, name: &str, info: &TensorInfo) -> Vec<Part> {
    let size = info.dtype.bitsize() / 8;
    if let Some(module) = name.strip_suffix(".gate.weight").filter(|_| layout == Layout::Mixtral) {
        let part = |layer| Part { name: format!("{layer}.block_sparse_moe.gate.weight"), info: info.clone(), start: 0 };
        return module.strip_suffix(".mlp").map(part).into_iter().collect();
    }
    let Some((experts, parameter)) = name.rsplit_once('.') else { return Vec::new() };
    let fused =
        OF_EXPERTS.contains(&parameter) && experts.ends_with(".mlp.experts") && info.dtype.bitsize().is_multiple_of(8);
    let projections = layout.projections(parameter);
    let &[count, rows, columns] = info.shape.as_slice() else { return Vec::new() };
    if !fused || rows % projections.len() != 0 {
        return Vec::new();
    }
    let (module, rows) = (layout.module(experts), rows / projections.len());
    let numbered = (0..count).flat_map(|expert| projections.iter().map(move |projection| (expert, projection)));
    let part = |(i, (expert, projection)): (usize, (usize, &&str))| Part {
        name: format!("{module}.{expert}.{projection}.weight"),
        info: TensorInfo { dtype: info.dtype, shape: vec![rows, columns] },
        start: i * rows * columns * size,
    };
    numbered.enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use crate::{Checkpoint, Dtype, TensorSource, TensorSpec, write_safetensors};

    /// A model of two experts with hidden size 2 and intermediate size 1, whose elements are bytes.
    fn model(dir: &std::path::Path, model_type: &str) -> Checkpoint {
        let tensors: [(&str, &[usize], &[u8]); 4] = [
            ("model.layers.3.mlp.experts.gate_up_proj", &[2, 2, 2], &[0, 1, 2, 3, 4, 5, 6, 7]),
            ("model.layers.3.mlp.experts.down_proj", &[2, 2, 1], &[10, 11, 12, 13]),
            ("model.layers.3.mlp.gate.weight", &[2, 2], &[20, 21, 22, 23]),
            ("model.norm.weight", &[2], &[30, 31]),
        ];
        let spec = |(name, shape, _): &(&str, &[usize], &[u8])| TensorSpec {
            name: (*name).to_owned(),
            dtype: Dtype::U8,
            shape: shape.to_vec(),
        };
        let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
        std::fs::write(dir.join("config.json"), format!(r#"{{"model_type":"{model_type}"}}"#)).unwrap();
        let path = dir.join("model.safetensors");
        let _ = std::fs::remove_file(&path);
        write_safetensors(&path, &specs, |i| tensors[i].2.to_vec()).unwrap();
        Checkpoint::open(dir).unwrap()
    }

    #[test]
    fn parts_are_read_like_tensors() {
        let folder = tempfile::tempdir().unwrap();
        for (model_type, experts, router, [gate, up, down]) in [
            ("mixtral", "block_sparse_moe.experts", "block_sparse_moe.gate", ["w1", "w3", "w2"]),
            ("qwen3_moe", "mlp.experts", "mlp.gate", ["gate_proj", "up_proj", "down_proj"]),
        ] {
            let model = model(folder.path(), model_type);
            let mut names = model.names();
            names.sort_unstable();
            assert_eq!((names.len(), model.names()), (8, names));
            let read = |name: String| {
                let name = format!("model.layers.3.{name}.weight");
                let (info, bytes) = (model.info(&name).unwrap(), model.bytes(&name).unwrap());
                let mut last = [0];
                model.read(&name, bytes.len() - 1, &mut last).unwrap();
                assert_eq!(last[0], bytes[bytes.len() - 1]);
                assert!(model.read(&name, bytes.len(), &mut last).is_err(), "the next part is not read");
                (info.shape.clone(), bytes.to_vec())
            };
            assert_eq!(read(format!("{experts}.0.{gate}")), (vec![1, 2], vec![0, 1]));
            assert_eq!(read(format!("{experts}.0.{up}")), (vec![1, 2], vec![2, 3]));
            assert_eq!(read(format!("{experts}.1.{gate}")), (vec![1, 2], vec![4, 5]));
            assert_eq!(read(format!("{experts}.1.{down}")), (vec![2, 1], vec![12, 13]));
            assert_eq!(read(router.to_owned()), (vec![2, 2], vec![20, 21, 22, 23]));
            assert!(model.info("model.layers.3.mlp.experts.down_proj").is_none());
        }
        assert_eq!(model(folder.path(), "other").names().len(), 4, "other families are left as they are");
    }
}
