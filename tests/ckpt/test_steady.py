"""Files that change while a run works are noticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.steady import Sealed, Steady, staying
from moe_rco.errors import ModelError, OutputError
from tests.tiny_models import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return Checkpoint(save_tiny("mixtral", tmp_path / "model"))


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_model_that_stays_as_it_was(model: Checkpoint) -> None:
    model.digest()
    steady = Steady.of(model)
    for path in model.files:
        os.utime(path, (1, 1))  # touched
        shutil.copy(path, path.with_suffix(".copy"))
        os.replace(path.with_suffix(".copy"), path)  # and copied again
    steady.check()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00001-of"])
def test_a_file_of_the_model_that_changed_is_named(model: Checkpoint, name: str) -> None:
    model.digest()
    steady = Steady.of(model)
    change(next(path for path in model.directory.iterdir() if path.name.startswith(name)))
    with pytest.raises(ModelError, match=name):
        steady.check()


def test_a_file_that_is_gone_was_read_while_it_was_there(model: Checkpoint) -> None:
    steady = Steady.of(model)
    shutil.rmtree(model.directory)
    steady.check()


@pytest.mark.parametrize("how", ["gone", "cut", "changed", "all gone"])
def test_what_was_written_is_to_stay(tmp_path: Path, how: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"abcdef")
    sealed = Sealed.of(tmp_path)
    (tmp_path / "report.json").write_text("later")
    sealed.check()
    if how == "gone":
        (tmp_path / "b").unlink()
    elif how == "cut":
        os.truncate(tmp_path / "b", 3)
    elif how == "changed":
        change(tmp_path / "b")
    else:
        shutil.rmtree(tmp_path)
    with pytest.raises(OutputError, match="a was" if how == "all gone" else "b was"):
        sealed.check()


def test_what_was_made_of_a_changed_model_is_forgotten_however_it_ends(model: Checkpoint) -> None:
    forgotten = list[int]()
    model.digest()
    with pytest.raises(ZeroDivisionError), staying(model, lambda: forgotten.append(1)):
        raise ZeroDivisionError
    assert not forgotten
    inside = staying(model, lambda: forgotten.append(1))
    inside.__enter__()
    change(model.files[0])
    with pytest.raises(ModelError, match="was changed"):
        inside.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert forgotten
