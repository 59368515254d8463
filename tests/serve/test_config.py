"""A checkpoint that contradicts its quantization_config is refused, by name, before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_rco.adapters import get_adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError
from moe_rco.serve.config import expected_tensors, layer_options
from moe_rco.serve.hf import register
from moe_rco.types import Option
from tests.compressed import random_job
from tests.tiny_models import FAMILIES, save_tiny

register()

OPTIONS = ("prune", "int3-g64", "int4-g64", "bf16")


@pytest.fixture(scope="module", params=FAMILIES)
def family_out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    random_job(save_tiny(request.param, base / "model"), base / "store", 0, OPTIONS).write(base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def qwen_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("qwen")
    random_job(save_tiny("qwen3_moe", base / "model"), base / "store", 0, OPTIONS).write(base / "out")
    return base / "out"


@pytest.fixture
def out(qwen_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen_out, tmp_path / "out"))


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def error_of(out: Path) -> str:
    with pytest.raises(ModelError) as caught:
        AutoModelForCausalLM.from_pretrained(out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_config_is_understood(family_out: Path) -> None:
    config = config_of(family_out)
    adapter = get_adapter(config)
    layers = layer_options(config["quantization_config"], adapter, config)
    assert {Option.parse(name) for name in OPTIONS} == {
        option for layer in layers.values() for option in layer
    }
    written = Checkpoint(family_out, allow_quantized=True).tensors
    expected = expected_tensors(layers, adapter, config)
    assert expected.keys() == {name for name in written if ".experts." in name}
    for name, (shape, dtype) in expected.items():
        assert (written[name].shape, written[name].torch_dtype) == (shape, dtype)


Change = Callable[[dict[str, Any]], object]


def first_of(layer: dict[str, list[int]], option: str) -> int:
    return layer[option][0]


CHANGES: list[tuple[Change, str]] = [
    (lambda q: q.update(format_version=3), "format_version 3, this moe_rco reads 1 and 2"),
    (lambda q: q.pop("format_version"), "format_version None"),
    (lambda q: q.update(surplus=1), "surplus"),
    (lambda q: q.pop("layers"), "layers"),
    (lambda q: q["layers"].update({"x": {}}), "damaged: layers"),
    (lambda q: q["layers"]["0"].update({"int9": []}), "unknown option 'int9'"),
    (lambda q: q["layers"].pop("1"), "no option for expert 0 of layer 1"),
    (
        lambda q: q["layers"].update({"7": {"bf16": [0]}}),
        "expert 0 of layer 7, which the model does not have",
    ),
    (lambda q: q["layers"]["0"]["bf16"].append(8), "expert 8 of layer 0, which the model does not have"),
    (lambda q: q["layers"]["0"]["bf16"].append(first_of(q["layers"]["0"], "prune")), "is given two options"),
    (lambda q: q["layers"]["0"].pop("prune"), "no option for expert"),
    (
        lambda q: q["layers"].update({"0": {"prune": list(range(7)), "bf16": [7]}}),
        "keeps 1 experts of layer 0",
    ),
    (
        lambda q: q["layers"]["0"].update({"int4-g48": q["layers"]["0"].pop("int4-g64")}),
        "group size 48 does not divide",
    ),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_damaged_configs(out: Path, change: Change, words: str) -> None:
    config = config_of(out)
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    assert words in error_of(out)


@pytest.mark.parametrize(
    ("moved_from", "moved_to"), [("prune", "bf16"), ("bf16", "int4-g64"), ("int4-g64", "int3-g64")]
)
def test_an_expert_said_to_be_what_it_is_not(out: Path, moved_from: str, moved_to: str) -> None:
    config = config_of(out)
    layer = config["quantization_config"]["layers"]["1"]
    expert = layer[moved_from].pop()
    layer.setdefault(moved_to, []).append(expert)
    (out / "config.json").write_text(json.dumps(config))
    message = error_of(out)
    assert "expert tensor model.layers.1.mlp.experts." in message
    assert "quantization_config" in message


def edit(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_tensor(out: Path) -> None:
    name = next(
        iter(sorted(n for n in Checkpoint(out, allow_quantized=True).tensors if n.endswith("weight_scale")))
    )
    edit(out, lambda tensors: tensors.pop(name, None))
    assert f"expert tensor {name}, which quantization_config promises, is missing" in error_of(out)


@pytest.mark.parametrize("value", [torch.zeros(3, 1, dtype=torch.bfloat16), torch.zeros(64, 1)])
def test_a_wrong_tensor(out: Path, value: torch.Tensor) -> None:
    name = next(
        iter(sorted(n for n in Checkpoint(out, allow_quantized=True).tensors if n.endswith("weight_scale")))
    )
    edit(out, lambda tensors: tensors.update({name: value}) if name in tensors else None)
    assert f"expert tensor {name} in" in error_of(out)


def test_an_extra_tensor(out: Path) -> None:
    edit(out, lambda tensors: tensors.update({"model.layers.0.mlp.experts.9.up_proj.weight": torch.zeros(1)}))
    assert "experts.9.up_proj.weight, which quantization_config does not account for" in error_of(out)


def test_a_truncated_shard(out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in error_of(out)
