"""Compares the zoo with PyTorch: a training step of each model at its configuration's sizes, as a Markdown table.

    cargo build --release -p candlepower-launcher
    target/bench-venv/bin/python bench/zoo.py target/release/candlepower      (bench/cpu.sh creates the venv)

Both sides alternate, and each measurement is a separate process, so peak memory is measured separately. A cell is the median
over the rounds of each measurement's median. PyTorch uses the sizes that `candlepower config` prints. For recurrent models,
all frames beyond the given ones are predictions, on both sides. On a GPU, memory is device memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

RECURRENT = ["conv_lstm_stack", "predrnn", "predrnn_v2", "predrnn_pp", "mim", "e3d_lstm", "mau"]
OTHERS = ["sim_vp", "sim_vp_incepu", "tau", "svg_lp"]
BENCH = Path(__file__).resolve().parent


class Failure(Exception):
    """A program that failed, with its error output."""


def run(*command):
    """A program's standard output."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=BENCH.parent)
    if done.returncode:
        raise Failure(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def settings(args, model):
    """The configuration's path and overrides."""
    path = f"configs/{model.removesuffix('_incepu')}{'_small' if args.small else ''}.toml"
    changed = {"trainer.precision": f'"{args.precision}"', "trainer.accelerator": f'"{args.device}"', **dict(args.set)}
    if args.threads:
        changed["trainer.threads"] = args.threads
    if args.batch:
        changed["trainer.batch_size"] = args.batch
    if args.frames:
        changed |= {"data.frames_in": args.frames, "data.frames_out": args.frames}
    if model in RECURRENT:
        changed["module.sampling"] = '"none"'
    if model == "sim_vp_incepu":
        changed["module.translator"] = '"incepu"'
    return [path, *(part for key, value in changed.items() for part in ("--set", f"{key}={value}"))]


def ours(args, model):
    return json.loads(run(args.candlepower, "bench", *settings(args, model), "--json", "--steps", args.steps))


def sizes(config, model):
    """A configuration's sizes, by the names of the PyTorch scripts' arguments."""
    module, data = config["module"], config["data"]
    found = {"batch": config["trainer"]["batch_size"]} | {name: data[name] for name in ("frames_in", "frames_out")}
    if model in RECURRENT:
        found |= {"hidden": module["hidden"][0], "layers": len(module["hidden"]), "kernel": module["kernel"]}
        names = ["patch", "reduction"]
    else:
        names = ["spatial_channels", "temporal_channels", "spatial_layers", "temporal_layers", "mlp_ratio"]
        names += ["channels", "features", "latent", "hidden"]
    return found | {name: module[name] for name in names if name in module}


def pytorch(args, model):
    config = tomllib.loads(run(args.candlepower, "config", *settings(args, model)))
    words = [part for name, value in sizes(config, model).items() for part in (f"--{name.replace('_', '-')}", value)]
    threads = ["--threads", args.threads] if args.threads else []
    script = BENCH / ("pytorch_openstl.py" if model in RECURRENT else "pytorch_zoo.py")
    timing = ["--device", args.device, "--precision", args.precision, "--steps", args.steps]
    return json.loads(run(sys.executable, script, model, *words, *timing, *threads))


def row(args, model):
    rounds = [(ours(args, model), pytorch(args, model)) for _ in range(args.rounds)]
    memory = "peak_rss_mb" if args.device == "cpu" else "peak_device_mb"
    (a, a_memory), (b, b_memory) = (
        [statistics.median(pair[side][key] or 0 for pair in rounds) for key in ("ms_per_step", memory)]
        for side in (0, 1)
    )
    ratios = ", ".join(f"{other['ms_per_step'] / own['ms_per_step']:.2f}x" for own, other in rounds)
    return f"| `{model}` | {a:.0f} | {b:.0f} | {b / a:.2f}x | {ratios} | {a_memory:.0f} / {b_memory:.0f} |"


def setting(text):
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected SECTION.KEY=VALUE, found {text!r}")
    return key, value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candlepower", type=Path, help="the program")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: all of {', '.join(RECURRENT + OTHERS)}")
    parser.add_argument("--small", action="store_true", help="the configurations that train on a CPU in minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16-mixed", "16-mixed"], default="32")
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, of each measurement; default: 3")
    parser.add_argument("--batch", type=int, help="default: the configuration's")
    parser.add_argument("--frames", type=int, help="given, and as many predicted; default: the configuration's")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both; default: one a core")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="K=V", help="another change: SECTION.KEY=VALUE")
    args = parser.parse_intermixed_args()
    args.candlepower = args.candlepower.resolve()
    for model in args.models:
        if model not in RECURRENT + OTHERS:
            parser.error(f"{model}: expected one of {', '.join(RECURRENT + OTHERS)}")
    print("| model | Candlepower, ms | PyTorch, ms | ratio | rounds | peak MB, Candlepower / PyTorch |")
    print("|---|---|---|---|---|---|")
    failures = []
    for model in args.models or RECURRENT + OTHERS:
        try:
            print(row(args, model), flush=True)
        except Failure as failure:
            print(f"| `{model}` | failed | | | | |", flush=True)
            failures.append(str(failure))
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
