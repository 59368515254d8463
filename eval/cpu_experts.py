"""How fast, and how exactly, the routed experts of one layer run on this CPU, whatever the kernel.

    OMP_NUM_THREADS=1 python -m eval.cpu_experts [OUTPUT.md]

One thread: the kernels are compared, not the machine's cores. vLLM's own fused kernel on the bfloat16 (and
float32) weights is what stock vLLM decodes with; the others compute with quantised weights:
  moe_rco     the packed weights as `serve/vllm_cpu_kernel.py` multiplies by them; it chooses the experts, too, for
              which the others need further calls that are not in their times
  dequantise  each chosen expert expanded when used, then matrix products in float32 (what transformers does)
  int4pack, int8pack  torch's packed CPU matrix products, called for each chosen expert
The error is the largest difference to double precision on the same weights, relative to the largest output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
from vllm.platforms import current_platform

from moe_rco.quant.packing import SHAPE, WEIGHT, dequantize, pack, unpack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.serve.vllm_cpu import CpuExperts
from moe_rco.types import Option

RESULT = Path(__file__).parent / "results" / "cpu_experts.md"
TOKENS = (1, 16, 256)
OPTIONS = ("bf16", "int8-g64", "int4-g64", "int3-g64", "int2-g64")
INT8_PER_CHANNEL = "int8"
SECONDS = 1.0
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Inputs [T, H], the router's logits [T, E], and weights and ids [T, k] of the experts chosen by them."""


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


# A sixteenth of the second model's 128 experts: the routing of one token touches 8 of them either way.
SHAPES = (Shape("demo", 128, 64, 32, 4), Shape("Qwen3-30B-A3B, 16 of its experts", 2048, 768, 16, 8))


def layer(shape: Shape, name: str) -> tuple[list[list[dict[str, Tensor]]], list[list[Tensor]]]:
    """The tensors as written, and the weights they stand for, of gate, up and down of every expert."""
    option, generator = Option.parse(name), torch.Generator().manual_seed(0)
    written: list[list[dict[str, Tensor]]] = []
    for _ in range(shape.experts):
        written.append([])
        for rows, columns in ((shape.intermediate, shape.hidden),) * 2 + (
            (shape.hidden, shape.intermediate),
        ):
            weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
            tensors = {WEIGHT: weight.bfloat16()}
            if option.is_quantized:
                quantised = quantize_rtn(weight, option, search=False)
                tensors = pack(quantised.codes, quantised.scale, quantised.zero, option)
            written[-1].append(tensors)
    return written, [[dequantize(tensors, option) for tensors in expert] for expert in written]


def ours(shape: Shape, name: str, written: list[list[dict[str, Tensor]]]) -> Experts:
    option = Option.parse(name)
    everyone = range(shape.experts)
    experts = CpuExperts(
        [option for _ in everyone], everyone, shape.hidden, shape.intermediate, shape.top_k, False
    )
    for expert, matrices in enumerate(written):
        for matrix, tensors in enumerate(matrices):
            for suffix in tensors.keys() - {SHAPE}:
                experts.load(expert, matrix, suffix, tensors[suffix])
    return lambda x, logits, factors, ids: experts(x, logits)


def fused(weights: list[list[Tensor]], dtype: torch.dtype) -> Experts:
    w13 = torch.stack([torch.cat(expert[:2]) for expert in weights]).to(dtype)
    w13, w2 = (
        cpu_prepack_moe_weight(weight, "vec")
        for weight in (w13, torch.stack([expert[2] for expert in weights]).to(dtype))
    )

    def run(x: Tensor, logits: Tensor, factors: Tensor, ids: Tensor) -> Tensor:
        x = x.to(dtype)
        out = torch.empty_like(x)
        cpu_fused_moe(out, x, w13, w2, None, None, factors, ids, "silu", "vec", False)
        return out

    return run


