use crate::ffi;

/// The library that computes f32 matrix products on a CPU.
///
/// Both accumulate in f32 but differ in the last bits, so a process uses only one of them; see [`products`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// The BLAS library that libtorch's own operators call: MKL in libtorch's builds for x86-64.
    Libtorch,
    /// oneDNN, which libtorch includes for half-precision products.
    Onednn,
}

impl Products {
    /// Returns the name used in files.
    pub fn name(self) -> &'static str {
        match self {
            Products::Libtorch => "libtorch",
            Products::Onednn => "onednn",
        }
    }

    /// Returns whether this libtorch has the library and can use it on this machine.
    pub fn is_available(self) -> bool {
        // SAFETY: takes nothing and only reads.
        self == Products::Libtorch || unsafe { ffi::cl_has_onednn() } != 0
    }
}

/// Returns the library that [`linear`](crate::linear) uses in this process. Products with few rows are an exception:
/// this crate has its own kernels for them (docs/benchmarks.md).
///
/// The default is oneDNN on non-Intel processors with AVX-512, where MKL uses only 256-bit vectors and takes twice as
/// long (docs/benchmarks.md), and libtorch's own library elsewhere. It depends only on the processor, never on a
/// measurement, so that results on one machine are reproducible bit for bit.
pub fn products() -> Products {
    // SAFETY: takes nothing and only reads.
    if unsafe { ffi::cl_uses_onednn() } != 0 { Products::Onednn } else { Products::Libtorch }
}

/// Returns whether this processor lacks instructions for bf16 products (x86-64 without AVX512-BF16).
///
/// Large bf16 products are then computed in f32, which is fast, but slower than a model in f32.
pub fn emulates_bf16() -> bool {
    // SAFETY: takes nothing and only reads.
    unsafe { ffi::cl_emulates_bf16() != 0 }
}

/// Selects the library for this process from now on, if this libtorch has it; returns whether it does.
pub fn use_products(products: Products) -> bool {
    if products.is_available() {
        // SAFETY: sets one flag.
        unsafe { ffi::cl_use_onednn((products == Products::Onednn).into()) };
    }
    products.is_available()
}

/// Serializes tests that change the library of the process, or need the same one for several products.
#[cfg(test)]
pub(crate) fn turn() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
