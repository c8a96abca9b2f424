#!/usr/bin/env bash
# Trains the small configurations, each for the same CPU time: a Markdown table of their scores on the same
# held-out sequences, compared with baselines that learn nothing.
#
#   bench/learning.sh               all of them (about an hour on two cores)
#   bench/learning.sh NAME...       only these: predrnn, sim_vp, ... as in configs/NAME_small.toml; `conv_lstm` is the quickstart
#
#   --minutes N   minutes of training (4)    --threads N   threads of training (one per core)
#   --runs DIR    folder for the runs (runs/learning)
#
# Each model's step is timed first, and the model gets as many steps as fit into the minutes. So other load during a long
# training delays it, but does not change its result. All use the same data: one built-in digit, 5 -> 5 frames of 64x64.
set -euo pipefail
cd "$(dirname "$0")/.."

models=() minutes=4 runs=runs/learning
threads=$(nproc 2>/dev/null || sysctl -n hw.physicalcpu)
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
while (($#)); do
    case $1 in
        --minutes | --threads)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "$1: expected a number from 1" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift ;;
        --runs) runs=${2:?"--runs: expected a folder"}; shift ;;
        -h | --help) usage; exit ;;
        -*) usage >&2; exit 2 ;;
        *) models+=("$1") ;;
    esac
    shift
done
((${#models[@]})) ||
    models=(conv_lstm conv_lstm_stack predrnn predrnn_v2 predrnn_pp e3d_lstm mim mau sim_vp tau svg_lp)

candlepower=${CANDLEPOWER_BENCH_BINARY:-${CARGO_TARGET_DIR:-target}/release/candlepower}
[[ -n ${CANDLEPOWER_BENCH_BINARY:-} ]] || cargo build --release --quiet -p candlepower-launcher
mkdir -p "$runs"
command -v jq >/dev/null || { echo "jq is not installed" >&2; exit 1; }

data=(--set data.protocol=openstl --set data.digits=builtin --set data.digits_per_frame=1 --set data.frames_in=5
    --set data.frames_out=5 --set data.train_samples=40000 --set data.val_samples=200)

settings() { # MODEL: sets `config` and `own`
    config=configs/$1_small.toml own=()
    case $1 in
        conv_lstm) config=configs/quickstart.toml ;;
        svg_lp) own=(--set data.stochastic=false) ;;
    esac
    own+=(--set trainer.threads="$threads" "${data[@]}")
}

declare -A ms
for model in "${models[@]}"; do
    settings "$model"
    ms[$model]=$("$candlepower" bench "$config" --json --steps 10 "${own[@]}" | jq .ms_per_step)
    printf '%s: %.0f ms per step\n' "$model" "${ms[$model]}" >&2
done

echo "| model | parameters | ms per step | steps | MSE | SSIM, range 1 | below the best trivial MSE |"
echo "|---|---|---|---|---|---|---|"
for model in "${models[@]}"; do
    settings "$model"
    steps=$(jq -n "$minutes * 60000 / ${ms[$model]} | floor")
    ! grep -q '^name = "one_cycle"' "$config" || own+=(--set schedule.steps="$steps")
    own+=(--set run.dir="$runs" --set run.name="$model" --set trainer.max_steps="$steps" --set trainer.val_every="$steps")
    "$candlepower" train "$config" --resume auto "${own[@]}" >"$runs/$model.log" 2>&1 ||
        { tail -5 "$runs/$model.log" >&2; exit 1; }
    run=$(find "$runs/$model" -maxdepth 1 -name 'version_*' | sort -V | tail -1)
    "$candlepower" validate "$config" --checkpoint "$run" --lead-times "$run/lead_times" "${own[@]}" >/dev/null
    read -r mse ssim below < <(jq -r '.predictors | .["this model"] as $model
        | [$model.mse, ([$model.frames[].ssim_range_1] | add / length),
            100 * (1 - $model.mse / (del(.["this model"]) | map(.mse) | min))] | @tsv' "$run/lead_times/scores.json")
    parameters=$(sed -n 's/ parameters in .*//p' "$runs/$model.log")
    printf '| `%s` | %s | %.0f | %s | %.5f | %.3f | %.1f %% |\n' "$model" "$parameters" "${ms[$model]}" "$steps" "$mse" \
        "$ssim" "$below"
done
