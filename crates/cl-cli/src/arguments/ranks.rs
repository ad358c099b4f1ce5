//! Arguments of commands that several processes run together.

use std::time::Duration;

/// What several processes ("ranks") that a launcher started need to know.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct RankArgs {
    /// Seconds to wait for another rank, where torchrun or another launcher started several.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub rank_timeout: u64,
}

impl RankArgs {
    /// Time to wait for another rank.
    pub fn timeout(self) -> Duration {
        Duration::from_secs(self.rank_timeout)
    }
}
