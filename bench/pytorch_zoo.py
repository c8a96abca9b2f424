"""A training step in PyTorch of one of the zoo's other models: SimVP, TAU, SVG-LP. Prints one JSON line.

    pytorch_zoo.py sim_vp|sim_vp_incepu|tau|svg_lp --batch 8 [sizes]

Sizes are named as in the `[module]` sections in configs/; `candlepower bench` times the same step. The models are written
from their equations: SimVP (Gao et al. 2022; gSTA: Tan et al. 2022), TAU (Tan et al. 2023), SVG-LP (Denton and Fergus
2018). Frames are random numbers, generated before the first step, so only PyTorch is timed.
"""

import argparse

import pytorch_step
import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    """Convolution, group normalisation, SiLU. Stride 2 halves the size, a pixel shuffle doubles it."""

    def __init__(self, inputs, outputs, resize):
        super().__init__()
        wide = 4 * outputs if resize == "double" else outputs
        self.conv = nn.Conv2d(inputs, wide, 3, stride=2 if resize == "halve" else 1, padding=1)
        self.shuffle = nn.PixelShuffle(2) if resize == "double" else nn.Identity()
        self.norm = nn.GroupNorm(2, outputs)

    def forward(self, x):
        return F.silu(self.norm(self.shuffle(self.conv(x))))


class LargeKernel(nn.Module):
    def __init__(self, channels, outputs):
        super().__init__()
        self.near = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.far = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.mix = nn.Conv2d(channels, outputs, 1)

    def forward(self, x):
        return self.mix(self.far(self.near(x)))


class Gsta(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.kernel = LargeKernel(channels, 2 * channels)

    def forward(self, x):
        value, gate = self.kernel(x).chunk(2, 1)
        return torch.sigmoid(gate) * value


class TemporalAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = channels // max(channels // 16, 4)
        self.kernel = LargeKernel(channels, channels)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels, bias=False)

    def forward(self, x):
        moving = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return moving[:, :, None, None] * self.kernel(x) * x


class Block(nn.Module):
    def __init__(self, channels, outputs, ratio, gate):
        super().__init__()
        hidden = int(channels * ratio)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.enter, self.leave = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.gate = gate(channels)
        self.widen, self.narrow = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.scale1 = nn.Parameter(0.01 * torch.ones(channels, 1, 1))
        self.scale2 = nn.Parameter(0.01 * torch.ones(channels, 1, 1))
        self.reduction = nn.Conv2d(channels, outputs, 1) if channels != outputs else nn.Identity()

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.scale1 * (self.leave(self.gate(F.gelu(self.enter(y)))) + y)
        y = self.norm2(x)
        x = x + self.scale2 * self.narrow(F.gelu(self.mix(self.widen(y))))
        return self.reduction(x)


