//! Per-sample values collected during an evaluation, for metrics that are not means.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Device, Tensor};

use crate::collective::Collective;
use crate::error::{Error, Result};

/// The values that a module collected for all samples of an evaluation
/// ([`Step::collect`](crate::module::Step::collect)), on the CPU, in sample order, independent of the ranks.
#[derive(Default)]
pub struct Collected {
    /// By name, then by batch number.
    parts: HashMap<String, BTreeMap<usize, Tensor>>,
}

impl Collected {
    /// The values collected under this name, (N, ...) for N samples.
    ///
    /// # Errors
    /// If nothing was collected under this name, or the values of the batches cannot be concatenated.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let Some(parts) = self.parts.get(name) else {
            let mut names: Vec<&str> = self.parts.keys().map(String::as_str).collect();
            names.sort_unstable();
            return Err(Error::msg(format!("nothing was collected as `{name}`, only {}", names.join(", "))));
        };
        let parts: Vec<&Tensor> = parts.values().collect();
        Tensor::cat(&parts, 0).map_err(|error| Error::msg(format!("what was collected as `{name}`: {error}")))
    }

    /// Whether nothing was collected.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Adds the values collected for batch number `batch`, which has `samples` samples.
    pub(crate) fn add(&mut self, batch: usize, samples: usize, name: &str, rows: &Tensor) -> Result<()> {
        if rows.dims().first() != Some(&samples) {
            let shape = rows.dims();
            let message = format!(
                "`{name}` is collected with shape {shape:?}: expected a row for each of {samples} samples"
            );
            return Err(Error::msg(message));
        }
        let rows = rows.to_device(&Device::Cpu)?.force_contiguous()?;
        self.parts.entry(name.to_string()).or_default().insert(batch, rows);
        Ok(())
    }

    /// Combines the values of all ranks.
    pub(crate) fn over(self, ranks: &dyn Collective) -> Result<Self> {
        if ranks.is_alone() {
            return Ok(self);
        }
        let unreadable = Error::content("what ranks have collected");
        let own = self.parts.iter().flat_map(|(name, parts)| {
            parts.iter().map(move |(batch, rows)| (format!("{batch}/{name}"), rows))
        });
        let own = safetensors::serialize(own, None).map_err(unreadable)?;
        let mut all = Self::default();
        for bytes in ranks.gather_bytes(&own)? {
            for (key, rows) in candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)? {
                if let Some((batch, name)) = key.split_once('/')
                    && let Ok(batch) = batch.parse()
                {
                    all.add(batch, rows.dim(0)?, name, &rows)?;
                }
            }
        }
        Ok(all)
    }
}
