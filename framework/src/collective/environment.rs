//! This process's rank among processes started together, from environment variables set by their starter.

use crate::error::{Error, Result};

/// What started several processes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starter {
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// Another MPI's `mpirun` (MPICH, Intel MPI), by its process-management interface.
    Pmi,
    /// SLURM's `srun`.
    Slurm,
    /// `torchrun`, a Kubernetes PyTorchJob, and anything else that sets `RANK` and `WORLD_SIZE`.
    Torch,
}

impl Starter {
    /// Its name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Starter::OpenMpi => "Open MPI",
            Starter::Pmi => "MPI",
            Starter::Slurm => "SLURM",
            Starter::Torch => "RANK and WORLD_SIZE",
        }
    }

    /// The variables for rank and world size, overall and on this machine.
    fn variables(self) -> [&'static str; 4] {
        match self {
            Starter::OpenMpi => [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ],
            Starter::Pmi => ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
            // A batch script has SLURM_PROCID and SLURM_NTASKS too, but is no task: only a step counts.
            Starter::Slurm => {
                ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"]
            }
            Starter::Torch => ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
        }
    }
}

/// This process as one of several that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// What started them.
    pub starter: Starter,
    /// This process's rank, from 0.
    pub rank: usize,
    /// The number of processes.
    pub world_size: usize,
    /// This process's rank on this machine, if known.
    pub local_rank: Option<usize>,
    /// The number of processes on this machine, if known.
    pub local_size: Option<usize>,
    /// The address of the first process, as `HOST:PORT`, if known.
    pub master: Option<String>,
}

impl Environment {
    /// Reads this process's environment variables. `None` if the process was started alone.
    pub fn read() -> Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Like [`read`](Self::read), for the given variables. `mpirun` takes precedence over the `srun` or
    /// Kubernetes pod that it runs in.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        for starter in [Starter::OpenMpi, Starter::Pmi, Starter::Slurm, Starter::Torch] {
            let [rank, world_size, local_rank, local_size] = starter.variables();
            let number = |name: &str| variable(name).map(|text| number(name, &text)).transpose();
            let (Some(own), Some(size)) = (number(rank)?, number(world_size)?) else { continue };
            if own >= size {
                return Err(Error::msg(format!(
                    "the environment variables contradict each other: {rank} is {own}, {world_size} is {size}"
                )));
            }
            // A pod of a PyTorchJob is a separate machine, with one process.
            let alone = |value| (starter == Starter::Torch).then_some(value);
            let found = Self {
                starter,
                rank: own,
                world_size: size,
                local_rank: number(local_rank)?.or(alone(0)),
                local_size: number(local_size)?.or(alone(1)),
                master: master(starter, &variable)?,
            };
            return Ok(Some(found).filter(|_| size > 1));
        }
        Ok(None)
    }
}

/// Parses the number that a variable's text is, or begins with: SLURM writes `4(x2),3` for four tasks on each
/// of two machines and three on another.
fn number(name: &str, text: &str) -> Result<usize> {
    let digits = text.trim().split(['(', ',']).next().unwrap_or_default();
    let wrong = |_| Error::msg(format!("the environment variable {name} is `{text}`: expected a number"));
    digits.parse().map_err(wrong)
}

/// `torchrun` itself listens on `MASTER_PORT`, so the port after it is used.
const PORT_AFTER: usize = 1;
/// The port if none is specified: the one after PyTorch's default.
const PORT: usize = 29501;

/// The address of the first process: from `MASTER_ADDR` and `MASTER_PORT`, or the first of SLURM's machines,
/// with a port that jobs are unlikely to share.
fn master(starter: Starter, variable: impl Fn(&str) -> Option<String>) -> Result<Option<String>> {
    if let Some(host) = variable("MASTER_ADDR") {
        let port = variable("MASTER_PORT").map(|text| number("MASTER_PORT", &text)).transpose()?;
        return Ok(Some(format!("{host}:{}", port.map_or(PORT, |port| port + PORT_AFTER))));
    }
    let nodes = variable("SLURM_STEP_NODELIST").filter(|_| starter == Starter::Slurm);
    let job = variable("SLURM_JOB_ID").map(|text| number("SLURM_JOB_ID", &text)).transpose()?.unwrap_or(0);
    Ok(nodes.map(|nodes| format!("{}:{}", first_host(&nodes), 20_000 + job % 10_000)))
}

