//! Data parallelism: the ranks' gradients are added up while the backward pass goes on.
//!
//! A backward pass completes the gradients of the last layer first. In the last one of a step, the sums of a layer's gradients are
//! started as soon as they are complete, and computed by libtorch's threads while the layers before it are differentiated.

use std::collections::VecDeque;
use std::sync::Mutex;

use cl_model::LayerHooks;
use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_torch::{Pending, ProcessGroup, TorchError, set_gradient};

use crate::sharding::{locked, unit_of};
use crate::{Ranks, TrainError};

/// Gradients are sent in pieces of at least this many bytes, so that small ones share a message.
const BUCKET_BYTES: usize = 8 << 20;
/// Pieces on their way at a time, each a copy of gradients.
const AT_A_TIME: usize = 2;

/// Adds up the gradients of trained tensors over all ranks. A tensor gets a gradient if it has one in any rank.
pub(crate) struct GradientSums {
    ranks: Ranks,
    /// The trained tensors in the order in which their gradients are added up: layer by layer from the last one, then those outside
    /// of the layers. It is the same in all ranks.
    units: Mutex<Vec<Vec<Tensor>>>,
    layers: usize,
    step: Mutex<Step>,
}

/// What was done of a step.
#[derive(Default)]
struct Step {
    /// Whether gradients are complete after the backward pass that runs.
    is_last_pass: bool,
    /// Number of units that were started.
    started: usize,
    /// Tensors of started units that are not on their way.
    collected: Vec<Tensor>,
    on_their_way: VecDeque<Bucket>,
    /// The first error of a hook, which cannot return it.
    failure: Option<TorchError>,
}

/// Gradients on their way.
struct Bucket {
    tensors: Vec<Tensor>,
    /// All gradients, or zeros where there is none, and for each tensor 1 if it has one.
    flat: Tensor,
    pending: Pending,
}

impl GradientSums {
    /// `None` if this process trains alone.
    pub(crate) fn new(ranks: &Ranks, trainable: &[(String, Tensor)], layers: usize) -> Option<GradientSums> {
        ranks.group()?;
        let mut units: Vec<Vec<Tensor>> = (0..=layers).map(|_| Vec::new()).collect();
        for (name, tensor) in trainable {
            units[layers - unit_of(name).min(layers)].push(tensor.shallow_clone());
        }
        Some(GradientSums { ranks: ranks.clone(), units: Mutex::new(units), layers, step: Mutex::default() })
    }

    /// Before a backward pass: it is this rank's last of the step.
    pub(crate) fn begin_last_pass(&self) {
        locked(&self.step).is_last_pass = true;
    }

    /// At the end of a step: adds up the gradients that are not yet, and waits for all.
    pub(crate) fn finish(&self) -> Result<(), TrainError> {
        let _no_graph = tch::no_grad_guard();
        let (units, mut step) = (locked(&self.units), std::mem::take(&mut *locked(&self.step)));
        self.ranks.together(|group| {
            step.failure.take().map_or(Ok(()), Err)?;
            step.start(&units, units.len(), group)?;
            step.send_collected(group)?;
            step.on_their_way.drain(..).try_for_each(Bucket::arrive)
        })
    }
}

impl LayerHooks for GradientSums {
    fn spreads_weights(&self) -> bool {
        false
    }

    fn before(&self, _layer: usize) {}

    fn after_forward(&self, _layer: usize) {}

    fn after_backward(&self, layer: usize) {
        let _no_graph = tch::no_grad_guard();
        let mut step = locked(&self.step);
        let Some(group) = self.ranks.group().filter(|_| step.is_last_pass && step.failure.is_none()) else { return };
        step.failure = step.start(&locked(&self.units), self.layers - layer, group).err();
    }
}

impl Step {
    /// Starts the first `complete` units.
    fn start(&mut self, units: &[Vec<Tensor>], complete: usize, group: &ProcessGroup) -> Result<(), TorchError> {
        while self.started < complete {
            for tensor in &units[self.started] {
                // Where a bucket ends depends on shapes and dtypes only, and not on when a unit is started.
                if self.collected.last().is_some_and(|last| last.kind() != tensor.kind()) {
                    self.send_collected(group)?;
                }
                self.collected.push(tensor.shallow_clone());
                if self.collected.iter().map(bytes).sum::<usize>() >= BUCKET_BYTES {
                    self.send_collected(group)?;
                }
            }
            self.started += 1;
        }
        Ok(())
    }

    fn send_collected(&mut self, group: &ProcessGroup) -> Result<(), TorchError> {
        let tensors = std::mem::take(&mut self.collected);
        let Some(kind) = tensors.first().map(Tensor::kind) else { return Ok(()) };
        while self.on_their_way.len() >= AT_A_TIME {
            self.on_their_way.pop_front().map_or(Ok(()), Bucket::arrive)?;
        }
        let present: Vec<f32> = tensors.iter().map(|t| f32::from(u8::from(t.grad().defined()))).collect();
        let mut parts: Vec<Tensor> = tensors.iter().map(flat_gradient).collect();
        parts.push(Tensor::from_slice(&present).to_kind(kind));
        let flat = Tensor::cat(&parts, 0);
        let pending = group.all_reduce(&flat)?;
        self.on_their_way.push_back(Bucket { tensors, flat, pending });
        Ok(())
    }
}

impl Bucket {
    /// Waits for the sums, and puts them into the gradients.
    fn arrive(self) -> Result<(), TorchError> {
        self.pending.wait()?;
        let elements: i64 = self.tensors.iter().map(|t| t.numel() as i64).sum();
        let present = self.flat.narrow(0, elements, self.tensors.len() as i64).to_kind(Kind::Float);
        let present = Vec::<f32>::try_from(&present).map_err(|e| TorchError::from_tch("all_reduce", e))?;
        let mut start = 0;
        for (tensor, present) in self.tensors.iter().zip(present) {
            let sum = self.flat.narrow(0, start, tensor.numel() as i64).view_as(tensor);
            start += tensor.numel() as i64;
            if tensor.grad().defined() {
                tensor.grad().copy_(&sum);
            } else if present > 0.0 {
                set_gradient(tensor, Some(&sum.to_device(tensor.device()).copy()))?;
            }
        }
        Ok(())
    }
}

/// A tensor's gradient in host memory, or zeros.
fn flat_gradient(tensor: &Tensor) -> Tensor {
    match tensor.grad() {
        gradient if gradient.defined() => gradient.reshape([-1]).to_device(Device::Cpu),
        _ => Tensor::zeros([tensor.numel() as i64], (tensor.kind(), Device::Cpu)),
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}
