use std::path::PathBuf;

use cl_checkpoint::Interrupt;

use crate::Error;
use crate::run::options::at_most;

/// Returns an error if a stop was requested. Called between modules.
pub(super) fn stop_if_asked(interrupt: &Interrupt) -> Result<(), Error> {
    if interrupt.requested() { Err(Error::Interrupted) } else { Ok(()) }
}

/// Runs a function in a thread pool of the given size; 0 for all cores.
pub(super) fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> Result<R, Error> + Send) -> Result<R, Error> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(at_most(threads)).build();
    let wrong = |e| Error::Io { path: PathBuf::from("threads"), source: std::io::Error::other(e) };
    pool.map_err(wrong)?.install(f)
}
