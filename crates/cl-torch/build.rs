//! Compiles the C++ shim against the libtorch that torch-sys chose, and lets binaries and tests find that libtorch.

use std::env;
use std::path::PathBuf;

fn main() {
    // docs.rs has no libtorch; torch-sys looks for none with this cfg (Cargo.toml).
    if env::var_os("CARGO_CFG_DOCSRS").is_some() {
        return;
    }
    let lib = PathBuf::from(
        env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes the folder of libtorch's libraries"),
    );
    let include = lib.parent().expect("libtorch/lib has a parent").join("include");
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=build.rs");
    // Crates with a binary read this as DEP_CL_TORCH_LIBTORCH_LIB and turn it into a run path.
    println!("cargo:libtorch_lib={}", lib.display());
    // Cargo adds native search folders below its target folder to the library path of `cargo run`, `cargo test` and
    // doctests; a link inside OUT_DIR counts as one, so none of them needs a variable set by hand.
    let link = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("libtorch");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(&lib, &link).expect("OUT_DIR is writable");
    println!("cargo:rustc-link-search=native={}", link.display());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(false)
        .opt_level(1)
        .debug(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .include("csrc")
        .files([
            "csrc/shim.cpp",
            "csrc/products.cpp",
            "csrc/linear.cpp",
            "csrc/quantized.cpp",
            "csrc/process_group.cpp",
        ])
        .compile("cl_torch_shim");
}
