//! Helpers shared by unit tests.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::ffi;

/// Returns pseudorandom numbers from -1 to 1, which depend on `phase`.
pub(crate) fn noise(shape: &[i64], phase: f64, kind: Kind) -> Tensor {
    let n: i64 = shape.iter().product();
    let t = ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + phase).sin() * 43758.5453).frac();
    t.to_kind(kind).reshape(shape)
}

/// Calls `test` once for each vector width in bits that this processor supports, with the kernels for that width; tests
/// take turns.
pub(crate) fn with_every_width(test: impl Fn(i32)) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for bits in [128, 256, 512] {
        // SAFETY: sets one pointer.
        if unsafe { ffi::cl_use_kernels(bits) } != 0 {
            test(bits);
        }
    }
    // SAFETY: as above.
    assert_ne!(unsafe { ffi::cl_use_kernels(0) }, 0);
}
