#!/usr/bin/env bash
# What a graphics card makes of it: ten minutes, one folder of numbers, and rows of the
# book's table of costs.
#
#     bash benchmarks/gpu.sh                 # results in gpu-<name of the card>/
#     DEVICE=cpu MODEL=ViT-B-32-quickgelu CLASSES=5 EACH=2 METHODS=coop \
#         bash benchmarks/gpu.sh             # does the script run?
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
model=${MODEL:-ViT-B-16-quickgelu}
classes=${CLASSES:-100}
each=${EACH:-16}
methods=${METHODS:-"coop cocoop kgcoop prograd maple promptsrc tcp mma coprompt tpt"}
if [ "$device" = cuda ]; then
    card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
else
    card=$(uname -m)
fi
out=${OUT:-gpu-${card// /-}}
costs=promptkit/assets/costs.csv
[ "$device" = cuda ] || costs=$out/costs.csv  # a trial is no contribution
costs=${COSTS:-$costs}
mkdir -p "$out"
{ date -u +%F; echo "$card"; python -c 'import torch; print("torch", torch.__version__)'
  git rev-parse HEAD; } > "$out/about.txt"
common=(--device "$device" --model "$model" --classes "$classes")
for precision in fp32 bf16; do
    # shellcheck disable=SC2086  # a list of words
    python benchmarks/limit.py $methods "${common[@]}" --precision $precision \
        --json "$out/limit-$precision.json" --costs "$costs" \
        | tee "$out/limit-$precision.txt"
    python benchmarks/epoch.py coop maple "${common[@]}" --each "$each" \
        --precision $precision --json "$out/epoch-$precision.json" \
        | tee "$out/epoch-$precision.txt"
done
echo "numbers and tables: $out; costs: $costs ('promptkit pages' writes their page)"
