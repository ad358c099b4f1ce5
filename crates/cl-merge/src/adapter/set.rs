//! Several opened adapters, their modules, and checks of their compatibility.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use cl_checkpoint::problem::TensorProblem;
use cl_checkpoint::{Adapter, AdapterModule, BesideKind, Checkpoint, LayerKind, TensorSource, convert};

use super::update::Update;
use crate::Error;
use crate::problem::{AdapterProblem, Place, Problem};
use crate::tensor::is_float;

/// Opens adapters.
///
/// # Errors
/// Returns [`Error::Problems`] with all problems of all adapters.
pub fn open(dirs: &[PathBuf]) -> Result<Vec<Adapter>, Error> {
    let (mut adapters, mut problems) = (Vec::new(), Vec::new());
    for dir in dirs {
        match Adapter::open(dir) {
            Ok(adapter) => adapters.push(adapter),
            Err(error) => problems.push(Problem::unopened(dir, error)),
        }
    }
    if problems.is_empty() { Ok(adapters) } else { Err(Error::Problems(problems)) }
}

/// A tensor of the base that at least one adapter changes other than by factors.
pub(super) struct Whole {
    /// Name of the tensor in the model.
    pub(super) tensor: String,
    /// The adapters that change it, in the order of members.
    pub(super) parts: Vec<WholePart>,
}

/// The contribution of one adapter to a [`Whole`].
#[derive(Clone, Debug)]
pub(super) struct WholePart {
    pub(super) member: usize,
    /// Name in the adapter's file.
    pub(super) name: String,
    pub(super) kind: BesideKind,
    /// Factor applied to an update's own bias (`lora_bias`).
    pub(super) scaling: f64,
}

/// An adapter, borrowed from the caller or shared.
pub(super) enum Held<'a> {
    Borrowed(&'a Adapter),
    Kept(Arc<Adapter>),
}

impl Deref for Held<'_> {
    type Target = Adapter;

    fn deref(&self) -> &Adapter {
        match self {
            Held::Borrowed(adapter) => adapter,
            Held::Kept(adapter) => adapter,
        }
    }
}

/// An adapter and its weight.
pub(super) struct Member<'a> {
    pub(super) adapter: Held<'a>,
    /// Directory as given, used in messages.
    pub(super) name: String,
    /// Key of its random masks: the directory as given, unless a name is set.
    pub(super) key: String,
    pub(super) weight: f64,
}

/// A module that at least one adapter changes by LoRA factors.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) kind: LayerKind,
    /// Rows and columns of the weight.
    pub(super) shape: [usize; 2],
    /// The adapters that change it, in the order of members.
    pub(super) parts: Vec<Part>,
}

/// The contribution of one adapter to a module.
pub(super) struct Part {
    pub(super) member: usize,
    pub(super) module: AdapterModule,
    pub(super) scaling: f64,
}

impl Module {
    /// Returns the name of the module's weight.
    pub(super) fn tensor(&self) -> String {
        format!("{}.weight", self.name)
    }

    pub(super) fn elements(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Returns the sum of the ranks over all adapters.
    pub(super) fn total_rank(&self) -> usize {
        self.parts.iter().map(|part| part.module.rank()).sum()
    }
}

/// A set of adapters with compatible modules.
pub(super) struct Set<'a> {
    pub(super) members: Vec<Member<'a>>,
    /// Modules, sorted by name.
    pub(super) modules: Vec<Module>,
    /// Tensors trained in addition to the factors, sorted by name.
    pub(super) wholes: Vec<Whole>,
    /// Whether embedding and head, tied in the base, stay tied although they change.
    pub(super) as_one: bool,
    /// Weights stored in addition to the factors that the configuration does not mark as trained: member, name in its
    /// file, name in the base.
    untrained: Vec<(usize, String, String)>,
    pub(super) notes: Vec<String>,
}

