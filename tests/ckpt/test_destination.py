"""Putting a directory in its place: killed at any moment, the old or the new one is whole and nothing gathers."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest

from moe_rco.ckpt import destination as destination_module
from moe_rco.ckpt.destination import MARGIN_BYTES, check_destination, check_place, publish, recover
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.errors import OutputError
from tests.killing import killed_at, tree


def written(path: Path, text: str) -> Path:
    """A directory that passes for one of ours."""
    path.mkdir()
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "moe_rco"}}')
    (path / "plan.json").write_text("{}")
    (path / "weights").write_text(text)
    (path / "eval").mkdir()
    (path / "eval" / "scores").write_text(text)
    return path


@pytest.mark.parametrize("existing", [False, True])
def test_publish_killed_at_any_moment(tmp_path: Path, existing: bool) -> None:
    for moment in count():
        place = tmp_path / str(moment)
        place.mkdir()
        out, partial = place / "out", written(place / "partial", "new")
        new = tree(partial)
        if existing:
            old = tree(written(out, "old"))
        killed = killed_at(moment, lambda: publish(partial, out, overwrite=existing))  # noqa: B023
        if killed:
            recover(out)
            if existing:
                assert tree(out) in (old, new)
            if partial.exists():
                publish(partial, out, overwrite=existing)
        assert tree(out) == new
        assert os.listdir(place) == ["out"]
        if not killed:
            break
    assert moment > (12 if existing else 7)


def test_an_old_directory_brought_back_is_not_overwritten_unasked(tmp_path: Path) -> None:
    partial, out = written(tmp_path / "partial", "new"), written(tmp_path / "out", "old")
    os.rename(out, destination_module._aside(out))
    with pytest.raises(OutputError, match="exists"):
        publish(partial, out)
    assert (out / "weights").read_text() == "old"
    assert (partial / "weights").read_text() == "new"


def test_a_probe_left_behind_is_removed_by_the_next_check(tmp_path: Path) -> None:
    for moment in range(2):
        assert killed_at(moment, lambda: check_place(tmp_path / "out"))
    assert os.listdir(tmp_path) == [".out.probe"]
    check_place(tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_what_an_interrupted_run_has_written_counts_as_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = destination_module.shutil.disk_usage(tmp_path)._replace(free=MARGIN_BYTES + 1000)
    monkeypatch.setattr(destination_module.shutil, "disk_usage", lambda path: usage)
    check_destination(tmp_path / "out", needed_bytes=1000)
    with pytest.raises(OutputError, match="free"):
        check_destination(tmp_path / "out", needed_bytes=1500)
    store = WorkDirectory.of(tmp_path / "out").store
    store.mkdir(parents=True)
    (store / "layer").write_bytes(bytes(500))
    check_destination(tmp_path / "out", needed_bytes=1500)


def several(path: Path) -> Path:
    """An output of several budgets."""
    path.mkdir()
    for name in ("50pct", "25pct"):
        written(path / name, name)
    (path / "curve.json").write_text("{}")
    (path / "curve.svg").write_text("<svg/>")
    (path / "report.html").write_text("<html>")
    return path


def test_an_output_of_several_budgets_is_ours_to_replace(tmp_path: Path) -> None:
    publish(several(tmp_path / "partial"), several(tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out" / "50pct" / "weights").read_text() == "50pct"


@pytest.mark.parametrize(
    "foreign", ["thesis.tex", "50pct/../own/thesis.tex", "-curve.json", "-25pct/plan.json"]
)
def test_one_with_something_else_in_it_is_not(tmp_path: Path, foreign: str) -> None:
    out = several(tmp_path / "out")
    if foreign.startswith("-"):
        (out / foreign[1:]).unlink()
    else:
        path = Path(os.path.normpath(out / foreign))
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    with pytest.raises(OutputError, match="was not written by moe-rco"):
        check_destination(out, overwrite=True)
