//! ZeRO: training state sharded over the ranks (Rajbhandari et al., arXiv:1910.02054).
//!
//! A tensor is divided into as many consecutive shards as there are ranks; the last one is padded with zeros. With
//! stage 1, each rank has the optimizer state of its shard. With stage 2, each rank also has only the gradients of its
//! shard, which are reduce-scattered layer by layer during the backward pass. With stage 3, the base model's weights
//! are sharded as well, and all-gathered only while a layer is computed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cl_model::{Decoder, LayerHooks};
use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_torch::{Pending, ProcessGroup, TorchError, set_gradient};

use crate::{Ranks, TrainError};

/// A tensor of the model of which this rank keeps a shard.
struct Piece {
    /// The model's own handle to the tensor.
    tensor: Tensor,
    shape: Vec<i64>,
    /// This rank's shard, flattened; it has the same length in every rank.
    own: Tensor,
}

/// Returns a copy of this rank's shard of a tensor.
fn part(tensor: &Tensor, group: &ProcessGroup) -> Tensor {
    let flat = tensor.detach().reshape([-1]);
    let (all, ranks) = (flat.numel() as i64, group.world_size() as i64);
    let length = (all + ranks - 1) / ranks;
    let start = (length * group.rank() as i64).min(all);
    let own = flat.narrow(0, start, length.min(all - start));
    let missing = length - own.numel() as i64;
    if missing == 0 {
        own.copy()
    } else {
        Tensor::cat(&[own, Tensor::zeros([missing], (flat.kind(), flat.device()))], 0)
    }
}

/// All-gathers the full tensors whose shards the ranks have; `parts` are this rank's shards with the full shapes, all
/// of one dtype.
fn whole(parts: &[(&Tensor, &[i64])], group: &ProcessGroup) -> Result<Vec<Tensor>, TorchError> {
    let Some((first, _)) = parts.first() else { return Ok(Vec::new()) };
    let (kind, device, ranks) = (first.kind(), first.device(), group.world_size() as i64);
    let own = joined(parts.iter().map(|(part, _)| part.to_device(Device::Cpu)).collect(), 0);
    let all = Tensor::empty([ranks * own.numel() as i64], (kind, Device::Cpu));
    group.all_gather(&all, &own)?.wait()?;
    let all = all.view([ranks, -1]);
    let mut start = 0;
    let cut = |(part, shape): &(&Tensor, &[i64])| {
        let length = part.numel() as i64;
        // For a single tensor, this is a view, because the shards are consecutive.
        let flat = all.narrow(1, start, length).reshape([-1]).narrow(0, 0, shape.iter().product());
        start += length;
        flat.reshape(*shape).to_device(device)
    };
    Ok(parts.iter().map(cut).collect())
}

/// Concatenates tensors along a dimension; a single one is not copied.
fn joined(mut tensors: Vec<Tensor>, dim: i64) -> Tensor {
    if tensors.len() == 1 { tensors.remove(0) } else { Tensor::cat(&tensors, dim) }
}

/// Shards of at least this many bytes are sent alone, without a copy; smaller ones are sent together, in fewer
/// messages.
const ALONE: usize = 1 << 20;

/// Sorts items so that those that are sent together are adjacent.
fn sort<T>(items: &mut [T], own: impl Fn(&T) -> &Tensor) {
    items.sort_by_key(|item| (is_alone(own(item)), own(item).kind() as i32));
}

/// Whether two adjacent shards are sent together.
fn together(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == b.kind() && !is_alone(a) && !is_alone(b)
}

fn is_alone(own: &Tensor) -> bool {
    own.numel() * own.kind().elt_size_in_bytes() >= ALONE
}

/// Placeholder for a tensor whose values are not on this rank: all NaN, expanded from a single element.
fn absent(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    Tensor::full([1], f64::NAN, (kind, device)).expand(shape, false)
}

