"""Shared by the zoo's scripts: times a training step in PyTorch on the CPU or a GPU."""

import json
import statistics
import time

import torch
from pytorch_conv_lstm import peak_rss_mb
from pytorch_gpu import PRECISIONS

# Same as in `candlepower bench`; more on a GPU, because cuDNN first tries its algorithms.
WARM_UP = {"cpu": 2, "cuda": 5}


def add_arguments(parser):
    parser.add_argument("--device", choices=WARM_UP, default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="by autocast; default: 32")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed, after the warm-up; default: 10")


def prepare(args):
    """Applies settings that must precede the creation of a model."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # Like Lightning's `benchmark=True`; shapes do not change here.
    torch.backends.cudnn.allow_tf32 = False


def measure(args, model, loss, lr):
    """Times Adam steps on `loss()`, and prints one JSON line."""
    on_gpu, half = args.device == "cuda", PRECISIONS[args.precision]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "16-mixed")
    times = []
    for number in range(WARM_UP[args.device] + args.steps):
        if on_gpu and number == WARM_UP[args.device]:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(args.device, dtype=half, enabled=half is not None):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    times = times[WARM_UP[args.device] :]
    result = {
        "ms_per_step": statistics.median(times),
        "min": min(times),
        "peak_rss_mb": peak_rss_mb(),
        "peak_device_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
