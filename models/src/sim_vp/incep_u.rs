//! SimVP's first translator: a U-Net whose blocks use kernels of several sizes.

use candle_core::Tensor;
use candlepower::nn::channels_last::{Conv2dOptions, GroupNorm};
use candlepower::nn::{Activation, Conv};
use candlepower::prelude::*;

use super::SimVpConfig;

/// Sides of a block's kernels.
const KERNELS: [usize; 4] = [3, 5, 7, 11];
/// Groups of a block's convolutions and normalisations, if they divide the channels; otherwise 1.
const GROUPS: usize = 8;

/// A 1x1 convolution, then the sum of four grouped convolutions of different sizes.
struct Inception {
    enter: Conv,
    branches: Vec<Branch>,
}

struct Branch {
    conv: Conv,
    norm: GroupNorm,
    groups: usize,
}

impl Inception {
    fn new(inputs: usize, hidden: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let groups = if hidden.is_multiple_of(GROUPS) { GROUPS } else { 1 };
        let branch = |(i, side): (usize, &usize)| {
            let vb = vb.pp("layers").pp(i);
            let conv = Conv::new(&[outputs, hidden / groups, *side, *side], vb.pp("conv"))?;
            Ok(Branch {
                conv,
                norm: GroupNorm::new(groups, outputs, vb.pp("norm"))?.then(Activation::LeakyRelu(0.2)),
                groups,
            })
        };
        let enter = Conv::new(&[hidden, inputs, 1, 1], vb.pp("conv1"))?;
        Ok(Self { enter, branches: KERNELS.iter().enumerate().map(branch).collect::<Result<_>>()? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.enter.channels_last(x, Conv2dOptions::default())?;
        let mut sum: Option<Tensor> = None;
        for Branch { conv, norm, groups } in &self.branches {
            let padding = conv.weight.dim(2)? / 2;
            let y =
                conv.channels_last(&x, Conv2dOptions { padding, groups: *groups, ..Default::default() })?;
            let y = norm.forward(&y)?;
            sum = Some(match sum {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        sum.ok_or_else(|| Error::msg("an inception block has kernels"))
    }

    fn weights(&self) -> usize {
        let branches = self.branches.iter().map(|branch| branch.conv.weight.elem_count());
        self.enter.weight.elem_count() + branches.sum::<usize>()
    }
}

/// Equally many blocks down and up; each block up also sees the output of the block down at its level.
pub(super) struct IncepU {
    down: Vec<Inception>,
    up: Vec<Inception>,
}

impl IncepU {
    /// Creates the translator, with `features` channels in and out.
    pub(super) fn new(config: &SimVpConfig, features: usize, vb: VarBuilder) -> Result<Self> {
        let (width, blocks) = (config.temporal_channels, config.temporal_layers);
        let groups = if (width / 2).is_multiple_of(GROUPS) { GROUPS } else { 1 };
        for (key, channels) in [("temporal_channels", width), ("spatial_channels", features)] {
            if !channels.is_multiple_of(groups) {
                let of = if key == "spatial_channels" {
                    format!("{channels} channels of {} frames", features / config.spatial_channels)
                } else {
                    format!("{channels} channels")
                };
                return Err(Error::setting(key, format!("{of} do not make {groups} groups")));
            }
        }
        let down = |i: usize| {
            Inception::new(if i == 0 { features } else { width }, width / 2, width, vb.pp("enc").pp(i))
        };
        let up = |i: usize| {
            let inputs = if i == 0 { width } else { 2 * width };
            let outputs = if i + 1 == blocks { features } else { width };
            Inception::new(inputs, width / 2, outputs, vb.pp("dec").pp(i))
        };
        Ok(Self {
            down: (0..blocks).map(down).collect::<Result<_>>()?,
            up: (0..blocks).map(up).collect::<Result<_>>()?,
        })
    }

    pub(super) fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        let mut beside = Vec::with_capacity(self.down.len());
        for block in &self.down {
            x = block.forward(&x)?;
            beside.push(x.clone());
        }
        // The lowest output is the input of the first block up.
        beside.pop();
        for (i, block) in self.up.iter().enumerate() {
            if i > 0
                && let Some(skip) = beside.pop()
            {
                x = Tensor::cat(&[x, skip], 3)?;
            }
            x = block.forward(&x)?;
        }
        Ok(x)
    }

    pub(super) fn weights(&self) -> usize {
        self.down.iter().chain(&self.up).map(Inception::weights).sum()
    }
}
