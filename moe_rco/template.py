"""Writes a first recipe for a model directory, with its own sizes in the comments."""

from __future__ import annotations

from pathlib import Path

from moe_rco.inspection import Inspection, inspect
from moe_rco.marked_yaml import dump
from moe_rco.units import format_size

_TEMPLATE = """\
# {directory}: a {family} model of {layers} MoE layers with {experts} experts, {top_k} of them used per token.
# The routed experts take {expert_bytes} now; everything else, {other_bytes}, is copied unchanged.
#
#   moe-rco prune --recipe THIS_FILE --dry-run      # sizes and memory, nothing is written
#   moe-rco prune --recipe THIS_FILE

version: 1

{model}

# What may become of an expert: prune, bf16, int2, int3, int4 or int8; {group_note}.
# vLLM's fast CUDA kernels run 4 and 8 bits and bf16; int2 and int3 need 'experimental: true'.
options: [{options}]

# The most the routed experts' files may take, in one of four forms:
#   {{ratio: 0.35}}     a fraction of what they take now: {example_bytes}
#   {{bytes: {example_size}}}
#   {{avg_bits: 4.25}}  bits per original expert weight, scales included
#   {{fit: {{gpu_memory: 24GB, max_model_len: 8192, max_num_seqs: 4}}}}  what is left of a GPU that serves it like this
# 35% and {example_size} are short for the first two. A list, as in [50%, 35%, 25%], gives a model each in one run.
budget: {{ratio: 0.35}}

# mixed: every expert has its own precision.
# stock: every layer keeps equally many experts and has one precision. vLLM then reads the result without this package;
#        transformers too where the options have one width, as in [prune, bf16].
layout: mixed
experimental: false

quantizer: {{method: gptq}} # or rtn: round to nearest, faster and worse

calibration:
  # A dataset on the Hugging Face Hub, a .jsonl, .parquet or .txt file, or a list of {{data, weight}}. Conversations (`messages`)
  # are rendered with the model's chat template, and what the assistant says counts.
  # Text like the text the model will be used for gives the best choice.
  data: HuggingFaceFW/fineweb-edu
  text_field: text        # the field or column that holds the text
  sequences: 2048         # more text is the best protection against learning the calibration set by heart
  sequence_length: 2048
  holdout: 0.1            # fraction never used for gradients: it chooses the best candidate

search:
  method: rco             # or what it is compared with: evolution, penalty, fisher, proxy, reap ...
  steps: 300
  refine: 300             # then races improve the best, as long as so many steps take; more steps before, where they pay
  samples: 4              # assignments tried per step, in pairs
  batch: 4                # sequences per sample
  learning_rate: 0.1
  seed: 0                 # the same recipe and seed give the same result

execution:
  device: auto            # cpu, cuda, cuda:1 ...
  mode: auto
  dtype: auto             # or float32, bfloat16
  # memory_limit: 70GiB

{output}
"""


def recipe_for(directory: str | Path) -> str:
    """The text of a commented recipe for the model in a directory. Raises ModelError."""
    found = inspect(directory)
    group = next((size for size in (128, 64, 32) if _divides(found, size)), None)
    suffix = f"-g{group}" if group else ""
    note = (
        f"-g{group} is one scale for every {group} weights"
        if group
        else f"one scale per row, as no usual group size divides {found.hidden} and {found.intermediate}"
    )
    return _TEMPLATE.format(
        directory=found.directory,
        family=found.family,
        layers=len(found.layers),
        experts=found.num_experts,
        top_k=found.top_k,
        expert_bytes=format_size(found.expert_bytes),
        other_bytes=format_size(found.other_bytes),
        model=dump({"model": str(found.directory)}).strip(),
        group_note=note,
        options=", ".join(["prune", f"int4{suffix}", f"int8{suffix}", "bf16"]),
        example_bytes=format_size(found.expert_bytes * 35 // 100),
        example_size=format_size(found.expert_bytes * 35 // 100).replace(" ", ""),
        output=dump({"output": f"out/{found.directory.resolve().name}-35"}).strip(),
    )


def _divides(found: Inspection, group: int) -> bool:
    return found.hidden % group == 0 and found.intermediate % group == 0