class Inception(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        groups = 8 if hidden % 8 == 0 else 1
        self.enter = nn.Conv2d(inputs, hidden, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(hidden, outputs, k, padding=k // 2, groups=groups),
                nn.GroupNorm(groups, outputs),
                nn.LeakyReLU(0.2),
            )
            for k in (3, 5, 7, 11)
        )

    def forward(self, x):
        x = self.enter(x)
        return sum(branch(x) for branch in self.branches)


class IncepU(nn.Module):
    def __init__(self, features, width, blocks):
        super().__init__()
        self.down = nn.ModuleList(Inception(width if i else features, width // 2, width) for i in range(blocks))
        self.up = nn.ModuleList(
            Inception(2 * width if i else width, width // 2, width if i + 1 < blocks else features)
            for i in range(blocks)
        )

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.up[0](x)
        for i, block in enumerate(self.up[1:], 1):
            x = block(torch.cat([x, skips[-1 - i]], 1))
        return x


class SimVp(nn.Module):
    def __init__(self, args):
        super().__init__()
        width, features, n = args.spatial_channels, args.frames_in * args.spatial_channels, args.spatial_layers
        self.encoder = nn.ModuleList(
            Layer(width if i else 1, width, "halve" if i % 2 else "keep") for i in range(n)
        )
        self.decoder = nn.ModuleList(Layer(width, width, "keep" if i % 2 else "double") for i in range(n))
        self.to_frame = nn.Conv2d(width, 1, 1)
        hidden, blocks = args.temporal_channels, args.temporal_layers
        if args.model == "sim_vp_incepu":
            self.translator = IncepU(features, hidden, blocks)
        else:
            gate = TemporalAttention if args.model == "tau" else Gsta
            widths = [features] + [hidden] * (blocks - 1) + [features]
            self.translator = nn.Sequential(
                *(Block(widths[i], widths[i + 1], args.mlp_ratio, gate) for i in range(blocks))
            )
        self.alpha = 0.1 if args.model == "tau" else 0.0

    def forward(self, frames):
        batch, times, channels, height, width = frames.shape
        x = first = self.encoder[0](frames.flatten(0, 1))
        for layer in self.encoder[1:]:
            x = layer(x)
        shape = x.shape
        x = self.translator(x.reshape(batch, -1, *shape[2:])).reshape(shape)
        for layer in self.decoder[:-1]:
            x = layer(x)
        return self.to_frame(self.decoder[-1](x + first)).reshape(frames.shape)

    def loss(self, frames, target):
        prediction = self(frames)
        loss = F.mse_loss(prediction, target)
        if self.alpha:
            def change(x):
                return F.softmax((x[:, 1:] - x[:, :-1]).flatten(2) / 0.1, -1)

            p, q = change(prediction), change(target)
            loss = loss + self.alpha * (p * torch.log(p / (q + 1e-12) + 1e-12)).mean()
        return loss


class Lstm(nn.Module):
    def __init__(self, inputs, hidden, layers, heads):
        super().__init__()
        self.embed = nn.Linear(inputs, hidden)
        self.cells = nn.ModuleList(nn.LSTMCell(hidden, hidden) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(hidden, width) for width in heads)

    def forward(self, x, states):
        x = self.embed(x)
        for k, cell in enumerate(self.cells):
            states[k] = cell(x, states[k])
            x = states[k][0]
        return [head(x) for head in self.heads]


class SvgLp(nn.Module):
    def __init__(self, args):
        super().__init__()
        n, g, z, hidden = args.channels, args.features, args.latent, args.hidden
        widths = [1, n, 2 * n, 4 * n, 8 * n]
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
            for a, b in zip(widths, widths[1:])
        )
        self.to_features = nn.Sequential(nn.Conv2d(8 * n, g, 4), nn.BatchNorm2d(g), nn.Tanh())
        self.from_features = nn.Sequential(nn.ConvTranspose2d(g, 8 * n, 4), nn.BatchNorm2d(8 * n), nn.LeakyReLU(0.2))
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(2 * a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
            for a, b in [(8 * n, 4 * n), (4 * n, 2 * n), (2 * n, n)]
        )
        self.to_frame = nn.ConvTranspose2d(2 * n, 1, 4, 2, 1)
        self.predictor = Lstm(g + z, hidden, 2, [g])
        self.posterior = Lstm(g, hidden, 1, [z, z])
        self.prior = Lstm(g, hidden, 1, [z, z])
        self.frames_in = args.frames_in

    def encode(self, x):
        skips = []
        for layer in self.encoder:
            x = layer(x)
            skips.append(x)
        return self.to_features(x).flatten(1), skips

    def decode(self, features, skips):
        x = self.from_features(features[:, :, None, None])
        for layer, skip in zip(self.decoder, skips[:0:-1]):
            x = layer(torch.cat([x, skip], 1))
        return torch.sigmoid(self.to_frame(torch.cat([x, skips[0]], 1)))

    def loss(self, frames, target):
        """As in the reference, each frame is encoded twice: as the next frame and as the current one."""
        x = torch.cat([frames, target], 1).transpose(0, 1)
        states = [[None] * 2, [None], [None]]
        mse = kld = 0.0
        for t in range(1, len(x)):
            h, its_skips = self.encode(x[t - 1])
            h_next, _ = self.encode(x[t])
            if t < self.frames_in:
                skips = its_skips
            mean, logvar = self.posterior(h_next, states[1])
            mean_p, logvar_p = self.prior(h, states[2])
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            (g,) = self.predictor(torch.cat([h, z], 1), states[0])
            mse = mse + F.mse_loss(self.decode(torch.tanh(g), skips), x[t])
            each = 0.5 * (logvar_p - logvar) + (logvar.exp() + (mean - mean_p) ** 2) / (2 * logvar_p.exp()) - 0.5
            kld = kld + each.sum() / len(mean)
        return mse + 1e-4 * kld


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["sim_vp", "sim_vp_incepu", "tau", "svg_lp"])
    sizes = [("batch", 8), ("frames-in", 10), ("frames-out", 10), ("spatial-channels", 64), ("temporal-channels", 512),
             ("spatial-layers", 4), ("temporal-layers", 8), ("channels", 64), ("features", 128), ("latent", 10),
             ("hidden", 256)]
    for name, value in sizes:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--mlp-ratio", type=float, default=8.0, help="default: 8")
    parser.add_argument("--channels-last", action="store_true", help="PyTorch's other memory format")
    pytorch_step.add_arguments(parser)
    args = parser.parse_args()

    pytorch_step.prepare(args)
    model = (SvgLp if args.model == "svg_lp" else SimVp)(args).to(args.device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    frames = torch.rand(args.batch, args.frames_in, 1, 64, 64, device=args.device)
    target = torch.rand(args.batch, args.frames_out, 1, 64, 64, device=args.device)
    pytorch_step.measure(args, model, lambda: model.loss(frames, target), lr=1e-3)


if __name__ == "__main__":
    main()
