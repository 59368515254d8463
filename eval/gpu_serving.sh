#!/usr/bin/env bash
# What the vLLM plugin does on an NVIDIA GPU: outputs against transformers, then speed and memory, with CUDA graphs.
#
#   pip install 'moe_rco[serve]' && bash eval/gpu_serving.sh [LAYERS]
#
# Makes a random model with the layer shape of Qwen3-30B-A3B (1.2 GB a layer in bfloat16) under out/gpu; results go
# to eval/results/gpu_agreement.md and eval/results/gpu_serving.md. Not run by its authors yet: they had no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
layers=${1:-4}
model=out/gpu/random-$layers
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
[ -e "$model/config.json" ] || python -m eval.random_model "$model" --layers "$layers"
python -m eval.serving --model "$model" --variants gpu --rounds 7 --output eval/results/gpu_serving.md
python -m eval.agreement "$model" --variants gpu --output eval/results/gpu_agreement.md
