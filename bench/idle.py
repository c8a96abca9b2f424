"""The share of a benchmark's time in which the GPU is idle: idle.py [--seconds N] COMMAND...

COMMAND takes `--steps N`, and its last output is a JSON line with `ms_per_step`, as from `candlepower bench --json` and
pytorch_gpu.py. A short run determines how many steps take N seconds; then COMMAND runs that many, while nvidia-smi reads
the driver's `utilization.gpu`, the share of the last sample period in which a kernel ran. Only the middle half of the
steps counts, away from start and end. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time


def run(command, steps):
    """The command's result, and when it ended."""
    # Makes CUDA number the devices as nvidia-smi does.
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    done = subprocess.run([*command, "--steps", str(steps)], env=environment, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)  # The command has printed its error.
    return json.loads(done.stdout.splitlines()[-1]), time.monotonic()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="of steps that are watched; default: 15")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    found, _ = run(args.command, 10)
    steps = max(10, round(1000 * args.seconds / found["ms_per_step"]))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "50"]
    readings = []
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as watch:
        reader = threading.Thread(target=lambda: readings.extend((time.monotonic(), line) for line in watch.stdout))
        reader.start()
        try:
            found, end = run(args.command, steps)
        finally:
            watch.terminate()
            reader.join()

    ms = found["ms_per_step"]
    seconds = steps * ms / 1000
    middle = (end - 0.75 * seconds, end - 0.25 * seconds)
    busy = [float(line) for at, line in readings if middle[0] <= at <= middle[1] and line.strip().isdigit()]
    if not busy:
        sys.exit(f"nvidia-smi told no utilisation of GPU {gpu}")
    idle = 100 - statistics.mean(busy)
    print(json.dumps({"idle_percent": idle, "idle_ms_per_step": idle / 100 * ms, "ms_per_step": ms, "readings": len(busy)}))


if __name__ == "__main__":
    main()