/// Weights of a base model of which each rank keeps a shard (ZeRO stage 3).
///
/// Pass [`SpreadWeights::place`] to [`Decoder::load_with`], and the weights to [`train`](crate::train()).
pub struct SpreadWeights {
    ranks: Ranks,
    pieces: Mutex<BTreeMap<String, Piece>>,
}

impl SpreadWeights {
    /// Creates an empty set of weights.
    pub fn new(ranks: &Ranks) -> SpreadWeights {
        SpreadWeights { ranks: ranks.clone(), pieces: Mutex::default() }
    }

    /// Keeps this rank's shard of a weight, and returns a tensor of the weight's shape without its values.
    pub fn place(&self, name: &str, tensor: Tensor) -> Tensor {
        let _no_graph = tch::no_grad_guard();
        let Some(group) = self.ranks.group().filter(|_| tensor.is_floating_point()) else { return tensor };
        let shape = tensor.size();
        let placed = absent(&shape, tensor.kind(), tensor.device());
        let piece = Piece { own: part(&tensor, group), tensor: placed.shallow_clone(), shape };
        locked(&self.pieces).insert(name.to_owned(), piece);
        placed
    }
}

/// The tensors of a layer, or those outside the layers.
#[derive(Default)]
struct Unit {
    /// Sharded weights that are gathered only while the layer is computed.
    spread: Vec<Piece>,
    trained: Vec<Trained>,
    /// Whether the reduction of the gradients was started.
    reduced: bool,
    /// Reductions that were started and are not complete.
    on_their_way: Vec<Sums>,
}

/// A reduce-scatter of gradients in progress.
struct Sums {
    /// Indices of the tensors among the trained tensors of the unit.
    places: Vec<usize>,
    /// The buffer that is being sent, kept until the operation is complete.
    _all: Tensor,
    /// This rank's shards of the sums one after another, then for each tensor the number of ranks that have a gradient.
    own: Tensor,
    pending: Pending,
}

/// A trained tensor.
struct Trained {
    /// Index in the optimizer's lists.
    index: usize,
    tensor: Tensor,
    shape: Vec<i64>,
    own: Tensor,
    /// Whether every rank also keeps the full tensor.
    resident: bool,
    gradient: Option<Tensor>,
}

/// Sharded training state, by layer. The first unit contains what is outside the layers.
pub(crate) struct Sharding {
    ranks: Ranks,
    stage: u8,
    units: Vec<Mutex<Unit>>,
    /// Whether a layer's gradients are reduced after its backward pass.
    reduces: AtomicBool,
    /// The first error of a hook, since hooks cannot return errors.
    failure: Mutex<Option<TorchError>>,
}

impl Sharding {
    /// Shards the trained tensors, and takes over the weights that are already sharded.
    pub(crate) fn new(
        stage: u8,
        ranks: &Ranks,
        trainable: &[(String, Tensor)],
        spread: Option<SpreadWeights>,
        model: &Decoder,
    ) -> Option<Sharding> {
        let _no_graph = tch::no_grad_guard();
        let group = ranks.group().filter(|_| stage > 0)?;
        let layers = model.config.num_hidden_layers;
        let mut units: Vec<Unit> = (0..=layers).map(|_| Unit::default()).collect();
        let mut pieces =
            spread.map(|s| s.pieces.into_inner().unwrap_or_else(PoisonError::into_inner)).unwrap_or_default();
        for (index, (name, tensor)) in trainable.iter().enumerate() {
            let (tensor, shape) = (tensor.shallow_clone(), tensor.size());
            let divided = pieces.get(name).map(|piece| piece.own.shallow_clone());
            let resident = divided.is_none();
            let own = divided.unwrap_or_else(|| part(&tensor, group));
            units[unit_of(name).min(layers)].trained.push(Trained {
                index,
                tensor,
                shape,
                own,
                resident,
                gradient: None,
            });
        }
        while let Some((name, piece)) = pieces.pop_first() {
            units[unit_of(&name).min(layers)].spread.push(piece);
        }
        let units = units.into_iter().map(Mutex::new).collect();
        let reduces = AtomicBool::new(stage >= 2);
        Some(Sharding { ranks: ranks.clone(), stage, units, reduces, failure: Mutex::new(None) })
    }

