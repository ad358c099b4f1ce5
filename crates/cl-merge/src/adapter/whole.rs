//! Tensors that adapters train in addition to their factors, in full or in some rows.
//!
//! Such a tensor is represented by its difference from the base's, so that it is weighted and merged like an update.

use std::ops::Range;

use cl_checkpoint::problem::TensorProblem;
use cl_checkpoint::{BesideKind, Checkpoint, Dtype, TensorInfo, TensorSource, convert};

use super::set::{HEAD, Set, Whole, WholePart, base_tensor, tied_table};
use crate::Error;
use crate::problem::{AdapterProblem, Place, Problem};
use crate::tensor::is_float;

/// A selection of rows of a tensor, as a matrix `[rows, columns]`.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) columns: usize,
    /// Row numbers in the base; `None` for all rows.
    ids: Option<Vec<usize>>,
    count: usize,
}

impl Whole {
    /// Whether it consists only of updates' own biases (`lora_bias`), which are added to the base's bias.
    pub(super) fn is_update(&self) -> bool {
        self.parts.iter().all(|part| matches!(part.kind, BesideKind::UpdateBias { .. }))
    }

    /// Returns the sorted ids of all rows that change; `None` if the tensor changes in full.
    pub(super) fn rows(&self) -> Option<Vec<usize>> {
        let mut all = Vec::new();
        for part in &self.parts {
            let BesideKind::Rows(ids) = &part.kind else { return None };
            all.extend(ids);
        }
        all.sort_unstable();
        all.dedup();
        Some(all)
    }

    /// Returns the shape after the change; a token table may have grown.
    pub(super) fn shape(&self, set: &Set<'_>, base: Option<&Checkpoint>) -> Vec<usize> {
        let of_base = base.and_then(|base| base.info(&base_tensor(base, &self.tensor)));
        let own = self.parts.iter().filter(|part| !matches!(part.kind, BesideKind::Rows(_)));
        let shapes = own.filter_map(|part| set.members[part.member].adapter.info(&part.name));
        let longest = shapes.chain(of_base).max_by_key(|info| info.shape.first().copied());
        longest.map(|info| info.shape.clone()).unwrap_or_default()
    }

    /// Returns a view of all rows. With `changed_only`, it is restricted to the rows that change if only some do.
    pub(super) fn view(&self, set: &Set<'_>, base: Option<&Checkpoint>, changed_only: bool) -> View {
        let shape = self.shape(set, base);
        let ids = self.rows().filter(|_| changed_only);
        let count = ids.as_ref().map_or(shape.first().copied().unwrap_or(0), Vec::len);
        View { columns: shape.iter().skip(1).product(), ids, count }
    }
}

impl View {
    pub(super) fn rows(&self) -> usize {
        self.count
    }

    pub(super) fn elements(&self) -> usize {
        self.count * self.columns
    }

    /// Maps a row of the view to the row of the base's tensor.
    fn of_base(&self, row: usize) -> usize {
        self.ids.as_ref().map_or(row, |ids| ids[row])
    }
}

impl WholePart {
    /// Maps a row of the base to the part's row that replaces or is added to it, if there is one.
    fn row(&self, base_row: usize) -> Option<usize> {
        match &self.kind {
            BesideKind::Rows(ids) => ids.iter().position(|id| *id == base_row),
            _ => Some(base_row),
        }
    }

    /// Whether its values replace the base's. Those of an update's own bias are added instead.
    fn replaces(&self) -> bool {
        !matches!(self.kind, BesideKind::UpdateBias { .. })
    }

    /// Reads the values of a row.
    fn values(&self, set: &Set<'_>, row: usize, columns: usize) -> Result<Vec<f32>, Error> {
        let member = &set.members[self.member];
        let (info, bytes) = (member.adapter.info(&self.name), member.adapter.bytes(&self.name)?);
        let Some(info) = info else { return Ok(vec![0.0; columns]) };
        let size = info.dtype.bitsize() / 8;
        let bytes = bytes.get(row * columns * size..(row + 1) * columns * size).unwrap_or_default();
        let values = convert::to_f32(info.dtype, bytes).filter(|v| v.len() == columns);
        let values = values.ok_or_else(|| cl_checkpoint::Error::Tensor {
            path: member.adapter.dir().to_owned(),
            tensor: self.name.clone(),
            problem: Box::new(TensorProblem::NoRow { row }),
        })?;
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => Err(Error::NotFinite {
                model: member.name.clone(),
                tensor: self.name.clone(),
                index: row * columns + i,
                value: values[i],
            }),
        }
    }
}

