#!/usr/bin/env bash
# Scaling from one rank to several on this machine: samples per second of a configuration's training step, as a Markdown table.
#
#   bench/scaling.sh [CONFIG] [RANKS] [OPTION FOR EACH RUN]...      default: configs/quickstart.toml 2
#
# The global batch is the same in each run: this is strong scaling. A rank has one compute thread; in the last line, a
# single rank has as many threads as there are ranks. Each number is the best of three alternating runs. Needs MPI
# (.ci/run installs Debian's).
set -euo pipefail
cd "$(dirname "$0")/.."

config=${1:-configs/quickstart.toml} ranks=${2:-2}
shift $(($# > 2 ? 2 : $#))
target=${CARGO_TARGET_DIR:-target}
cargo build --release --quiet -p candlepower-launcher --features mpi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
command=("$target/release/candlepower" bench "$config" --steps 10 --json "$@")

run() {
    case $1 in
        single) "${command[@]}" --set trainer.threads=1 ;;
        threads) "${command[@]}" --devices "$ranks" --set "trainer.threads=$ranks" ;;
        processes) mpirun -n "$ranks" --oversubscribe --bind-to none "${command[@]}" --set "trainer.threads=$ranks" ;;
        wide) "${command[@]}" --set "trainer.threads=$ranks" ;;
    esac
}

declare -A best
for _ in 1 2 3; do
    for kind in single threads processes wide; do
        speed=$(run $kind 2>/dev/null | sed -n 's/.*"samples_per_second":\([0-9.e+-]*\).*/\1/p')
        best[$kind]=$(awk -v a="${best[$kind]:-0}" -v b="$speed" 'BEGIN { print (b > a) ? b : a }')
    done
done
line() { awk -v name="$1" -v x="$2" -v one="${best[single]}" 'BEGIN { printf "| %s | %.2f | %.2f |\n", name, x, x / one }'; }
echo "| ranks | samples per second | times one |"
echo "|---|---|---|"
line "1" "${best[single]}"
line "$ranks threads of one process" "${best[threads]}"
line "$ranks processes" "${best[processes]}"
line "1, with $ranks compute threads" "${best[wide]}"
