"""The training step of bench/tutorial.toml, in PyTorch on a GPU: prints its time and memory as one JSON line.

The model is that of pytorch_conv_lstm.py. Frames are on the device before the first step, so only PyTorch is timed.
"""

import argparse
import json
import statistics

import torch
from pytorch_conv_lstm import EncoderDecoder
from torch.nn import functional as F

PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32": None}


def kernel_ms(step, steps):
    """Milliseconds per step that the device spends on kernels and copies. All are on one stream, so their times add up."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    # An annotation spans kernels that are listed separately.
    events = [event for event in profile.events() if not getattr(event, "is_user_annotation", False)]
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in on_device) / 1000 / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in [("batch", 16), ("nf", 64), ("size", 64), ("frames-in", 10), ("frames-out", 10)]:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed, after the warm-up; default: 30")
    parser.add_argument("--warm-up", type=int, default=8, help="default: 8")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16-mixed")
    parser.add_argument("--tf32", action="store_true", help="products and convolutions of 32 bits by TF32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help='torch.compile(mode="max-autotune")')
    parser.add_argument("--profile", action="store_true", help="also how long kernels run in a step, by torch.profiler")
    args = parser.parse_args()

    device = torch.device("cuda")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # Like Lightning's `benchmark=True`; shapes do not change here.
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    network = EncoderDecoder(args.nf, args.frames_out, 1, args.channels_last).to(device)
    if args.channels_last:
        for cell in [*network.encoder, *network.decoder]:
            cell.to(memory_format=torch.channels_last)
    model = torch.compile(network, mode="max-autotune") if args.compile else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.98))
    half = PRECISIONS[args.precision]
    scaler = torch.amp.GradScaler("cuda", enabled=args.precision == "16-mixed")
    frames = torch.rand(args.batch, args.frames_in, 1, args.size, args.size, device=device)
    target = torch.rand(args.batch, args.frames_out, 1, args.size, args.size, device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=half, enabled=half is not None):
            prediction = model(frames)
        loss = F.mse_loss(prediction.float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    for _ in range(args.warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    kernels = kernel_ms(step, args.steps) if args.profile else None
    # A multiply-add counts as two operations, a step as three forward passes.
    weights = sum(cell.conv.weight.numel() for cell in network.encoder) * args.frames_in
    weights += sum(cell.conv.weight.numel() for cell in network.decoder) * args.frames_out
    weights += network.to_frame.weight.numel() * args.frames_out
    flops = 3 * 2 * weights * args.size**2 * args.batch
    ms = statistics.median(times)
    print(
        json.dumps(
            {
                "ms_per_step": ms,
                "min": min(times),
                "kernel_ms_per_step": kernels,
                "tflops": flops / ms / 1e9,
                "peak_device_mb": torch.cuda.max_memory_allocated() / 1e6,
                "precision": args.precision,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name(),
            }
        )
    )


if __name__ == "__main__":
    main()
