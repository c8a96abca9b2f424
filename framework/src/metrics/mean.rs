//! Means over samples that stay on the device until they are read.

use candle_core::{DType, Device, Tensor};
use candlepower_kernels::Download;
use indexmap::IndexMap;

use crate::collective::Collective;
use crate::error::{Error, Result};

/// A rank's sums by name, with their weights, both as the bits of an f64: decimals could be rounded, and
/// cannot represent NaN or infinity.
pub type Sums = Vec<(String, u64, u64)>;

/// Weighted means of scalars by name, in order of first appearance.
#[derive(Default)]
pub struct Means {
    sums: IndexMap<String, (Tensor, f64)>,
    /// The download of the device's sums, if started, in order.
    coming: Option<Box<Download>>,
}

impl Means {
    /// Adds a scalar with this weight: the number of samples that it is the mean of.
    pub fn add(&mut self, name: &str, value: &Tensor, weight: f64) -> Result<()> {
        if value.elem_count() != 1 {
            let shape = value.dims();
            return Err(Error::msg(format!(
                "metric `{name}` is logged with shape {shape:?}: expected a scalar"
            )));
        }
        if !(weight.is_finite() && weight >= 0.) {
            let message =
                format!("metric `{name}` is logged with weight {weight}: expected a number of at least 0");
            return Err(Error::msg(message));
        }
        if weight == 0. {
            // The mean over nothing may be NaN, and does not count.
            return self.add_sum(name, Tensor::zeros(1, DType::F64, &Device::Cpu)?, 0.);
        }
        if !value.device().is_cpu() {
            self.coming = None;
        }
        self.add_sum(name, (value.detach().flatten_all()?.to_dtype(DType::F64)? * weight)?, weight)
    }

    fn add_sum(&mut self, name: &str, weighted: Tensor, weight: f64) -> Result<()> {
        match self.sums.get_mut(name) {
            Some((sum, weights)) => {
                // Earlier values may have been plain numbers on the CPU: move their sum to the device.
                if sum.device().is_cpu() {
                    *sum = sum.to_device(weighted.device())?;
                }
                *sum = (&*sum + weighted.to_device(sum.device())?)?;
                *weights += weight;
            }
            None => {
                self.sums.insert(name.to_string(), (weighted, weight));
            }
        }
        Ok(())
    }

    /// Adds the sums of another accumulator.
    pub(crate) fn merge(&mut self, others: Means) -> Result<()> {
        self.coming = None;
        others.sums.into_iter().try_for_each(|(name, (sum, weight))| self.add_sum(&name, sum, weight))
    }

    /// Takes over the sums of another accumulator, replacing sums of the same names.
    pub(crate) fn replace(&mut self, others: Means) {
        if !others.is_empty() {
            self.coming = None;
        }
        self.sums.extend(others.sums);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Adds the sums of a rank.
    pub(crate) fn merge_sums(&mut self, sums: &Sums) -> Result<()> {
        sums.iter().try_for_each(|(name, sum, weight)| {
            let sum = Tensor::new(&[f64::from_bits(*sum)], &Device::Cpu)?;
            self.add_sum(name, sum, f64::from_bits(*weight))
        })
    }

    /// A copy of the sums, to read while more values are added here.
    pub(crate) fn copied(&self) -> Means {
        Means { sums: self.sums.clone(), coming: None }
    }

    /// Starts reading. Work queued on the device afterwards does not delay it.
    pub(crate) fn begin(&mut self) -> Result<()> {
        let on_device = self.sums_on(false);
        if !on_device.is_empty() {
            self.coming = Some(Box::new(Download::start(&Tensor::cat(&on_device, 0)?)?));
        }
        Ok(())
    }

    /// The sums on the CPU, or those on a device.
    fn sums_on(&self, cpu: bool) -> Vec<&Tensor> {
        self.sums.values().map(|(sum, _)| sum).filter(|sum| sum.device().is_cpu() == cpu).collect()
    }

    /// Reads every mean. The only place that waits for the device.
    pub fn read(self) -> Result<IndexMap<String, f64>> {
        Ok(self.read_sums()?.into_iter().map(|(name, sum, weight)| (name, sum / weight)).collect())
    }

    /// Reads every mean over the values of all ranks, in one exchange. Ranks may have different metrics.
    pub(crate) fn read_over(self, ranks: &dyn Collective) -> Result<IndexMap<String, f64>> {
        if ranks.is_alone() {
            return self.read();
        }
        let mut sums: IndexMap<String, (f64, f64)> = IndexMap::new();
        for (name, sum, weight) in self.gather(ranks)?.into_iter().flatten() {
            let (sums, weights) = sums.entry(name).or_default();
            *sums += f64::from_bits(sum);
            *weights += f64::from_bits(weight);
        }
        Ok(sums.into_iter().map(|(name, (sum, weight))| (name, sum / weight)).collect())
    }

    /// Gathers the sums of each rank on all ranks.
    pub(crate) fn gather(self, ranks: &dyn Collective) -> Result<Vec<Sums>> {
        let own = self.read_sums()?.into_iter();
        let own: Sums = own.map(|(name, sum, weight)| (name, sum.to_bits(), weight.to_bits())).collect();
        if ranks.is_alone() {
            return Ok(vec![own]);
        }
        let own = serde_json::to_vec(&own).map_err(Error::content("metrics"))?;
        let parts = ranks.gather_bytes(&own)?;
        parts.iter().map(|part| serde_json::from_slice(part).map_err(Error::content("metrics"))).collect()
    }

    /// Name, weighted sum and total weight of every metric. Waits for the device only once.
    fn read_sums(mut self) -> Result<Vec<(String, f64, f64)>> {
        if self.coming.is_none() {
            self.begin()?;
        }
        let on_device = self.coming.take().map(|coming| coming.finish()).transpose()?;
        let here = self.sums_on(true);
        let here = if here.is_empty() { None } else { Some(Tensor::cat(&here, 0)?) };
        let values = |sums: Option<Tensor>| sums.map_or(Ok(Vec::new()), |sums| sums.to_vec1::<f64>());
        let (mut here, mut on_device) = (values(here)?.into_iter(), values(on_device)?.into_iter());
        let value = |(name, (sum, weight)): (String, (Tensor, f64))| {
            let value = if sum.device().is_cpu() { here.next() } else { on_device.next() };
            Some((name, value?, weight))
        };
        Ok(self.sums.into_iter().filter_map(value).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_weighted_by_samples() {
        let mut means = Means::default();
        let scalar = |x: f32| Tensor::new(x, &Device::Cpu).unwrap();
        means.add("loss", &scalar(1.), 3.).unwrap();
        means.add("loss", &scalar(5.), 1.).unwrap();
        let error = means.add("mse", &scalar(1.).broadcast_as(3).unwrap(), 1.).unwrap_err();
        assert_eq!(error.to_string(), "metric `mse` is logged with shape [3]: expected a scalar");
        assert_eq!(means.read().unwrap()["loss"], 2.);
    }
}
