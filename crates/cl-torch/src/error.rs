use std::ffi::CStr;

use crate::ffi;

/// An error raised inside libtorch, or a tensor that cannot be what was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TorchError {
    /// libtorch raised a C++ exception; `message` is its first line.
    #[error("{operation}: {message}")]
    Libtorch {
        /// The entry that was called.
        operation: &'static str,
        /// First line of libtorch's message.
        message: String,
    },
    /// A stored dtype that libtorch cannot compute with.
    #[error("tensor `{tensor}` has dtype {dtype}, which cannot be loaded into libtorch")]
    Dtype {
        /// Name of the tensor.
        tensor: String,
        /// Its dtype as stored.
        dtype: String,
    },
    /// The bytes of the tensor could not be read.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// A tensor that should exist was not in the source.
    #[error("tensor `{tensor}` not found")]
    Missing {
        /// Name of the tensor.
        tensor: String,
    },
    /// The CUDA half of libtorch could not be loaded.
    #[error("cannot load {path}: {message}")]
    Cuda {
        /// File that was tried.
        path: String,
        /// The loader's message.
        message: String,
    },
    /// A device name that is not `cpu`, `cuda` or `cuda:N`, or one that is not there.
    #[error("device `{device}`: {message}")]
    Device {
        /// What was asked for.
        device: String,
        /// Why it cannot be had, and what can.
        message: String,
    },
}

impl TorchError {
    /// Turns the return code of a shim entry into a result.
    pub(crate) fn check(operation: &'static str, code: i32) -> Result<(), TorchError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the shim returns a NUL-terminated string that lives until the next call on this thread.
        let text = unsafe { CStr::from_ptr(ffi::cl_last_error()) }.to_string_lossy().into_owned();
        Err(TorchError::Libtorch { operation, message: text.lines().next().unwrap_or_default().to_owned() })
    }

    /// Wraps tch's error: its text carries a C++ stack of many lines, of which the first says what happened.
    pub fn from_tch(operation: &'static str, error: tch::TchError) -> TorchError {
        let text = error.to_string();
        let line = text.lines().find(|l| !l.trim().is_empty()).unwrap_or_default().trim();
        TorchError::Libtorch { operation, message: line.to_owned() }
    }
}
