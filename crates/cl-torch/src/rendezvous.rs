use std::fmt::Display;
use std::str::FromStr;

use crate::TorchError;

/// Rank, world size and address of a process group, from the environment variables that launchers set.
///
/// `torchrun` and Kubernetes' PyTorchJob set `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`.
/// Slurm's `srun` and Open MPI's `mpirun` set their own variables for ranks and sizes. These are read only if
/// `MASTER_ADDR` is set, since a shell inside a Slurm allocation has them too. Source: PyTorch's "Environment variable
/// initialization".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// Rank of this process, from 0.
    pub rank: usize,
    /// Number of processes; at least 2.
    pub world_size: usize,
    /// Rank of this process among those on its machine: the index of its GPU.
    pub local_rank: usize,
    /// Number of processes on this machine, if the launcher sets it.
    pub local_world_size: Option<usize>,
    /// Host of the c10d store, which is the host of rank 0.
    pub address: String,
    /// Port of the store.
    pub port: u16,
    /// Whether the launcher hosts the store (torchrun); otherwise rank 0 does.
    pub launcher_hosts: bool,
    /// Number of times the launcher has restarted the processes; each restart uses its own prefix in the store.
    pub restart: u64,
}

/// Variables with rank, world size, local rank and local world size, for each launcher.
const LAUNCHERS: [[&str; 4]; 2] = [
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"],
    ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"],
];
const PYTORCH: [&str; 4] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];

impl Rendezvous {
    /// Reads the environment; returns `None` if this is the only process.
    ///
    /// # Errors
    /// Returns [`TorchError::Launcher`] if a variable is missing or invalid.
    pub fn from_env() -> Result<Option<Rendezvous>, TorchError> {
        Rendezvous::from_variables(&|name| std::env::var(name).ok())
    }

    fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Rendezvous>, TorchError> {
        let address = get("MASTER_ADDR").filter(|a| !a.is_empty());
        let foreign = || LAUNCHERS.into_iter().filter(|_| address.is_some()).find(|names| get(names[1]).is_some());
        let Some(names) = Some(PYTORCH).filter(|names| get(names[1]).is_some()).or_else(foreign) else {
            return Ok(None);
        };
        let world_size: usize = number(get, names[1], "a number of processes")?;
        if world_size <= 1 {
            return Ok(None);
        }
        let below = |name, what: &str| {
            let value: usize = number(get, name, what)?;
            if value < world_size {
                Ok(value)
            } else {
                Err(wrong(name, get(name), format!("{what} below {world_size}")))
            }
        };
        let rank = below(names[0], "this process's number")?;
        let local_rank = if get(names[2]).is_some() { below(names[2], "its number on this machine")? } else { rank };
        let missing = || wrong("MASTER_ADDR", None, "the host of rank 0".to_owned());
        Ok(Some(Rendezvous {
            rank,
            world_size,
            local_rank,
            local_world_size: get(names[3]).and_then(|v| v.parse().ok()),
            address: address.clone().ok_or_else(missing)?,
            port: number(get, "MASTER_PORT", "a free port of that host")?,
            launcher_hosts: get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True"),
            restart: get("TORCHELASTIC_RESTART_COUNT").and_then(|v| v.parse().ok()).unwrap_or(0),
        }))
    }
}

fn number<N: FromStr<Err: Display>>(
    get: &dyn Fn(&str) -> Option<String>,
    name: &'static str,
    expected: &str,
) -> Result<N, TorchError> {
    let value = get(name);
    value.as_deref().and_then(|v| v.parse().ok()).ok_or_else(|| wrong(name, value, expected.to_owned()))
}

fn wrong(name: &'static str, value: Option<String>, expected: String) -> TorchError {
    TorchError::Launcher { name, value, expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &str) -> Result<Option<Rendezvous>, String> {
        let pairs: Vec<(&str, &str)> = variables.split_whitespace().filter_map(|v| v.split_once('=')).collect();
        let get = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Rendezvous::from_variables(&get).map_err(|e| e.to_string())
    }

    #[test]
    fn each_launcher_is_understood() {
        let meeting = " MASTER_ADDR=node0 MASTER_PORT=29400";
        for own in [
            "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1",
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1",
            "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1",
        ] {
            let found = read(&(own.to_owned() + meeting)).unwrap().unwrap();
            let Rendezvous {
                rank,
                world_size,
                local_rank,
                local_world_size: _,
                address,
                port,
                launcher_hosts,
                restart,
            } = found;
            assert_eq!((rank, world_size, local_rank, address.as_str(), port), (3, 4, 1, "node0", 29400));
            assert!(!launcher_hosts && restart == 0);
        }
        let torchrun = "RANK=0 WORLD_SIZE=2 TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RESTART_COUNT=2";
        let found = read(&(torchrun.to_owned() + meeting)).unwrap().unwrap();
        assert!(found.launcher_hosts && found.restart == 2);
    }

    #[test]
    fn one_process_needs_no_meeting() {
        for alone in ["", "RANK=0", "WORLD_SIZE=1 RANK=0", "SLURM_PROCID=0 SLURM_NTASKS=4", "OMPI_COMM_WORLD_SIZE=2"] {
            assert_eq!(read(alone), Ok(None), "{alone}");
        }
    }

    #[test]
    fn what_is_missing_or_invalid_is_named() {
        for (variables, part) in [
            ("WORLD_SIZE=2", "RANK is not set"),
            ("WORLD_SIZE=two RANK=0", "WORLD_SIZE=two: expected a number of processes"),
            ("WORLD_SIZE=2 RANK=2", "RANK=2: expected this process's number below 2"),
            ("WORLD_SIZE=2 RANK=0", "MASTER_ADDR is not set"),
            ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a", "MASTER_PORT is not set"),
            ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=70000", "MASTER_PORT=70000"),
        ] {
            let message = read(variables).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }
}
