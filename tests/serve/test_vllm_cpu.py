"""The CPU experts against double-precision arithmetic on the dequantised weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_rco.quant.packing import SHAPE, WEIGHT, dequantize, nbytes, pack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import Option
from tests.vllm_engine import ROOT

pytest.importorskip("vllm", reason="vLLM is not installed")

from moe_rco.serve.vllm_cpu import CpuExperts, _run

pytestmark = pytest.mark.slow  # compiles the kernels where no earlier run has left them
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 96, 9, 3
MIXED = ("bf16", "int8", "int8-g32", "int4-g16", "int4", "int3-g32", "int3", "int2-g16")


def build(
    names: Sequence[str],
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    elsewhere: Collection[int] = (),
    renormalize: bool = True,
) -> tuple[CpuExperts, dict[int, list[Tensor]], int]:
    """Experts whose ids take `names` in turn, their dequantised weights in float64, and their bytes on disk.

    Those in `elsewhere` are another process's.
    """
    generator = torch.Generator().manual_seed(0)
    options = [Option.parse(names[expert % len(names)]) for expert in range(EXPERTS)]
    local = [e for e, option in enumerate(options) if not option.is_prune and e not in elsewhere]
    experts = CpuExperts(options, local, hidden, intermediate, TOP_K, renormalize)
    weights: dict[int, list[Tensor]] = {}
    on_disk = 0
    for expert, option in enumerate(options):
        if option.is_prune:
            continue
        for matrix, shape in enumerate(
            ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        ):
            weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            tensors = {WEIGHT: weight.bfloat16()}
            if option.is_quantized:
                quantised = quantize_rtn(weight, option, search=False)
                tensors = pack(quantised.codes, quantised.scale, quantised.zero, option)
            weights.setdefault(expert, []).append(dequantize(tensors, option).double())
            on_disk += nbytes(shape, option)
            for suffix, tensor in tensors.items():
                if suffix != SHAPE and expert in local:
                    experts.load(expert, matrix, suffix, tensor)
    return experts, weights, on_disk


def inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and the router's logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, generator=generator), torch.randn(tokens, EXPERTS, generator=generator)


def reference(experts: CpuExperts, weights: dict[int, list[Tensor]], x: Tensor, logits: Tensor) -> Tensor:
    kept = torch.tensor([not option.is_prune for option in experts.options])
    p = torch.softmax(logits.double().masked_fill(~kept, -torch.inf), -1)
    factors, ids = torch.topk(p, TOP_K)
    if experts.renormalize:
        factors = factors / factors.sum(-1, keepdim=True)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, chosen) in enumerate(zip(x.double(), ids.tolist(), strict=True)):
        for factor, expert in zip(factors[token], chosen, strict=True):
            gate, up, down = weights[expert]
            out[token] += factor * (down @ (F.silu(gate @ row) * (up @ row)))
    return out


@pytest.mark.parametrize("names", [*((name,) for name in MIXED), (*MIXED, "prune")], ids="-".join)
@pytest.mark.parametrize("tokens", [1, 2, 150])
@pytest.mark.parametrize("renormalize", [True, False])
def test_exact_to_float32(names: tuple[str, ...], tokens: int, renormalize: bool) -> None:
    experts, weights, _ = build(names, renormalize=renormalize)
    x, logits = inputs(tokens)
    expected = reference(experts, weights, x, logits)
    assert (experts(x, logits) - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("renormalize", [True, False])
def test_pruned_experts_are_never_chosen(renormalize: bool) -> None:
    experts, weights, _ = build(("prune", "bf16"), renormalize=renormalize)
    x, logits = inputs(20)
    logits[:, ::2] += 100  # the pruned ones
    expected = reference(experts, weights, x, logits)
    assert (experts(x, logits) - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("shape", [(64, 33), (48, 16)])
def test_rows_need_not_fill_blocks(shape: tuple[int, int]) -> None:
    hidden, intermediate = shape
    experts, weights, _ = build(("int3", "int2", "bf16", "int8", "int4"), hidden, intermediate)
    x, logits = inputs(5)
    expected = reference(experts, weights, x[:, :hidden], logits)
    assert (experts(x[:, :hidden], logits) - expected).abs().max() < 2e-6 * expected.abs().max()


def test_an_expert_that_is_not_here_adds_nothing() -> None:
    """It takes part in the routing all the same, and the processes' outputs add up to the whole."""
    x, logits = inputs(20)
    parts = [build(MIXED, elsewhere=range(start, EXPERTS, 2))[0](x, logits) for start in (0, 1)]
    assert torch.allclose(parts[0] + parts[1], build(MIXED)[0](x, logits), atol=1e-6)