/// Computes `base + Σ weightᵢ·(valueᵢ − base)` for some rows of a view, in f64; `base` holds these rows. A value that
/// replaces the base's with a weight of one is kept bit for bit.
pub(super) fn weighted(
    set: &Set<'_>,
    whole: &Whole,
    view: &View,
    rows: Range<usize>,
    weights: &[f64],
    base: &[f64],
) -> Result<Vec<f64>, Error> {
    let mut out = Vec::with_capacity(base.len());
    for (row, of_base) in rows.zip(base.chunks(view.columns.max(1))) {
        let id = view.of_base(row);
        let parts: Vec<(&WholePart, usize)> = whole.parts.iter().filter_map(|p| Some((p, p.row(id)?))).collect();
        let replaced: f64 = parts.iter().filter(|(p, _)| p.replaces()).map(|(p, _)| weights[p.member]).sum();
        let mut sum: Vec<f64> = of_base.iter().map(|b| (1.0 - replaced) * b).collect();
        for (part, own) in parts {
            let scale = weights[part.member] * part.scaling;
            let values = part.values(set, own, view.columns)?;
            sum.iter_mut().zip(values).for_each(|(s, v)| *s += scale * f64::from(v));
        }
        out.extend(sum);
    }
    Ok(out)
}

/// Reads some rows of the base in f64; rows beyond the end of its table are zero.
pub(super) fn base_rows(
    base: Option<&Checkpoint>,
    tensor: &str,
    view: &View,
    rows: Range<usize>,
) -> Result<Vec<f64>, Error> {
    let mut out = vec![0.0; rows.len() * view.columns];
    let Some(base) = base else { return Ok(out) };
    let source = base_tensor(base, tensor);
    let Some(info) = base.info(&source) else { return Ok(out) };
    let (size, own) = (info.dtype.bitsize() / 8, info.shape.first().copied().unwrap_or(0));
    let mut bytes = vec![0; view.columns * size];
    for (row, out) in rows.zip(out.chunks_mut(view.columns.max(1))) {
        let row = view.of_base(row);
        if row >= own {
            continue;
        }
        base.read(&source, row * view.columns * size, &mut bytes)?;
        out.iter_mut().zip(to_f64(info.dtype, &bytes)).for_each(|(o, v)| *o = v);
        if let Some(i) = out.iter().position(|v| !v.is_finite()) {
            let (model, tensor, value) = (base.dir().display().to_string(), source, out[i] as f32);
            return Err(Error::NotFinite { model, tensor, index: row * view.columns + i, value });
        }
    }
    Ok(out)
}

/// Converts values of a floating-point dtype to f64.
pub(super) fn to_f64(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    if dtype == Dtype::F64 {
        return bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes"))).collect();
    }
    convert::to_f32(dtype, bytes).expect("checked to be floating").into_iter().map(f64::from).collect()
}

/// The difference of one member from the base, computed when it is read, so that no table is held twice.
pub(super) struct Difference<'d> {
    set: &'d Set<'d>,
    base: Option<&'d Checkpoint>,
    whole: Whole,
    view: &'d View,
    info: TensorInfo,
}

impl<'d> Difference<'d> {
    pub(super) fn new(
        set: &'d Set<'d>,
        base: Option<&'d Checkpoint>,
        whole: &Whole,
        view: &'d View,
        member: usize,
    ) -> Difference<'d> {
        let parts = whole.parts.iter().filter(|part| part.member == member).cloned().collect();
        let info = TensorInfo { dtype: Dtype::F32, shape: vec![view.rows(), view.columns] };
        Difference { set, base, whole: Whole { tensor: whole.tensor.clone(), parts }, view, info }
    }

    fn rows(&self, rows: Range<usize>) -> Result<Vec<f32>, Error> {
        if self.whole.parts.is_empty() {
            return Ok(vec![0.0; rows.len() * self.view.columns]);
        }
        let weights = vec![1.0; self.set.members.len()];
        let base = base_rows(self.base, &self.whole.tensor, self.view, rows.clone())?;
        let values = weighted(self.set, &self.whole, self.view, rows, &weights, &base)?;
        Ok(values.iter().zip(base).map(|(v, b)| (v - b) as f32).collect())
    }
}

