"""A Qwen3-MoE with the layer shape of Qwen3-30B-A3B, few layers and random weights, for measuring speed and memory.

    python -m eval.random_model out/random --layers 4

128 experts of 2048 x 768, top 8, the demo's tokenizer; 1.2 GB a layer in bfloat16. Weights are drawn on the GPU where
there is one. What it says is noise: it is for `eval.serving`, not for quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from moe_rco.recipe import DEMO_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    arguments = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        moe_intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 512),
        head_dim=128 if arguments.hidden >= 2048 else 64,  # pyright: ignore[reportCallIssue]
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(arguments.out, max_shard_size="2GB")
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
