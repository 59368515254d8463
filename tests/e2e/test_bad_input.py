"""What a user can get wrong: one line that says what, where and what to do, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from moe_rco import cli
from moe_rco.recipe import DEMO_MODEL

RECIPE = """\
version: 1
model: model
options: [prune, int4-g64, int8-g64, bf16]
budget: {ratio: 0.4}
calibration: {data: text.jsonl, sequences: 8, sequence_length: 32}
search: {steps: 0}
output: out
"""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's files, to copy from."""
    return shutil.copytree(DEMO_MODEL, tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def place(tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a valid recipe, model and text."""
    shutil.copytree(pristine, tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    lines = [
        json.dumps({"text": f"Document {number}: " + "some words to read. " * 40}) for number in range(6)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(place: Path, *overrides: str) -> str:
    """Run `prune`, check how it refuses, and return its message."""
    before = sorted(path.relative_to(place) for path in place.rglob("*"))
    sets = [part for override in overrides for part in ("--set", override)]
    result = CliRunner().invoke(cli.app, ["prune", "--recipe", "recipe.yaml", *sets])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0]  # only progress may stand before it
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == before
    return errors[0]


def shard(place: Path, number: int = 1) -> Path:
    return sorted((place / "model").glob("model-*.safetensors"))[number]


def change_index(place: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = place / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_config(place: Path, **values: object) -> None:
    path = place / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model=nowhere", ["nowhere"]),
        ("budget.ratio=0.001", ["too small", "smallest possible is ratio 0.0", "largest"]),
        ("budget.bytes=12", ["too small", "smallest possible is", "bytes"]),
        ("budget.avg_bits=0.01", ["too small", "avg_bits"]),
        ("budget.ratio=0", ["budget.ratio"]),
        ("budget.ratio=-0.5", ["budget.ratio"]),
        ("budget.bytes=-5", ["budget.bytes"]),
        ("options=[prune, int4-g48]", ["group size 48 does not divide", "int4-g"]),
        ("calibration.data=empty.jsonl", ["empty.jsonl", "no text"]),
        ("calibration.data=missing.jsonl", ["missing.jsonl", "no such file"]),
        ("calibration.data=short.txt", ["short.txt", "too short"]),
        ("calibration.text_field=body", ["line 1", "'body'", "text_field"]),
        ("calibration.data=model", ["is a directory"]),
        ("execution.device=cuda:7", ["cuda:7", "execution.device"]),
        ("execution.memory_limit=100MiB", ["memory", "100"]),
        ("output=model", ["exists"]),
        ("output=text.jsonl/out", ["text.jsonl"]),
    ],
)
def test_wrong_values(place: Path, override: str, parts: list[str]) -> None:
    (place / "empty.jsonl").write_text("\n")
    (place / "short.txt").write_text("Few words.")
    message = refused(place, override)
    for part in parts:
        assert part in message


def test_budget_is_refused_when_it_cannot_hold_top_k_experts_a_layer(place: Path) -> None:
    """Four experts a layer at 4 bits is the least the model can run with."""
    message = refused(place, "options=[prune, int4-g64]", "budget.ratio=0.03")
    assert "every layer keeps at least 4 experts" in message


def test_unsupported_architecture(place: Path) -> None:
    change_config(place, model_type="qwen3_moeh")
    assert "the nearest is 'qwen3_moe'" in refused(place)


def test_missing_shard(place: Path) -> None:
    shard(place).unlink()
    assert "model-00002" in refused(place)


@pytest.mark.parametrize("keep", [4, 100, 5000, -1])
def test_truncated_shard(place: Path, keep: int) -> None:
    content = shard(place).read_bytes()
    shard(place).write_bytes(content[:keep])
    assert shard(place).name in refused(place)


def test_header_length_lies(place: Path) -> None:
    content = shard(place).read_bytes()
    shard(place).write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    assert shard(place).name in refused(place)


@pytest.mark.parametrize("name", ["../text.jsonl", "/etc/passwd", "sub/file.safetensors"])
def test_index_names_a_file_outside(place: Path, name: str) -> None:
    change_index(place, lambda placed: placed.update(dict.fromkeys(list(placed)[:1], name)))
    message = refused(place)
    assert name in message
    assert "not in the model directory" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_weights_are_named(place: Path, value: float) -> None:
    tensors = load_file(shard(place))
    name = next(name for name in tensors if ".experts." in name)
    tensors[name][3, 5] = value
    save_file(tensors, shard(place), {"format": "pt"})
    message = refused(place)
    assert name in message
    assert "NaN or infinite" in message


def test_wrong_shape_is_named(place: Path) -> None:
    tensors = load_file(shard(place))
    name = next(name for name in tensors if ".experts." in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, shard(place), {"format": "pt"})
    assert name in refused(place)


def test_configuration_contradicts_the_tensors(place: Path) -> None:
    change_config(place, num_local_experts=64, num_experts=64)
    assert "experts.32" in refused(place)


def test_missing_tokenizer(place: Path) -> None:
    for path in (place / "model").glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(place)


def test_output_not_writable(place: Path) -> None:
    """Not even root may make directories in /proc."""
    assert "not writable" in refused(place, "output=/proc/out")


def test_disk_too_small(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "free" in refused(place)


def test_no_access_to_the_hub(place: Path) -> None:
    result = CliRunner().invoke(cli.app, ["prune", "--recipe", "qwen-moe.yaml"])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    for part in ("Qwen/Qwen3-30B-A3B", "Hugging Face Hub", "--set model="):
        assert part in result.stderr


def test_data_from_the_hub_without_access(place: Path) -> None:
    message = refused(place, "calibration.data=nobody/nothing-here")
    for part in ("nobody/nothing-here", "local"):
        assert part in message


def test_the_recipe_itself_is_fine(place: Path) -> None:
    """So that the refusals above are for the reasons they name."""
    result = CliRunner().invoke(cli.app, ["prune", "--recipe", "recipe.yaml", "--dry-run"])
    assert result.exit_code == 0, result.output
