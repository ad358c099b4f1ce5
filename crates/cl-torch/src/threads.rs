//! Spinning and number of libtorch's threads.
//!
//! libtorch uses the threads of libgomp, which wait in a busy loop ("spinning", for some milliseconds) before they
//! sleep. This is fastest on an otherwise idle machine, but slow if another process is busy: while one thread spins,
//! the thread that it waits for may have no core to run on. libgomp spins for only a hundredth of that time if it has
//! more threads than the process has cores (`gomp_throttled_spin_count_var`, decided for every parallel region).
//! Therefore, while other processes keep cores busy, a second small team of libgomp threads is started, which only
//! sleeps; when the cores are free again, it is stopped.

use std::fs;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

/// The environment variables of libgomp that determine how long threads spin.
const SPIN_VARIABLES: [&str; 2] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"];
/// Interval between measurements of the load.
const PERIOD: Duration = Duration::from_millis(500);
/// Load by other processes, in cores, above which threads spin only briefly; below half of it, they spin normally
/// again.
const BUSY_CORES: f64 = 0.25;

/// Monitors the load by other processes on the cores that this process may use, and makes libtorch's threads spin only
/// briefly while there are too few cores for all. Runs until the program ends; results do not depend on it.
///
/// Has no effect if the user has set `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY`, if libtorch uses a single thread, or if
/// `/proc` does not report the load (on systems other than Linux).
pub fn watch_load() {
    if SPIN_VARIABLES.iter().any(|name| std::env::var_os(name).is_some()) {
        return;
    }
    let Some(mut before) = Usage::now() else { return };
    let watch = move || {
        let mut team: Option<Team> = None;
        loop {
            thread::sleep(PERIOD);
            let Some(now) = Usage::now() else { return };
            let computing = tch::get_num_threads();
            let others = now.others_since(&before, PERIOD);
            let limit = if team.is_some() { BUSY_CORES / 2.0 } else { BUSY_CORES };
            let crowded = computing > 1 && others > limit && others + f64::from(computing) > now.cores as f64;
            match (&team, crowded) {
                (None, true) => team = Some(Team::start()),
                (Some(_), false) => team = None,
                _ => {}
            }
            before = now;
        }
    };
    // If the thread cannot be started, computations are only slower while other processes are busy.
    let _watcher = thread::Builder::new().name("load".to_owned()).spawn(watch);
}

/// Sets the number of threads that libtorch uses, instead of one per core. Sums can differ in their last bits between
/// different numbers of threads.
pub fn set_threads(threads: u16) {
    tch::set_num_threads(i32::from(threads));
}

/// Sleeping libgomp threads that raise libgomp's number of threads above the number of cores. Stopped when dropped.
struct Team {
    end: Option<Sender<()>>,
    leader: Option<JoinHandle<()>>,
}

impl Team {
    fn start() -> Team {
        let (end, ended) = channel::<()>();
        let lead = move || {
            // Large enough that libtorch uses several threads, which then belong to this leader thread. If the process
            // is exiting, libtorch may return an error. No scalars are used, because tch panics when it frees one after
            // an error.
            let started = Tensor::f_zeros([1 << 18], (Kind::Float, Device::Cpu)).and_then(|zeros| zeros.f_add(&zeros));
            drop(started);
            // Returns with an error when the sender is dropped.
            let _ = ended.recv();
        };
        Team { end: Some(end), leader: thread::Builder::new().name("sleeping team".to_owned()).spawn(lead).ok() }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(leader) = self.leader.take() {
            let _ = leader.join();
        }
    }
}

/// CPU times in kernel ticks since boot.
struct Usage {
    /// Cores that this process may use.
    cores: usize,
    /// Ticks that these cores spent on all processes.
    all: u64,
    /// Ticks that this process spent on all cores.
    own: u64,
}

/// Ticks per second in `/proc`; the same on every architecture of Linux (`USER_HZ`).
const TICKS: f64 = 100.0;

impl Usage {
    fn now() -> Option<Usage> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let allowed = allowed_cores(&status)?;
        let all = busy_ticks(&fs::read_to_string("/proc/stat").ok()?, &allowed);
        let own = own_ticks(&fs::read_to_string("/proc/self/stat").ok()?)?;
        Some(Usage { cores: allowed.len(), all, own })
    }

    /// Returns the number of cores that other processes kept busy since `before`, which was measured `period` ago.
    fn others_since(&self, before: &Usage, period: Duration) -> f64 {
        let others = self.all.saturating_sub(before.all).saturating_sub(self.own.saturating_sub(before.own));
        others as f64 / TICKS / period.as_secs_f64()
    }
}

/// Parses the cores in `Cpus_allowed_list: 0-1,4`.
fn allowed_cores(status: &str) -> Option<Vec<usize>> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cores.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cores)
}

/// Ticks that these cores spent in user, nice and system mode and on interrupts; not idle, waiting for I/O, or stolen
/// by a hypervisor.
fn busy_ticks(stat: &str, cores: &[usize]) -> u64 {
    let of_core = |line: &str| {
        let mut fields = line.strip_prefix("cpu")?.split_ascii_whitespace();
        let core: usize = fields.next()?.parse().ok()?;
        let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
        let busy = ticks.iter().take(3).chain(ticks.iter().skip(5).take(2)).sum::<u64>();
        cores.contains(&core).then_some(busy)
    };
    stat.lines().filter_map(of_core).sum()
}

/// Ticks of all threads of this process, in user and kernel mode. The process name in parentheses can contain any
/// characters.
fn own_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_read_as_the_kernel_writes_it() {
        let status = "Name:\tcl\nCpus_allowed:\t13\nCpus_allowed_list:\t0-1,4\nMems_allowed_list:\t0\n";
        let cores = allowed_cores(status).unwrap();
        assert_eq!(cores, [0, 1, 4]);
        let stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 3 1000 1000 4 5 1000 0 0\ncpu1 10 0 0 7 0 0 0 0 0 0\n\
            cpu2 500 0 0 0 0 0 0 0 0 0\ncpu4 100 0 0 0 0 0 0 0 0 0\nintr 5\n";
        assert_eq!(busy_ticks(stat, &cores), 15 + 10 + 100);
        let own = "77 (a ) b) R 1 77 77 0 -1 4194304 100 0 0 0 30 12 5 5 20 0 3 0 100 1 1";
        assert_eq!(own_ticks(own), Some(42));
        let (before, now) = (Usage { cores: 3, all: 100, own: 40 }, Usage { cores: 3, all: 200, own: 90 });
        assert_eq!(now.others_since(&before, Duration::from_millis(500)), 1.0);
    }

    #[test]
    fn a_sleeping_team_ends_when_dropped() {
        let team = Team::start();
        let sum = (Tensor::ones([1 << 18], (Kind::Float, Device::Cpu)) * 2.0).sum(Kind::Float);
        assert_eq!(f64::try_from(sum).unwrap(), f64::from(1 << 19));
        drop(team);
    }
}
