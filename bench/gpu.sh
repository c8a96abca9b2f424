#!/usr/bin/env bash
# Checks Candlepower on this machine's first CUDA device, then compares the tutorial's training step with PyTorch's in a table.
#
#   bench/gpu.sh CANDLEPOWER [TESTS...]         the program, built with `--features cuda`, and test programs built with it:
#                                               from framework/kernels/tests/cuda.rs, and from tests/tests/, which compare
#                                               the device's results with reference numbers from PyTorch
#   bench/gpu.sh --checks CANDLEPOWER ...       only checks         --benchmark: no checks
#   --quick     one size, without torch.compile --limit N: timeout of a check or a measurement in seconds (300)
#   --steps N   timed steps (30)                --out DIR: folder for full logs (a temporary folder)
#   --zoo       also compares a step of each other model in bf16-mixed with PyTorch's (bench/zoo.py)
#   --quality-steps N: steps of the training whose validation error is compared with PyTorch's, from the same weights on the
#               same batches (600; 0: none)
#
# Build the programs on a machine with a toolkit, with `cargo build --release -p candlepower-launcher --features cuda`, and
# `cargo test --release --no-run --workspace --features candlepower-launcher/cuda --test cuda --test seed_convlstm --test
# recurrent --test sim_vp --test svg_lp --test optimizers --test buffers --test devices --test recorded --test resume --test
# precision`, which names the test programs.
#
# This script builds nothing. It needs the programs, CUDA's libraries, and a python3 with torch (CANDLEPOWER_BENCH_PYTHON
# names another python). Each measurement is a separate process. Exits with 1 if a check fails.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
repository=$(dirname "$here")

checks_alone=0 benchmark_alone=0 quick=0 zoo=0 steps=30 quality_steps=600 limit=300 out=
while (($#)); do
    case $1 in
        --checks) checks_alone=1 ;;
        --benchmark) benchmark_alone=1 ;;
        --quick) quick=1 ;;
        --zoo) zoo=1 ;;
        --steps) steps=$2 && shift ;;
        --quality-steps) quality_steps=$2 && shift ;;
        --limit) limit=$2 && shift ;;
        --out) out=$2 && shift ;;
        -h | --help) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit ;;
        *) break ;;
    esac
    shift
