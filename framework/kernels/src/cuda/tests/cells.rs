//! Tests of the pointwise parts of recurrent cells.

use super::{Host, assert_close, at, random, run};
use crate::cuda::arguments::{Blend, Blended, MOST_GATES, MemoryUpdate, OpenOutput, SumGates, Term};
use crate::cuda::sources::CELLS;
use crate::{OutputGate, blend, memory_update, open_output, sum_gates};
use candle_core::{Device, Result, Tensor, Var};

const ROWS: usize = 5;
const WIDTH: usize = 4;
const TOLERANCE: f32 = 1e-6;

/// The op's result on the CPU and, given the gradient `d` of the result, the gradients of its inputs (rows,
/// columns).
fn on_cpu(inputs: &[&[f32]], d: &[f32], op: impl Fn(&[Var]) -> Result<Tensor>) -> Vec<Vec<f32>> {
    let var = |x: &&[f32]| Var::from_slice(x, (ROWS, x.len() / ROWS), &Device::Cpu).unwrap();
    let vars: Vec<Var> = inputs.iter().map(var).collect();
    let y = op(&vars).unwrap();
    let d = Tensor::from_slice(d, y.shape(), &Device::Cpu).unwrap();
    let gradients = (&y * d).unwrap().sum_all().unwrap().backward().unwrap();
    let all = std::iter::once(y).chain(vars.iter().map(|x| gradients.get(x).unwrap().clone()));
    all.map(|x| x.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

#[test]
fn gates_are_summed() {
    let Some(host) = Host::new() else { return };
    let (gates, places) = (3, [&[2usize, 0][..], &[1], &[0, 1, 2]]);
    let terms: Vec<Vec<f32>> = (0..3).map(|i| random(ROWS * places[i].len() * WIDTH, i as u64)).collect();
    let inputs: Vec<&[f32]> = terms.iter().map(|x| &x[..]).collect();
    let d = random(ROWS * gates * WIDTH, 9);
    let expected = on_cpu(&inputs, &d, |x| {
        sum_gates(gates, &x.iter().map(Var::as_tensor).zip(places).collect::<Vec<_>>())
    });
    for at_once in [1, WIDTH] {
        let sum = vec![f32::NAN; ROWS * gates * WIDTH];
        let mut all = [Term::default(); 3];
        for ((term, values), places) in all.iter_mut().zip(&terms).zip(places) {
            let stride = (places.len() * WIDTH) as u32;
            *term = Term { at: at(values), stride, places: [-1; MOST_GATES] };
            for (gate, place) in places.iter().enumerate() {
                term.places[*place] = (gate * WIDTH) as i32;
            }
        }
        let [rows, gates, width] = [ROWS, gates, WIDTH].map(|n| n as u32);
        let arguments = SumGates { terms: all, sum: at(&sum), rows, gates, width };
        run(host, &CELLS, &format!("sum_gates_{at_once}"), sum.len() / at_once, arguments);
        assert_close("sum", &sum, &expected[0], TOLERANCE);
    }
}

#[test]
fn memories_are_updated() {
    let Some(host) = Host::new() else { return };
    const COUNT: usize = 4;
    let (gates, memory, d) =
        (random(ROWS * COUNT * WIDTH, 1), random(ROWS * WIDTH, 2), random(ROWS * WIDTH, 3));
    for ((forget, squash), at_once) in [(None, false), (Some((3, 1.)), true), (Some((0, 0.)), false)]
        .into_iter()
        .flat_map(|case| [1, WIDTH].map(|at_once| (case, at_once)))
    {
        let update = crate::MemoryUpdate { input: 2, candidate: 1, forget, squash };
        let expected = on_cpu(&[&gates, &memory], &d, |x| memory_update(&x[0], &x[1], update));
        let (to, d_gates) = (vec![f32::NAN; memory.len()], vec![f32::NAN; gates.len()]);
        let forwards = MemoryUpdate {
            gates: at(&gates),
            memory: at(&memory),
            d: 0,
            to: at(&to),
            d_gates: at(&d_gates),
            input: 2,
            candidate: 1,
            forget: forget.map_or(-1, |(place, _)| place as i32),
            bias: forget.map_or(0., |(_, bias)| bias),
            squash: u32::from(squash),
            rows: ROWS as u32,
            width: WIDTH as u32,
            count: COUNT as u32,
        };
        let kernel = format!("memory_update_{at_once}");
        run(host, &CELLS, &kernel, to.len() / at_once, forwards);
        assert_close(&kernel, &to, &expected[0], TOLERANCE);
        run(host, &CELLS, &kernel, to.len() / at_once, MemoryUpdate { d: at(&d), ..forwards });
        assert_close("gates", &d_gates, &expected[1], TOLERANCE);
        assert_close("memory", &to, &expected[2], TOLERANCE);
    }
}

#[test]
fn outputs_are_opened() {
    let Some(host) = Host::new() else { return };
    const COUNT: usize = 3;
    let gates = random(ROWS * COUNT * WIDTH, 1);
    let [y, more, d] = [2, 3, 4].map(|seed| random(ROWS * WIDTH, seed));
    let kinds = [OutputGate::Sigmoid, OutputGate::Tanh, OutputGate::SigmoidOfTanh];
    for (kind, gate) in kinds.into_iter().enumerate() {
        for (at_once, with_more) in [(1, false), (WIDTH, false), (1, true), (WIDTH, true)] {
            let inputs = [&gates[..], &y, &more];
            let expected = on_cpu(&inputs[..2 + usize::from(with_more)], &d, |x| {
                open_output(gate, &x[0], 1, x.get(2).map(Var::as_tensor), &x[1])
            });
            let [to, d_more, d_gates] = [&y, &more, &gates].map(|like| vec![f32::NAN; like.len()]);
            let forwards = OpenOutput {
                gates: at(&gates),
                y: at(&y),
                more: at(&more) * u64::from(with_more),
                d: 0,
                to: at(&to),
                d_gates: at(&d_gates),
                d_more: at(&d_more) * u64::from(with_more),
                place: 1,
                kind: kind as u32,
                rows: ROWS as u32,
                width: WIDTH as u32,
                count: COUNT as u32,
            };
            let kernel = format!("open_output_{at_once}");
            run(host, &CELLS, &kernel, to.len() / at_once, forwards);
            assert_close(&kernel, &to, &expected[0], TOLERANCE);
            run(host, &CELLS, &kernel, to.len() / at_once, OpenOutput { d: at(&d), ..forwards });
            assert_close("gates", &d_gates, &expected[1], TOLERANCE);
            assert_close("y", &to, &expected[2], TOLERANCE);
            if with_more {
                assert_close("more", &d_more, &expected[3], TOLERANCE);
            }
        }
    }
}

#[test]
fn two_are_blended_by_a_third() {
    let Some(host) = Host::new() else { return };
    // The gate and b are in one tensor, part of which is neither.
    let (one, a, d) = (random(ROWS * 3 * WIDTH, 1), random(ROWS * WIDTH, 2), random(ROWS * WIDTH, 3));
    let expected = on_cpu(&[&one, &a], &d, |x| blend(WIDTH, (&x[0], 2), (&x[1], 0), (&x[0], 0)));
    for at_once in [1, WIDTH] {
        let (to, d_one, d_a) = (vec![f32::NAN; a.len()], vec![0f32; one.len()], vec![f32::NAN; a.len()]);
        let of = |values: &[f32], gradient: &[f32], offset: usize| Blended {
            at: at(values),
            gradient: at(gradient),
            stride: (values.len() / ROWS) as u32,
            offset: offset as u32,
        };
        let three = [of(&one, &d_one, 2 * WIDTH), of(&a, &d_a, 0), of(&one, &d_one, 0)];
        let forwards = Blend { of: three, d: 0, to: at(&to), rows: ROWS as u32, width: WIDTH as u32 };
        let kernel = format!("blend_{at_once}");
        run(host, &CELLS, &kernel, to.len() / at_once, forwards);
        assert_close(&kernel, &to, &expected[0], TOLERANCE);
        run(host, &CELLS, &kernel, to.len() / at_once, Blend { d: at(&d), ..forwards });
        assert_close("one", &d_one, &expected[1], TOLERANCE);
        assert_close("a", &d_a, &expected[2], TOLERANCE);
    }
}
