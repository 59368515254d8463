"""The store of quantised experts: what it gives back, what it refuses, and what a killed run leaves."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from moe_rco.ckpt import store as store_module
from moe_rco.ckpt.store import Store
from moe_rco.errors import StoreError
from moe_rco.types import Option
from tests.killing import killed_at

INT4, INT2 = Option.parse("int4-g64"), Option.parse("int2-g64")
TENSORS = {
    "layer.weight_shape": torch.tensor([3, 4]),
    "layer.weight_scale": torch.randn(3, 1).bfloat16(),
    "layer.weight_packed": torch.arange(7, dtype=torch.int32),
    "layer.strided": torch.arange(6).view(2, 3).t(),
}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_tensors_come_back_and_survive_reopening(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "store", "f")
    assert not store.has(3, INT4)
    store.write(3, INT4, TENSORS)
    for opened in (store, Store(tmp_path / "deep" / "store", "f")):
        assert opened.has(3, INT4)
        assert not opened.has(3, INT2)
        assert not opened.has(0, INT4)
        assert same(opened.read(3, INT4), TENSORS)
    infos = store.tensors(3, INT4)
    content = infos["layer.weight_packed"].file.read_bytes()
    info = infos["layer.weight_packed"]
    raw = content[info.offset : info.offset + info.nbytes]
    assert raw == TENSORS["layer.weight_packed"].numpy().tobytes()


def test_slices_of_one_tensor_are_stored_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, "f")
    whole = torch.randn(4, 1000)
    store.write(0, INT4, {"a": whole[1], "b": whole[2]})
    assert same(store.read(0, INT4), {"a": whole[1], "b": whole[2]})
    assert (tmp_path / "layer-0.int4-g64.safetensors").stat().st_size < 9000


def test_writing_again_replaces(tmp_path: Path) -> None:
    store = Store(tmp_path, "f")
    store.write(0, INT4, TENSORS)
    store.read(0, INT4)
    store.write(0, INT4, {"a": torch.ones(2)})
    assert same(store.read(0, INT4), {"a": torch.ones(2)})
    store.write(0, INT4, TENSORS)
    (tmp_path / "layer-0.int4-g64.safetensors").write_bytes(b"damaged after it was written again")
    with pytest.raises(StoreError, match="damaged"):
        store.read(0, INT4)


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, "f").write(0, INT4, TENSORS)
    with pytest.raises(StoreError, match=r"made from other weights.*delete the directory"):
        Store(tmp_path, "g")
    assert Store(tmp_path, "f").has(0, INT4)


def test_damage_is_noticed(tmp_path: Path) -> None:
    Store(tmp_path, "f").write(0, INT4, TENSORS)
    path = tmp_path / "layer-0.int4-g64.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    for read in (Store(tmp_path, "f").read, Store(tmp_path, "f").tensors):
        with pytest.raises(StoreError, match="damaged"):
            read(0, INT4)
    path.unlink()
    assert not Store(tmp_path, "f").has(0, INT4)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no layer 5 at int4-g64"):
        Store(tmp_path, "f").read(5, INT4)


def test_files_without_an_entry_do_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path, "f")
    store.write(0, INT4, TENSORS)
    (tmp_path / "layer-0.int2-g64.safetensors").write_bytes(b"half written")
    (tmp_path / "layer-0.int4-g64.safetensors.tmp").write_bytes(b"half written")
    store = Store(tmp_path, "f")
    assert not store.has(0, INT2)
    store.write(0, INT2, TENSORS)
    store.write(0, INT4, TENSORS)
    assert same(store.read(0, INT2), TENSORS)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("interrupted", ["os.replace", "write_file", "write_text"])
def test_a_killed_write_leaves_the_old_state(
    tmp_path: Path, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, "f")
    store.write(0, INT4, TENSORS)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        module, _, name = interrupted.rpartition(".")
        patch.setattr(store_module.os if module else store_module, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.write(1, INT4, TENSORS)
    reopened = Store(tmp_path, "f")
    assert reopened.has(0, INT4)
    assert not reopened.has(1, INT4)
    reopened.write(1, INT4, TENSORS)
    assert same(Store(tmp_path, "f").read(1, INT4), TENSORS)


def test_what_killed_processes_left_does_not_gather(tmp_path: Path) -> None:
    store = Store(tmp_path, "f")
    store.write(0, INT4, TENSORS)
    for moment in count():
        if not killed_at(moment, lambda: store.write(1, INT4, TENSORS)):
            break
        reopened = Store(tmp_path, "f")
        assert not list(tmp_path.glob("*.tmp"))
        assert same(reopened.read(0, INT4), TENSORS)
        if reopened.has(1, INT4):
            assert same(reopened.read(1, INT4), TENSORS)
    assert moment >= 5


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 1, "fingerprint": "f", "files": []}', "\x00"]
)
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(StoreError, match="delete the directory"):
        Store(tmp_path, "f")


def test_another_format_version(tmp_path: Path) -> None:
    Store(tmp_path, "f")
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(StoreError, match="format version 2"):
        Store(tmp_path, "f")


def test_the_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot use"):
        Store(tmp_path / "file", "f")


def test_a_failing_disk_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, "f")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "replace", full)
    with pytest.raises(StoreError, match="No space left"):
        store.write(0, INT4, TENSORS)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_statistics_are_merged_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, "f")
    store.update_stats(0, {"undersampled": [3, 7], "error": {"int4-g64": {"rtn": 2.0}}})
    store.update_stats(
        0, {"undersampled": [3], "error": {"int4-g64": {"gptq": 1.0}, "int2-g64": {"rtn": 9.0}}}
    )
    store.update_stats(1, {"undersampled": []})
    expected = {
        "0": {
            "undersampled": [3],
            "error": {"int4-g64": {"rtn": 2.0, "gptq": 1.0}, "int2-g64": {"rtn": 9.0}},
        },
        "1": {"undersampled": []},
    }
    assert Store(tmp_path, "f").stats == expected
    store.stats["0"]["undersampled"].append(1)
    assert store.stats == expected


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    names = list(TENSORS)
    for place, order in (("a", names), ("b", names[::-1])):
        Store(tmp_path / place, "f").write(0, INT4, {name: TENSORS[name] for name in order})
    files = [
        tmp_path / place / name for name in ("layer-0.int4-g64.safetensors", "index.json") for place in "ab"
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[2].read_bytes() == files[3].read_bytes()


def test_parts_make_the_same_file_as_the_whole(tmp_path: Path) -> None:
    """However the experts were shared out; and nothing of the parts stays."""
    whole, parted = Store(tmp_path / "whole", "f"), Store(tmp_path / "parted", "f")
    whole.write(1, INT4, TENSORS)
    names = list(TENSORS)
    for number, part in ((7, names[2:]), (0, names[:2])):
        parted.write_part(1, INT4, number, {name: TENSORS[name] for name in part})
    parted.write_part(1, INT2, 0, TENSORS)
    assert not parted.has(1, INT4)
    parted.join(1, INT4)
    assert parted.digest(1, INT4) == whole.digest(1, INT4)
    assert same(parted.read(1, INT4), TENSORS)
    assert [path.name for path in parted.directory.glob("*.tmp")] == ["layer-1.int2-g64.safetensors.0.tmp"]


def test_a_damaged_part_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path, "f")
    store.write_part(1, INT4, 0, TENSORS)
    (part,) = tmp_path.glob("*.tmp")
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(StoreError, match="cannot join the parts of layer 1 at int4-g64"):
        store.join(1, INT4)
    assert not store.has(1, INT4)
