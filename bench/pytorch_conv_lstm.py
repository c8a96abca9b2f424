"""The training step of bench/tutorial.toml, in PyTorch: prints its time and memory as one JSON line.

The model is written from its equations: cells without peepholes, one convolution over [input; output], gates i, f, o,
g; two cells read the frames, two more produce the requested number of outputs, each from the previous output; a 1x3x3
convolution and a sigmoid turn outputs into frames. Frames are random numbers, generated before the first step, so only
PyTorch is timed.
"""

import argparse
import json
import resource
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

WARM_UP = 2  # Same as in `candlepower bench`. With `compile`, the first one compiles.
MODES = ["f32", "channels_last", "bf16", "compile", "inference"]


class Cell(nn.Module):
    """c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c')."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x, state):
        h, c = state
        i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class EncoderDecoder(nn.Module):
    def __init__(self, hidden, frames_out, patch, channels_last):
        super().__init__()
        channels = patch * patch
        self.encoder = nn.ModuleList([Cell(channels, hidden), Cell(hidden, hidden)])
        self.decoder = nn.ModuleList([Cell(hidden, hidden), Cell(hidden, hidden)])
        self.to_frame = nn.Conv3d(hidden, channels, (1, 3, 3), padding=(0, 1, 1))
        self.hidden, self.frames_out, self.patch = hidden, frames_out, patch
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for cell in [*self.encoder, *self.decoder]:
            cell.to(memory_format=self.memory_format)

    def start(self, x):
        """Zero states for two cells."""
        size = (x.shape[0], self.hidden, *x.shape[2:])
        zeros = torch.zeros(size, device=x.device).to(memory_format=self.memory_format)
        return [(zeros, zeros), (zeros, zeros)]

    def step(self, cells, x, states):
        for k, cell in enumerate(cells):
            states[k] = cell(x, states[k])
            x = states[k][0]
        return x

    def forward(self, frames):
        """(B, T_in, 1, H, W) to (B, T_out, 1, H, W)."""
        frames = F.pixel_unshuffle(frames, self.patch)
        states = self.start(frames[:, 0])
        for t in range(frames.shape[1]):
            frame = frames[:, t].contiguous(memory_format=self.memory_format)
            v = self.step(self.encoder, frame, states)
        states, outputs = self.start(frames[:, 0]), []
        for _ in range(self.frames_out):
            v = self.step(self.decoder, v, states)
            outputs.append(v)
        logits = self.to_frame(torch.stack(outputs, 2)).transpose(1, 2)
        return F.pixel_shuffle(torch.sigmoid(logits), self.patch)


def peak_rss_mb():
    """This process's peak memory in 10^6 bytes. `ru_maxrss` is in KiB on Linux, in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in [("batch", 2), ("nf", 64), ("size", 64), ("frames-in", 10), ("frames-out", 10), ("patch", 1)]:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed, after the warm-up; default: 20")
    parser.add_argument("--mode", choices=MODES, default="f32", help="default: f32, eager")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps: expected at least 1")

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    library = peak_rss_mb()
    network = EncoderDecoder(args.nf, args.frames_out, args.patch, args.mode == "channels_last")
    model = torch.compile(network) if args.mode == "compile" else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.98))
    frames = torch.rand(args.batch, args.frames_in, 1, args.size, args.size)
    target = torch.rand(args.batch, args.frames_out, 1, args.size, args.size)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.mode == "bf16"):
            prediction = model(frames)
        return F.mse_loss(prediction.float(), target)

    def train():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    @torch.inference_mode()
    def infer():
        loss()

    step = infer if args.mode == "inference" else train
    times = []
    for _ in range(WARM_UP + args.steps):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    times = times[WARM_UP:]
    result = {
        "ms_per_step": statistics.median(times),
        "min": min(times),
        "peak_rss_mb": peak_rss_mb(),
        "library_rss_mb": library,  # Of which PyTorch itself, before a model exists.
        "mode": args.mode,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
