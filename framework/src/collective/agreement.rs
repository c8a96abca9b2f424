//! Checks that all ranks are about to train the same thing.

use candle_core::Var;
use sha2::{Digest, Sha256};

use super::Collective;
use crate::error::{Error, Result};

/// What all ranks must have in common: one line per setting, and one per parameter.
pub(crate) struct Identity(Vec<String>);

impl Identity {
    /// From a configuration, one setting per line, and parameters.
    pub(crate) fn new(configuration: &str, params: &[(String, Var)]) -> Self {
        let settings = configuration.lines().map(str::to_string);
        let params = params.iter().map(|(name, var)| format!("parameter `{name}` of shape {:?}", var.dims()));
        Self(settings.chain(params).collect())
    }

    fn text(&self) -> String {
        self.0.join("\n")
    }
}

/// Refuses to train if ranks differ, and reports which rank differs, and how. Usually only 32 bytes per rank
/// are exchanged.
pub(crate) fn check(ranks: &dyn Collective, own: &Identity) -> Result<()> {
    if ranks.is_alone() {
        return Ok(());
    }
    let text = own.text();
    let hashes = ranks.gather_bytes(&Sha256::digest(&text))?;
    let Some(other) = hashes.iter().position(|hash| *hash != hashes[0]) else { return Ok(()) };
    let texts = ranks.gather_bytes(text.as_bytes())?;
    let lines = |rank: usize| -> Vec<String> {
        String::from_utf8_lossy(&texts[rank]).lines().map(str::to_string).collect()
    };
    let (first, second) = (lines(0), lines(other));
    let place = first.iter().zip(&second).position(|(a, b)| a != b).unwrap_or(first.len().min(second.len()));
    let line =
        |lines: &[String]| lines.get(place).map_or("nothing".into(), |line| format!("`{}`", line.trim()));
    Err(Error::msg(format!(
        "rank {other} is configured differently from rank 0: it has {}, rank 0 has {}. All ranks need the same binary, the \
         same configuration and the same data",
        line(&second),
        line(&first)
    )))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use candle_core::{DType, Device};

    use super::*;
    use crate::collective::Threads;

    #[test]
    fn the_rank_that_differs_is_named_with_what_differs() {
        let check = |identity: fn(usize) -> (String, Vec<usize>)| -> Vec<Option<String>> {
            let ranks = Threads::new(3, Duration::from_secs(60));
            std::thread::scope(|scope| {
                let run = |rank: &Threads| {
                    let (configuration, shape) = identity(rank.rank());
                    let var = Var::zeros(shape, DType::F32, &Device::Cpu).unwrap();
                    let own = Identity::new(&configuration, &[("w".into(), var)]);
                    super::check(rank, &own).err().map(|error| error.to_string())
                };
                let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || run(rank))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            })
        };
        assert_eq!(check(|_| ("a = 1\nb = 2".into(), vec![2])), [None, None, None]);
        let lr = check(|rank| (format!("a = 1\nlr = {}", if rank == 2 { 0.1 } else { 0.2 }), vec![2]));
        let expected =
            "rank 2 is configured differently from rank 0: it has `lr = 0.1`, rank 0 has `lr = 0.2`.";
        assert!(lr.iter().all(|error| error.as_ref().unwrap().starts_with(expected)), "{lr:?}");
        let shape = check(|rank| ("a = 1".into(), if rank == 1 { vec![3] } else { vec![2, 1] }));
        let expected = "rank 1 is configured differently from rank 0: it has `parameter `w` of shape [3]`, rank 0 has \
                        `parameter `w` of shape [2, 1]`.";
        assert!(shape.iter().all(|error| error.as_ref().unwrap().starts_with(expected)), "{shape:?}");
    }
}
