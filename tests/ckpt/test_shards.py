"""Which shards are complete: what the manifest says counts only for the same inputs, and only with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_rco.ckpt import shards as shards_module
from moe_rco.ckpt.shards import ShardManifest, ShardWriter, read_manifest
from moe_rco.ckpt.writer import Entry, from_tensor
from tests.killing import tree

ENTRIES = [from_tensor(f"t{number}", torch.full((10,), number)) for number in range(4)]


def write(place: Path, inputs: str = "a", entries: list[Entry] = ENTRIES) -> None:
    directory = place / "shards"
    directory.mkdir(exist_ok=True)
    ShardWriter(directory, 80, None, ShardManifest(place / "manifest", inputs)).write(entries)


@pytest.fixture
def written_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards written from here on."""
    names: list[str] = []
    write_file = shards_module.write_file

    def noted(path: Path, *rest: object) -> str:
        names.append(path.name.removesuffix(".tmp"))
        return write_file(path, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(shards_module, "write_file", noted)
    return names


def shard(number: int) -> str:
    return f"model-{number:05d}-of-00004.safetensors"


def test_complete_shards_are_not_written_again(tmp_path: Path, written_again: list[str]) -> None:
    write(tmp_path)
    assert written_again == [shard(number) for number in (1, 2, 3, 4)]
    before = tree(tmp_path)
    write(tmp_path)
    assert len(written_again) == 4
    assert tree(tmp_path) == before
    manifest = read_manifest(tmp_path / "manifest")
    assert manifest is not None
    assert (manifest["total"], len(manifest["shards"])) == (4, 4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-8] + b"changed!"),
    ],
)
def test_a_damaged_shard_is_written_again(
    tmp_path: Path, damage: Callable[[Path], object], written_again: list[str]
) -> None:
    write(tmp_path)
    before = tree(tmp_path)
    written_again.clear()
    damage(tmp_path / "shards" / shard(3))
    write(tmp_path)
    assert written_again == [shard(3)]
    assert tree(tmp_path) == before


def test_shards_of_other_inputs_are_written_again(tmp_path: Path, written_again: list[str]) -> None:
    write(tmp_path)
    written_again.clear()
    write(tmp_path, "b")
    assert len(written_again) == 4


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs": "a", "total": "4", "shards": {}}', "\x00"])
def test_a_damaged_manifest_lists_nothing(tmp_path: Path, text: str, written_again: list[str]) -> None:
    write(tmp_path)
    before = tree(tmp_path)
    written_again.clear()
    (tmp_path / "manifest").write_text(text)
    assert read_manifest(tmp_path / "manifest") is None
    write(tmp_path)
    assert len(written_again) == 4
    assert tree(tmp_path) == before


def test_a_manifest_may_list_what_is_not_there(tmp_path: Path, written_again: list[str]) -> None:
    value = {"inputs": "a", "total": 4, "shards": {shard(1): "0" * 64}}
    (tmp_path / "manifest").write_text(json.dumps(value))
    write(tmp_path)
    assert len(written_again) == 4