    /// Whether ranks communicate within every micro-batch, so that all of them need the same number of micro-batches.
    pub(crate) fn in_lockstep(&self) -> bool {
        self.stage >= 2
    }

    /// This rank's shards of the trained tensors, in the optimizer's order.
    pub(crate) fn parts(&self) -> Vec<Tensor> {
        let mut parts: Vec<(usize, Tensor)> = Vec::new();
        for unit in &self.units {
            parts.extend(locked(unit).trained.iter().map(|t| (t.index, t.own.shallow_clone())));
        }
        parts.sort_by_key(|(index, _)| *index);
        parts.into_iter().map(|(_, part)| part).collect()
    }

    /// Gradients of this rank's shards, in the optimizer's order; `None` for a tensor that has no gradient in any rank.
    pub(crate) fn gradients(&self, count: usize) -> Vec<Option<Tensor>> {
        let mut gradients: Vec<Option<Tensor>> = (0..count).map(|_| None).collect();
        for unit in &self.units {
            for trained in &locked(unit).trained {
                gradients[trained.index] = trained.gradient.as_ref().map(Tensor::shallow_clone);
            }
        }
        gradients
    }

    /// Clears the gradients of a step.
    pub(crate) fn zero_grad(&self) {
        for unit in &self.units {
            locked(unit).trained.iter_mut().for_each(|t| t.gradient = None);
        }
    }

    /// Prepares a forward pass by gathering the weights outside the layers. `is_last` announces this rank's last pass
    /// of the step.
    pub(crate) fn begin_pass(&self, is_last: bool) -> Result<(), TrainError> {
        self.reduces.store(self.stage >= 2 || is_last, Ordering::Relaxed);
        self.hook(0, Sharding::gather);
        self.check()
    }

    /// Completes a backward pass.
    pub(crate) fn end_pass(&self) -> Result<(), TrainError> {
        if self.stage >= 2 {
            self.reduce_all()?;
        }
        self.end_forward()
    }

    /// Completes a forward pass that has no backward pass.
    pub(crate) fn end_forward(&self) -> Result<(), TrainError> {
        self.units.iter().for_each(|unit| release(&mut locked(unit)));
        self.check()
    }

    /// Completes all passes of a step: reduces the remaining gradients.
    pub(crate) fn end_passes(&self) -> Result<(), TrainError> {
        if self.stage == 1 { self.reduce_all() } else { Ok(()) }
    }

    /// Reduces the gradients of a penalty, which only rank 0 has.
    pub(crate) fn add_penalty(&self) -> Result<(), TrainError> {
        self.reduce_all()
    }

    /// Reduces the gradients of all units whose reduction has not been started, and waits for all reductions.
    fn reduce_all(&self) -> Result<(), TrainError> {
        // In the order of a backward pass, because all ranks must start the reductions in the same order.
        for unit in (1..self.units.len()).rev().chain([0]) {
            self.hook(unit, Sharding::reduce);
        }
        for unit in 0..self.units.len() {
            self.hook(unit, Sharding::arrive);
            locked(&self.units[unit]).reduced = false;
        }
        self.check()
    }

