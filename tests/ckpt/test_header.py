"""The header parser against the reference implementation and against damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe_rco.ckpt.header import HeaderError, read_header, write_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.int64).view(2, 3),
    "b": torch.randn(5).to(torch.bfloat16),
    "c": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def test_a_reference_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.keys() == TENSORS.keys()
    content = path.read_bytes()
    for name, tensor in TENSORS.items():
        info = header[name]
        assert info.shape == tuple(tensor.shape)
        assert info.torch_dtype == tensor.dtype
        raw = content[info.offset : info.offset + info.nbytes]
        assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_written_header_is_read_by_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    form = [("é", "I32", (2, 3)), ("y", "BF16", ())]
    path.write_bytes(write_header(form, {"format": "pt"}) + bytes(26))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"é", "y"}
        assert file.get_tensor("é").shape == (2, 3)
        assert file.metadata() == {"format": "pt"}


def file_with(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "size", "words"),
    [
        ({"a": entry(0, 8)}, 4, "truncated"),
        ({"a": entry(0, 8)}, 12, "4 bytes after its last tensor"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "tensor b leaves a hole"),
        ({"a": entry(0, 8, [3])}, 8, "disagree"),
        ({"a": entry(0, 8, [-2])}, 8, "entry of tensor a"),
        ({"a": entry(8, 0, [2])}, 8, "entry of tensor a"),
        ({"a": entry(0, 8, dtype="F12")}, 8, "unknown dtype F12"),
        ({"a": {"dtype": "F32"}}, 8, "entry of tensor a"),
        ({"a": 3}, 8, "entry of tensor a"),
        ([], 0, "not a JSON object"),
    ],
)
def test_damaged_entries_are_refused(tmp_path: Path, entries: object, size: int, words: str) -> None:
    path = file_with(tmp_path / "x", json.dumps(entries).encode(), bytes(size))
    with pytest.raises(HeaderError, match=words):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"\x04\x00", "truncated"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "claims to be 1099511627776 bytes long"),
        ((100).to_bytes(8, "little") + b"{}", "a header of 100 bytes"),
        ((4).to_bytes(8, "little") + b"nope", "not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not JSON"),
        ((40).to_bytes(8, "little") + b'{"__metadata__":{}, "a": 1,  "a": 2}    ', "not JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=words):
        read_header(path)


def test_a_shape_of_very_many_dimensions_is_not_multiplied(tmp_path: Path) -> None:
    """It would take hours: a header of 100 MB has room for fifty million."""
    entry = {"dtype": "U8", "shape": [2**62] * 1_000_000, "data_offsets": [0, 0]}
    raw = json.dumps({"x": entry}).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(HeaderError, match=r"entry of tensor x\)$"):
        read_header(tmp_path / "x")
