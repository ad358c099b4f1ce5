//! How libtorch's threads wait for each other, and how many there are.

use std::env;

/// How often a thread of libgomp looks before it sleeps: some tens of microseconds. libgomp's own 300,000 are milliseconds, which
/// pay on a machine of one's own; where another process holds a core, each thread spins through the time in which the one that
/// it waits for could run.
const SPINS: &str = "500";
const SPIN_VARIABLES: [&str; 2] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"];

/// Starts this program again, once, with threads that wait briefly before they sleep: libgomp reads that from the environment when
/// it is loaded, which is before any code of ours. What the user has set stays. Results do not depend on it.
///
/// Call it before anything else happens: on success it does not return. Where it cannot be done nothing changes.
pub fn wait_briefly() {
    if SPIN_VARIABLES.iter().any(|name| env::var_os(name).is_some()) {
        return;
    }
    #[cfg(unix)]
    if let Ok(program) = env::current_exe() {
        use std::os::unix::process::CommandExt;
        let mut arguments = env::args_os();
        let mut command = std::process::Command::new(program);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        let _failure = command.args(arguments).env(SPIN_VARIABLES[0], SPINS).exec();
    }
}

/// Lets libtorch compute with so many threads instead of one for each core. Sums may differ in their last bits with another number.
pub fn set_threads(threads: u16) {
    tch::set_num_threads(i32::from(threads));
}
