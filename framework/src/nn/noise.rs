//! Randomness inside modules, drawn from a generator of [`Step::rng`](crate::module::Step::rng).

use candle_core::{Device, Shape, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;

use crate::error::Result;

/// Independent normal numbers of mean 0 and variance 1, f32.
pub fn normal(shape: impl Into<Shape>, rng: &mut impl Rng, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.sample(StandardNormal)).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Stochastic depth (Huang et al. 2016): the whole branch `x` (B, ..) of a sample is zero with this probability; the others
/// are scaled up, so that the mean stays. For training alone.
pub fn drop_path(x: &Tensor, probability: f64, rng: &mut impl Rng) -> Result<Tensor> {
    if probability == 0. {
        return Ok(x.clone());
    }
    let kept = 1. - probability;
    let factor = |_| if rng.random_bool(kept) { 1. / kept as f32 } else { 0. };
    let factors: Vec<f32> = (0..x.dim(0)?).map(factor).collect();
    let mut shape = vec![1; x.rank()];
    shape[0] = factors.len();
    let factors = Tensor::from_vec(factors, shape, x.device())?;
    Ok(x.broadcast_mul(&factors.to_dtype(x.dtype())?)?)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::seed::ChaCha8Rng;

    #[test]
    fn whole_samples_are_dropped_and_the_mean_stays() {
        let x = Tensor::ones((4000, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let rows = drop_path(&x, 0.25, &mut rng).unwrap().to_vec2::<f32>().unwrap();
        assert!(rows.iter().all(|row| row[0] == row[1] && (row[0] == 0. || row[0] == 1. / 0.75)));
        let dropped = rows.iter().filter(|row| row[0] == 0.).count();
        // Four standard deviations are 110.
        assert!((890..1110).contains(&dropped), "{dropped}");
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let noise = normal((100, 400), &mut ChaCha8Rng::seed_from_u64(1), &Device::Cpu).unwrap();
        let mean = |x: &Tensor| x.mean_all().unwrap().to_scalar::<f32>().unwrap();
        // Four standard deviations: 4 / sqrt(40000), and sqrt(2) as many.
        assert!(mean(&noise).abs() < 0.02 && (mean(&noise.sqr().unwrap()) - 1.).abs() < 0.03);
    }
}
