//! Sums of gates, memory updates and output gates against f64, forward and backward.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{D, Result, Tensor, Var};
use candlepower_kernels::{MemoryUpdate, OutputGate, blend, memory_update, open_output, sum_gates};
use common::*;
use proptest::prelude::*;

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.)?.recip()
}

fn gate(gates: &Tensor, place: usize, width: usize) -> Result<Tensor> {
    gates.narrow(D::Minus1, place * width, width)
}

/// Runs `got` in f32 and `wanted` in f64 on the same values; compares outputs and gradients.
fn check(
    what: &str,
    inputs: &[Tensor],
    got: impl Fn(&[Var]) -> Tensor,
    wanted: impl Fn(&[Var]) -> Result<Tensor>,
) {
    let single: Vec<Var> = inputs.iter().map(var).collect();
    let wide: Vec<Var> = inputs.iter().map(double).collect();
    let (got, wanted) = (got(&single), wanted(&wide).unwrap());
    assert_close(&format!("{what}, output"), &got, &wanted);
    let (got, wanted) = (loss(&got, 9).backward().unwrap(), loss(&wanted, 9).backward().unwrap());
    for (index, (single, wide)) in single.iter().zip(&wide).enumerate() {
        assert_close(&format!("{what}, gradient {index}"), &grad(&got, single), &grad(&wanted, wide));
    }
}

fn check_memory(rows: usize, width: usize, update: MemoryUpdate, seed: u64) {
    const GATES: usize = 4;
    let inputs = [random(&[rows, GATES * width], seed), random(&[rows, width], seed + 1)];
    check(
        &format!("{rows} x {width}, {update:?}"),
        &inputs,
        |x| memory_update(&x[0], &x[1], update).unwrap(),
        |x| {
            let kept = if update.squash { x[1].tanh()? } else { x[1].as_tensor().clone() };
            let kept = match update.forget {
                Some((place, bias)) => (sigmoid(&(gate(&x[0], place, width)? + f64::from(bias))?)? * kept)?,
                None => kept,
            };
            let taken = gate(&x[0], update.candidate, width)?.tanh()?;
            kept + (sigmoid(&gate(&x[0], update.input, width)?)? * taken)?
        },
    );
}

fn check_output(rows: usize, width: usize, output: OutputGate, more: bool, seed: u64) {
    let (place, gates) = (1, 3);
    let mut inputs = vec![random(&[rows, gates * width], seed), random(&[rows, width], seed + 1)];
    inputs.extend(more.then(|| random(&[rows, width], seed + 2)));
    check(
        &format!("{rows} x {width}, {output:?}"),
        &inputs,
        |x| open_output(output, &x[0], place, x.get(2).map(Var::as_tensor), &x[1]).unwrap(),
        |x| {
            let o = gate(&x[0], place, width)?;
            let o = if more { (o + x[2].as_tensor())? } else { o };
            let open = match output {
                OutputGate::Sigmoid => sigmoid(&o)?,
                OutputGate::Tanh => o.tanh()?,
                OutputGate::SigmoidOfTanh => sigmoid(&o.tanh()?)?,
            };
            open * x[1].tanh()?
        },
    );
}

const OUTPUTS: [OutputGate; 3] = [OutputGate::Sigmoid, OutputGate::Tanh, OutputGate::SigmoidOfTanh];

#[test]
fn memories_and_outputs_at_each_level() {
    at_each_level(|_| {
        for (rows, width) in [(1, 1), (7, 16), (300, 40)] {
            for forget in [None, Some((3, 1.)), Some((0, 0.))] {
                for squash in [false, true] {
                    check_memory(rows, width, MemoryUpdate { input: 2, candidate: 1, forget, squash }, 1);
                }
            }
            for (output, more) in OUTPUTS.iter().flat_map(|&output| [(output, true), (output, false)]) {
                check_output(rows, width, output, more, 2);
            }
        }
    });
}

/// `roles` gives the tensor and the gate index of the gate, a and b.
fn check_blend(rows: usize, width: usize, gates: &[usize], roles: [(usize, usize); 3], seed: u64) {
    let inputs: Vec<Tensor> =
        gates.iter().enumerate().map(|(i, gates)| random(&[rows, gates * width], seed + i as u64)).collect();
    check(
        &format!("{rows} x {width}, {roles:?} of {gates:?}"),
        &inputs,
        |x| {
            let [gate, a, b] = roles.map(|(tensor, place)| (x[tensor].as_tensor(), place));
            blend(width, gate, a, b).unwrap()
        },
        |x| {
            let part = |role: usize| gate(&x[roles[role].0], roles[role].1, width);
            let open = sigmoid(&part(0)?)?;
            (&open * part(1)?)? + ((1. - &open)? * part(2)?)?
        },
    );
}

#[test]
fn blends_at_each_level() {
    at_each_level(|_| {
        for (rows, width) in [(1, 1), (7, 16), (300, 40)] {
            check_blend(rows, width, &[1, 1, 1], [(0, 0), (1, 0), (2, 0)], 1);
            check_blend(rows, width, &[3, 2], [(0, 0), (1, 1), (0, 2)], 2);
            check_blend(rows, width, &[3], [(0, 2), (0, 0), (0, 1)], 3);
        }
    });
}

