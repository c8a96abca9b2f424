#!/usr/bin/env bash
# The recurrent models beside PyTorch on this machine's CPU: a training step of each at its published size.
#
#   bench/recurrent.sh              all of them (about a quarter of an hour on two cores)
#   bench/recurrent.sh MODEL...     these alone: conv_lstm_stack predrnn predrnn_v2 predrnn_pp e3d_lstm mim mau
#
#   --batch N     samples of a step (2)             --steps N     timed steps of a measurement, after two more (3)
#   --threads N   of both (one a core)              --frames N    given, and as many predicted (10)
#
# Candlepower and PyTorch take turns, model by model; each measurement is a process of its own. All frames beyond the given
# ones are predictions, in both. CANDLEPOWER_BENCH_PYTHON names a python that has torch; see bench/cpu.sh for one.
set -euo pipefail
cd "$(dirname "$0")/.."

models=() batch=2 steps=3 frames=10
threads=$(nproc 2>/dev/null || sysctl -n hw.physicalcpu)
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
while (($#)); do
    case $1 in
        --batch | --steps | --threads | --frames)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "$1: expected a number from 1" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift ;;
        -h | --help) usage; exit ;;
        -*) usage >&2; exit 2 ;;
        *) models+=("$1") ;;
    esac
    shift
done
((${#models[@]})) || models=(conv_lstm_stack predrnn predrnn_v2 predrnn_pp e3d_lstm mim mau)

target=${CARGO_TARGET_DIR:-target}
candlepower=${CANDLEPOWER_BENCH_BINARY:-$target/release/candlepower}
[[ -n ${CANDLEPOWER_BENCH_BINARY:-} ]] || cargo build --release --quiet -p candlepower-launcher
python=${CANDLEPOWER_BENCH_PYTHON:-$target/bench-venv/bin/python}
"$python" -c 'import torch' 2>/dev/null || { echo "$python: has no torch; see CANDLEPOWER_BENCH_PYTHON" >&2; exit 1; }

field() { # JSON NAME DIGITS
    "$python" -c 'import json, sys; print(f"{json.loads(sys.argv[1])[sys.argv[2]]:.{sys.argv[3]}f}")' "$@"
}

echo "| model | batch | Candlepower, ms | PyTorch, ms | ratio | peak MB, Candlepower / PyTorch |"
echo "|---|---|---|---|---|---|"
for model in "${models[@]}"; do
    ours=$("$candlepower" bench "configs/$model.toml" --json --steps "$steps" --set trainer.batch_size="$batch" \
        --set trainer.threads="$threads" --set module.sampling=none --set data.frames_in="$frames" \
        --set data.frames_out="$frames")
    torch=$("$python" bench/pytorch_openstl.py "$model" --batch "$batch" --frames-in "$frames" \
        --frames-out "$frames" --steps "$steps" --threads "$threads" 2>/dev/null)
    [[ -n $ours && -n $torch ]]
    a=$(field "$ours" ms_per_step 0) b=$(field "$torch" ms_per_step 0)
    ratio=$("$python" -c "print(f'{$b / $a:.2f}x')")
    echo "| \`$model\` | $batch | $a | $b | $ratio | $(field "$ours" peak_rss_mb 0) / $(field "$torch" peak_rss_mb 0) |"
done