done
(($#)) || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
candlepower=$(realpath "$1")
shift
tests=()
for test in "$@"; do tests+=("$(realpath "$test")"); done
python=${CANDLEPOWER_BENCH_PYTHON:-python3}
# CUDA's libraries, if pip installed them along with torch.
libraries=$("$python" -c 'import glob, nvidia; print(":".join(at for root in nvidia.__path__ for at in glob.glob(root + "/*/lib")))' \
    2>/dev/null) && export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries
# All of NCCL's processes are on this machine, which may have no other network.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
# With a cache, the driver compiles kernels for its device only once.
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-${TMPDIR:-/tmp}/candlepower-cuda-cache} CUDA_CACHE_MAXSIZE=4294967296
out=${out:-$(mktemp -d)}
mkdir -p "$out"
out=$(realpath "$out")
cd "$repository" || exit 1

# Lines of the final summary.
summary=$out/summary.txt
: >"$summary"
failures=0
# A terminated training saves first; a hanging one is killed after 10 s.
within() { timeout --kill-after=10 "$@"; }
# The most informative line of a log: the first `error` line of Candlepower's programs, the last line of Python's.
why() { { grep -m1 '^error' "$1" || tail -1 "$1"; } | cut -c1-150; }
note() { echo "$*" | tee -a "$summary"; }
check() { # WHAT COMMAND...: runs it, with its output in a log
    ((benchmark_alone)) && return
    local what=$1 log since=$SECONDS
    log=$out/$(tr -c 'a-zA-Z0-9\n' '-' <<<"$1").log
    shift
    if "$@" >"$log" 2>&1; then
        note "ok      $what ($((SECONDS - since)) s)"
    else
        note "FAILED  $what: $(why "$log")"
        # For Rust tests: which ones failed, and why.
        grep -A2 'panicked at' "$log" | cut -c1-200 | sed 's/^/          /' | head -24 | tee -a "$summary"
        failures=$((failures + 1))
    fi
}

devices=$("$candlepower" devices)
note "$devices"
grep -q '^cuda:0' <<<"$devices" || { echo "there is no CUDA device" >&2; exit 1; }
# Compiles most kernels into the cache, so that no later process needs the time for it.
warm() { within 300 "$candlepower" bench bench/tutorial.toml --accelerator cuda --batch-size 1 --steps 1 "$@" >"$out/warm.log" 2>&1; }
warm --precision bf16-mixed || note "FAILED  a first step: $(why "$out/warm.log")"

echo "== checks"
for test in ${tests[@]+"${tests[@]}"}; do
    # Candle's own convolutions, which are also compared with the reference numbers, let cuDNN use TF32; this forbids it. The
    # kernels' tests switch it themselves.
    tf32=(NVIDIA_TF32_OVERRIDE=0)
    [[ $(basename "$test") == cuda* ]] && tf32=()
    check "$(basename "$test")" within "$limit" env ${tf32[@]+"${tf32[@]}"} CANDLEPOWER_TEST_DEVICE=cuda \
        CANDLEPOWER_GOLDEN="$repository/tests/golden" "$test" --test-threads 1 --nocapture
done

train() { # NAME CONFIG STEPS ACCELERATOR [ARGUMENT...]: a training without pictures, every step logged
    local name=$1 config=$2 steps=$3 accelerator=$4
    shift 4
    within "$limit" "$candlepower" train "$config" --accelerator "$accelerator" --set run.dir="\"$out/runs\"" \
        --set run.name="\"$name\"" --set trainer.max_steps="$steps" --set trainer.log_every=1 --set trainer.limit_val_batches=1 \
        --set trainer.sanity_val_batches=0 --set data.val_samples=4 --set logging.image_every=0 \
        --set logging.progress=false "$@"
}
metrics() { echo "$out/runs/$1/version_0/metrics.jsonl"; }
same_losses() { # CONFIG TOLERANCE [ARGUMENT...]: three steps on the CPU and on the device
    local name tolerance=$2 config=$1
    name=$(basename "$config" .toml)
    shift 2
    rm -rf "$out/runs/$name-cpu" "$out/runs/$name-cuda"
    train "$name-cpu" "$config" 3 cpu "$@" && train "$name-cuda" "$config" 3 cuda "$@" || return 1
    "$python" - "$(metrics "$name-cpu")" "$(metrics "$name-cuda")" "$tolerance" <<'PYTHON'
import json, sys
cpu, cuda = ([json.loads(line) for line in open(path)] for path in sys.argv[1:3])
assert len(cpu) == len(cuda) > 0, (len(cpu), len(cuda))
worst = 0
for a, b in zip(cpu, cuda):
    for key in ("loss", "grad_norm", "mse"):
        if key in a:
            # NaN counts as the largest difference.
            difference = abs(a[key] - b[key]) / abs(a[key])
            worst = difference if not difference <= worst else worst
print(f"largest relative difference {worst:.1e}")
sys.exit(not worst <= float(sys.argv[3]))
PYTHON
}
small="--set trainer.batch_size=2"
for config in configs/quickstart.toml configs/*_small.toml; do
    # shellcheck disable=SC2086
    check "three steps of $config as on the CPU" same_losses "$config" 2e-3 $small
done

weights() { sha256sum "$out/runs/$1/version_0/checkpoints/$2/model.safetensors" | cut -d' ' -f1; }
same_after_resuming() { # PRECISION: compares six steps with three plus three
    local arguments=(--precision "$1" --set checkpoint.every_steps=3)
    rm -rf "$out/runs/whole-$1" "$out/runs/halves-$1"
    train "whole-$1" configs/quickstart.toml 6 cuda "${arguments[@]}" &&
        train "halves-$1" configs/quickstart.toml 3 cuda "${arguments[@]}" &&
        train "halves-$1" configs/quickstart.toml 6 cuda "${arguments[@]}" --resume auto || return 1
    echo "$(weights "whole-$1" 6) $(weights "halves-$1" 6)"
    [[ -n $(weights "whole-$1" 6) && $(weights "whole-$1" 6) == "$(weights "halves-$1" 6)" ]]
}
for precision in 32 bf16-mixed 16-mixed; do
    check "resuming in $precision is exact to the bit" same_after_resuming "$precision"
done

full() { # a batch that fits on no device
    local words
    words=$(within "$limit" "$candlepower" bench bench/tutorial.toml --accelerator cuda --steps 1 \
        --set trainer.batch_size=4000 2>&1) && { echo "it fitted"; return 1; }
    echo "$words"
    grep -q 'trainer.micro_batch_size' <<<"$words"
}
check "a full device says what to change" full
((checks_alone)) && exit $((failures > 0))

echo "== benchmark"
results=$out/results.tsv
: >"$results"
measure() { # WHAT COMMAND...
    local what=$1 json log
    log=$out/$(tr -c 'a-zA-Z0-9\n' '-' <<<"$1").log
    shift
    if json=$(within "$limit" "$@" 2>"$log") && json=$(tail -1 <<<"$json") && [[ $json == \{* ]]; then
        printf '%s\t%s\n' "$what" "$json" >>"$results"
        echo "  $what: $json"
        if [[ $what == *recorded* ]] && ! grep -q 'recorded as a CUDA graph' "$log"; then
            note "FAILED  $what: $(grep -m1 'not recorded' "$log" || echo 'steps were not recorded')"
            failures=$((failures + 1))
        fi
    else
        log=$(why "$log")
        note "  $what: failed: ${log:-nothing was said, in at most $limit s}"
    fi
}
ours() { # WHAT BATCH [ARGUMENT...]
    local what=$1 batch=$2
    shift 2
    measure "$what" "$candlepower" bench bench/tutorial.toml --json --steps "$steps" --accelerator cuda \
        --batch-size "$batch" --set data.workers=4 "$@"
}
torch() { # WHAT BATCH [ARGUMENT...]
    local what=$1 batch=$2
    shift 2
    measure "$what" "$python" bench/pytorch_gpu.py --steps "$steps" --batch "$batch" "$@"
}
batches=(16 64)
((quick)) && batches=(16)
for batch in "${batches[@]}"; do
    ours "$batch bf16-mixed|candlepower" "$batch" --precision bf16-mixed
    ours "$batch bf16-mixed|candlepower, recorded" "$batch" --precision bf16-mixed --set trainer.cuda_graph=true
    ours "$batch bf16-mixed|candlepower, recorded, benchmark" "$batch" --precision bf16-mixed --set trainer.cuda_graph=true \
        --set trainer.benchmark=true
    torch "$batch bf16-mixed|eager" "$batch" --precision bf16-mixed
done
ours "16 32|candlepower" 16 --precision 32
ours "16 32|candlepower, benchmark" 16 --precision 32 --set trainer.benchmark=true
torch "16 32|eager" 16 --precision 32
ours "16 32 TF32|candlepower" 16 --precision 32 --set 'trainer.float32_matmul_precision="high"'
torch "16 32 TF32|eager" 16 --precision 32 --tf32
# Last, because compiling takes minutes: a timeout then loses only this.
for batch in "${batches[@]}"; do
    torch "$batch bf16-mixed|eager, channels last" "$batch" --precision bf16-mixed --channels-last
    ((quick)) || torch "$batch bf16-mixed|compile, channels last" "$batch" --precision bf16-mixed --channels-last --compile
done

# Both are observed in the same way. PyTorch's profiler, which slows the host down, only measures the kernels' time.
idle() { # WHO COMMAND...
    local who=$1
    shift
    measure "idle|$who" "$python" bench/idle.py "$@"
}
idle candlepower "$candlepower" bench bench/tutorial.toml --json --accelerator cuda --batch-size 16 --set data.workers=4 \
    --precision bf16-mixed
idle eager "$python" bench/pytorch_gpu.py --batch 16 --precision bf16-mixed
torch "idle|eager, by its profiler" 16 --precision bf16-mixed --profile

"$python" - "$results" <<'PYTHON' | tee -a "$summary"
import json, sys
rows = {}
for line in open(sys.argv[1]):
    what, result = line.rstrip("\n").split("\t")
    case, who = what.split("|")
    rows.setdefault(case, {})[who] = json.loads(result)
idle = rows.pop("idle", {})
print("\n| batch, precision | of | ms per step | TFLOP/s | MB on the device | Candlepower is |")
print("|---|---|---|---|---|---|")
for case, all in rows.items():
    ours = all.get("candlepower")
    for who, it in all.items():
        times = "" if who == "candlepower" or not ours else f"{it['ms_per_step'] / ours['ms_per_step']:.2f}x as fast"
        memory = it.get("peak_device_mb") or 0
        print(f"| {case} | {who} | {it['ms_per_step']:.2f} | {it['tflops'] or 0:.0f} | {memory:.0f} | {times} |")
shares = []
for who, it in idle.items():
    # The kernels' time is from a profiled run, the step's time from one without the profiler.
    ms = it["idle_ms_per_step"] if "idle_ms_per_step" in it else it["ms_per_step"] - it["kernel_ms_per_step"]
    shares.append(f"{who} {100 * ms / it['ms_per_step']:.1f} % ({ms:.2f} of {it['ms_per_step']:.2f} ms)")
print("\nGPU idle between steps, 16 bf16-mixed:", "; ".join(shares) or "not measured")
PYTHON
if ((zoo)); then
    within $((8 * limit)) "$python" bench/zoo.py "$candlepower" --device cuda --precision bf16-mixed --steps 10 \
        >"$out/zoo.txt" 2>"$out/zoo.log" || {
        note "FAILED  a model of the zoo: $(why "$out/zoo.log")"
        failures=$((failures + 1))
    }
    { echo && grep '^|' "$out/zoo.txt"; } | tee -a "$summary"
fi
if ((quality_steps)); then
    every=$((quality_steps < 6 ? 1 : quality_steps / 6))
    within $((4 * limit)) "$python" bench/quality.py "$candlepower" --out "$out/quality" --steps "$quality_steps" \
        --every $every >"$out/quality.txt" 2>"$out/quality.log" || {
        note "FAILED  the same training in PyTorch: $(why "$out/quality.log")"
        failures=$((failures + 1))
    }
    { echo && grep '^|' "$out/quality.txt"; } | tee -a "$summary"
fi
echo "== summary (logs in $out)"
cat "$summary"
exit $((failures > 0))
