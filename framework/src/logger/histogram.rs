//! Histograms with TensorFlow's buckets.

use candle_core::{DType, Tensor};
use tfrecord::protobuf::HistogramProto;

use crate::error::{Error, Result};

/// Counts a tensor's finite values in buckets that grow by a tenth away from zero; `None` if no value is
/// finite.
pub(super) fn histogram(values: &Tensor) -> Result<Option<HistogramProto>> {
    // TensorFlow's limits end at 1e20; exploding gradients do not.
    let mut limits = HistogramProto::tf_default().bucket_limit;
    limits.push(f64::MAX);
    let mut histogram = HistogramProto::new(limits).map_err(message)?;
    let values: Vec<f64> = values.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    for value in values.into_iter().filter(|value| value.is_finite()) {
        histogram.try_add_one(value).map_err(message)?;
    }
    Ok((histogram.num > 0.).then(|| compact(histogram)))
}

/// Removes empty buckets, except directly before a filled one, where the limit marks the start of the filled
/// bucket. The first bucket starts at the minimum; an empty one before it would have a negative width.
fn compact(mut histogram: HistogramProto) -> HistogramProto {
    let (limits, counts) = (&histogram.bucket_limit, &histogram.bucket);
    let needed = |&i: &usize| counts[i] > 0. || counts.get(i + 1).is_some_and(|next| *next > 0.);
    let kept: Vec<usize> = (0..counts.len()).skip_while(|i| counts[*i] == 0.).filter(needed).collect();
    (histogram.bucket_limit, histogram.bucket) = kept.into_iter().map(|i| (limits[i], counts[i])).unzip();
    histogram
}

fn message(error: tfrecord::Error) -> Error {
    Error::msg(format!("histogram: {error}"))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn of(values: &[f32]) -> HistogramProto {
        histogram(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap().unwrap()
    }

    #[test]
    fn buckets_hold_every_value_between_their_limits() {
        let values = [-2., -1e-30, 0., 0., 1e-30, 0.5, 0.51, 3., 1e25, -1e3];
        let histogram = of(&values);
        assert_eq!((histogram.min, histogram.max, histogram.num), (-1e3, 1e25f32 as f64, 10.));
        assert_eq!(histogram.bucket.iter().sum::<f64>(), 10.);
        let sum: f64 = values.iter().map(|x| *x as f64).sum();
        let squares: f64 = values.iter().map(|x| (*x as f64).powi(2)).sum();
        assert_eq!((histogram.sum, histogram.sum_squares), (sum, squares));
        let mut low = f64::MIN;
        for (limit, count) in histogram.iter() {
            let inside = values.iter().filter(|x| low < **x as f64 && **x as f64 <= limit).count();
            assert_eq!(count, inside as f64, "({low}, {limit}]");
            low = limit;
        }
        // Values closer to zero than 1e-12 count as zero on their side; 0.5 and 0.51 share a bucket.
        assert_eq!(histogram.bucket.iter().filter(|count| **count > 0.).count(), 7);
        assert!(histogram.bucket.first() > Some(&0.) && histogram.bucket.last() > Some(&0.), "{histogram:?}");
        assert!(histogram.bucket.windows(2).all(|pair| pair != [0., 0.]), "{histogram:?}");
    }

    #[test]
    fn half_precision_is_counted_and_what_is_not_finite_left_out() {
        let halves = Tensor::new(&[[1f32, f32::NAN], [f32::INFINITY, -4.]], &Device::Cpu).unwrap();
        let histogram = histogram(&halves.to_dtype(DType::BF16).unwrap()).unwrap().unwrap();
        assert_eq!((histogram.min, histogram.max, histogram.num), (-4., 1., 2.));
        let nothing = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
        assert_eq!(super::histogram(&nothing).unwrap(), None);
    }
}