/// The sum of gates, composed of candle's own operations.
fn summed(gates: usize, width: usize, terms: &[(Tensor, Vec<usize>)]) -> Result<Tensor> {
    let mut sums = vec![(terms[0].0.narrow(D::Minus1, 0, width)? * 0.)?; gates];
    for (values, places) in terms {
        for (index, &place) in places.iter().enumerate() {
            sums[place] = (&sums[place] + gate(values, index, width)?)?;
        }
    }
    Tensor::cat(&sums, D::Minus1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..Default::default() })]
    #[test]
    fn sums_in_any_order(
        rows in 1..40usize, width in 1..40usize, gates in 1..8usize, terms in 1..6usize, level in 0..3usize, seed in 0..1000u64,
    ) {
        let level = [candlepower_kernels::Level::Portable, candlepower_kernels::Level::Avx2, candlepower_kernels::Level::Avx512][level];
        candlepower_kernels::Level::force(Some(level));
        // Each term has some of the gates in a different order: ascending or descending, from one of them on.
        let places: Vec<Vec<usize>> = (0..terms)
            .map(|term| {
                let first = term + seed as usize;
                let step = if term % 2 == 0 { 1 } else { gates - 1 };
                (0..1 + first % gates).map(|i| (first + i * step) % gates).collect()
            })
            .collect();
        let inputs: Vec<Tensor> = places.iter().enumerate()
            .map(|(term, places)| random(&[rows, places.len() * width], seed + term as u64)).collect();
        check(
            &format!("{rows} rows, {width} wide, {places:?} of {gates}"),
            &inputs,
            |x| {
                let terms: Vec<(&Tensor, &[usize])> = x.iter().zip(&places).map(|(x, p)| (x.as_tensor(), &p[..])).collect();
                sum_gates(gates, &terms).unwrap()
            },
            |x| summed(gates, width, &x.iter().zip(&places).map(|(x, p)| (x.as_tensor().clone(), p.clone())).collect::<Vec<_>>()),
        );
        candlepower_kernels::Level::force(None);
    }
}

#[test]
fn the_same_bits_on_any_threads() {
    same_bits_on_any_threads(|| {
        let (gates, memory) = (var(&random(&[4000, 60], 1)), var(&random(&[4000, 20], 2)));
        let update = MemoryUpdate { input: 0, candidate: 1, forget: Some((2, 1.)), squash: true };
        let sum = sum_gates(3, &[(&gates, &[0, 1, 2]), (&memory, &[1])]).unwrap();
        let after = memory_update(&sum, &memory, update).unwrap();
        let output = open_output(OutputGate::Tanh, &sum, 2, Some(&memory), &after).unwrap();
        let output = blend(20, (&sum, 0), (&output, 0), (&memory, 0)).unwrap();
        let grads = loss(&output, 3).backward().unwrap();
        vec![output, grad(&grads, &gates), grad(&grads, &memory)]
    });
}

#[test]
fn errors_name_what_does_not_fit() {
    let (gates, memory) = (random(&[2, 12], 1), random(&[2, 4], 2));
    let update = MemoryUpdate { input: 0, candidate: 1, forget: Some((3, 1.)), squash: false };
    let text = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(text(memory_update(&gates, &memory, update)).contains("no gate 3 among 3"));
    assert!(text(blend(4, (&gates, 0), (&gates, 3), (&memory, 0))).contains("no gate 3 among 3"));
    assert!(text(blend(4, (&gates, 0), (&gates, 1), (&gates, 0))).contains("twice"));
    assert!(text(sum_gates(3, &[(&gates, &[0, 2, 0])])).contains("a term says twice what gate 0 is"));
    assert!(text(blend(5, (&gates, 0), (&gates, 1), (&gates, 2))).contains("(.., k 5)"));
    let number = random(&[], 5);
    assert!(text(blend(4, (&gates, 0), (&number, 0), (&memory, 0))).contains("got []"));
    assert!(text(sum_gates(3, &[(&gates, &[0, 1, 2]), (&number, &[0])])).contains("got []"));
    let fits = MemoryUpdate { forget: None, ..update };
    assert!(text(memory_update(&gates, &random(&[2, 5], 3), fits)).contains("[2, 12] and [2, 5]"));
    assert!(text(open_output(OutputGate::Tanh, &gates, 7, None, &memory)).contains("no gate 7"));
    let more = random(&[3, 4], 4);
    assert!(text(open_output(OutputGate::Tanh, &gates, 0, Some(&more), &memory)).contains("[3, 4]"));
    assert!(text(sum_gates(2, &[(&gates, &[0, 1, 2])])).contains("no gate 2 among 2"));
    assert!(text(sum_gates(3, &[(&gates, &[0, 1, 2]), (&memory, &[0, 1])])).contains("for 2 gates"));
    assert!(text(sum_gates(3, &[])).contains("at least one term"));
}
