use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tch::{Cuda, Device};

use crate::{Rendezvous, TorchError, ffi};

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
    let given = std::env::var_os("CL_LIBTORCH_CUDA").filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = given.clone().or_else(|| loaded_libtorch_folder().filter(|f| f.join("libtorch_cuda.so").exists()));
    let file = folder.as_deref().unwrap_or(Path::new("")).join("libtorch_cuda.so");
    match open(&file) {
        Ok(()) => {}
        Err(error) if given.is_some() => return Err(error),
        Err(error) => {
            let _ = NOT_LOADED.set(error.to_string());
            return Ok(false);
        }
    }
    if let Some(linalg) = folder.map(|f| f.join("libtorch_cuda_linalg.so")).filter(|p| p.exists()) {
        // libtorch loads this library by its bare name when it is first needed, and finds it only if it is in a
        // directory of the loader's search path or already loaded.
        open(&linalg)?;
    }
    // cuDNN's attention compiles a kernel for every new length, and almost every batch here has new lengths.
    TorchError::check("disabling cuDNN's attention", disable_cudnn_attention())?;
    Ok(true)
}

/// Why the CUDA library was not loaded.
static NOT_LOADED: OnceLock<String> = OnceLock::new();

fn disable_cudnn_attention() -> std::ffi::c_int {
    // SAFETY: sets a flag of libtorch's global context.
    unsafe { ffi::cl_disable_cudnn_attention() }
}

/// Returns the device `name`: `auto` (a GPU as for `cuda` if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.
///
/// With `cuda`, each of several processes on a machine uses its own GPU, by its rank on this machine. If only one GPU is
/// visible to the process, as when a launcher sets `CUDA_VISIBLE_DEVICES` for each, it uses that one.
///
/// # Errors
/// Returns [`TorchError::Device`] if the name is unknown or there is no such GPU.
pub fn pick_device(name: &str) -> Result<Device, TorchError> {
    let count = if Cuda::is_available() { Cuda::device_count() as usize } else { 0 };
    let error = |message: String| TorchError::Device { device: name.to_owned(), message };
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" if count == 0 => return Ok(Device::Cpu),
        "auto" | "cuda" => {
            let local_rank = Rendezvous::from_env()?.map_or(0, |meeting| meeting.local_rank);
            Some(if count == 1 { 0 } else { local_rank })
        }
        _ => name.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()),
    };
    let index = index.ok_or_else(|| error("expected auto, cpu, cuda or cuda:N".to_owned()))?;
    if index < count {
        return Ok(Device::Cuda(index));
    }
    Err(error(match (count, NOT_LOADED.get()) {
        (0, Some(reason)) => format!(
            "no GPU, because libtorch's CUDA library is not loaded ({reason}); set CL_LIBTORCH_CUDA to the lib directory \
             of a CUDA build of torch 2.11.0"
        ),
        (0, None) => "libtorch finds no GPU; check the driver with `nvidia-smi`, and CUDA_VISIBLE_DEVICES".to_owned(),
        _ => format!("{count} GPUs visible, counted from 0"),
    }))
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
        assert!(pick_device("cuda:99").unwrap_err().to_string().contains("GPU"));
    }
}
