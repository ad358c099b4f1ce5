//! Arguments of commands that run as several processes.

use std::time::Duration;

/// Options for several processes ("ranks") started by a launcher.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct RankArgs {
    /// Seconds to wait for another rank, if torchrun or another launcher started several.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub rank_timeout: u64,
}

impl RankArgs {
    /// Returns the time to wait for another rank.
    pub fn timeout(self) -> Duration {
        Duration::from_secs(self.rank_timeout)
    }
}
