//! A model with an adapter applied, `base + s·B·A`, computed on the fly while it is read.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use cl_checkpoint::problem::TensorProblem;
use cl_checkpoint::{Adapter, Checkpoint, TensorInfo, TensorSource};
use serde_json::{Map, Value};

use super::fold::{
    BLOCK, FoldReport, Folding, Target, Updates, blocks, companions, dora_problems, grown, store, targets,
};
use super::set::{Held, Set};
use crate::Error;
use crate::problem::Problem;

/// A base with one adapter folded in. It reads as the same bytes that [`super::fold_with`] writes.
pub(crate) struct Folded {
    base: Arc<Checkpoint>,
    adapter: Arc<Adapter>,
    set: Set<'static>,
    targets: BTreeMap<String, (Target, TensorInfo)>,
    config: Map<String, Value>,
    companions: Vec<PathBuf>,
    /// The block that each thread computed last: a thread reads consecutive pieces, which mostly lie in the same block.
    last: Mutex<HashMap<ThreadId, Last>>,
    pub(crate) notes: Vec<String>,
}

/// A computed block of rows of a tensor, in the base's dtype.
struct Last {
    tensor: String,
    block: usize,
    bytes: Vec<u8>,
    updates: Option<Arc<Updates>>,
}

impl Folded {
    /// Opens an adapter on a base. Reads only headers, and those weights that the adapter stores as copies of the
    /// base's.
    ///
    /// # Errors
    /// Returns all incompatibilities.
    pub(crate) fn open(base: Arc<Checkpoint>, dir: &Path) -> Result<Folded, Vec<Problem>> {
        let one = |at: &Path, error| vec![Problem::unopened(at, error)];
        let adapter = Arc::new(Adapter::open(dir).map_err(|error| one(dir, error))?);
        let mut problems = Vec::new();
        let mut set: Set<'static> = Set::of(vec![Held::Kept(adapter.clone())], &[], &mut problems);
        set.check_against(&base, &mut problems).map_err(|error| one(base.dir(), error))?;
        dora_problems(&set, &mut problems);
        set.check_base_hash(&base, &mut problems).map_err(|error| one(base.dir(), error))?;
        if !problems.is_empty() {
            return Err(problems);
        }
        let mut report = FoldReport { notes: set.notes.clone(), ..FoldReport::default() };
        let targets = targets(&base, &set, &mut report);
        let grown = grown(&base, &set);
        let of = companions(&base, grown.map(|_| &*adapter)).map_err(|error| one(base.dir(), error))?;
        let mut config = base.config().clone();
        if let Some((_, rows)) = grown {
            config.insert("vocab_size".to_owned(), rows.into());
        }
        if report.untied {
            config.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
        }
        let targets = targets.into_iter().map(|target| {
            let info = TensorInfo { dtype: target.spec.dtype, shape: target.spec.shape.clone() };
            (target.spec.name.clone(), (target, info))
        });
        let targets = targets.collect();
        let companions = of.into_values().collect();
        let last = Mutex::default();
        Ok(Folded { base, adapter, set, targets, config, companions, last, notes: report.notes })
    }

    /// Returns the adapter.
    pub(crate) fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Returns the content of config.json after folding.
    pub(crate) fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// Returns the companion files. If the adapter adds tokens, its tokenizer replaces the base's.
    pub(crate) fn companions(&self) -> &[PathBuf] {
        &self.companions
    }

    /// Returns the memory per thread in bytes.
    pub(crate) fn room(&self) -> usize {
        let columns = self.set.modules.iter().map(|m| m.shape[1]).max().unwrap_or(0);
        let factors = self.set.modules.iter().map(|m| 8 * m.total_rank() * (m.shape[0] + m.shape[1])).max();
        // While a block is computed: base and sum in f64, the base's bytes, and the cached block.
        4 * 8 * BLOCK.max(columns) + 2 * factors.unwrap_or(0)
    }

    /// Returns the number and the rows of the block that contains an element.
    fn block_of(shape: &[usize], element: usize) -> (usize, std::ops::Range<usize>) {
        let columns: usize = shape[1..].iter().product();
        let length = (BLOCK / columns.max(1)).max(1);
        let block = element / columns.max(1) / length;
        let rows = shape.first().copied().unwrap_or(0);
        (block, block * length..rows.min((block + 1) * length))
    }

