#!/usr/bin/env bash
# Runs a command with the CUDA libraries replaced by a stand-in: two devices, emulated on the CPU.
#
#   cargo build --package candlepower-stand-in
#   tests/stand_in/run.sh target/debug/candlepower devices        # a program with the feature `cuda`
#   CANDLEPOWER_TEST_DEVICE=cuda tests/stand_in/run.sh cargo test --workspace --features candlepower-launcher/cuda --test resume
#
# Kernels are compiled by NVIDIA's NVRTC, from the folder in CANDLEPOWER_NVRTC, or else from PyPI.
# CANDLEPOWER_STAND_IN_DEVICES sets the number of devices, CANDLEPOWER_STAND_IN_MEMORY the memory of each in bytes.
set -euo pipefail
(($#)) || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

manifest=$(dirname "$0")/Cargo.toml
target=$(cargo metadata --manifest-path "$manifest" --format-version 1 --no-deps |
    sed -E 's/.*"target_directory":"([^"]*)".*/\1/')
# The output of `cargo test`, or that of `cargo build` if it is newer.
library=$target/debug/deps/libcandlepower_stand_in.so
[ "$target/debug/libcandlepower_stand_in.so" -nt "$library" ] && library=$target/debug/libcandlepower_stand_in.so
[ -f "$library" ] || { echo "the stand-in is not built: cargo build --package candlepower-stand-in" >&2; exit 2; }

folder=$target/stand-in
mkdir -p "$folder"
for name in libcuda.so.1 libcudnn.so.9 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnccl.so.2; do
    ln -sf "$library" "$folder/$name"
done

compiler=${CANDLEPOWER_NVRTC:-$folder/nvrtc/nvidia/cu13/lib}
if [ ! -e "$compiler/libnvrtc.so.13" ]; then
    python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --root-user-action=ignore \
        --target "$folder/nvrtc" nvidia-cuda-nvrtc==13.0.88 >&2
fi

# No TF32 in candle's own calls either, so 32-bit results match the CPU's.
export NVIDIA_TF32_OVERRIDE=0
export LD_LIBRARY_PATH=$folder:$compiler${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec "$@"
