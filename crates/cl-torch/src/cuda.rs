use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

use tch::{Cuda, Device};

use crate::{Rendezvous, TorchError};

/// Loads libtorch's CUDA library if there is one, so that a binary linked against the CPU libraries can use a GPU.
///
/// Searched in order: the directory in `CL_LIBTORCH_CUDA` (the `lib` directory of a CUDA build of torch 2.11.0), the
/// directory of the loaded libtorch, and the loader's search path. Must be called before any other function of
/// libtorch, which looks for CUDA only once. Returns whether the library was loaded.
///
/// # Errors
/// Returns [`TorchError::Cuda`] if `CL_LIBTORCH_CUDA` is set and its library cannot be loaded. Without that variable, a
/// missing CUDA library is not an error.
pub fn load_cuda() -> Result<bool, TorchError> {
    if let Some(folder) = std::env::var_os("CL_LIBTORCH_CUDA").filter(|v| !v.is_empty()) {
        open(&Path::new(&folder).join("libtorch_cuda.so"))?;
        return Ok(true);
    }
    let beside = loaded_libtorch_folder().map(|f| f.join("libtorch_cuda.so")).filter(|p| p.exists());
    let file = beside.unwrap_or_else(|| PathBuf::from("libtorch_cuda.so"));
    Ok(open(&file).is_ok())
}

/// Returns the device `name`: `auto` (the first GPU if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// Returns [`TorchError::Device`] if the name is unknown or there is no such GPU.
pub fn pick_device(name: &str) -> Result<Device, TorchError> {
    let index = match name {
        "auto" => return Ok(Device::cuda_if_available()),
        "cpu" => return Ok(Device::Cpu),
        // Each of several processes on one machine uses its own GPU.
        "cuda" => Some(Rendezvous::from_env()?.map_or(0, |meeting| meeting.local_rank)),
        _ => name.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()),
    };
    let error = |message: String| TorchError::Device { device: name.to_owned(), message };
    let index = index.ok_or_else(|| error("expected auto, cpu, cuda or cuda:N".to_owned()))?;
    let count = if Cuda::is_available() { Cuda::device_count() as usize } else { 0 };
    if index >= count {
        return Err(error(format!(
            "{count} GPUs visible; to use a GPU, set CL_LIBTORCH_CUDA to the lib directory of a CUDA build of torch 2.11.0"
        )));
    }
    Ok(Device::Cuda(index))
}

fn open(file: &Path) -> Result<(), TorchError> {
    let path = file.display().to_string();
    let name = CString::new(path.clone().into_bytes())
        .map_err(|_| TorchError::Cuda { path: path.clone(), message: "NUL byte in the path".to_owned() })?;
    // SAFETY: dlopen with a NUL-terminated name; libtorch's own initialisers run, as they would at start-up.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        // SAFETY: after a failed dlopen, dlerror returns a NUL-terminated message.
        let message = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
        return Err(TorchError::Cuda { path, message });
    }
    Ok(())
}

/// The directory of the loaded `libtorch_cpu.so`, from the process's memory map.
fn loaded_libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|l| l.ends_with("/libtorch_cpu.so"))?;
    Some(Path::new(&line[line.find('/')?..]).parent()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_loaded_libtorch() {
        let _ = tch::get_num_threads();
        assert!(loaded_libtorch_folder().unwrap().join("libc10.so").exists());
    }

    #[test]
    fn devices_by_name() {
        assert_eq!(pick_device("cpu").unwrap(), Device::Cpu);
        assert!(pick_device("gpu").unwrap_err().to_string().contains("expected auto, cpu, cuda or cuda:N"));
        assert!(pick_device("cuda:99").unwrap_err().to_string().contains("CL_LIBTORCH_CUDA"));
    }
}