    /// Computes the bytes of a block, in the base's dtype.
    fn compute(&self, target: &Target, block: usize, last: &mut Last) -> Result<(), Error> {
        let folding = Folding { base: &self.base, set: &self.set };
        let (values, columns, start) = if let Some(module) = target.module {
            let module = &self.set.modules[module];
            let updates = match &last.updates {
                Some(updates) if last.tensor == target.spec.name => updates.clone(),
                _ => Arc::new(folding.updates(target, module)?),
            };
            last.updates = Some(updates.clone());
            let rows = blocks(module.shape)[block].clone();
            (folding.rows(target, module, &updates, &rows)?.1, module.shape[1], rows.start)
        } else {
            let whole = &self.set.wholes[target.whole.expect("a target that changes")];
            let view = whole.view(&self.set, Some(&self.base), false);
            let rows = blocks([view.rows(), view.columns])[block].clone();
            (folding.whole_rows(whole, &view, rows.clone())?, view.columns, rows.start)
        };
        last.tensor.clone_from(&target.spec.name);
        last.block = block;
        last.bytes.clear();
        let dtype = target.spec.dtype;
        for (i, &value) in values.iter().enumerate() {
            if !store(dtype, value, &mut last.bytes).is_finite() {
                let (tensor, index) = (target.spec.name.clone(), start * columns + i);
                // The cached bytes are incomplete.
                last.block = usize::MAX;
                return Err(Error::Overflow { tensor, index, value: value as f32, dtype });
            }
        }
        Ok(())
    }

    fn read_changed(
        &self,
        (target, info): &(Target, TensorInfo),
        mut offset: usize,
        mut out: &mut [u8],
    ) -> Result<(), Error> {
        let thread = std::thread::current().id();
        let kept = self.last.lock().expect("no panic while held").remove(&thread);
        let nothing = || Last { tensor: String::new(), block: usize::MAX, bytes: Vec::new(), updates: None };
        let mut last = kept.unwrap_or_else(nothing);
        let size = info.dtype.bitsize() / 8;
        let columns: usize = info.shape[1..].iter().product();
        while !out.is_empty() {
            let (block, rows) = Folded::block_of(&info.shape, offset / size);
            if last.tensor != target.spec.name || last.block != block {
                self.compute(target, block, &mut last)?;
            }
            let from = offset - rows.start * columns * size;
            let length = out.len().min(last.bytes.len() - from);
            let (now, later) = out.split_at_mut(length);
            now.copy_from_slice(&last.bytes[from..from + length]);
            (out, offset) = (later, offset + length);
        }
        self.last.lock().expect("no panic while held").insert(thread, last);
        Ok(())
    }
}

impl TensorSource for Folded {
    fn names(&self) -> Vec<&str> {
        self.targets.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.targets.get(name).map(|(_, info)| info)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], cl_checkpoint::Error> {
        match self.targets.get(name) {
            Some((target, _)) if target.module.is_none() && target.whole.is_none() => self.base.bytes(&target.source),
            Some(_) => {
                let problem = Box::new(TensorProblem::Computed);
                let path = self.adapter.dir().to_owned();
                Err(cl_checkpoint::Error::Tensor { path, tensor: name.to_owned(), problem })
            }
            None => self.base.bytes(name),
        }
    }

    fn read(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), cl_checkpoint::Error> {
        match self.targets.get(name) {
            Some(changed) if changed.0.module.is_some() || changed.0.whole.is_some() => {
                self.read_changed(changed, offset, out).map_err(|error| match error {
                    Error::Checkpoint(error) => error,
                    other => cl_checkpoint::Error::Tensor {
                        path: self.adapter.dir().to_owned(),
                        tensor: name.to_owned(),
                        problem: Box::new(TensorProblem::NotComputed { source: Box::new(other) }),
                    },
                })
            }
            Some((target, _)) => self.base.read(&target.source, offset, out),
            None => self.base.read(name, offset, out),
        }
    }
}
