"""What an interrupted run goes on from: values come back exactly, or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from moe_rco.ckpt import state as state_module
from moe_rco.ckpt.state import SavedState
from moe_rco.errors import StoreError
from tests.killing import killed_at

VALUES = {
    "logits": torch.randn(5, 3, dtype=torch.float64).t(),
    "generator": torch.Generator().manual_seed(3).get_state(),
    "choice": torch.arange(4),
    "empty": torch.zeros(0, 8, dtype=torch.float64),
    "step": 3,
    "best": 0.1,
    "name": "rco",
}


def same(loaded: Mapping[str, object] | None, values: Mapping[str, object]) -> bool:
    if loaded is None or loaded.keys() != values.keys():
        return False
    pairs = ((loaded[name], value) for name, value in values.items())
    return all(
        torch.equal(a, b) and a.dtype == b.dtype
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a == b
        for a, b in pairs
    )


def test_values_come_back(tmp_path: Path) -> None:
    state = SavedState(tmp_path / "state", "f")
    assert state.load() is None
    state.save(VALUES)
    assert same(state.load(), VALUES)
    assert SavedState(tmp_path / "state", "g").load() is None
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_read_while_it_is_replaced_it_is_the_old_or_the_new(tmp_path: Path) -> None:
    """`moe-rco status` reads what a run is saving."""
    small, large = {"step": 1}, {**VALUES, "more": torch.zeros(1 << 16)}
    state, ended = SavedState(tmp_path / "state", "f"), Event()
    state.save(small)

    def save() -> None:
        for number in range(200):
            state.save(small if number % 2 else large)
        ended.set()

    writer = Thread(target=save)
    writer.start()
    while not ended.is_set():
        loaded = state.load()
        assert same(loaded, small) or same(loaded, large)
    writer.join()


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_damaged_file_is_as_none(tmp_path: Path, keep: int) -> None:
    state = SavedState(tmp_path / "state", "f")
    state.save(VALUES)
    state.path.write_bytes(state.path.read_bytes()[:keep])
    assert state.load() is None


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    state = SavedState(tmp_path / "state", "f")
    state.save(VALUES)
    content = state.path.read_bytes()
    for place in range(len(content)):
        state.path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        loaded = state.load()
        assert loaded is None or same(loaded, VALUES), place


def test_killed_at_any_moment_it_is_the_old_or_the_new(tmp_path: Path) -> None:
    state, old, new = SavedState(tmp_path / "state", "f"), {"step": 1}, {**VALUES, "step": 2}
    for moment in count():
        state.save(old)
        if not killed_at(moment, lambda: state.save(new)):
            break
        assert same(state.load(), old) or same(state.load(), new)
        state.save(new)
        assert same(state.load(), new)
        assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert moment >= 3


def test_killed_while_it_is_written_it_is_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, write_file = SavedState(tmp_path / "state", "f"), state_module.write_file
    state.save({"step": 1})

    def half(path: Path, *rest: object) -> None:
        write_file(path, *rest)  # pyright: ignore[reportArgumentType]
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(state_module, "write_file", half)
    assert killed_at(10**9, lambda: state.save(VALUES))
    assert same(state.load(), {"step": 1})


def test_a_full_disk_is_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "write_file", full)
    with pytest.raises(StoreError, match="No space left"):
        SavedState(tmp_path / "state", "f").save(VALUES)