impl<'a> Set<'a> {
    /// Creates a set of adapters with one weight each; if `weights` is empty, all are one. Problems are added to
    /// `problems`.
    pub(super) fn new(adapters: &'a [Adapter], weights: &[f64], problems: &mut Vec<Problem>) -> Set<'a> {
        Set::of(adapters.iter().map(Held::Borrowed).collect(), weights, problems)
    }

    /// Sets the names that serve as keys of random masks, one per adapter, unless `names` is empty.
    pub(super) fn rename(&mut self, names: &[String], problems: &mut Vec<Problem>) {
        if !names.is_empty() && names.len() != self.members.len() {
            let (adapters, given) = (self.members.len(), names.len());
            problems.push(one_per_adapter("names", adapters, given, false));
            return;
        }
        for (member, name) in self.members.iter_mut().zip(names) {
            member.key.clone_from(name);
        }
    }

    /// Like [`Set::new`], for adapters that the set may own.
    pub(super) fn of(adapters: Vec<Held<'a>>, weights: &[f64], problems: &mut Vec<Problem>) -> Set<'a> {
        if !weights.is_empty() && weights.len() != adapters.len() {
            problems.push(one_per_adapter("weights", adapters.len(), weights.len(), false));
        }
        if adapters.is_empty() {
            problems.push(Problem::whole(AdapterProblem::NoAdapters));
        }
        let mut members = Vec::new();
        let mut modules: BTreeMap<String, Module> = BTreeMap::new();
        let (mut wholes, mut untrained) = (BTreeMap::new(), Vec::new());
        for (index, adapter) in adapters.into_iter().enumerate() {
            let weight = weights.get(index).copied().unwrap_or(1.0);
            let name = adapter.dir().display().to_string();
            let of_adapter = |kind: AdapterProblem| Problem::new(Place::adapter(&name), kind);
            if !weight.is_finite() {
                problems.push(of_adapter(AdapterProblem::Weight { weight }));
            }
            problems.extend(adapter.check_built().err().map(|error| Problem::unopened(adapter.dir(), error)));
            for module in adapter.modules() {
                let part =
                    Part { member: index, module: module.clone(), scaling: adapter.config().scaling(&module.name) };
                problems.extend(part_problems(&adapter, &name, &part));
                let new = Module {
                    name: module.name.clone(),
                    kind: module.kind,
                    shape: module.weight_shape(),
                    parts: Vec::new(),
                };
                let known = modules.entry(module.name.clone()).or_insert(new);
                if known.kind != module.kind || known.shape != module.weight_shape() {
                    problems.push(of_adapter(AdapterProblem::ModulesDiffer {
                        module: module.name.clone(),
                        kind: module.kind,
                        shape: module.weight_shape(),
                        other_kind: known.kind,
                        other_shape: known.shape,
                    }));
                }
                known.parts.push(part);
            }
            take_beside(index, &adapter, &mut wholes, &mut untrained, problems);
            members.push(Member { adapter, key: name.clone(), name, weight });
        }
        let modules = modules.into_values().collect();
        let wholes = wholes.into_iter().map(|(tensor, parts)| Whole { tensor, parts }).collect();
        let mut set = Set { members, modules, wholes, as_one: false, untrained, notes: Vec::new() };
        set.note_names_of_bases();
        set
    }

    /// Reports adapters of different bases, by the hashes in their manifests where available.
    pub(super) fn check_bases(&self, problems: &mut Vec<Problem>) {
        let known = self.members.iter().filter_map(|m| Some((m.name.as_str(), m.adapter.base_hash()?)));
        let known: Vec<(&str, String)> = known.collect();
        let Some((first, base)) = known.first() else { return };
        for (name, other) in known.iter().filter(|(_, other)| other != base) {
            let (base, first_base) = (other.clone(), base.clone());
            let kind = AdapterProblem::OtherBase { base, first: (*first).to_owned(), first_base };
            problems.push(Problem::new(Place::adapter(name), kind));
        }
    }

    /// Reports adapters that were made for another base, by the hashes in their manifests where available.
    pub(super) fn check_base_hash(
        &self,
        base: &Checkpoint,
        problems: &mut Vec<Problem>,
    ) -> Result<(), cl_checkpoint::Error> {
        let known: Vec<_> = self.members.iter().filter_map(|m| Some((&m.name, m.adapter.base_hash()?))).collect();
        if known.is_empty() {
            return Ok(());
        }
        let hash = base.content_hash()?;
        for (name, _) in known.iter().filter(|(_, other)| *other != hash) {
            let kind = AdapterProblem::NotThisBase { base: base.dir().to_owned() };
            problems.push(Problem::new(Place::adapter(name), kind));
        }
        Ok(())
    }

    /// Gives the modules of fused experts the base's names, see [`Adapter::named_for`].
    fn name_for(&mut self, base: &Checkpoint, problems: &mut Vec<Problem>) {
        let named: Vec<Option<Adapter>> = self.members.iter().map(|member| member.adapter.named_in(base)).collect();
        if named.iter().all(Option::is_none) {
            return;
        }
        let (weights, keys): (Vec<f64>, Vec<String>) = self.members.iter().map(|m| (m.weight, m.key.clone())).unzip();
        let members = std::mem::take(&mut self.members).into_iter().zip(named);
        let held = members.map(|(member, named)| named.map_or(member.adapter, |n| Held::Kept(Arc::new(n))));
        let mut again = Vec::new();
        *self = Set::of(held.collect(), &weights, &mut again);
        self.members.iter_mut().zip(keys).for_each(|(member, key)| member.key = key);
        again.retain(|new| !problems.iter().any(|known| known.to_string() == new.to_string()));
        problems.extend(again);
    }

    /// Reports modules that are missing or have another shape in the base, and stored weights that are not copies of
    /// the base's.
    pub(super) fn check_against(
        &mut self,
        base: &Checkpoint,
        problems: &mut Vec<Problem>,
    ) -> Result<(), cl_checkpoint::Error> {
        self.name_for(base, problems);
        for module in &self.modules {
            let of = |kind: AdapterProblem| {
                let names = module.parts.iter().map(|part| self.members[part.member].name.clone());
                Problem::new(Place::Adapters(names.collect()), kind)
            };
            let name = || module.name.clone();
            match base.info(&base_tensor(base, &module.tensor())) {
                None => {
                    let base = base.dir().to_owned();
                    problems.push(of(AdapterProblem::ModuleNotInBase { module: name(), base }));
                }
                Some(info) if info.shape != module.shape => {
                    let (shape, of_base) = (module.shape, info.shape.clone());
                    problems.push(of(AdapterProblem::ModuleShape { module: name(), shape, of_base }));
                }
                Some(info) if !is_float(info.dtype) => {
                    let kind = AdapterProblem::BaseDtype { dtype: info.dtype };
                    problems.push(Problem::new(Place::Module(name()), kind));
                }
                Some(_) => {}
            }
        }
        for (member, tensor, stands_for) in &self.untrained {
            let member = &self.members[*member];
            if !is_copy(&member.adapter, tensor, base, &base_tensor(base, stands_for))? {
                let kind = AdapterProblem::Untrained { tensor: tensor.clone(), stands_for: stands_for.clone() };
                problems.push(Problem::new(Place::adapter(&member.name), kind));
            }
        }
        self.fit_wholes(base, problems);
        Ok(())
    }

    /// Reports weights stored in addition to the factors, which cannot be judged without the base.
    pub(super) fn check_alone(&self, problems: &mut Vec<Problem>) {
        for (member, tensor, _) in &self.untrained {
            let kind = AdapterProblem::WholeWeight { tensor: tensor.clone() };
            problems.push(Problem::new(Place::adapter(&self.members[*member].name), kind));
        }
        for whole in self.wholes.iter().filter(|whole| !whole.is_update()) {
            let name = &self.members[whole.parts[0].member].name;
            let kind = AdapterProblem::TrainedWhole { tensor: whole.tensor.clone() };
            problems.push(Problem::new(Place::adapter(name), kind));
        }
        problems.dedup_by_key(|problem| problem.to_string());
    }

    /// Reads one adapter's factors of a module.
    ///
    /// # Errors
    /// Returns [`Error::NotFinite`] for non-finite values, and an error if reading fails.
    pub(super) fn load(&self, part: &Part) -> Result<Update, Error> {
        let member = &self.members[part.member];
        let [a, b] = part.module.factors().map(|name| load(&member.adapter, &member.name, &name));
        Ok(Update::new(part.module.kind, part.module.weight_shape(), part.module.rank(), a?, b?))
    }

    /// Returns `base_model_name_or_path` if all adapters agree on it.
    pub(super) fn base_name(&self) -> Option<String> {
        let first = self.members.first()?.adapter.config().base_model_name_or_path.clone();
        self.members.iter().all(|m| m.adapter.config().base_model_name_or_path == first).then_some(first)?
    }

    fn note_names_of_bases(&mut self) {
        let names = self.members.iter().filter_map(|m| m.adapter.config().base_model_name_or_path.as_deref());
        let mut names: Vec<&str> = names.collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > 1 {
            self.notes.push(format!("adapters name different bases: {}", names.join(", ")));
        }
    }
}

/// Classifies the tensors of an adapter other than its factors.
fn take_beside(
    member: usize,
    adapter: &Adapter,
    wholes: &mut BTreeMap<String, Vec<WholePart>>,
    untrained: &mut Vec<(usize, String, String)>,
    problems: &mut Vec<Problem>,
) {
    if adapter.check_built().is_err() {
        return;
    }
    let tensors = adapter.beside().unwrap_or_else(|error| {
        problems.push(Problem::unopened(adapter.dir(), error));
        Vec::new()
    });
    for beside in tensors {
        let scaling = match &beside.kind {
            BesideKind::UpdateBias { module } => adapter.config().scaling(module),
            BesideKind::Untrained => {
                untrained.push((member, beside.name, beside.tensor));
                continue;
            }
            _ => 1.0,
        };
        let part = WholePart { member, name: beside.name, kind: beside.kind, scaling };
        wholes.entry(beside.tensor).or_default().push(part);
    }
}

/// Creates the problem for a list whose length does not match the number of adapters.
pub(super) fn one_per_adapter(option: &str, adapters: usize, given: usize, or_one: bool) -> Problem {
    Problem::new(Place::key(option), AdapterProblem::OnePerAdapter { adapters, given, or_one })
}

fn part_problems(adapter: &Adapter, name: &str, part: &Part) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut add = |kind: AdapterProblem| problems.push(Problem::new(Place::adapter(name), kind));
    for factor in part.module.factors() {
        let dtype = adapter.info(&factor).map(|info| info.dtype);
        if let Some(dtype) = dtype.filter(|dtype| !is_float(*dtype)) {
            add(AdapterProblem::Dtype { tensor: factor, dtype });
        }
    }
    if !part.scaling.is_finite() {
        add(AdapterProblem::Scaling { module: part.module.name.clone(), scaling: part.scaling });
    }
    problems
}

/// Returns the name of the base tensor that holds a weight. With tied embeddings, the head's weight is the embedding.
pub(super) fn base_tensor(base: &Checkpoint, tensor: &str) -> String {
    let table = if tensor == HEAD { tied_table(base) } else { None };
    table.unwrap_or_else(|| tensor.to_owned())
}

/// Name of the head's weight.
pub(super) const HEAD: &str = "lm_head.weight";

/// Returns the name of the embedding that is tied to the head; `None` if they are not tied, or if the files contain a
/// head that differs from the embedding, whatever config.json says.
pub(super) fn tied_table(base: &Checkpoint) -> Option<String> {
    let said = base.config().get("tie_word_embeddings").and_then(serde_json::Value::as_bool);
    if said == Some(false) || (said.is_none() && base.info(HEAD).is_some()) {
        return None;
    }
    let table = base.names().into_iter().find(|name| name.ends_with("embed_tokens.weight"))?;
    let own = base.info(HEAD).is_some() && !base.same_bytes(HEAD, table).unwrap_or(true);
    (!own).then(|| table.to_owned())
}

/// Reads a floating-point tensor of an adapter as f32.
pub(super) fn load(adapter: &Adapter, name: &str, tensor: &str) -> Result<Vec<f32>, Error> {
    let bytes = adapter.bytes(tensor)?;
    let dtype = adapter.info(tensor).expect("its bytes were found").dtype;
    let values = convert::to_f32(dtype, bytes).ok_or_else(|| {
        let problem = Box::new(TensorProblem::NotFloat { dtype });
        cl_checkpoint::Error::Tensor { path: adapter.dir().to_owned(), tensor: tensor.to_owned(), problem }
    })?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(index) => {
            let (model, tensor, value) = (name.to_owned(), tensor.to_owned(), values[index]);
            Err(Error::NotFinite { model, tensor, index, value })
        }
    }
}

