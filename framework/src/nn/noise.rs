//! Random operations for modules, drawn from the generators of [`Step::rng`](crate::module::Step::rng).

use candle_core::{Device, Shape, Tensor};
use rand::Rng;
use rand_distr::StandardNormal;

use crate::error::{Error, Result};
use crate::module::Step;

/// Independent standard normal values, f32.
pub fn normal(shape: impl Into<Shape>, rng: &mut impl Rng, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.sample(StandardNormal)).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Dropout (Srivastava et al. 2014): in training, sets each value to zero with this probability and scales
/// the others up to keep the mean; outside training, does nothing. `name` distinguishes it from other
/// dropouts in the step.
///
/// The dropped values depend only on seed, step and name, so a resumed run drops the same ones, unlike
/// `candle_nn::Dropout`, which drops different values in every run.
///
/// ```
/// # use candlepower::{nn, prelude::*};
/// # fn example(hidden: &Tensor, step: &Step) -> Result<Tensor> {
/// nn::dropout(hidden, 0.1, step, "hidden")
/// # }
/// ```
pub fn dropout(x: &Tensor, probability: f64, step: &Step, name: &str) -> Result<Tensor> {
    if probability == 0. || !step.is_training() {
        return Ok(x.clone());
    }
    let factors = factors(x.elem_count(), probability, &mut step.rng(name))?;
    let factors = Tensor::from_vec(factors, x.shape(), x.device())?;
    Ok((x * factors.to_dtype(x.dtype())?)?)
}

/// Zero with this probability, otherwise the factor that keeps the mean.
fn factors(count: usize, probability: f64, rng: &mut impl Rng) -> Result<Vec<f32>> {
    if !(0. ..1.).contains(&probability) {
        let message = format!("a drop probability is in [0, 1); this one is {probability}");
        return Err(Error::msg(message));
    }
    let kept = 1. - probability;
    Ok((0..count).map(|_| if rng.random_bool(kept) { 1. / kept as f32 } else { 0. }).collect())
}

/// Stochastic depth (Huang et al. 2016): sets the whole branch `x` (B, ..) of a sample to zero with this
/// probability and scales the others up to keep the mean. Only for training.
pub fn drop_path(x: &Tensor, probability: f64, rng: &mut impl Rng) -> Result<Tensor> {
    if probability == 0. {
        return Ok(x.clone());
    }
    let factors = factors(x.dim(0)?, probability, rng)?;
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
    fn values_are_dropped_in_training_by_the_name_and_the_step() {
        let x = Tensor::ones((50, 200), candle_core::DType::F32, &Device::Cpu).unwrap();
        let training = |index| Step::training(index, 0, 7, "", false);
        let values = |step: &Step, name: &str| -> Vec<f32> {
            dropout(&x, 0.2, step, name).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let first = values(&training(3), "a");
        assert!(first.iter().all(|x| [0., 1.25].contains(x)));
        let dropped = first.iter().filter(|x| **x == 0.).count();
        // Four standard deviations are 160.
        assert!((1840..2160).contains(&dropped), "{dropped}");
        assert_eq!(first, values(&training(3), "a"));
        assert_ne!(first, values(&training(3), "b"));
        assert_ne!(first, values(&training(4), "a"));
        assert_eq!(values(&Step::evaluation(3, 0, 7, false), "a"), vec![1.; 10_000]);
        assert!(dropout(&x, 1., &training(3), "a").is_err());
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let noise = normal((100, 400), &mut ChaCha8Rng::seed_from_u64(1), &Device::Cpu).unwrap();
        let mean = |x: &Tensor| x.mean_all().unwrap().to_scalar::<f32>().unwrap();
        // Four standard deviations: 4 / sqrt(40000) for the mean, and sqrt(2) times that for the variance.
        assert!(mean(&noise).abs() < 0.02 && (mean(&noise.sqr().unwrap()) - 1.).abs() < 0.03);
    }
}
