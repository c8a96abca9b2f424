//! Who this process is among those that were started together: what their starter says in environment variables.

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
    /// `torchrun`, a Kubernetes PyTorchJob, and whatever else sets `RANK` and `WORLD_SIZE`.
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

    /// The variables of rank, world size and rank on this machine.
    fn variables(self) -> [&'static str; 3] {
        match self {
            Starter::OpenMpi => {
                ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"]
            }
            Starter::Pmi => ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
            // A batch script has SLURM_PROCID and SLURM_NTASKS, too, and is no task of its own: only a step counts.
            Starter::Slurm => ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"],
            Starter::Torch => ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
        }
    }
}

/// This process among those that were started together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Environment {
    /// What started them.
    pub starter: Starter,
    /// Which of them this is, from 0.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
    /// Which of those on this machine, where that is said.
    pub local_rank: Option<usize>,
}

impl Environment {
    /// What this process's variables say; nothing where it was started alone.
    pub fn read() -> Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// The same for given variables. `mpirun` inside of `srun` or of a Kubernetes pod counts before what it is inside of.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        for starter in [Starter::OpenMpi, Starter::Pmi, Starter::Slurm, Starter::Torch] {
            let [rank, world_size, local_rank] = starter.variables();
            let number = |name: &str| -> Result<Option<usize>> {
                let Some(text) = variable(name) else { return Ok(None) };
                let wrong =
                    |_| Error::msg(format!("the environment variable {name} is `{text}`: expected a number"));
                text.trim().parse().map(Some).map_err(wrong)
            };
            let (Some(own), Some(size)) = (number(rank)?, number(world_size)?) else { continue };
            if own >= size {
                return Err(Error::msg(format!(
                    "the environment variables contradict each other: {rank} is {own}, {world_size} is {size}"
                )));
            }
            let local_rank = number(local_rank)?;
            return Ok(Some(Self { starter, rank: own, world_size: size, local_rank }).filter(|_| size > 1));
        }
        Ok(None)
    }
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
        let cases = [
            (
                Starter::OpenMpi,
                ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
            ),
            (Starter::Pmi, ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"]),
            (Starter::Slurm, ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"]),
            (Starter::Torch, ["RANK", "WORLD_SIZE", "LOCAL_RANK"]),
        ];
        for (starter, [rank, size, local]) in cases {
            let found = read(&[(rank, "5"), (size, "8"), (local, "1")]).unwrap().unwrap();
            assert_eq!(found, Environment { starter, rank: 5, world_size: 8, local_rank: Some(1) });
            assert_eq!(read(&[(rank, "0"), (size, "2")]).unwrap().unwrap().local_rank, None);
            // One alone is alone.
            assert_eq!(read(&[(rank, "0"), (size, "1")]).unwrap(), None);
        }
        assert_eq!(read(&[]).unwrap(), None);
    }

    #[test]
    fn what_is_inside_counts_before_what_it_is_inside_of() {
        let mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        let slurm =
            [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "4"), ("RANK", "3"), ("WORLD_SIZE", "4")];
        let found = read(&[mpi.as_slice(), &slurm].concat()).unwrap().unwrap();
        assert_eq!((found.starter, found.rank), (Starter::OpenMpi, 1));
        assert_eq!(read(&slurm).unwrap().unwrap().starter, Starter::Slurm);
        // A batch script, before any `srun`.
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
