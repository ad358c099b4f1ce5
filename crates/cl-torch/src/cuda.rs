use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

use tch::{Cuda, Device};

use crate::TorchError;

/// Loads the CUDA half of libtorch when there is one, so that a binary linked against the CPU libraries can use a GPU.
///
/// Looked for, in this order: the folder named by `CL_LIBTORCH_CUDA` (the `lib` folder of a full torch 2.11.0), the
/// folder of the libtorch that is loaded already, and the loader's own search path. Must run before any other call into
/// libtorch, which asks for its CUDA hooks once and keeps the answer. Returns whether the library was loaded.
///
/// # Errors
/// [`TorchError::Cuda`] when `CL_LIBTORCH_CUDA` is set and the library there does not load; without that variable a
/// missing CUDA library is no error.
pub fn load_cuda() -> Result<bool, TorchError> {
    if let Some(folder) = std::env::var_os("CL_LIBTORCH_CUDA").filter(|v| !v.is_empty()) {
        open(&Path::new(&folder).join("libtorch_cuda.so"))?;
        return Ok(true);
    }
    let beside = loaded_libtorch_folder().map(|f| f.join("libtorch_cuda.so")).filter(|p| p.exists());
    let file = beside.unwrap_or_else(|| PathBuf::from("libtorch_cuda.so"));
    Ok(open(&file).is_ok())
}

/// The device named by `name`: `auto` (the first GPU when there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// [`TorchError::Device`] for an unknown name or a GPU that is not there.
pub fn pick_device(name: &str) -> Result<Device, TorchError> {
    let index = match name {
        "auto" => return Ok(Device::cuda_if_available()),
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        _ => name.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()),
    };
    let error = |message: String| TorchError::Device { device: name.to_owned(), message };
    let index = index.ok_or_else(|| error("expected auto, cpu, cuda or cuda:N".to_owned()))?;
    let count = if Cuda::is_available() { Cuda::device_count() as usize } else { 0 };
    if index >= count {
        return Err(error(format!(
            "{count} GPUs visible; for a GPU set CL_LIBTORCH_CUDA to the lib folder of a CUDA build of torch 2.11.0"
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

/// The folder of the loaded `libtorch_cpu.so`, from the process's own memory map.
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
