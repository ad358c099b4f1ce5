use std::ffi::CStr;

use crate::ffi;

/// Errors of libtorch, and of loading tensors into it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TorchError {
    /// libtorch raised a C++ exception; `message` is its first line.
    #[error("{operation}: {message}")]
    Libtorch {
        /// The function that was called.
        operation: &'static str,
        /// First line of libtorch's message.
        message: String,
    },
    /// libtorch does not support the stored dtype.
    #[error("tensor `{tensor}` has dtype {dtype}, which cannot be loaded into libtorch")]
    Dtype {
        /// Name of the tensor.
        tensor: String,
        /// Its stored dtype.
        dtype: String,
    },
    /// The bytes of the tensor could not be read.
    #[error(transparent)]
    Checkpoint(#[from] cl_checkpoint::Error),
    /// There is no such tensor.
    #[error("tensor `{tensor}` not found")]
    Missing {
        /// Name of the tensor.
        tensor: String,
    },
    /// An environment variable of a distributed launcher is missing or invalid.
    #[error("{name}{}: expected {expected}; torchrun sets it, or unset WORLD_SIZE to run one process", shown(value.as_deref()))]
    Launcher {
        /// Name of the environment variable.
        name: &'static str,
        /// Its value, if it is set.
        value: Option<String>,
        /// What is expected.
        expected: String,
    },
    /// libtorch's CUDA library could not be loaded.
    #[error("cannot load {path}: {message}")]
    Cuda {
        /// The library.
        path: String,
        /// The loader's message.
        message: String,
    },
    /// The device name is unknown, or there is no such device.
    #[error("device `{device}`: {message}")]
    Device {
        /// The device name.
        device: String,
        /// What is wrong, and what is expected.
        message: String,
    },
}

/// Formats the value of a variable for an error message, to follow the variable's name.
fn shown(value: Option<&str>) -> String {
    value.map_or_else(|| " is not set".to_owned(), |value| format!("={value}"))
}

impl TorchError {
    /// Converts the return code of a shim function.
    pub(crate) fn check(operation: &'static str, code: i32) -> Result<(), TorchError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the shim returns a NUL-terminated string that lives until the next call on this thread.
        let text = unsafe { CStr::from_ptr(ffi::cl_last_error()) }.to_string_lossy().into_owned();
        Err(TorchError::Libtorch { operation, message: text.lines().next().unwrap_or_default().to_owned() })
    }

    /// Wraps an error of tch. Its text contains a C++ stack trace, of which only the first line is kept.
    pub fn from_tch(operation: &'static str, error: tch::TchError) -> TorchError {
        let text = error.to_string();
        let line = text.lines().find(|l| !l.trim().is_empty()).unwrap_or_default().trim();
        TorchError::Libtorch { operation, message: line.to_owned() }
    }
}
