//! Data parallelism: gradients are all-reduced over the ranks while the backward pass is running.
//!
//! A backward pass completes the gradients of the last layer first. In the last backward pass of a step, the all-reduce
//! of a layer's gradients is started as soon as they are complete, and it runs while libtorch's threads differentiate
//! the layers before it.

use std::collections::VecDeque;
use std::sync::Mutex;

use cl_model::LayerHooks;
use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_torch::{Pending, ProcessGroup, TorchError, set_gradient};

use crate::sharding::{locked, unit_of};
use crate::{Ranks, TrainError};

/// All-reduce buckets per step if gradients are small: with fewer, the last layers' gradients (the first to be complete)
/// would wait for those of many other layers.
const BUCKETS: usize = 16;
/// Bounds of the minimum size in bytes of a bucket. A smaller message takes mostly latency, a larger one more memory.
const BUCKET_BYTES: (usize, usize) = (16 << 10, 8 << 20);
/// No further bucket is sent while this many bytes are in flight; each bucket is a copy of gradients.
const BYTES_IN_FLIGHT: usize = 16 << 20;

/// Sums the gradients of the trained tensors over all ranks. A tensor gets a gradient if it has one in any rank.
pub(crate) struct GradientSums {
    ranks: Ranks,
    /// The trained tensors in the order in which their gradients are reduced: layer by layer from the last one, then
    /// those outside the layers. The order is the same in all ranks.
    units: Mutex<Vec<Vec<Tensor>>>,
    layers: usize,
    /// Minimum size in bytes of a bucket.
    bucket_bytes: usize,
    step: Mutex<Step>,
}

/// State of the reductions within one step.
#[derive(Default)]
struct Step {
    /// Whether the running backward pass completes the gradients of the step.
    is_last_pass: bool,
    /// Number of units whose reduction was started.
    started: usize,
    /// Tensors of started units that are not yet in a bucket.
    collected: Vec<Tensor>,
    on_their_way: VecDeque<Bucket>,
    /// The first error of a hook, since hooks cannot return errors.
    failure: Option<TorchError>,
}

/// A bucket of gradients in flight.
struct Bucket {
    tensors: Vec<Tensor>,
    /// All gradients flattened, with zeros for missing ones, followed by 1 for each tensor that has a gradient and 0
    /// for others.
    flat: Tensor,
    pending: Pending,
}

impl GradientSums {
    /// Returns `None` if there is only this process.
    pub(crate) fn new(ranks: &Ranks, trainable: &[(String, Tensor)], layers: usize) -> Option<GradientSums> {
        ranks.group()?;
        let mut units: Vec<Vec<Tensor>> = (0..=layers).map(|_| Vec::new()).collect();
        for (name, tensor) in trainable {
            units[layers - unit_of(name).min(layers)].push(tensor.shallow_clone());
        }
        let total: usize = trainable.iter().map(|(_, tensor)| bytes(tensor)).sum();
        let bucket_bytes = (total / BUCKETS).clamp(BUCKET_BYTES.0, BUCKET_BYTES.1);
        Some(GradientSums {
            ranks: ranks.clone(),
            units: Mutex::new(units),
            layers,
            bucket_bytes,
            step: Mutex::default(),
        })
    }

    /// Announces that the next backward pass is this rank's last of the step.
    pub(crate) fn begin_last_pass(&self) {
        locked(&self.step).is_last_pass = true;
    }

    /// Ends a step: reduces the remaining gradients and waits for all of them.
    pub(crate) fn finish(&self) -> Result<(), TrainError> {
        let _no_graph = tch::no_grad_guard();
        let (units, mut step) = (locked(&self.units), std::mem::take(&mut *locked(&self.step)));
        self.ranks.together(|group| {
            step.failure.take().map_or(Ok(()), Err)?;
            step.start(&units, units.len(), self.bucket_bytes, group)?;
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
        step.failure = step.start(&locked(&self.units), self.layers - layer, self.bucket_bytes, group).err();
    }
}

impl Step {
    /// Starts the reduction of the first `complete` units.
    fn start(
        &mut self,
        units: &[Vec<Tensor>],
        complete: usize,
        bucket_bytes: usize,
        group: &ProcessGroup,
    ) -> Result<(), TorchError> {
        while self.started < complete {
            for tensor in &units[self.started] {
                // The end of a bucket depends only on shapes and dtypes, not on when a unit is started.
                if self.collected.last().is_some_and(|last| last.kind() != tensor.kind()) {
                    self.send_collected(group)?;
                }
                self.collected.push(tensor.shallow_clone());
                if self.collected.iter().map(bytes).sum::<usize>() >= bucket_bytes {
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
        while self.on_their_way.iter().map(|bucket| bytes(&bucket.flat)).sum::<usize>() >= BYTES_IN_FLIGHT {
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
    /// Waits for the sums and writes them to the gradients.
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

/// The flattened gradient of a tensor in host memory, or zeros if it has none.
fn flat_gradient(tensor: &Tensor) -> Tensor {
    match tensor.grad() {
        gradient if gradient.defined() => gradient.reshape([-1]).to_device(Device::Cpu),
        _ => Tensor::zeros([tensor.numel() as i64], (tensor.kind(), Device::Cpu)),
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}