/// The first machine of SLURM's list: `node[07-09,12],login` begins with `node07`.
fn first_host(nodes: &str) -> String {
    let end = nodes.find([',', '[']).unwrap_or(nodes.len());
    let (prefix, rest) = nodes.split_at(end);
    let Some((range, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) else {
        return prefix.to_string();
    };
    let first = range.split([',', '-']).next().unwrap_or_default();
    let suffix = after.split(',').next().unwrap_or_default();
    format!("{prefix}{first}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Environment>> {
        Environment::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn every_starter_is_recognised() {
        for starter in [Starter::OpenMpi, Starter::Pmi, Starter::Slurm, Starter::Torch] {
            let [rank, size, local_rank, local_size] = starter.variables();
            let found = read(&[(rank, "5"), (size, "8"), (local_rank, "1"), (local_size, "4")]);
            let expected = Environment {
                starter,
                rank: 5,
                world_size: 8,
                local_rank: Some(1),
                local_size: Some(4),
                master: None,
            };
            assert_eq!(found.unwrap().unwrap(), expected);
            // Nothing is known about the machine; a pod has one process.
            let pod = starter == Starter::Torch;
            let found = read(&[(rank, "0"), (size, "2")]).unwrap().unwrap();
            assert_eq!((found.local_rank, found.local_size), (pod.then_some(0), pod.then_some(1)));
            // A single process counts as alone.
            assert_eq!(read(&[(rank, "0"), (size, "1")]).unwrap(), None);
        }
        assert_eq!(read(&[]).unwrap(), None);
    }

    #[test]
    fn the_first_process_is_found() {
        let torch = [("RANK", "1"), ("WORLD_SIZE", "4")];
        let slurm = [("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_JOB_ID", "1234567")];
        let master = |variables: &[(&str, &str)], more: &[(&str, &str)]| {
            read(&[variables, more].concat()).unwrap().unwrap().master
        };
        let is = |host: &str| Some(host.to_string());
        assert_eq!(master(&torch, &[("MASTER_ADDR", "a"), ("MASTER_PORT", "29400")]), is("a:29401"));
        assert_eq!(master(&torch, &[("MASTER_ADDR", "a")]), is("a:29501"));
        assert_eq!(master(&slurm, &[("MASTER_ADDR", "a"), ("SLURM_STEP_NODELIST", "b")]), is("a:29501"));
        for (nodes, first) in [
            ("gpu7", "gpu7"),
            ("gpu7,gpu9", "gpu7"),
            ("node[07-09,12],login", "node07"),
            ("node[3,5]", "node3"),
            ("rack[1-2]-a,x", "rack1-a"),
        ] {
            assert_eq!(master(&slurm, &[("SLURM_STEP_NODELIST", nodes)]), is(&format!("{first}:24567")));
        }
        assert_eq!(master(&torch, &[("SLURM_STEP_NODELIST", "b")]), None);
        let tasks = [("SLURM_STEP_TASKS_PER_NODE", "4(x2),3")];
        assert_eq!(read(&[&slurm[..], &tasks].concat()).unwrap().unwrap().local_size, Some(4));
    }

    #[test]
    fn what_is_inside_counts_before_what_it_is_inside_of() {
        let mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let slurm =
            [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "4"), ("RANK", "3"), ("WORLD_SIZE", "4")];
        let found = read(&[mpi.as_slice(), &slurm].concat()).unwrap().unwrap();
        assert_eq!((found.starter, found.rank), (Starter::OpenMpi, 1));
        assert_eq!(read(&slurm).unwrap().unwrap().starter, Starter::Slurm);
        // In a batch script, before any `srun`.
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]).unwrap(), None);
    }

    #[test]
    fn nonsense_is_refused() {
        let error = |variables: &[(&str, &str)]| read(variables).unwrap_err().to_string();
        assert_eq!(
            error(&[("RANK", "one"), ("WORLD_SIZE", "2")]),
            "the environment variable RANK is `one`: expected a number"
        );
        assert_eq!(
            error(&[("RANK", "2"), ("WORLD_SIZE", "2")]),
            "the environment variables contradict each other: RANK is 2, WORLD_SIZE is 2"
        );
    }
}