def one_by_one(matrices: Sequence[Sequence[Callable[[Tensor], Tensor]]]) -> Experts:
    """Experts one after the other, each matrix a function of its inputs."""

    def run(x: Tensor, logits: Tensor, factors: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, (gate, up, down) in enumerate(matrices):
            token, place = torch.where(ids == expert)
            if len(token):
                part = x[token]
                part = down(F.silu(gate(part)) * up(part)) * factors[token, place, None]
                out.index_add_(0, token, part)
        return out

    return run


def expanded(name: str, written: list[list[dict[str, Tensor]]]) -> Experts:
    option = Option.parse(name)
    return one_by_one(
        [
            [lambda x, t=tensors: F.linear(x, dequantize(t, option)) for tensors in expert]
            for expert in written
        ]
    )


def int4pack(name: str, written: list[list[dict[str, Tensor]]]) -> Experts:
    option = Option.parse(name)

    def matrix(tensors: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        codes, scale, _ = unpack(tensors, option)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
        grid = torch.stack([scale.float().T, torch.zeros_like(scale.float().T)], -1).contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, option.group_size, grid)

    return one_by_one([[matrix(tensors) for tensors in expert] for expert in written])


def int8pack(written: list[list[dict[str, Tensor]]]) -> Experts:
    def matrix(tensors: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        codes, scale, _ = unpack(tensors, Option.parse(INT8_PER_CHANNEL))
        scale = scale.flatten().float()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale)

    return one_by_one([[matrix(tensors) for tensors in expert] for expert in written])


def exact(weights: list[list[Tensor]]) -> Experts:
    doubles = [[weight.double() for weight in expert] for expert in weights]
    return one_by_one([[lambda x, w=weight: x @ w.T for weight in expert] for expert in doubles])


def seconds(run: Callable[[], Any]) -> float:
    """The shortest of the calls that fit into SECONDS, five at least: other programs only ever add to it."""
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(shape: Shape) -> list[str]:
    lines = [
        f"## {shape.name}: hidden {shape.hidden}, intermediate {shape.intermediate}, {shape.top_k} of {shape.experts} experts",
        "",
        "| weights | kernel | "
        + " | ".join(f"{tokens} token{'s' * (tokens > 1)}" for tokens in TOKENS)
        + " | error |",
        "|:--|:--|" + "--:|" * (len(TOKENS) + 1),
    ]
    inputs = {}
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        scores = torch.rand(tokens, shape.experts, generator=generator)
        factors, ids = scores.softmax(-1).topk(shape.top_k)
        x = torch.randn(tokens, shape.hidden, generator=generator)
        inputs[tokens] = x, scores, factors, ids.int()
    stock: list[float] = []
    for name in (*OPTIONS, INT8_PER_CHANNEL):
        written, weights = layer(shape, name)
        kernels: dict[str, Experts] = {}
        if name == "bf16":
            kernels["vLLM fused, bfloat16"] = fused(weights, torch.bfloat16)
            kernels["vLLM fused, float32"] = fused(weights, torch.float32)
        kernels["moe_rco"] = ours(shape, name, written)
        kernels["dequantise"] = expanded(name, written)
        if name == "int4-g64":
            kernels["int4pack"] = int4pack(name, written)
        if name == INT8_PER_CHANNEL:
            kernels["int8pack"] = int8pack(written)
        x, scores, factors, ids = inputs[16]
        truth = exact(weights)(x.double(), scores, factors.double(), ids)
        for kernel, run in kernels.items():
            times = [seconds(lambda run=run, given=given: run(*given)) for given in inputs.values()]
            stock = stock or times
            cells = [
                f"{1e6 * taken:.0f} µs ({taken / first:.2f})"
                for taken, first in zip(times, stock, strict=True)
            ]
            error = (run(*inputs[16]) - truth).abs().max() / truth.abs().max()
            lines.append(f"| {name} | {kernel} | {' | '.join(cells)} | {float(error):.0e} |")
    return [*lines, ""]


def main() -> None:
    current_platform.import_kernels()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    lines = [
        "# The experts of one layer on a CPU",
        "",
        "Made by `OMP_NUM_THREADS=1 python -m eval.cpu_experts`, whose first lines say what is compared. In brackets: the time",
        f"relative to vLLM's fused bfloat16 kernel. {torch.get_num_threads()} thread, torch {torch.__version__}; inputs are",
        "float32 but for that kernel's.",
        "",
    ]
    with torch.inference_mode():
        for shape in SHAPES:
            lines += measure(shape)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
