"""Compares Candlepower's convolutions with PyTorch's on this machine's CPU, shape by shape, as a Markdown table.

    cargo build --release -p candlepower-kernels --example conv
    target/bench-venv/bin/python bench/conv.py [target/release/examples/conv]      (bench/cpu.sh creates the venv)

Times in milliseconds: the forward pass; the backward pass, which is the operation that computes all three gradients
(PyTorch's aten.convolution_backward); and both through each side's automatic differentiation, from the sum of the
outputs. Each is the fastest of many runs, in float32, on all cores. PyTorch uses the faster of its two memory formats.
"""

import datetime
import os
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

# Batch, height and width, inputs, outputs, kernel, stride, groups.
SHAPES = [
    (8, 64, 64, 64, 1, 1, 1),
    (8, 32, 256, 256, 1, 1, 1),
    (16, 16, 128, 128, 1, 1, 1),
    (2, 64, 64, 64, 5, 1, 1),
    (8, 64, 64, 64, 5, 1, 1),
    (16, 16, 128, 512, 5, 1, 1),
    (2, 64, 128, 256, 3, 1, 1),
    (8, 32, 64, 64, 3, 1, 1),
    (8, 64, 32, 64, 3, 2, 1),
    (8, 64, 64, 64, 3, 1, 64),
    (16, 16, 512, 4096, 1, 1, 1),
    (16, 16, 4096, 512, 1, 1, 1),
    (16, 16, 4096, 4096, 3, 1, 4096),
    (16, 16, 512, 512, 5, 1, 512),
    (16, 16, 256, 512, 11, 1, 8),
]
SECONDS = 1.0


def fastest(step):
    """The time in milliseconds of the fastest of at least five runs, over at least a second, after two warm-up runs."""
    times, begin = [], time.perf_counter()
    while len(times) < 7 or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[2:])


def pytorch(batch, size, inputs, outputs, kernel, stride, groups):
    """(forward, backward, both through the graph), each in the faster of the two memory formats."""
    found = []
    for memory_format in torch.contiguous_format, torch.channels_last:
        x = torch.rand(batch, inputs, size, size).to(memory_format=memory_format).requires_grad_()
        w = torch.rand(outputs, inputs // groups, kernel, kernel).to(memory_format=memory_format).requires_grad_()
        b = torch.rand(outputs).requires_grad_()

        def forward():
            return F.conv2d(x, w, b, stride=stride, padding=kernel // 2, groups=groups)

        def both():
            x.grad = w.grad = b.grad = None
            forward().sum().backward()

        with torch.no_grad():
            dy = torch.rand_like(forward())

            def backward():
                pad = [kernel // 2] * 2
                return torch.ops.aten.convolution_backward(
                    dy, x, w, [outputs], [stride] * 2, pad, [1, 1], False, [0, 0], groups, [True] * 3)

            alone = fastest(forward), fastest(backward)
        found.append((*alone, fastest(both)))
    return tuple(map(min, zip(*found)))


def ours(program, shape):
    command = [program, *map(str, shape)]
    last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return tuple(map(float, last.split(":")[1].split()))


def main():
    program = sys.argv[1] if len(sys.argv) > 1 else "target/release/examples/conv"
    torch.set_num_threads(os.cpu_count())
    cells = "forward", "backward", "through the graph"
    print("| batch, size, channels, kernel | " + " | ".join(f"{cell}: ours / PyTorch, ms | ratio" for cell in cells) + " |")
    print("|---" * 7 + "|")
    for shape in SHAPES:
        batch, size, inputs, outputs, kernel, stride, groups = shape
        extra = (f", stride {stride}" if stride > 1 else "") + (f", {groups} groups" if groups > 1 else "")
        pairs = zip(ours(program, shape), pytorch(*shape))
        print(f"| {batch} x {size}x{size}, {inputs} to {outputs}, {kernel}x{kernel}{extra} | "
              + " | ".join(f"{a:.2f} / {b:.2f} | {b / a:.2f}x" for a, b in pairs) + " |", flush=True)
    print(f"\nA ratio above 1: ours needs less. {os.cpu_count()} cores, torch {torch.__version__}, {datetime.date.today()}")


if __name__ == "__main__":
    main()
