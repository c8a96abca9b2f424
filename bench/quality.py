"""Trains the tutorial's model in Candlepower and in PyTorch, from the same weights on the same batches.

    quality.py CANDLEPOWER --out DIR

Both sides read the same arrays of moving digits. Every epoch takes the training sequences in order, in batches
(Candlepower by `trainer.overfit_batches`, which keeps the order). Candlepower draws the weights, and PyTorch starts from that
checkpoint. Prints a table of the error on held-out sequences and of the training time until then, without validation and
the first step; then the numbers as one JSON line. DIR keeps the data and Candlepower's runs.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from pytorch_conv_lstm import EncoderDecoder
from pytorch_gpu import PRECISIONS
from torch.nn import functional as F

FRAMES_IN = FRAMES_OUT = 10
# Seven-segment digits: upper, upper left and right, middle, lower left and right, lower.
SEGMENTS = ["1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011"]
# The rectangle of each segment, in eighths of a digit's height: top, left, bottom, right.
BARS = [(0, 0, 1, 5), (0, 0, 4, 1), (0, 4, 4, 5), (4, 0, 5, 5), (4, 0, 8, 1), (4, 4, 8, 5), (7, 0, 8, 5)]


def digit(number, height):
    image = torch.zeros(height, 5 * height // 8, dtype=torch.uint8)
    for lit, bar in zip(SEGMENTS[number], BARS):
        top, left, bottom, right = (side * height // 8 for side in bar)
        if lit == "1":
            image[top:bottom, left:right] = 255
    return image


def write_frames(path, sequences, size, seed):
    """Writes sequences of two digits that move straight and bounce off the borders: (N, T, H, W) bytes, as a .npy file."""
    times, draw = FRAMES_IN + FRAMES_OUT, random.Random(seed)
    values = bytearray(sequences * times * size * size)
    frames = torch.frombuffer(values, dtype=torch.uint8).view(sequences, times, size, size)
    digits = [digit(number, 3 * size // 8) for number in range(10)]
    for sequence in frames:
        for _ in range(2):
            image = draw.choice(digits)
            ways = []
            for side in image.shape:
                room = size - side
                start, speed = draw.uniform(0, 2 * room), draw.uniform(0.02, 0.08) * size
                # Reflect at both borders, as often as needed.
                ways.append([round(room - abs(room - (start + speed * t) % (2 * room))) for t in range(times)])
            for frame, top, left in zip(sequence, *ways):
                place = frame[top : top + image.shape[0], left : left + image.shape[1]]
                torch.maximum(place, image, out=place)
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {tuple(frames.shape)}, }}"
    header = header.ljust(117) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + values)
    return frames


def read_weights(path):
    """The tensors of a .safetensors file, all f32, with the names in pytorch_conv_lstm.py."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    weights = {}
    for name, it in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in it["data_offsets"])
            values = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32).view(it["shape"])
            name = re.sub(r"^(encoder|decoder)_(\d)_convlstm", lambda m: f"{m[1]}.{int(m[2]) - 1}", name)
            weights[name.replace("decoder_CNN", "to_frame")] = values
    return weights


