//! Many tensors in few operations: they are laid one behind the other in flat buckets.

use candle_core::Tensor;

use super::Collective;
use crate::error::Result;

/// Numbers in a bucket, about: large enough that an operation's start costs nothing, small enough that the copies of a
/// bucket do not matter beside the parameters (25 MB of f32, as in Li et al. 2020, section 3.2.3).
const BUCKET: usize = 25 << 18;

/// The sums over all ranks of these tensors, in the same shapes. All are of one type.
pub(crate) fn all_reduce(ranks: &dyn Collective, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    in_buckets(tensors, BUCKET, |bucket| ranks.all_reduce(bucket))
}

/// Rank 0's values of these tensors, in the same shapes. All are of one type.
pub(crate) fn broadcast(ranks: &dyn Collective, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    in_buckets(tensors, BUCKET, |bucket| ranks.broadcast(bucket))
}

/// What `operation` makes of all tensors, bucket by bucket. A bucket is full with `size` numbers.
fn in_buckets(
    tensors: &[Tensor],
    size: usize,
    operation: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let mut done = Vec::with_capacity(tensors.len());
    let mut rest = tensors;
    while !rest.is_empty() {
        let (bucket, others) = rest.split_at(bucket_len(rest, size));
        let flat = bucket.iter().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
        let flat = operation(&Tensor::cat(&flat, 0)?)?;
        let mut from = 0;
        for tensor in bucket {
            let len = tensor.elem_count();
            // A copy, and not a view: optimizers and candle's operations are quickest on a storage of one's own.
            done.push(flat.narrow(0, from, len)?.reshape(tensor.shape())?.copy()?);
            from += len;
        }
        rest = others;
    }
    Ok(done)
}

/// How many of the first tensors fill a bucket: at least one.
fn bucket_len(tensors: &[Tensor], size: usize) -> usize {
    let mut numbers = 0;
    let full = tensors.iter().position(|tensor| {
        numbers += tensor.elem_count();
        numbers >= size
    });
    full.map_or(tensors.len(), |last| last + 1)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn buckets_hold_every_tensor_once_in_its_shape() {
        let shapes: [&[usize]; 5] = [&[2, 3], &[1], &[4], &[], &[2, 1, 2]];
        let tensor = |(i, shape): (usize, &&[usize])| Tensor::full(i as f32, *shape, &Device::Cpu).unwrap();
        let tensors: Vec<Tensor> = shapes.iter().enumerate().map(tensor).collect();
        for (size, expected) in [(7, vec![7, 9]), (1, vec![6, 1, 4, 1, 4]), (100, vec![16])] {
            let sizes = RefCell::new(Vec::new());
            let double = |bucket: &Tensor| {
                sizes.borrow_mut().push(bucket.elem_count());
                Ok((bucket * 2.)?)
            };
            let doubled = in_buckets(&tensors, size, double).unwrap();
            assert_eq!(sizes.into_inner(), expected);
            for (i, (tensor, shape)) in doubled.iter().zip(shapes).enumerate() {
                assert_eq!((tensor.dims(), tensor.dtype()), (shape, DType::F32));
                let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(values.iter().all(|x| *x == 2. * i as f32));
            }
        }
    }
}
