use crate::ffi;

/// Which library computes f32 products of matrices on a CPU.
///
/// Both accumulate in f32 and differ in the last bits, so a run keeps to one of them; see [`products`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// What libtorch's own operators call: MKL in its builds for x86-64.
    Libtorch,
    /// oneDNN, which libtorch has with it for half precision.
    Onednn,
}

impl Products {
    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Products::Libtorch => "libtorch",
            Products::Onednn => "onednn",
        }
    }

    /// Whether this libtorch has it on this machine.
    pub fn is_available(self) -> bool {
        // SAFETY: takes nothing and only reads.
        self == Products::Libtorch || unsafe { ffi::cl_has_onednn() } != 0
    }
}

/// The library that [`linear`](crate::linear) uses in this process.
///
/// At the start it is oneDNN on processors with AVX-512 that are not Intel's, where MKL stays at 256 bits and takes twice the time
/// (docs/benchmarks.md), and libtorch's own elsewhere. It follows from the processor alone, never from a measurement, so that a
/// machine always computes the same bits.
pub fn products() -> Products {
    // SAFETY: takes nothing and only reads.
    if unsafe { ffi::cl_uses_onednn() } != 0 { Products::Onednn } else { Products::Libtorch }
}

/// Has this process use `products` from here on, if this libtorch has them; returns whether it does.
pub fn use_products(products: Products) -> bool {
    if products.is_available() {
        // SAFETY: sets one flag.
        unsafe { ffi::cl_use_onednn((products == Products::Onednn).into()) };
    }
    products.is_available()
}