def test_large_and_undefined_activations_come_out_as_they_should() -> None:
    experts, weights, _ = build(("bf16", "int4"))
    x, logits = inputs(3)
    x[0] *= 1e4  # silu saturates
    expected = reference(experts, weights, x, logits)
    error = (experts(x, logits) - expected).abs().amax(1)
    assert (error < 2e-6 * expected.abs().amax(1)).all()
    x[1, 0] = torch.nan
    found = experts(x, logits)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    assert experts(x.bfloat16(), logits)[1].isnan().all()
    x, logits = inputs(3)
    logits[1, 4] = torch.nan
    assert experts(x, logits).isnan().all(1).tolist() == [False, True, False]


def test_each_token_is_its_own() -> None:
    experts, _, _ = build(MIXED)
    x, logits = inputs(70)
    together = experts(x, logits)
    alone = torch.cat([experts(x[t : t + 1], logits[t : t + 1]) for t in range(len(x))])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    experts, weights, _ = build(MIXED)
    x, logits = inputs(6)
    found = experts(x.to(dtype), logits.to(dtype))
    exact = experts(x.to(dtype).float(), logits.to(dtype).float())
    assert torch.equal(found, exact.to(dtype))
    assert found.dtype == dtype
    expected = reference(experts, weights, x.to(dtype), logits.to(dtype))
    step = torch.finfo(dtype).eps
    assert ((found.double() - expected).abs() <= step * expected.abs() + 1e-5).all()


def test_threads_change_nothing() -> None:
    experts, _, _ = build(MIXED)
    for dtype in (torch.float32, torch.bfloat16):
        x, logits = inputs(40)
        x = x.to(dtype)
        assert torch.equal(_run(x, logits, *experts._arguments, 3), experts(x, logits))
    torch.set_num_threads(1)  # numba starts one for every core, of the runtime that torch uses too


def test_bytes_held_are_the_bytes_on_disk() -> None:
    experts, weights, on_disk = build(MIXED)
    shapes = sum(16 * 3 for expert in weights if experts.options[expert].is_quantized)
    # Row counts are multiples of 32, so nothing is padded; `weight_shape` is not needed, and the zero points of
    # 3 bits take 3 bits instead of 3.2.
    assert 0.99 * (on_disk - shapes) < experts.nbytes <= on_disk - shapes


def test_the_operator_is_sound() -> None:
    experts, _, _ = build(("int4", "bf16"))
    x, logits = inputs(3)
    torch.library.opcheck(torch.ops.moe_rco.cpu_experts.default, (x, logits, *experts._arguments))


def test_the_operator_uses_the_threads_torch_has_and_what_was_compiled_before() -> None:
    code = (
        "import json, os, torch; from moe_rco.serve import vllm_cpu; from tests.serve.test_vllm_cpu import *\n"
        "def ticks():\n"
        "    fields = (open(f'/proc/self/task/{task}/stat').read() for task in os.listdir('/proc/self/task'))\n"
        "    return sorted(int(line.rpartition(')')[2].split()[11]) for line in fields)[-2:]\n"
        "experts, _, _ = build(MIXED, 512, 512); experts.prepare()\n"
        "x, logits = torch.randn(512, 512), torch.randn(512, EXPERTS)\n"
        "before = ticks()[0]\n"
        "for _ in range(20): two = experts(x, logits)\n"
        "vllm_cpu.PARALLEL_WORK = 1 << 60; assert torch.equal(experts(x, logits), two)\n"
        "kernels = vllm_cpu.kernel.run_experts, vllm_cpu.kernel.run_experts_parallel\n"
        "found = [sum(kernel.stats.cache_hits.values()) for kernel in kernels]\n"
        "print(json.dumps([ticks()[0] - before, torch.get_num_threads(), *found]))"
    )
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": "2"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert run.returncode == 0, run.stderr[-2000:]
    worked, *rest = json.loads(run.stdout.splitlines()[-1])
    assert worked >= 10, "hundredths of a second of the second thread"
    assert rest == [2, 1, 1]
