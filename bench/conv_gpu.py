"""Compares Candlepower's convolutions with PyTorch's on this machine's first CUDA device, in bf16 and f32, as a Markdown table.

    cargo build --release -p candlepower-kernels --features cuda --example conv_cuda
    python3 bench/conv_gpu.py [target/release/examples/conv_cuda]      (needs torch with CUDA)

The shapes are those of bench/tutorial.toml with batches of 16: a cell's first step, later steps, the gradient of a weight
over nine steps at once, and the convolution that makes frames. Then the depthwise ones of configs/sim_vp.toml. Times in milliseconds, medians of 30 groups of ten runs.
In f32 neither side uses TF32. PyTorch's passes are timed separately. Candlepower's gradient times are those of a forward
and backward pass minus the forward pass and the loss's backward pass, and its forward pass includes transposing the weight.
"Timed" uses `trainer.benchmark`, as PyTorch does here. PyTorch's bf16 tensors are channels last, as all of Candlepower's.
"""

import glob
import os
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

# Batch, height and width, inputs, outputs, kernel, groups.
SHAPES = [
    (16, 64, 64, 256, 3, 1),
    (16, 64, 72, 256, 3, 1),
    (16, 64, 128, 256, 3, 1),
    (144, 64, 128, 256, 3, 1),
    (160, 64, 64, 1, 3, 1),
    (16, 16, 512, 512, 5, 512),
    (16, 16, 4096, 4096, 3, 4096),
]
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def median(step):
    times = []
    for _ in range(35):
        start = time.perf_counter()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        times.append(1e2 * (time.perf_counter() - start))
    return statistics.median(times[5:])


def pytorch(dtype, batch, size, inputs, outputs, kernel, groups):
    def random(*shape):
        x = torch.rand(shape, device="cuda", dtype=DTYPES[dtype])
        # For each type, the memory format for which cuDNN's engines need no copy.
        return x.to(memory_format=torch.channels_last) if dtype == "bf16" else x

    x, w = random(batch, inputs, size, size), random(outputs, inputs // groups, kernel, kernel)
    dy, pad = random(batch, outputs, size, size), [kernel // 2] * 2

    def backward(of_x, of_w):
        torch.ops.aten.convolution_backward(dy, x, w, None, [1, 1], pad, [1, 1], False, [0, 0], groups, [of_x, of_w, False])

    passes = lambda: F.conv2d(x, w, padding=pad, groups=groups), lambda: backward(True, False), lambda: backward(False, True)
    return [median(step) for step in passes]


def libraries():
    """The folders of CUDA's libraries, if pip installed them along with torch."""
    try:
        import nvidia
    except ImportError:
        return []
    return [at for root in nvidia.__path__ for at in glob.glob(f"{root}/*/lib")]


def ours(program, dtype, shape, *more):
    folders = [os.environ.get("LD_LIBRARY_PATH"), *libraries()]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, folders))}
    command = [program, *map(str, shape), dtype, *more]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [float(ms) for ms in done.stdout.split()]


def main():
    program = sys.argv[1] if len(sys.argv) > 1 else "target/release/examples/conv_cuda"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    print("| type, batch, size, channels | pass | ours, ms | TFLOP/s | timed, ms | TFLOP/s | PyTorch, ms | TFLOP/s | ours is |")
    print("|---" * 9 + "|")
    for dtype, shape in [("bf16", shape) for shape in SHAPES] + [("f32", shape) for shape in SHAPES[1:]]:
        batch, size, inputs, outputs, kernel, groups = shape
        tflop = 2e-12 * batch * size**2 * (inputs // groups) * outputs * kernel**2
        sides = ours(program, dtype, shape), ours(program, dtype, shape, "timed"), pytorch(dtype, *shape)
        for name, *times in zip(("forward", "input", "weight"), *sides):
            cells = " | ".join(f"{ms:.3f} | {tflop / ms * 1e3:.0f}" for ms in times)
            print(f"| {dtype}, {batch} x {size}x{size}, {inputs} to {outputs}, {groups} groups | {name} | {cells} | {times[2] / times[0]:.2f}x as fast |",
                  flush=True)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")


if __name__ == "__main__":
    main()