    /// Distributes the updated shards: every rank gets the full values of the tensors that it keeps in full.
    pub(crate) fn share_updates(&self) -> Result<(), TrainError> {
        let _no_graph = tch::no_grad_guard();
        for unit in &self.units {
            let unit = locked(unit);
            let mut resident: Vec<&Trained> = unit.trained.iter().filter(|t| t.resident).collect();
            sort(&mut resident, |t| &t.own);
            for same in resident.chunk_by(|a, b| together(&a.own, &b.own)) {
                let parts: Vec<(&Tensor, &[i64])> = same.iter().map(|t| (&t.own, t.shape.as_slice())).collect();
                self.ranks.together(|group| {
                    for (trained, whole) in same.iter().zip(whole(&parts, group)?) {
                        trained.tensor.detach().copy_(&whole);
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// All-gathers full tensors from this rank's shards, given with their full shapes and all of one dtype.
    pub(crate) fn whole(&self, parts: &[(&Tensor, &[i64])]) -> Result<Vec<Tensor>, TrainError> {
        let _no_graph = tch::no_grad_guard();
        let mut all = Vec::new();
        self.ranks.together(|group| {
            all = whole(parts, group)?;
            Ok(())
        })?;
        Ok(all)
    }

    /// Returns this rank's shard of a tensor.
    pub(crate) fn part(&self, tensor: &Tensor) -> Tensor {
        let _no_graph = tch::no_grad_guard();
        self.ranks.group().map_or_else(|| tensor.shallow_clone(), |group| part(tensor, group))
    }

    /// Gathers the trained weights in full on rank 0, at the end of training. Frozen weights remain sharded, because an
    /// adapter is saved without them.
    pub(crate) fn collect(&self) -> Result<(), TrainError> {
        let _no_graph = tch::no_grad_guard();
        for index in 0..self.units.len() {
            if locked(&self.units[index]).trained.iter().all(|trained| trained.resident) {
                continue;
            }
            self.hook(index, Sharding::gather);
            self.check()?;
            if !self.ranks.is_first() {
                release(&mut locked(&self.units[index]));
            }
        }
        self.share_updates()
    }

    /// Runs `body` for a unit, unless an earlier call failed.
    fn hook(&self, index: usize, body: fn(&Sharding, &mut Unit, &ProcessGroup) -> Result<(), TorchError>) {
        let _no_graph = tch::no_grad_guard();
        let Some(group) = self.ranks.group().filter(|_| locked(&self.failure).is_none()) else { return };
        if let Err(error) = body(self, &mut locked(&self.units[index]), group) {
            *locked(&self.failure) = Some(error);
        }
    }

    fn check(&self) -> Result<(), TrainError> {
        match locked(&self.failure).take() {
            None => Ok(()),
            Some(source) => self.ranks.together(|_| Err(source)),
        }
    }

    fn gather(&self, unit: &mut Unit, group: &ProcessGroup) -> Result<(), TorchError> {
        let mut pieces: Vec<&mut Piece> = unit.spread.iter_mut().collect();
        sort(&mut pieces, |piece| &piece.own);
        for same in pieces.chunk_by_mut(|a, b| together(&a.own, &b.own)) {
            let parts: Vec<(&Tensor, &[i64])> = same.iter().map(|p| (&p.own, p.shape.as_slice())).collect();
            let all = whole(&parts, group)?;
            same.iter_mut().zip(&all).for_each(|(piece, whole)| piece.tensor.set_data(whole));
        }
        Ok(())
    }

    /// Starts the reduce-scatter of a unit's gradients.
    fn reduce(&self, unit: &mut Unit, group: &ProcessGroup) -> Result<(), TorchError> {
        if std::mem::replace(&mut unit.reduced, true) || unit.trained.is_empty() {
            return Ok(());
        }
        let mut trained: Vec<(usize, &Trained)> = unit.trained.iter().enumerate().collect();
        sort(&mut trained, |(_, t)| &t.own);
        let ranks = group.world_size() as i64;
        for same in trained.chunk_by(|(_, a), (_, b)| together(&a.own, &b.own)) {
            let mut rows: Vec<Tensor> = same.iter().map(|(_, t)| rows_of_gradient(t, ranks)).collect();
            let present: Vec<f32> = same.iter().map(|(_, t)| f32::from(u8::from(t.tensor.grad().defined()))).collect();
            rows.push(Tensor::from_slice(&present).to_kind(rows[0].kind()).expand([ranks, same.len() as i64], false));
            let all = Tensor::cat(&rows, 1).reshape([-1]);
            let own = Tensor::empty([all.numel() as i64 / ranks], (all.kind(), Device::Cpu));
            let pending = group.reduce_scatter(&own, &all)?;
            same.iter().try_for_each(|(_, t)| set_gradient(&t.tensor, None))?;
            let places = same.iter().map(|(place, _)| *place).collect();
            unit.on_their_way.push(Sums { places, _all: all, own, pending });
        }
        Ok(())
    }

    /// Waits for the sums of a unit's gradients, and adds this rank's shards to those of earlier passes.
    fn arrive(&self, unit: &mut Unit, _group: &ProcessGroup) -> Result<(), TorchError> {
        for Sums { places, _all, own, pending } in unit.on_their_way.drain(..) {
            pending.wait()?;
            let mut start = 0;
            let counts = own.narrow(0, own.numel() as i64 - places.len() as i64, places.len() as i64);
            let counts = Vec::<f32>::try_from(counts.to_kind(Kind::Float));
            let counts = counts.map_err(|e| TorchError::from_tch("reduce_scatter", e))?;
            for (place, count) in places.into_iter().zip(counts) {
                let trained = &mut unit.trained[place];
                let length = trained.own.numel() as i64;
                let part = own.narrow(0, start, length).to_device(trained.own.device());
                start += length;
                if count > 0.0 {
                    trained.gradient = Some(match trained.gradient.take() {
                        Some(mut before) => before.g_add_(&part),
                        None => part.copy(),
                    });
                }
            }
        }
        Ok(())
    }
}

impl LayerHooks for Sharding {
    fn spreads_weights(&self) -> bool {
        self.units.iter().any(|unit| !locked(unit).spread.is_empty())
    }

    fn before(&self, layer: usize) {
        self.hook(layer + 1, Sharding::gather);
    }

    fn after_forward(&self, layer: usize) {
        release(&mut locked(&self.units[layer + 1]));
    }

    fn after_backward(&self, layer: usize) {
        if self.reduces.load(Ordering::Relaxed) {
            self.hook(layer + 1, Sharding::reduce);
            // The gradients of the following layer were reduced during the backward pass of this one.
            if layer + 2 < self.units.len() {
                self.hook(layer + 2, Sharding::arrive);
            }
        }
        release(&mut locked(&self.units[layer + 1]));
    }
}

/// Arranges the gradient of a full tensor as one row per rank's shard.
fn rows_of_gradient(trained: &Trained, ranks: i64) -> Tensor {
    let (length, (kind, device)) = (trained.own.numel() as i64, (trained.own.kind(), Device::Cpu));
    let gradient = trained.tensor.grad();
    if !gradient.defined() {
        return Tensor::zeros([ranks, length], (kind, device));
    }
    let flat = gradient.reshape([-1]).to_device(device);
    let missing = ranks * length - flat.numel() as i64;
    let filled = if missing == 0 { flat } else { Tensor::cat(&[flat, Tensor::zeros([missing], (kind, device))], 0) };
    filled.view([ranks, length])
}

fn release(unit: &mut Unit) {
    let _no_graph = tch::no_grad_guard();
    for piece in &mut unit.spread {
        let absent = absent(&piece.shape, piece.own.kind(), piece.own.device());
        piece.tensor.set_data(&absent);
    }
}

/// Index of the unit that a tensor belongs to, by its name: 1 + the number of its layer, or 0.
pub(crate) fn unit_of(name: &str) -> usize {
    let number = name.split_once("layers.").and_then(|(_, rest)| rest.split('.').next()?.parse::<usize>().ok());
    number.map_or(0, |layer| layer + 1)
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