impl TensorSource for Difference<'_> {
    fn names(&self) -> Vec<&str> {
        vec![""]
    }

    fn info(&self, _name: &str) -> Option<&TensorInfo> {
        Some(&self.info)
    }

    fn bytes(&self, name: &str) -> Result<&[u8], cl_checkpoint::Error> {
        let problem = Box::new(TensorProblem::Computed);
        Err(cl_checkpoint::Error::Tensor { path: "difference".into(), tensor: name.to_owned(), problem })
    }

    fn read(&self, _name: &str, offset: usize, out: &mut [u8]) -> Result<(), cl_checkpoint::Error> {
        let (start, columns) = (offset / 4, self.view.columns);
        let rows = start / columns..(start + out.len() / 4).div_ceil(columns);
        let first = rows.start * columns;
        let values = self.rows(rows).map_err(|error| match error {
            Error::Checkpoint(error) => error,
            other => cl_checkpoint::Error::Tensor {
                path: "adapter".into(),
                tensor: self.whole.tensor.clone(),
                problem: Box::new(TensorProblem::NotComputed { source: Box::new(other) }),
            },
        })?;
        for (bytes, value) in out.chunks_exact_mut(4).zip(&values[start - first..]) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }
}

impl Set<'_> {
    /// Matches the tensors that adapters train in addition to their factors with the base. With tied embeddings, a
    /// change that applies equally to embedding and head is kept once.
    pub(super) fn fit_wholes(&mut self, base: &Checkpoint, problems: &mut Vec<Problem>) {
        self.share_tied(base);
        for whole in &self.wholes {
            problems.extend(self.whole_problems(whole, base));
        }
        let rows = |tensor: &str| {
            let whole = self.wholes.iter().find(|w| w.tensor == tensor);
            let own = || base.info(&base_tensor(base, tensor)).map(|info| info.shape.clone());
            whole.map(|w| w.shape(self, Some(base))).or_else(own)?.first().copied()
        };
        let table = base.names().into_iter().find(|name| name.ends_with("embed_tokens.weight"));
        let grown = self.wholes.iter().any(|w| w.tensor == HEAD || Some(w.tensor.as_str()) == table);
        let rows = (table.and_then(rows), rows(HEAD));
        if let (Some(table), Some(head)) = rows
            && grown
            && !self.as_one
            && table != head
        {
            problems.push(Problem::whole(AdapterProblem::HeadRows { embedding: table, head }));
        }
    }

    fn whole_problems(&self, whole: &Whole, base: &Checkpoint) -> Vec<Problem> {
        let tensor = &whole.tensor;
        let who = || whole.parts.iter().map(|p| self.members[p.member].name.clone()).collect::<Vec<String>>();
        let of_tensor = |kind: AdapterProblem| Problem::new(Place::tensor(tensor), kind);
        let Some(info) = base.info(&base_tensor(base, tensor)) else {
            let kind = AdapterProblem::TensorNotInBase { tensor: tensor.clone(), base: base.dir().to_owned() };
            return vec![Problem::new(Place::Adapters(who()), kind)];
        };
        if !is_float(info.dtype) {
            return vec![of_tensor(AdapterProblem::BaseDtype { dtype: info.dtype })];
        }
        let mut problems: Vec<Problem> =
            whole.parts.iter().filter_map(|part| self.part_problem(whole, part, info)).collect();
        if let Some(module) = self.modules.iter().find(|m| m.tensor() == *tensor) {
            let other = &self.members[module.parts[0].member].name;
            problems.push(of_tensor(AdapterProblem::FactorsAndWhole { factors: other.clone(), whole: who() }));
        }
        let mut bases: Vec<String> =
            whole.parts.iter().filter_map(|p| self.members[p.member].adapter.base_hash()).collect();
        bases.sort();
        bases.dedup();
        if bases.len() > 1 && !whole.is_update() {
            problems.push(of_tensor(AdapterProblem::WholeOfOtherBases { adapters: who() }));
        }
        problems
    }

    fn part_problem(&self, whole: &Whole, part: &WholePart, info: &TensorInfo) -> Option<Problem> {
        let member = &self.members[part.member];
        let own = member.adapter.info(&part.name)?;
        let say = |kind: AdapterProblem| Some(Problem::new(Place::adapter(&member.name), kind));
        let tensor = part.name.clone();
        if !is_float(own.dtype) {
            return say(AdapterProblem::Dtype { tensor, dtype: own.dtype });
        }
        if let BesideKind::Rows(ids) = &part.kind {
            let fits = own.shape.get(1..) == info.shape.get(1..);
            let rows = info.shape.first().copied().unwrap_or(0);
            let outside = ids.iter().find(|id| **id >= rows);
            return match outside {
                Some(id) => say(AdapterProblem::TokenBeyond { tensor, token: *id, rows }),
                None if !fits => {
                    let (shape, of_base) = (own.shape.clone(), info.shape.clone());
                    say(AdapterProblem::RowShape { tensor, shape, of_base })
                }
                None => None,
            };
        }
        if own.shape == info.shape {
            return None;
        }
        let table = ["embed", "lm_head", "wte"].iter().any(|t| whole.tensor.contains(t)) && own.shape.len() == 2;
        if !(table && own.shape[1..] == info.shape[1..] && own.shape[0] > info.shape[0]) {
            let (shape, base_tensor, of_base) = (own.shape.clone(), whole.tensor.clone(), info.shape.clone());
            return say(AdapterProblem::WholeShape { tensor, shape, base_tensor, of_base });
        }
        if whole.parts.len() > 1 || member.weight != 1.0 {
            return say(AdapterProblem::AddedTokens { tensor, rows: own.shape[0], base_rows: info.shape[0] });
        }
        None
    }

    /// Handles tied embeddings of the base: trained token rows change both embedding and head, unless the adapter has
    /// separate rows for the head. If all changes apply equally to both, they stay tied.
    fn share_tied(&mut self, base: &Checkpoint) {
        let Some(table) = tied_table(base) else { return };
        let of = |wholes: &[Whole], tensor: &str| -> Vec<WholePart> {
            wholes.iter().find(|w| w.tensor == tensor).map_or(Vec::new(), |w| w.parts.clone())
        };
        let (of_table, mut of_head) = (of(&self.wholes, &table), of(&self.wholes, HEAD));
        let own: Vec<usize> = of_head.iter().map(|part| part.member).collect();
        for part in of_table.iter().filter(|part| !own.contains(&part.member)) {
            if matches!(part.kind, BesideKind::Rows(_)) || self.members[part.member].adapter.config().ties_weights() {
                of_head.push(part.clone());
            }
        }
        of_head.sort_by_key(|part| part.member);
        let adapted = self.modules.iter().any(|m| m.tensor() == table || m.tensor() == HEAD);
        let same = of_table.len() == of_head.len()
            && of_table.iter().zip(&of_head).all(|(a, b)| a.member == b.member && self.equal(a, b));
        self.wholes.retain(|w| w.tensor != HEAD);
        self.as_one = !of_table.is_empty() && same && !adapted;
        if !self.as_one && !of_head.is_empty() {
            self.wholes.push(Whole { tensor: HEAD.to_owned(), parts: of_head });
            self.wholes.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        }
    }

    /// Whether two parts of a member have the same content.
    fn equal(&self, a: &WholePart, b: &WholePart) -> bool {
        let adapter = &self.members[a.member].adapter;
        let shape = |part: &WholePart| adapter.info(&part.name).map(|info| (info.dtype, info.shape.clone()));
        let bytes = |part: &WholePart| adapter.bytes(&part.name).ok();
        a.kind == b.kind && (a.name == b.name || shape(a) == shape(b) && bytes(a) == bytes(b))
    }
}
