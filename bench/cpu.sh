#!/usr/bin/env bash
# Compares Candlepower with PyTorch on this machine's CPU: the tutorial model's training step, as a Markdown table.
#
#   bench/cpu.sh                    all sizes, forward only, threads, plain candle, burn (about half an hour on two cores)
#   bench/cpu.sh --quick            only 2x64 (about two minutes)
#   bench/cpu.sh 4x64 1x32          only training steps of these sizes: BATCHxHIDDEN
#
#   --rounds N    rounds of measurements (3)          --steps N    timed steps of a measurement, after two more (5)
#   --threads N   threads of both sides (one per core)
#
# Measurements alternate between the competitors, so other load on the machine affects all of them. Each is a separate
# process, so peak memory is measured separately. A cell is the median over the rounds of each measurement's median.
# PyTorch's bf16 is skipped on CPUs without bf16 products, where a step takes minutes.
# If interrupted, it prints the results so far. CANDLEPOWER_BENCH_PYTHON names a python with torch; without it, a virtual
# environment with torch is created once, in the target folder.
set -euo pipefail
cd "$(dirname "$0")/.."

sizes=() rounds=3 steps=5 extras=1
threads=$(nproc 2>/dev/null || sysctl -n hw.physicalcpu)
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
while (($#)); do
    case $1 in
        --quick) sizes=(2x64) rounds=3 extras=0 ;;
        --rounds | --steps | --threads)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "$1: expected a number from 1" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift ;;
        -h | --help) usage; exit ;;
        *)
            [[ $1 =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || { usage >&2; exit 2; }
            sizes+=("$1") extras=0 ;;
    esac
    shift
done
((${#sizes[@]})) || sizes=(2x64 1x64 2x16 8x16 8x32 2x128)

target=${CARGO_TARGET_DIR:-target}
cargo build --release --quiet -p candlepower-launcher
candlepower=$target/release/candlepower

burn=$target/bench-burn/release/burn-conv-lstm
((!extras)) || cargo build --release --quiet --manifest-path bench/burn/Cargo.toml --target-dir "$target/bench-burn"

python=${CANDLEPOWER_BENCH_PYTHON:-}
if [[ -z $python ]]; then
    python=$target/bench-venv/bin/python
    if ! "$python" -c 'import torch' 2>/dev/null; then
        echo "installing torch into $target/bench-venv" >&2
        python3 -m venv "$target/bench-venv"
        # PyTorch's own index has a build without CUDA, a tenth of the size. The default index is the fallback.
        "$python" -m pip install --quiet torch --index-url https://download.pytorch.org/whl/cpu ||
            "$python" -m pip install --quiet torch
    fi
fi
"$python" -c 'import torch' || { echo "$python: has no torch; see CANDLEPOWER_BENCH_PYTHON in $0" >&2; exit 1; }

# One line per measurement: its name, a tab, the JSON object that it printed.
results=$(mktemp)
trap 'status=$?; "$python" bench/table.py "$results" "$threads"; rm -f "$results"; exit $status' EXIT
trap 'exit 130' INT TERM

measure() { # WHAT COMMAND...
    local what=$1 json
    shift
    if json=$("$@"); then
        printf '%s\t%s\n' "$what" "$json" >>"$results"
        echo "  $what: $(sed -E 's/.*"ms_per_step": ?([0-9]+).*/\1/' <<<"$json") ms" >&2
    else
        echo "  $what: failed, left out" >&2
    fi
}
ours() { # WHAT SIZE [ARGUMENT...]
    local what=$1 batch=${2%x*} hidden=${2#*x}
    shift 2
    measure "$what" "$candlepower" bench bench/tutorial.toml --json --steps "$steps" --set trainer.batch_size="$batch" \
        --set module.hidden="$hidden" --set trainer.threads="$threads" "$@"
}
pytorch() { # WHAT SIZE MODE
    measure "$1" "$python" bench/pytorch_conv_lstm.py --batch "${2%x*}" --nf "${2#*x}" --mode "$3" --steps "$steps" \
        --threads "$threads"
}

bf16=1
if [[ -r /proc/cpuinfo ]] && ! grep -qE 'avx512_bf16|amx_bf16|\bbf16\b' /proc/cpuinfo; then
    bf16=0
    echo "this processor has no bf16 products: PyTorch's bf16 is left out" >&2
fi

for ((round = 1; round <= rounds; round++)); do
    echo "round $round of $rounds" >&2
    for size in "${sizes[@]}"; do
        ours "train $size ours" "$size"
        pytorch "train $size f32" "$size" f32
        ((!bf16)) || pytorch "train $size bf16" "$size" bf16
    done
    if ((extras)); then
        ours "forward 2x64 ours" 2x64 --forward
        pytorch "forward 2x64 f32" 2x64 inference
        for n in 1 2; do
            ((n > threads)) || threads=$n ours "threads $n" 2x64
        done
        # Only in the first round: they take many times as long as all others.
        ((round > 1)) || steps=3 ours "candle 2x64" 2x64 --set trainer.kernels=reference
        ((round > 1)) || RAYON_NUM_THREADS=$threads measure "burn 2x64" "$burn" 2 64 3
    fi
done