class Candlepower:
    def __init__(self, args, out):
        self.args, self.runs = args, out / "runs"
        self.config = out / "quality.toml"
        data = f'[data]\nname = "frames"\npath = "{out / "data"}"\nsplit = "folder"\nworkers = 4\n\n[callbacks.throughput]\n\n'
        tutorial = (Path(__file__).parent / "tutorial.toml").read_text()
        self.config.write_text(re.sub(r"(?ms)^\[data\]\n.*?(?=^\[)", data, tutorial))

    def run(self, command, *arguments, **settings):
        args = self.args
        settings = {"trainer.batch_size": args.batch, "module.hidden": args.nf, **settings}
        pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        command = [args.candlepower, command, self.config, "--accelerator", args.accelerator, "--precision", args.precision,
                   *pairs, *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    def train(self, name, steps, **settings):
        """Trains a new run; returns its folder."""
        args = self.args
        self.run("train", **{
            "run.dir": str(self.runs), "run.name": name, "trainer.max_steps": steps,
            "trainer.overfit_batches": args.sequences // args.batch, "trainer.sanity_val_batches": 0,
            "trainer.log_every": args.every, "checkpoint.every_steps": args.every, "checkpoint.keep_last": steps,
            "logging.progress": False, "logging.image_every": 0, **settings,
        })  # fmt: skip
        return max((self.runs / name).glob("version_*"), key=lambda path: path.stat().st_mtime)

    def curve(self):
        """The learning curve as (step, seconds, error)s, and the initial weights, from a run with a learning rate of zero."""
        drawn = self.train("drawn", 1, **{"optimizer.lr": 0.0, "trainer.overfit_batches": 1}) / "checkpoints/1"
        run = self.train("trained", self.args.steps)
        seconds, before, elapsed = {}, 1, 0.0
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["split"] == "train" and "steps_per_second" in record:
                elapsed += (record["step"] - before) / record["steps_per_second"]
                before = record["step"]
                seconds[before] = elapsed
        steps = range(self.args.every, self.args.steps + 1, self.args.every)
        checkpoints = [(0, drawn)] + [(step, run / f"checkpoints/{step}") for step in steps]
        points = [(step, seconds.get(step, 0.0), self.error(checkpoint)) for step, checkpoint in checkpoints]
        return points, read_weights(drawn / "model.safetensors")

    def error(self, checkpoint):
        return json.loads(self.run("validate", "--checkpoint", checkpoint, "--json").splitlines()[-1])["mse"]


def pytorch(args, weights, train, held_out):
    device = torch.device(args.accelerator)
    network = EncoderDecoder(args.nf, FRAMES_OUT, 1, False).to(device)
    network.load_state_dict(weights)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.98))
    half = PRECISIONS[args.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "16-mixed")
    batches = train.shape[0] // args.batch

    def loss_of(frames, at):
        frames = frames[at * args.batch : (at + 1) * args.batch].to(device).float().div(255).unsqueeze(2)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            prediction = network(frames[:, :FRAMES_IN])
        return F.mse_loss(prediction.float(), frames[:, FRAMES_IN:]), len(frames)

    def error():
        with torch.no_grad():
            losses = [loss_of(held_out, at) for at in range(-(-held_out.shape[0] // args.batch))]
        return sum(loss.item() * count for loss, count in losses) / held_out.shape[0]

    points, elapsed, since = [(0, 0.0, error())], 0.0, None
    for step in range(1, args.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        loss, _ = loss_of(train, (step - 1) % batches)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 1 or step % args.every == 0:
            loss.item()  # Wait for the device.
            elapsed += time.perf_counter() - since if since else 0.0
            if step % args.every == 0:
                points.append((step, elapsed, error()))
            since = time.perf_counter()
    return points


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candlepower", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in [("steps", 600), ("every", 100), ("batch", 16), ("nf", 64), ("size", 64), ("sequences", 2048),
                        ("held-out", 256)]:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--accelerator", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16-mixed")
    args = parser.parse_args()
    args.sequences -= args.sequences % args.batch
    args.every = min(args.every, args.steps)

    out = args.out.resolve()
    train = write_frames(out / "data/train/frames.npy", args.sequences, args.size, 1)
    held_out = write_frames(out / "data/val/frames.npy", args.held_out, args.size, 2)
    ours, weights = Candlepower(args, out).curve()
    theirs = pytorch(args, weights, train, held_out)
    assert [point[0] for point in ours] == [point[0] for point in theirs]
    print("| step | seconds, Candlepower | seconds, PyTorch | held-out MSE, Candlepower | held-out MSE, PyTorch |")
    print("|---|---|---|---|---|")
    for (step, seconds, error), (_, other, other_error) in zip(ours, theirs):
        print(f"| {step} | {seconds:.1f} | {other:.1f} | {error:.5f} | {other_error:.5f} |")
    print(json.dumps({"candlepower": ours, "pytorch": theirs}))
    # With the same weights, both predict the same before the first step, up to rounding.
    if not abs(ours[0][2] / theirs[0][2] - 1) < (1e-4 if args.precision == "32" else 1e-2):
        sys.exit("the first predictions differ, of the same weights")


if __name__ == "__main__":
    main()
