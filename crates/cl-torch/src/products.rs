use crate::ffi;

/// The library that computes f32 matrix products on a CPU.
///
/// Both accumulate in f32 and differ in the last bits, so a run keeps to one of them; see [`products`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// The library that libtorch's own operators call: MKL in its builds for x86-64.
    Libtorch,
    /// oneDNN, which libtorch includes for half precision.
    Onednn,
}

impl Products {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Products::Libtorch => "libtorch",
            Products::Onednn => "onednn",
        }
    }

    /// Whether it is available in this libtorch on this machine.
    pub fn is_available(self) -> bool {
        // SAFETY: takes nothing and only reads.
        self == Products::Libtorch || unsafe { ffi::cl_has_onednn() } != 0
    }
}

/// The library that [`linear`](crate::linear) uses in this process, except for products of few rows, for which the crate has loops of
/// its own (docs/benchmarks.md).
///
/// The default is oneDNN on processors with AVX-512 that are not Intel's, where MKL uses only 256-bit vectors and takes
/// twice the time (docs/benchmarks.md), and libtorch's own elsewhere. It depends only on the processor, never on a
/// measurement, so that a machine always computes the same bits.
pub fn products() -> Products {
    // SAFETY: takes nothing and only reads.
    if unsafe { ffi::cl_uses_onednn() } != 0 { Products::Onednn } else { Products::Libtorch }
}

/// Whether this processor has no instructions for products of bf16 (x86-64 without AVX512-BF16). Large products are then computed
/// in f32, which is fast, but slower than f32 from the start.
pub fn emulates_bf16() -> bool {
    // SAFETY: takes nothing and only reads.
    unsafe { ffi::cl_emulates_bf16() != 0 }
}

/// Selects `products` for this process from now on, if available in this libtorch; returns whether it is.
pub fn use_products(products: Products) -> bool {
    if products.is_available() {
        // SAFETY: sets one flag.
        unsafe { ffi::cl_use_onednn((products == Products::Onednn).into()) };
    }
    products.is_available()
}

/// Tests that change the library of the process, or need the same one for several products, take turns.
#[cfg(test)]
pub(crate) fn turn() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
