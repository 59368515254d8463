"""GPTQ beside the reference implementation (github.com/IST-DASLab/gptq), which is read from a clone and run as it is."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from eval.timing import ratio
from moe_rco.quant.errors import output_error
from moe_rco.quant.gptq import quantize_gptq
from moe_rco.types import Option

EXPERTS, HIDDEN, INNER, TOKENS = 4, 2048, 768, 4096
OPTIONS = ("int4-g128", "int3-g128")


def quantising(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Gate and up of some experts of Qwen3-30B-A3B's size, correlated inputs; both with 128 a group and activation order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    mix = torch.randn(HIDDEN, HIDDEN, generator=generator) * torch.logspace(0, -2, HIDDEN)
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator) @ mix
    hessian = (inputs.T @ inputs / TOKENS).expand(EXPERTS, HIDDEN, HIDDEN).contiguous()
    rows = []
    for name in OPTIONS:
        option = Option.parse(name)
        times: tuple[list[float], list[float]] = ([], [])
        errors = [0.0, 0.0]
        for _ in range(arguments.repeats):
            for which, quantised in enumerate((_ours, lambda *a: _reference(arguments.gptq, *a))):
                start = time.perf_counter()
                found = quantised(weight, hessian, option)
                times[which].append(time.perf_counter() - start)
                errors[which] = float(output_error(weight, found, hessian).sum())
        rows.append(
            {
                "option": name,
                "experts a second, ours": f"{EXPERTS / min(times[0]):.2f}",
                "the reference's": f"{EXPERTS / min(times[1]):.2f}",
                "time, ours / reference": ratio(*times),
                "output error, ours / reference": f"{errors[0] / errors[1]:.3f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def _ours(weight: torch.Tensor, hessian: torch.Tensor, option: Option) -> torch.Tensor:
    return quantize_gptq(weight, hessian, option).dequantize()


def _reference(clone: Path, weight: torch.Tensor, hessian: torch.Tensor, option: Option) -> torch.Tensor:
    """Its options for groups: fixed grids from the smallest and largest weight, columns by activation."""
    with _importable(clone):
        gptq, quant = importlib.import_module("gptq"), importlib.import_module("quant")
    found = []
    for matrix, moment in zip(weight, hessian, strict=True):
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight.data = matrix.clone()
        solver = gptq.GPTQ(layer)
        solver.quantizer = quant.Quantizer()
        solver.quantizer.configure(option.bits, perchannel=True, sym=False, mse=False)
        solver.H = moment.clone()
        # It waits for a CUDA device at the end, and prints.
        with patch("torch.cuda.synchronize"), patch("builtins.print"):
            solver.fasterquant(percdamp=0.01, groupsize=option.group_size, actorder=True, static_groups=True)
        found.append(layer.weight.data)
    return torch.stack(found)


@contextmanager
def _importable(clone: Path) -> Iterator[None]:
    sys.path.insert(0, str(clone))
    try:
        yield
    finally:
        sys.path.remove(str(clone))
