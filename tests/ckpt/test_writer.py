"""The streaming writer against the reference reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_rco.ckpt import writer
from moe_rco.ckpt.header import read_header
from moe_rco.ckpt.shards import ShardWriter
from moe_rco.ckpt.writer import Entry, from_file, from_tensor

TENSORS = {
    "z": torch.randn(5).bfloat16(),
    "a": torch.arange(12, dtype=torch.int64).view(3, 4),
    "m": torch.randn(7, 3),
    "scalar": torch.tensor(3, dtype=torch.int32),
    "empty": torch.zeros(0, 2),
    "byte": torch.tensor([True, False, True]),
}


def entries() -> list[Entry]:
    return [from_tensor(name, tensor) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_what_is_written_is_read(tmp_path: Path, shard_bytes: int) -> None:
    told: list[int] = []
    paths = ShardWriter(tmp_path, shard_bytes, {"format": "pt"}).write(entries(), told.append)
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert sum(told) == total
    assert [path.name for path in paths] == [
        f"model-{number:05d}-of-{len(paths):05d}.safetensors" for number in range(1, len(paths) + 1)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    loaded: dict[str, torch.Tensor] = {}
    for path in paths:
        here = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in here)
        size = sum(tensor.nbytes for tensor in here.values())
        assert size <= shard_bytes or sum(tensor.nbytes > 0 for tensor in here.values()) == 1
        loaded |= here
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert loaded.keys() == TENSORS.keys() == index["weight_map"].keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    for path in ShardWriter(tmp_path, 10**9).write(entries()):
        for tensor in read_header(path).values():
            assert tensor.offset % TENSORS[tensor.name].element_size() == 0


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        ShardWriter(tmp_path / place, 60, {"format": "pt", "by": "us"}).write(entries())
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert len(files) > 2
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_bytes_are_copied_without_decoding(tmp_path: Path) -> None:
    # 8-bit floats are nothing we compute with, and NaN payloads must survive.
    odd = torch.tensor([0x7FC1, 0xFFFF, 0x7F81], dtype=torch.uint16).view(torch.bfloat16)
    save_file({"f8": torch.randn(9).to(torch.float8_e5m2), "nan": odd}, tmp_path / "source.safetensors")
    source = read_header(tmp_path / "source.safetensors")
    (path,) = ShardWriter(tmp_path, 10**9).write(
        [from_file(source["f8"]), from_file(source["nan"], "renamed")]
    )
    loaded = load_file(path)
    assert torch.equal(loaded["renamed"].view(torch.uint16), odd.view(torch.uint16))
    assert loaded["f8"].dtype == torch.float8_e5m2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 64)
    value = torch.randn(50, 3).to(dtype)
    save_file({"x": value}, tmp_path / "source")
    (info,) = read_header(tmp_path / "source").values()
    (path,) = ShardWriter(tmp_path, 10**9).write([from_file(info, dtype=torch.bfloat16)])
    assert torch.equal(load_file(path)["x"], value.bfloat16())


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    value = torch.randn(4, 6)
    (path,) = ShardWriter(tmp_path, 10**9).write([from_tensor("x", value.t()[1:3])])
    assert torch.equal(load_file(path)["x"], value.t()[1:3])


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    writer.replace_text(path, "old")

    def fails(source: Path, target: Path) -> None:
        assert (source.read_text(), target.read_text()) == ("new", "old")
        raise OSError("the machine stops here")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="stops here"):
        writer.replace_text(path, "new")
    assert path.read_text() == "old"


def test_a_wrong_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x has 16 bytes, announced were 20"):
        ShardWriter(tmp_path, 10**9).write([Entry("x", "F32", (5,), lambda: [bytes(16)])])


def test_a_source_that_shrinks_is_an_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "source")
    (info,) = read_header(tmp_path / "source").values()
    (tmp_path / "source").write_bytes((tmp_path / "source").read_bytes()[:-10])
    with pytest.raises(OSError, match="became shorter"):
        ShardWriter(tmp_path, 10**9).write([from_file(info)])


def test_shard_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positive"):
        ShardWriter(tmp_path, 0)
