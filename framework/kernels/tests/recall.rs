//! Attention to kept states against f64: outputs, and gradients of queries, keys and values.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{Result, Tensor, Var};
use candlepower_kernels::{Kept, no_grad, recall};
use common::*;

/// `recall` composed of candle's own operations.
fn composed(asked: &Tensor, keys: &[&Tensor], values: &[&Tensor], scale: f64) -> Result<Tensor> {
    let (keys, values) =
        (Tensor::stack(keys, 0)?.flatten_from(2)?, Tensor::stack(values, 0)?.flatten_from(2)?);
    let scores = (keys.broadcast_mul(&asked.flatten_from(1)?.unsqueeze(0)?)?.sum_keepdim(2)? * scale)?;
    let powers = scores.broadcast_sub(&scores.max_keepdim(0)?)?.exp()?;
    let weights = powers.broadcast_div(&powers.sum_keepdim(0)?)?;
    values.broadcast_mul(&weights)?.sum(0)?.reshape(asked.shape())
}

/// A function of query, keys and values.
type Asked<'a> = dyn Fn(&Tensor, &[&Tensor], &[&Tensor]) -> Tensor + 'a;

/// Queries twice; the second query is the first result, among states shifted by one. One state occurs twice,
/// one is both a key and a value, and one is not tracked.
fn check(shape: &[usize], seed: u64) {
    let what = format!("{shape:?}");
    let vars: Vec<Var> = (0..5).map(|i| var(&random(shape, seed + i))).collect();
    let wide: Vec<Var> = vars.iter().map(|x| double(x)).collect();
    let plain = random(shape, seed + 9);
    let plain64 = double(&plain);
    let scale = 2. / (shape[1..].iter().product::<usize>() as f64).sqrt();
    let total = |x: &[&Tensor], recall: &Asked| {
        let first = recall(x[0], &[x[1], x[1], x[2]], &[x[5], x[3], x[2]]);
        let second = recall(&first, &[x[1], x[2], x[0]], &[x[3], x[2], x[4]]);
        (loss(&first, seed + 20) + loss(&second, seed + 21)).unwrap()
    };
    let mut tensors: Vec<&Tensor> = vars.iter().map(Var::as_tensor).collect();
    tensors.push(&plain);
    let kept: Vec<Kept> = tensors.iter().map(|x| Kept::new(x).unwrap()).collect();
    let of = |x: &[&Tensor]| -> Vec<Kept> {
        let place = |x: &Tensor| tensors.iter().position(|tensor| tensor.id() == x.id()).unwrap();
        x.iter().map(|x| kept[place(x)].clone()).collect()
    };
    let got = total(&tensors, &|asked, keys, values| recall(asked, &of(keys), &of(values), scale).unwrap());
    let mut tensors64: Vec<&Tensor> = wide.iter().map(Var::as_tensor).collect();
    tensors64.push(&plain64);
    let wanted = total(&tensors64, &|asked, keys, values| composed(asked, keys, values, scale).unwrap());
    assert_close(&format!("loss, {what}"), &got, &wanted);
    let wanted = wanted.backward().unwrap();
    // A second backward pass through the same graph starts from zero.
    for _ in 0..2 {
        let got = got.backward().unwrap();
        for (i, (x, x64)) in vars.iter().zip(&wide).enumerate() {
            assert_close(&format!("gradient {i}, {what}"), &grad(&got, x), &grad(&wanted, x64));
        }
        assert!(got.get(&plain).is_none());
    }
}

#[test]
fn states_are_kept_for_several_uses_at_each_level() {
    at_each_level(|_| {
        check(&[1, 3], 1);
        check(&[3, 5, 7, 3], 2);
        // Several parts, the last one with an odd size.
        check(&[2, 9, 31, 33], 3);
    });
}

#[test]
fn the_same_bits_on_any_threads() {
    let x: Vec<Var> = (0..3).map(|seed| var(&random(&[3, 12, 12, 67], seed))).collect();
    same_bits_on_any_threads(|| {
        let kept: Vec<Kept> = x.iter().map(|x| Kept::new(x).unwrap()).collect();
        let y = recall(&x[0], &kept, &kept, 0.01).unwrap();
        let grads = loss(&y, 3).backward().unwrap();
        [vec![y], x.iter().map(|x| grad(&grads, x)).collect()].concat()
    });
}

#[test]
fn what_is_kept_and_not_used_has_a_gradient_of_zero() {
    let (x, asked) = (var(&random(&[2, 8], 1)), random(&[2, 8], 2));
    let y = (x.as_tensor() * 2.).unwrap();
    let used = [Kept::new(&asked).unwrap()];
    assert!(!recall(&asked, &used, &used, 1.).unwrap().track_op());
    // A single key has all the weight, whatever it is: its gradient is zero, and its value gets the whole
    // gradient.
    let kept = Kept::new(&y).unwrap();
    let found = recall(&asked, &[kept], &[Kept::new(&asked).unwrap()], 1.).unwrap();
    let grads = loss(&found, 3).backward().unwrap();
    assert!(bits(&grad(&grads, &x)).iter().all(|bits| bits << 1 == 0));
    assert!(
        !no_grad(|| recall(&y, &[Kept::new(&y).unwrap()], &[Kept::new(&y).unwrap()], 1.).unwrap()).track_op()
    );
}

#[test]
fn errors_name_what_does_not_fit() {
    let kept = |shape: &[usize]| Kept::new(&random(shape, 1)).unwrap();
    let text = |keys: &[Kept], values: &[Kept]| {
        recall(&random(&[2, 4], 2), keys, values, 1.).unwrap_err().to_string()
    };
    assert!(text(&[], &[]).contains("0 keys"));
    assert!(Kept::new(&random(&[0, 4], 1)).unwrap_err().to_string().contains("no elements"));
    assert!(text(&[kept(&[2, 4])], &[]).contains("1 keys and 0 values"));
    assert!(text(&[kept(&[2, 4])], &[kept(&[2, 5])]).contains("got [2, 5]"));
}