/// Whether a stored weight is a copy of the base's, up to conversion between their dtypes.
fn is_copy(adapter: &Adapter, tensor: &str, base: &Checkpoint, stands_for: &str) -> Result<bool, cl_checkpoint::Error> {
    let (Some(ours), Some(theirs)) = (adapter.info(tensor), base.info(stands_for)) else { return Ok(false) };
    if ours.shape != theirs.shape {
        return Ok(false);
    }
    let (bytes, of_base) = (adapter.bytes(tensor)?, base.bytes(stands_for)?);
    if ours.dtype == theirs.dtype {
        return Ok(bytes == of_base);
    }
    let (Some(x), Some(y)) = (convert::to_f32(ours.dtype, bytes), convert::to_f32(theirs.dtype, of_base)) else {
        return Ok(false);
    };
    let rounds_to =
        |values: &[f32], dtype, expected: &[u8]| convert::from_f32(dtype, values).is_some_and(|b| b == expected);
    Ok(rounds_to(&x, theirs.dtype, of_base) || rounds_to(&y, ours.dtype, bytes))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use cl_checkpoint::{CheckpointWriter, Dtype, Manifest, TensorSpec, WriteOptions, write_safetensors};
    use serde_json::json;

    use super::*;
    use crate::adapter::fold;

    const MODULE: &str = "model.layers.0.block_sparse_moe.experts";

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn spec(name: String, shape: [usize; 2]) -> TensorSpec {
        TensorSpec { name, dtype: Dtype::F32, shape: shape.to_vec() }
    }

    /// Writes an adapter of rank 1 on `down_proj` of two fused experts, as PEFT does.
    fn fused(dir: &Path, base: &str, scale: f32) -> Adapter {
        std::fs::create_dir(dir).unwrap();
        let config = json!({"r": 1, "lora_alpha": 2, "base_model_name_or_path": base, "target_modules": [],
            "target_parameters": ["mlp.experts.down_proj"]});
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        let name = |factor: &str| format!("base_model.model.model.layers.0.mlp.experts.lora_{factor}.weight");
        let specs = [spec(name("A"), [2, 1]), spec(name("B"), [2, 2])];
        let values = [bytes(&[1.0, 10.0]), bytes(&[scale, 2.0 * scale, 3.0 * scale, 4.0 * scale])];
        write_safetensors(&dir.join("adapter_model.safetensors"), &specs, |i| values[i].clone()).unwrap();
        Adapter::open(dir).unwrap()
    }

    /// The base decides the names, also where adapters were opened with different ones.
    #[test]
    fn adapters_of_fused_experts_get_the_names_of_the_base() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let specs = [0, 1].map(|expert| spec(format!("{MODULE}.{expert}.w2.weight"), [2, 1]));
        let writer = CheckpointWriter::create(&place("base"), &specs, WriteOptions::default()).unwrap();
        specs.iter().for_each(|spec| writer.write(&spec.name, &bytes(&[0.5, 0.0])).unwrap());
        writer.put_json("config.json", &json!({"model_type": "mixtral"})).unwrap();
        writer.finish(Manifest::new("model")).unwrap();
        let base = Checkpoint::open(&place("base")).unwrap();
        let adapters = [fused(&place("a"), "someone/model", 1.0), fused(&place("b"), "x/Mixtral", 100.0)];
        assert_ne!(adapters[0].modules()[0].name, adapters[1].modules()[0].name);
        fold(&base, &adapters, &place("out"), Manifest::new("model"), false).unwrap();
        let folded = Checkpoint::open(&place("out")).unwrap();
        let of = |expert: usize| folded.load_f32(&format!("{MODULE}.{expert}.w2.weight")).unwrap();
        // With rank 1, the columns of B are those of the experts; the scaling is 2.
        assert_eq!([of(0), of(1)], [vec![202.5, 606.0], vec![4040.5, 8080.0]]);
    }
}
