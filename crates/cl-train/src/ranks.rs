//! The processes that train a round together.

use std::sync::Arc;
use std::time::Duration;

use cl_torch::tch::{self, Device, Kind, Tensor};
use cl_torch::{ProcessGroup, Rendezvous, TorchError};

use crate::TrainError;

/// The processes ("ranks") that train one round together, as seen by one of them.
///
/// The micro-batches of a step are assigned to the ranks in turn, and their gradients are summed. Results do not depend
/// on the number of ranks, apart from the order of sums. Rank 0 writes all files.
#[derive(Clone)]
pub struct Ranks {
    group: Option<Arc<ProcessGroup>>,
}

impl Ranks {
    /// Creates the ranks of a run with this process only.
    pub fn alone() -> Ranks {
        Ranks { group: None }
    }

    /// Joins the ranks that a launcher started; without a launcher, this process is the only rank (see
    /// [`Rendezvous::from_env`]). `timeout` limits the waiting for another rank, here and in later operations.
    ///
    /// # Errors
    /// Returns an error if a launcher's variable is invalid, or if a rank does not join in time.
    pub fn join(timeout: Duration) -> Result<Ranks, TrainError> {
        match Rendezvous::from_env()? {
            None => Ok(Ranks::alone()),
            Some(meeting) => {
                let (rank, world_size) = (meeting.rank, meeting.world_size);
                let group = ProcessGroup::join(&meeting, timeout);
                let group = group.map_err(|source| TrainError::Join {
                    rank,
                    world_size,
                    place: format!("{}:{}", meeting.address, meeting.port),
                    source: Box::new(source),
                })?;
                tracing::debug!(rank, world_size, "joined");
                Ok(Ranks::of(group))
            }
        }
    }

    /// Creates the ranks of a process group.
    pub fn of(group: ProcessGroup) -> Ranks {
        Ranks { group: Some(Arc::new(group)) }
    }

    /// The process group, if there are other ranks.
    pub(crate) fn group(&self) -> Option<&ProcessGroup> {
        self.group.as_deref()
    }

    /// Rank of this process, from 0.
    pub fn rank(&self) -> usize {
        self.group().map_or(0, ProcessGroup::rank)
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.group().map_or(1, ProcessGroup::world_size)
    }

    /// Whether this is rank 0, which writes the files.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Waits until every rank has reached this barrier.
    ///
    /// # Errors
    /// Returns [`TrainError::RankLost`] if a rank does not reach it.
    pub fn barrier(&self) -> Result<(), TrainError> {
        self.together(|group| group.barrier())
    }

    /// Sums each number over all ranks.
    pub(crate) fn sum(&self, values: &mut [f64]) -> Result<(), TrainError> {
        self.together(|group| {
            let sums = Tensor::from_slice(values);
            group.all_reduce(&sums)?.wait()?;
            sums.copy_data(values, values.len());
            Ok(())
        })
    }

    /// Returns whether `flag` is set in any rank.
    ///
    /// # Errors
    /// Returns [`TrainError::RankLost`] if a rank is lost.
    pub fn any(&self, flag: bool) -> Result<bool, TrainError> {
        let mut set = [f64::from(u8::from(flag))];
        self.sum(&mut set)?;
        Ok(set[0] > 0.0)
    }

    /// Replaces tensors by those of rank 0, in one message. They must be contiguous, in host memory and of one dtype.
    pub(crate) fn copy_from_first(&self, tensors: &[Tensor]) -> Result<(), TrainError> {
        let _no_graph = tch::no_grad_guard();
        self.together(|group| {
            if let [single] = tensors {
                return group.broadcast(&single.detach(), 0)?.wait();
            }
            let flat: Vec<Tensor> = tensors.iter().map(|t| t.reshape([-1])).collect();
            let all = Tensor::cat(&flat, 0);
            group.broadcast(&all, 0)?.wait()?;
            let mut start = 0;
            for tensor in tensors {
                let length = tensor.numel() as i64;
                tensor.detach().copy_(&all.narrow(0, start, length).reshape(tensor.size()));
                start += length;
            }
            Ok(())
        })
    }

