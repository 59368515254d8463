"""`inspect` and `init` on original models of every family, and on a rewritten one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_rco.adapters import get_adapter
from moe_rco.errors import ModelError
from moe_rco.inspection import inspect
from moe_rco.plan import FORMAT_VERSION, METHOD
from moe_rco.quant.packing import layout, nbytes
from moe_rco.recipe import parse
from moe_rco.template import recipe_for
from moe_rco.types import BF16, PRUNE, Option
from tests.tiny_models import FAMILIES, save_tiny

INT4 = Option(4, 64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny")


def file_bytes(directory: Path) -> int:
    """Bytes of the tensors themselves, by the files' own headers."""
    total = 0
    for path in directory.glob("*.safetensors"):
        header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        total += sum(e - b for b, e in (t["data_offsets"] for n, t in header.items() if n != "__metadata__"))
    return total


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_original_models(family: str, tmp_path: Path) -> None:
    directory = save_tiny(family, tmp_path)
    found = inspect(directory)
    assert found.family == family
    assert [layer.options for layer in found.layers] == [("bf16",) * 8] * 2
    assert [layer.kept for layer in found.layers] == [8, 8]
    assert found.expert_bytes == 2 * found.expert_numel
    assert found.expert_bytes + found.other_bytes == file_bytes(directory)


def rewritten(source: Path, target: Path) -> list[tuple[Option, ...]]:
    """What rewrite writes, with zeros for weights: per layer 2 pruned, 4 int4, 2 bf16."""
    config = json.loads((source / "config.json").read_text())
    adapter = get_adapter(config)
    chosen = [PRUNE, INT4, INT4, BF16, PRUNE, INT4, INT4, BF16]
    tensors = {"model.embed_tokens.weight": torch.zeros(96, 64, dtype=torch.bfloat16)}
    for layer in adapter.moe_layers(config):
        tensors[adapter.router_name(layer)] = torch.zeros(8, 64, dtype=torch.bfloat16)
        for index, option in enumerate(chosen):
            for weight in adapter.expert(config, layer, index).weights:
                for suffix, (shape, dtype) in layout(weight.shape, option).items():
                    name = f"{weight.name.removesuffix('.weight')}.{suffix}"
                    tensors[name] = torch.zeros(shape, dtype=dtype)
    ids = {"prune": [0, 4], "int4-g64": [1, 2, 5, 6], "bf16": [3, 7]}
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "layers": {str(layer): ids for layer in adapter.moe_layers(config)},
    }
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return [tuple(chosen)] * 2


def test_our_output(tiny: Path, tmp_path: Path) -> None:
    chosen = rewritten(tiny, tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert [layer.options for layer in found.layers] == [tuple(o.name for o in options) for options in chosen]
    assert [layer.kept for layer in found.layers] == [6, 6]
    expert = sum(nbytes(shape, INT4) * 4 + nbytes(shape, BF16) * 2 for shape in [(64, 64)] * 3)
    assert [layer.bytes for layer in found.layers] == [expert, expert]
    assert found.expert_bytes + found.other_bytes == file_bytes(tmp_path / "out")


def test_damaged_output_is_refused(tiny: Path, tmp_path: Path) -> None:
    rewritten(tiny, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    layer = config["quantization_config"]["layers"]["1"]
    layer["prune"], layer["bf16"] = [0, 3], [4, 7]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.[34]"):
        inspect(tmp_path / "out")


def test_a_foreign_quantised_model_is_described_by_its_own_word(tiny: Path, tmp_path: Path) -> None:
    rewritten(tiny, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}})
    )
    assert inspect(tmp_path / "out").layers[0].options == ("awq",) * 8


def test_init_writes_a_recipe_that_is_valid_and_fits_the_model(tiny: Path) -> None:
    text = recipe_for(tiny)
    recipe = parse(text)
    assert recipe.model_directory == tiny
    assert [option.name for option in recipe.options] == ["prune", "int4-g64", "int8-g64", "bf16"]
    assert recipe.output == "out/tiny-35"
    assert "2 MoE layers with 8 experts, 2 of them used per token" in text
    assert "384.00 KiB now" in text


def test_init_without_a_group_size_that_divides(tmp_path: Path) -> None:
    directory = save_tiny("qwen3_moe", tmp_path / "a: #odd [name]", moe_intermediate_size=40)
    text = recipe_for(directory)
    assert [option.name for option in parse(text).options] == ["prune", "int4", "int8", "bf16"]
    assert parse(text).model == str(directory)
    assert "divides 64 and 40" in text


def test_an_original_model_without_an_expert_its_config_promises(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 9}))
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\.experts\.8"):
        inspect(tmp_path / "copy")


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model directory"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        inspect(tmp_path)
