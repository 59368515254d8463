"""A Qwen3-MoE with the layer shape of Qwen3-30B-A3B, few layers and random weights, for measuring speed and memory.

    python -m eval.random_model out/random --layers 4

128 experts of 2048 x 768, top 8, the demo's tokenizer; 1.2 GB a layer in bfloat16. Weights are drawn on the GPU where
there is one, and written one by one: the model need not fit into memory. What it says is noise: it is for speed, not for
quality.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from moe_rco.adapters import get_adapter
from moe_rco.ckpt.shards import ShardWriter
from moe_rco.ckpt.writer import Entry
from moe_rco.recipe import DEMO_MODEL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _layer(name: str) -> int:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _random(name: str, shape: tuple[int, ...]) -> Entry:
    """Normal weights of a size that keeps activations near one; norms are ones. Drawn when they are written."""

    def chunks() -> Iterator[memoryview]:
        if len(shape) == 1:
            weight = torch.ones(shape)
        else:
            generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
            weight = torch.randn(shape, generator=generator, device=DEVICE) * shape[1] ** -0.5
        yield weight.to(torch.bfloat16).cpu().flatten().view(torch.uint8).numpy().data

    return Entry(name, "BF16", shape, chunks)


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
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {
        name: tuple(weight.shape) for name, weight in model.named_parameters() if ".experts." not in name
    }
    adapter = get_adapter(config.to_dict())
    experts = [weight for group in adapter.groups(config.to_dict()) for weight in group.weights]
    shapes |= {weight.name: weight.shape for weight in experts}
    arguments.out.mkdir(parents=True)
    entries = (
        _random(name, shape) for name, shape in sorted(shapes.items(), key=lambda item: _layer(item[0]))
    )
    ShardWriter(arguments.out, 2 * 10**9, {"format": "pt"}).write(entries)
    config.architectures = [adapter.architecture]
    config.dtype = torch.bfloat16
    config.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
