//! Compiles the C++ shim against the libtorch that torch-sys selected, and makes that libtorch visible to binaries and
//! tests.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    // docs.rs has no libtorch; with this cfg, torch-sys does not need one (Cargo.toml).
    if env::var_os("CARGO_CFG_DOCSRS").is_some() {
        return;
    }
    let lib = PathBuf::from(
        env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes the folder of libtorch's libraries"),
    );
    let include = lib.parent().expect("libtorch/lib has a parent").join("include");
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=build.rs");
    // Crates with a binary read this as DEP_CL_TORCH_LIBTORCH_LIB and set it as a run path.
    println!("cargo:libtorch_lib={}", lib.display());
    // Cargo adds native search directories below its target directory to the library path of `cargo run`, `cargo test`
    // and doctests. A link inside OUT_DIR counts as one, so no environment variable has to be set by hand.
    let link = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("libtorch");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(&lib, &link).expect("OUT_DIR is writable");
    println!("cargo:rustc-link-search=native={}", link.display());
    shim(
        &include,
        "cl_torch_shim",
        &[
            "attention",
            "dispatch",
            "elementwise",
            "kv_blocks",
            "linear",
            "process_group",
            "products",
            "quantized",
            "shim",
        ],
        &[],
    );
    shim(&include, "cl_torch_kernels", &["kernels"], &[]);
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
        // The same kernels for wider vectors; dispatch.cpp selects one at run time.
        shim(&include, "cl_torch_avx2", &["kernels"], &["-DCL_KERNELS=avx2", "-mavx2", "-mfma"]);
        let avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"];
        shim(&include, "cl_torch_avx512", &["kernels"], &[&["-DCL_KERNELS=avx512"], &avx512[..]].concat());
    }
}

/// Compiles files of csrc/ into a static library.
fn shim(include: &Path, name: &str, files: &[&str], flags: &[&str]) {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(false)
        .opt_level(3)
        .debug(false)
        .flag_if_supported("-fno-math-errno")
        .flag_if_supported("-Wno-psabi") // vectors are passed between inlined functions only
        .include(include)
        .include(include.join("torch/csrc/api/include"))
        .include("csrc")
        .files(files.iter().map(|file| format!("csrc/{file}.cpp")));
    for flag in flags {
        build.flag(flag);
    }
    build.compile(name);
}