    /// Broadcasts the text of rank 0; the text of other ranks is ignored.
    ///
    /// # Errors
    /// Returns [`TrainError::RankLost`] if a rank is lost.
    pub fn text_from_first(&self, text: &str) -> Result<String, TrainError> {
        let mut received = text.to_owned();
        self.together(|group| {
            let length = Tensor::from_slice(&[text.len() as i64]);
            group.broadcast(&length, 0)?.wait()?;
            let bytes = if self.is_first() {
                Tensor::from_slice(text.as_bytes())
            } else {
                Tensor::zeros([length.int64_value(&[0])], (Kind::Uint8, Device::Cpu))
            };
            group.broadcast(&bytes, 0)?.wait()?;
            let bytes = Vec::<u8>::try_from(&bytes).map_err(|e| TorchError::from_tch("broadcast", e))?;
            received = String::from_utf8_lossy(&bytes).into_owned();
            Ok(())
        })?;
        Ok(received)
    }

    /// Gathers the texts of all ranks, in the order of ranks.
    ///
    /// # Errors
    /// Returns [`TrainError::RankLost`] if a rank is lost.
    pub fn texts_of_all(&self, text: &str) -> Result<Vec<String>, TrainError> {
        let mut texts = vec![text.to_owned()];
        self.together(|group| {
            let ranks = group.world_size() as i64;
            let lengths = Tensor::zeros([ranks], (Kind::Int64, Device::Cpu));
            group.all_gather(&lengths, &Tensor::from_slice(&[text.len() as i64]))?.wait()?;
            let lengths = Vec::<i64>::try_from(&lengths).map_err(|e| TorchError::from_tch("all_gather", e))?;
            // Padded to equal lengths, which `all_gather` needs.
            let longest = lengths.iter().copied().max().unwrap_or(0).max(1);
            let mut padded = text.as_bytes().to_vec();
            padded.resize(longest as usize, 0);
            let all = Tensor::zeros([ranks * longest], (Kind::Uint8, Device::Cpu));
            group.all_gather(&all, &Tensor::from_slice(&padded))?.wait()?;
            let all = Vec::<u8>::try_from(&all).map_err(|e| TorchError::from_tch("all_gather", e))?;
            let of = |(bytes, length): (&[u8], &i64)| String::from_utf8_lossy(&bytes[..*length as usize]).into_owned();
            texts = all.chunks_exact(longest as usize).zip(&lengths).map(of).collect();
            Ok(())
        })?;
        Ok(texts)
    }

    /// Checks that `value` is the same as on rank 0.
    ///
    /// # Errors
    /// Returns [`TrainError::RankDiffers`] with `what` if it is not, and [`TrainError::RankLost`] if a rank is lost.
    pub fn check_same(&self, what: &'static str, value: &str) -> Result<(), TrainError> {
        let same = self.text_from_first(value)? == value;
        if same { Ok(()) } else { Err(TrainError::RankDiffers { rank: self.rank(), what }) }
    }

    /// Runs `operation` if there are other ranks.
    pub(crate) fn together(
        &self,
        operation: impl FnOnce(&ProcessGroup) -> Result<(), TorchError>,
    ) -> Result<(), TrainError> {
        let Some(group) = self.group() else { return Ok(()) };
        let (rank, world_size) = (group.rank(), group.world_size());
        operation(group).map_err(|source| TrainError::RankLost { rank, world_size, source })
    }
}

/// Returns which of `count` items this rank computes, and whether each of them counts. Items are assigned to the ranks
/// in turn; those that are not `wanted` are skipped.
///
/// With `in_lockstep`, every rank gets the same number of items: shorter lists are filled with the first wanted item,
/// which does not count.
pub(crate) fn deal(
    count: usize,
    wanted: impl Fn(usize) -> bool,
    ranks: &Ranks,
    in_lockstep: bool,
) -> Vec<(usize, bool)> {
    let of = |rank: usize| (rank..count).step_by(ranks.world_size()).filter(|i| wanted(*i));
    let mut own: Vec<(usize, bool)> = of(ranks.rank()).map(|i| (i, true)).collect();
    if in_lockstep {
        let most = (0..ranks.world_size()).map(|rank| of(rank).count()).max().unwrap_or(0);
        let repeated = (0..count).find(|i| wanted(*i)).into_iter().cycle();
        own.extend(repeated.take(most - own.len()).map(|i| (i, false)));
    }
    own
}
