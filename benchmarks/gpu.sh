#!/usr/bin/env bash
# The CUDA tests and the GPU benchmarks on a machine that has torch but lacks some packages, without
# a network. Wheels come from the folders in WHEELS (see wheels.sh), and are installed aside.
#
#     WHEELS="wheels peers" bash benchmarks/gpu.sh OUT [MINUTES]
#     bash benchmarks/gpu.sh --smoke          # a trial on the CPU, of the smallest of everything
set -euo pipefail
cd "$(dirname "$0")/.."
export WANDB_MODE=offline HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
for folder in ${WHEELS:-}; do
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$aside/site" "$folder"/*.whl
done
export PYTHONPATH="$aside/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = --smoke ]; then
    python3 benchmarks/gpu.py "${2:-$aside/out}" --device cpu --smoke
    exit
fi
out=${1:?usage: gpu.sh OUT [MINUTES] [options of gpu.py]}
minutes=${2:-30}
python3 benchmarks/gpu.py "$out" --minutes "$minutes" "${@:3}"
