"""Turns the measurements of bench/cpu.sh into a Markdown table: table.py MEASUREMENTS THREADS."""

import datetime
import json
import os
import platform
import re
import statistics
import sys


# Rounds that differ by more than this factor were disturbed.
QUIET = 1.2


def read(path):
    """Name of a measurement -> the JSON objects of its rounds."""
    rounds = {}
    with open(path) as lines:
        for line in lines:
            what, result = line.rstrip("\n").split("\t")
            rounds.setdefault(what, []).append(json.loads(result))
    return rounds


def medians(results):
    """Field -> median over the rounds; the lower one of an even number, because disturbances only add time."""
    return {
        key: statistics.median_low([r[key] for r in results]) if isinstance(value, (int, float)) else value
        for key, value in results[0].items()
    }


def spread(results):
    """The ratio of the slowest round to the fastest."""
    times = [result["ms_per_step"] for result in results]
    return max(times) / min(times)


def number(value, digits=0):
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(ours, other):
    return "-" if ours is None or other is None else f"{other / ours:.2f}x"


def cpu():
    """The processor's name, and whether it has AVX-512."""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*:\s*(.*)", text)
    avx512 = "with" if re.search(r"\bavx512f\b", text) else "without"
    return f"{name.group(1) if name else platform.machine()}, {avx512} AVX-512"


def main():
    rounds, threads = read(sys.argv[1]), sys.argv[2]
    if not rounds:
        return
    measured = {what: medians(results) for what, results in rounds.items()}

    def get(what, key="ms_per_step"):
        return measured.get(what, {}).get(key)

    print("\n| batch x hidden | Candlepower, ms | PyTorch f32, ms | ratio | PyTorch bf16, ms | ratio "
          "| peak MB, Candlepower / PyTorch f32 | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    passes = [("train ", ""), ("forward ", ", forward only")]
    rows = dict.fromkeys(tuple(what.split()[:2]) for what in measured if what.startswith(("train ", "forward ")))
    for kind, size in rows:
        row = f"{kind} {size} "
        ours, f32, bf16 = (get(row + who) for who in ("ours", "f32", "bf16"))
        peak, other = (get(row + who, "peak_rss_mb") for who in ("ours", "f32"))
        cells = [size.replace("x", " x ") + dict(passes)[kind + " "], f"**{number(ours)}**", number(f32), ratio(ours, f32),
                 number(bf16), ratio(ours, bf16), f"{number(peak)} / {number(other)}", ratio(peak, other)]
        print("|", " | ".join(cells), "|")

    print()
    ours, candle = get("train 2x64 ours"), get("candle 2x64")
    if candle:
        print(f"- Plain candle (`trainer.kernels = \"reference\"`), 2 x 64: {number(candle)} ms, "
              f"{ratio(ours, candle)}; peak {number(get('candle 2x64', 'peak_rss_mb'))} MB.")
    burn = get("burn 2x64")
    if burn:
        print(f"- burn (its `ndarray` backend), 2 x 64: {number(burn)} ms, {ratio(ours, burn)}; "
              f"peak {number(get('burn 2x64', 'peak_rss_mb'))} MB.")
    one, two = get("threads 1"), get("threads 2")
    if one and two:
        print(f"- One thread to two, 2 x 64: {number(one)} ms to {number(two)} ms, {ratio(two, one)}.")
    if get("train 2x64 ours", "tflops"):
        print(f"- Arithmetic of 2 x 64: {number(get('train 2x64 ours', 'tflops'), 2)} TFLOP/s, "
              "counted as direct convolution.")
    library = next((result["library_rss_mb"] for result in measured.values() if "library_rss_mb" in result), None)
    if library:
        print(f"- Of PyTorch's memory, {number(library)} MB are the library itself, before there is a model.")
    torch = next((result["torch"] for result in measured.values() if "torch" in result), "none")
    disturbed = [f"{what} {spread(results):.1f}x" for what, results in rounds.items() if spread(results) > QUIET]
    if disturbed:
        print(f"- **Not a quiet machine**: slowest round over fastest: {', '.join(disturbed)}.")
    print(f"\nA ratio above 1: Candlepower needs less. Medians over {max(map(len, rounds.values()))} round(s) of each "
          f"one's median step; {threads} thread(s).")
    print(f"{cpu()}, {os.cpu_count()} cores; torch {torch}; {datetime.date.today()}")


if __name__ == "__main__":
    main()
