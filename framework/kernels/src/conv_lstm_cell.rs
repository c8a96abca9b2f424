//! Only the pointwise half of a ConvLSTM cell, as a candle op.

use crate::buffer::Buffer;
use crate::cell::{self, Order, States};
use crate::parallel::{Shared, on_pool};
use crate::simd::Level;
use crate::tensors::{check_type, packed, tracked, with_values};
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};

/// The fused pointwise half of an LSTM cell, for models that compute their gates in some other way.
///
/// `gates` (.., 4 N) are the pre-activations in the order i, f, o, g, and `c` (.., N) is the cell state;
/// returns (h', c'), both (.., N): c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c'). All f32
/// on the CPU, with any strides.
///
/// # Errors
/// If the shapes are incompatible, or a tensor is not f32 on the CPU.
pub fn conv_lstm_cell(gates: &Tensor, c: &Tensor) -> Result<(Tensor, Tensor)> {
    let op = "conv_lstm_cell";
    check_type(op, "gates", gates, DType::F32)?;
    check_type(op, "c", c, DType::F32)?;
    let fits = match (gates.dims(), c.dims()) {
        ([leading @ .., gates], [leading_c @ .., c]) => leading == leading_c && *gates == 4 * c,
        _ => false,
    };
    if !fits {
        bail!("{op}: gates must be (.., 4 N) and c (.., N), got {:?} and {:?}", gates.dims(), c.dims());
    }
    let states = if tracked(gates) || tracked(c) {
        gates.apply_op2(c, ConvLstmCell)?
    } else {
        gates.apply_op2_no_bwd(c, &ConvLstmCell)?
    };
    Ok((states.get(0)?, states.get(1)?))
}

/// The op: maps gates and c to h' and c', stacked as (2, .., N).
struct ConvLstmCell;

impl CustomOp2 for ConvLstmCell {
    fn name(&self) -> &'static str {
        "conv_lstm_cell"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gates, c) = (packed(a, la)?, packed(c, lc)?);
        let hidden = lc.dims().last().copied().unwrap_or(1);
        let mut states = vec![0f32; 2 * c.len()];
        let (h, c_after) = states.split_at_mut(c.len());
        let level = Level::current();
        on_pool(|| cell_forward(level, &gates, &c, hidden, h, c_after, None));
        Ok((CpuStorage::F32(states), [&[2], lc.dims()].concat().into()))
    }

    fn bwd(
        &self,
        gates: &Tensor,
        c: &Tensor,
        states: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (level, hidden) = (Level::current(), c.dims().last().copied().unwrap_or(1));
        let (mut d_gates, mut dc) = (vec![0f32; gates.elem_count()], vec![0f32; c.elem_count()]);
        with_values(gates, |a| {
            with_values(c, |before| {
                with_values(states, |states| {
                    with_values(d, |d| {
                        on_pool(|| cell_backward(level, a, before, states, d, hidden, &mut d_gates, &mut dc));
                        Ok(())
                    })
                })
            })
        })?;
        let d_gates = Tensor::from_vec(d_gates, gates.shape(), &Device::Cpu)?;
        Ok((Some(d_gates), Some(Tensor::from_vec(dc, c.shape(), &Device::Cpu)?)))
    }
}

fn cell_forward(
    level: Level,
    gates: &[f32],
    c: &[f32],
    hidden: usize,
    h: &mut [f32],
    c_after: &mut [f32],
    kept: Option<Shared>,
) {
    let pixels = c.len() / hidden;
    let step = cell::Forward {
        bias: &[],
        c_before: Some(Shared::read(c)),
        c: Shared::new(c_after),
        h: States { data: Shared::new(h), image: 0 },
        kept,
        c_kept: None,
        h_kept: None,
        hidden,
        pixels,
        width: 1,
    };
    cell::forward(level, 1, gates, Order::Plain, step);
}

#[expect(clippy::too_many_arguments, reason = "the tensors of the op's backward")]
fn cell_backward(
    level: Level,
    gates: &[f32],
    c: &[f32],
    states: &[f32],
    d: &[f32],
    hidden: usize,
    d_gates: &mut [f32],
    dc: &mut [f32],
) {
    let len = c.len();
    // Recomputing the activations is cheaper than saving them.
    let (mut h, mut c_after) = (Buffer::new(len), Buffer::new(len));
    let activations = Shared::new(d_gates);
    cell_forward(level, gates, c, hidden, &mut h, &mut c_after, Some(activations));
    dc.copy_from_slice(&d[len..]);
    let step = cell::Backward {
        kept: activations,
        c_before: Some(Shared::read(c)),
        c: Shared::read(&states[len..]),
        dh: None,
        dh_output: Some(States { data: Shared::read(&d[..len]), image: 0 }),
        dc: Shared::new(dc),
        hidden,
        pixels: len / hidden,
        width: 1,
    };
    cell::backward(level, 1, activations, Order::Plain, step);
}
