//! Operations on many tensors at once: they are concatenated into flat buckets.

use std::ops::Range;

use candle_core::{Shape, Tensor};

use super::Collective;
use crate::error::Result;

/// Approximate number of elements per bucket: large enough that starting an operation costs nothing, small
/// enough that copying a bucket is negligible next to the parameters (25 MB of f32, as in Li et al. 2020,
/// section 3.2.3).
const BUCKET: usize = 25 << 18;

/// The sums of these tensors over all ranks, in the same shapes. All have the same dtype.
pub(crate) fn all_reduce(ranks: &dyn Collective, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    in_buckets(tensors, BUCKET, |bucket| ranks.all_reduce(bucket))
}

/// Rank 0's values of these tensors, in the same shapes. All have the same dtype.
pub(crate) fn broadcast(ranks: &dyn Collective, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    in_buckets(tensors, BUCKET, |bucket| ranks.broadcast(bucket))
}

/// Applies `operation` to all tensors, bucket by bucket. A bucket is full at `size` elements.
fn in_buckets(
    tensors: &[Tensor],
    size: usize,
    operation: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let sizes: Vec<usize> = tensors.iter().map(Tensor::elem_count).collect();
    let mut done = Vec::with_capacity(tensors.len());
    for bucket in buckets_of(&sizes, size) {
        let shapes = tensors[bucket.clone()].iter().map(Tensor::shape);
        done.extend(unpack(&operation(&pack(&tensors[bucket.clone()])?)?, shapes)?);
    }
    Ok(done)
}

/// Divides tensors with these numbers of elements into buckets, in order.
pub(crate) fn buckets(sizes: &[usize]) -> Vec<Range<usize>> {
    buckets_of(sizes, BUCKET)
}

/// A bucket is full at `size` elements; it holds at least one tensor.
fn buckets_of(sizes: &[usize], size: usize) -> Vec<Range<usize>> {
    let (mut buckets, mut first, mut numbers) = (Vec::new(), 0, 0);
    for (i, own) in sizes.iter().enumerate() {
        numbers += own;
        if numbers >= size || i + 1 == sizes.len() {
            buckets.push(first..i + 1);
            (first, numbers) = (i + 1, 0);
        }
    }
    buckets
}

/// Concatenates the tensors, flattened.
pub(crate) fn pack(tensors: &[Tensor]) -> Result<Tensor> {
    let flat = tensors.iter().map(Tensor::flatten_all).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&flat, 0)?)
}

/// Splits a flat tensor into tensors of these shapes.
pub(crate) fn unpack<'s>(flat: &Tensor, shapes: impl Iterator<Item = &'s Shape>) -> Result<Vec<Tensor>> {
    let mut from = 0;
    let each = shapes.map(|shape| {
        let len = shape.elem_count();
        from += len;
        // A copy, not a view: optimizers and candle's operations are fastest on separate storage.
        Ok(flat.narrow(0, from - len, len)?.reshape(shape)?.copy()?)
    });
    each.collect()
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
