use std::ffi::{CString, c_int};
use std::ptr::NonNull;
use std::time::Duration;

use tch::Tensor;

use crate::ffi::{self, pointer};
use crate::{Rendezvous, TorchError};

/// A group of processes with Gloo's collective operations on CPU tensors, through libtorch's distributed library
/// (c10d).
///
/// Every process has to start the same operations in the same order, with tensors of the same dtype and size. If a
/// process does not do so within the timeout, or exits, the operation returns an error in the others.
pub struct ProcessGroup {
    raw: NonNull<ffi::Group>,
    rank: usize,
    world_size: usize,
}

// SAFETY: c10d's backends and stores take their own locks; the handle is a pointer to shared state without thread
// affinity.
unsafe impl Send for ProcessGroup {}
// SAFETY: as above.
unsafe impl Sync for ProcessGroup {}

impl ProcessGroup {
    /// Joins the group and waits for the other processes for at most `timeout`, which also applies to every later
    /// operation.
    ///
    /// `GLOO_SOCKET_IFNAME` names the network interface, as in PyTorch. If it is not set and the rendezvous address is
    /// a loopback address, the group uses the loopback interface.
    ///
    /// # Errors
    /// Returns [`TorchError::Libtorch`] if the store cannot be reached or opened, or if a process does not join in
    /// time.
    pub fn join(meeting: &Rendezvous, timeout: Duration) -> Result<ProcessGroup, TorchError> {
        let text = |s: &str| CString::new(s).unwrap_or_default();
        let address = text(&meeting.address);
        let prefix = text(&format!("cl/{}", meeting.restart));
        let interface =
            std::env::var("GLOO_SOCKET_IFNAME").ok().filter(|name| !name.is_empty()).map(|name| text(&name));
        let loopback = ["localhost", "127.0.0.1", "::1"].contains(&meeting.address.as_str());
        let null = std::ptr::null();
        let timeout = i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX);
        let serves = meeting.rank == 0 && !meeting.launcher_hosts;
        let mut raw = std::ptr::null_mut();
        // SAFETY: NUL-terminated strings that outlive the call, null where the shim allows it; `raw` is filled on
        // success.
        let code = unsafe {
            ffi::cl_process_group(
                address.as_ptr(),
                meeting.port,
                c_int::from(serves),
                number(meeting.rank),
                number(meeting.world_size),
                timeout,
                prefix.as_ptr(),
                interface.as_ref().map_or(null, |name| name.as_ptr()),
                if loopback { address.as_ptr() } else { null },
                &mut raw,
            )
        };
        TorchError::check("joining the other processes", code)?;
        let raw = NonNull::new(raw).expect("filled on success");
        Ok(ProcessGroup { raw, rank: meeting.rank, world_size: meeting.world_size })
    }

    /// Rank of this process, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of processes.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Starts an all-reduce: replaces `tensor` (contiguous) in every process by the sum over all processes,
    /// bit-identical in all of them.
    ///
    /// # Errors
    /// Returns [`TorchError::Libtorch`] if a process has exited or the tensor is not on the CPU.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<Pending, TorchError> {
        // SAFETY: a live group and a live tensor; the work that is returned holds the tensor.
        Pending::start("all_reduce", |work| unsafe { ffi::cl_all_reduce(self.raw.as_ptr(), pointer(tensor), work) })
    }

    /// Starts a broadcast: replaces `tensor` (contiguous) by that of the process with rank `root`.
    ///
    /// # Errors
    /// As for [`ProcessGroup::all_reduce`].
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Pending, TorchError> {
        let root = number(root);
        // SAFETY: as in `all_reduce`.
        Pending::start("broadcast", |work| unsafe { ffi::cl_broadcast(self.raw.as_ptr(), pointer(tensor), root, work) })
    }

    /// Starts an all-gather: fills `output` with the `input` of every process, in the order of ranks. `output` has
    /// `world_size` times as many elements as `input`.
    ///
    /// # Errors
    /// As for [`ProcessGroup::all_reduce`], or if sizes differ.
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Pending, TorchError> {
        let (out, part) = (pointer(output), pointer(input));
        // SAFETY: as in `all_reduce`.
        Pending::start("all_gather", |work| unsafe { ffi::cl_all_gather(self.raw.as_ptr(), out, part, work) })
    }

    /// Starts a reduce-scatter: sums `input` over all processes and stores part r of the sum in the `output` of rank r.
    /// `input` has `world_size` times as many elements as `output`.
    ///
    /// # Errors
    /// As for [`ProcessGroup::all_reduce`], or if sizes differ.
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<Pending, TorchError> {
        let (part, all) = (pointer(output), pointer(input));
        // SAFETY: as in `all_reduce`.
        Pending::start("reduce_scatter", |work| unsafe { ffi::cl_reduce_scatter(self.raw.as_ptr(), part, all, work) })
    }

    /// Waits until every process has reached the barrier.
    ///
    /// # Errors
    /// Returns [`TorchError::Libtorch`] if a process has exited or does not arrive in time.
    pub fn barrier(&self) -> Result<(), TorchError> {
        // SAFETY: a live group.
        Pending::start("barrier", |work| unsafe { ffi::cl_barrier(self.raw.as_ptr(), work) })?.wait()
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: created by `cl_process_group`, freed once.
        unsafe { ffi::cl_process_group_free(self.raw.as_ptr()) }
    }
}

