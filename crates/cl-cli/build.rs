//! Sets the run paths (rpath) with which the binary finds libtorch.

fn main() {
    let lib =
        std::env::var("DEP_CL_TORCH_LIBTORCH_LIB").expect("cl-torch publishes the folder of libtorch's libraries");
    println!("cargo:rerun-if-changed=build.rs");
    for path in ["$ORIGIN/libtorch/lib", "$ORIGIN/../libtorch/lib", lib.as_str()] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
}
