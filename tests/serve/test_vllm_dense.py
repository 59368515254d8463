"""Models with every group chosen for in a real, unmodified vLLM on the CPU; and the parts of what serves them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_rco.quant.packing import SHAPE, dequantize, pack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import Option
from tests.serve.test_vllm_engine import TOLERANCE, TWO, damaged, job
from tests.serve.vllm_models import difference, expected, write
from tests.vllm_engine import outcomes

pytest.importorskip("vllm", reason="vLLM is not installed")

from moe_rco.serve.vllm_packed import PackedWeights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    # Of two processes each has whole groups of 64 inputs of its heads.
    "qwen2_moe": ("qwen2_moe", {"hidden_size": 128, "num_attention_heads": 4}),
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "tied": ("demo", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (model, settings) in MODELS.items():
        directory = tmp_path_factory.mktemp(name)
        chosen = write(model, directory, dense=True, **settings).assignment
        assert any(option.is_quantized for group, option, _ in chosen.dense() if group.kind != "attention")
        made[name] = directory / "out"
    return made


@pytest.fixture(scope="module")
def eager(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    base = tmp_path_factory.mktemp("eager")
    todo = {name: job(out) for name, out in written.items()}
    lacking = damaged(written["qwen3_moe"], base / "missing", "missing", ".self_attn.")
    todo["missing"] = job(lacking) | {"unchecked": True}
    return dict(zip(todo, outcomes(list(todo.values()), base / "run", timeout=800), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_transformers(
    name: str, eager: dict[str, dict[str, Any]], written: dict[str, Path]
) -> None:
    probabilities, continuations = expected(written[name])
    assert "error" not in eager[name], eager[name]
    assert difference(eager[name], probabilities) < TOLERANCE
    assert eager[name]["tokens"] == continuations


def test_a_tensor_that_was_not_loaded_is_missed(eager: dict[str, dict[str, Any]]) -> None:
    error = eager["missing"].get("error", "none")
    assert re.search(r"^ModelError: tensor \S+self_attn\.\S+\.weight_scale is missing", error), error


def test_agrees_compiled_and_in_two_processes(written: dict[str, Path], tmp_path: Path) -> None:
    out = written["qwen2_moe"]
    (outcome,) = outcomes([job(out, **TWO, enforce_eager=False)], tmp_path, timeout=800)
    probabilities, continuations = expected(out)
    assert "error" not in outcome, outcome["log"][-3000:]
    assert difference(outcome, probabilities) < TOLERANCE
    assert outcome["tokens"] == continuations


@pytest.mark.parametrize("name", ["int2-g16", "int3", "int3-g32", "int4-g64", "int8"])
def test_packed_weights_are_what_they_stand_for(name: str) -> None:
    option, generator = Option.parse(name), torch.Generator().manual_seed(0)
    sizes, inputs, outputs = (32, 17), 64, 64
    module, whole = PackedWeights(option, sizes, inputs, outputs), []
    for number, size in enumerate(sizes):
        made = pack(
            *quantize_rtn(torch.randn(size, inputs, generator=generator), option, search=False), option
        )
        whole.append(dequantize(made, option))
        for suffix, tensor in made.items():
            if suffix != SHAPE:
                module.load(number, suffix, tensor)
    x, bias = torch.randn(3, inputs, generator=generator), torch.randn(outputs, generator=generator)
    expected_ = torch.zeros(3, outputs)
    expected_[:, : sum(sizes)] = x @ torch.cat(whole).T
    torch.testing.assert_close(module(x, bias), expected_ + bias, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[3, 0], [31, 3]])
    assert torch.equal(module.rows(ids), whole[0][ids])


def test_a_process_without_rows_looks_up_zeros() -> None:
    module = PackedWeights(Option.parse("int4-g64"), (0,), 64, 32)
    assert torch.equal(module.rows(torch.zeros(5, dtype=torch.int64)), torch.zeros(5, 64))
    assert torch.equal(module(torch.ones(2, 64)), torch.zeros(2, 32))