/// A collective operation in progress. Its tensors must not be used before [`Pending::wait`] returns.
#[must_use = "the result is there only after `wait`"]
pub struct Pending {
    raw: NonNull<ffi::Work>,
    operation: &'static str,
}

// SAFETY: c10d's works take their own locks, and may be waited for by any thread.
unsafe impl Send for Pending {}

impl Pending {
    fn start(operation: &'static str, run: impl FnOnce(*mut *mut ffi::Work) -> c_int) -> Result<Pending, TorchError> {
        let mut raw = std::ptr::null_mut();
        TorchError::check(operation, run(&mut raw))?;
        Ok(Pending { raw: NonNull::new(raw).expect("filled on success"), operation })
    }

    /// Waits until the operation is complete.
    ///
    /// # Errors
    /// Returns [`TorchError::Libtorch`] if a process has exited or did not join the operation within the timeout.
    pub fn wait(self) -> Result<(), TorchError> {
        // SAFETY: a live work, used by this thread alone.
        TorchError::check(self.operation, unsafe { ffi::cl_work_wait(self.raw.as_ptr()) })
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // SAFETY: created by an operation of the shim, freed once.
        unsafe { ffi::cl_work_free(self.raw.as_ptr()) }
    }
}

fn number(n: usize) -> c_int {
    c_int::try_from(n).unwrap_or(c_int::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;
    use tch::{Device, Kind};

    /// Runs `body` in `world_size` threads, one for each rank of a group.
    fn ranks<R: Send + 'static>(world_size: usize, body: fn(ProcessGroup) -> R) -> Vec<R> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = |rank| {
            let address = "127.0.0.1".to_owned();
            let meeting = Rendezvous {
                rank,
                world_size,
                local_rank: rank,
                local_world_size: None,
                address,
                port,
                launcher_hosts: false,
                restart: 0,
            };
            thread::spawn(move || body(ProcessGroup::join(&meeting, Duration::from_secs(20)).unwrap()))
        };
        let threads: Vec<_> = (0..world_size).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        Vec::try_from(t.to_kind(Kind::Float)).unwrap()
    }

    #[test]
    fn collectives_are_what_they_are_called() {
        let results = ranks(3, |group| {
            let own = group.rank() as f32 + 1.0;
            let sum = Tensor::from_slice(&[own, 10.0 * own]);
            group.all_reduce(&sum).unwrap().wait().unwrap();
            let narrow = Tensor::from_slice(&[own]).to_kind(Kind::BFloat16);
            group.all_reduce(&narrow).unwrap().wait().unwrap();
            let sent = Tensor::from_slice(&[own]);
            group.broadcast(&sent, 1).unwrap().wait().unwrap();
            let all = Tensor::zeros([3], (Kind::Float, Device::Cpu));
            group.all_gather(&all, &Tensor::from_slice(&[own])).unwrap().wait().unwrap();
            let part = Tensor::zeros([1], (Kind::Float, Device::Cpu));
            group.reduce_scatter(&part, &Tensor::from_slice(&[own, 10.0 * own, 100.0 * own])).unwrap().wait().unwrap();
            group.barrier().unwrap();
            [values(&sum), values(&narrow), values(&sent), values(&all), values(&part)]
        });
        for (rank, [sum, narrow, sent, all, part]) in results.into_iter().enumerate() {
            assert_eq!((sum, narrow, sent), (vec![6.0, 60.0], vec![6.0], vec![2.0]));
            assert_eq!((all, part), (vec![1.0, 2.0, 3.0], vec![6.0 * 10f32.powi(rank as i32)]));
        }
    }

    #[test]
    fn a_rank_that_ended_is_an_error_for_the_others() {
        let results = ranks(2, |group| {
            if group.rank() == 1 {
                return None;
            }
            // The sockets of the other rank close when its group is dropped.
            let reduced = (0..50).try_for_each(|_| {
                group.all_reduce(&Tensor::from_slice(&[1f32]))?.wait()?;
                thread::sleep(Duration::from_millis(20));
                Ok::<(), TorchError>(())
            });
            Some(reduced.unwrap_err().to_string())
        });
        let message = results[0].as_ref().unwrap();
        assert!(message.starts_with("all_reduce: ") && !message.contains('\n'), "{message}");
    }
}
