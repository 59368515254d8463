"""An output directory that appears complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_rco.ckpt.reader import CONFIG
from moe_rco.ckpt.workdir import WorkDirectory, missing_parents
from moe_rco.ckpt.writer import sync_directory
from moe_rco.errors import OutputError, PlanError
from moe_rco.plan import FILE_NAME, METHOD, Plan
from moe_rco.units import format_size

# File systems need some room beside the files' bytes: directories, metadata, the report.
MARGIN_BYTES = 16 << 20
CURVE, CURVE_PICTURE, PAGE = "curve.json", "curve.svg", "report.html"
"""Beside the models in the output of several budgets; the page is in each model's directory as well."""


def check_destination(
    destination: Path, *, overwrite: bool = False, needed_bytes: int | None = None, keep: Path | None = None
) -> None:
    """Check, leaving nothing behind, that a directory can be made at `destination`, with room for `needed_bytes`.

    What an interrupted run has already written for it counts as room. `keep` is a directory (the source model) that
    must not be replaced. Raises OutputError.
    """
    if destination.is_symlink() or destination.exists():
        if not overwrite:
            raise OutputError(f"output {destination} exists; name another one, or say to overwrite it")
        _check_replaceable(destination)
    if keep is not None and keep.resolve().is_relative_to(destination.resolve()):
        raise OutputError(f"output {destination} is or holds the model being read; name another one")
    check_place(destination)
    if needed_bytes is None:
        return
    free = shutil.disk_usage(existing_parent(destination)).free + WorkDirectory.of(destination).held_bytes()
    if needed_bytes + MARGIN_BYTES > free:
        raise OutputError(
            f"output {destination} needs {format_size(needed_bytes)}, but its disk has {format_size(free)} free; "
            "make room or name another directory"
        )


def check_place(destination: Path) -> None:
    """Check, leaving nothing behind, that directories can be made where `destination` will be. Raises OutputError."""
    parent = existing_parent(destination)
    if not parent.is_dir():
        raise OutputError(f"output {destination} cannot be made: {parent} is not a directory")
    # By trying: permissions alone do not tell of read-only file systems, quotas or a superuser's limits.
    probe = parent / f".{destination.name}.probe"
    try:
        probe.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed by another process that checks
            probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"output {destination} cannot be made: {parent} is not writable ({error.strerror}); name another directory"
        ) from error


@contextlib.contextmanager
def replacing(destination: Path, *, overwrite: bool = False, keep: Path | None = None) -> Iterator[Path]:
    """A fresh directory beside `destination`, renamed to it at the end; removed on any failure or interrupt.

    With `overwrite` the old directory is moved away only once the new one is complete, and then removed.
    Missing parents are made, and removed again on failure. Raises OutputError.
    """
    check_destination(destination, overwrite=overwrite, keep=keep)
    parent = destination.parent
    made = missing_parents(parent)
    partial = parent / f".{destination.name}.tmp-{os.getpid()}"
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise OutputError(f"output {destination} cannot be made: {error}") from error
        yield partial
        publish(partial, destination, overwrite=overwrite, keep=keep)
        made = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def publish(partial: Path, destination: Path, *, overwrite: bool = False, keep: Path | None = None) -> None:
    """Rename a complete directory to `destination`, on the same file system. Raises OutputError.

    A directory that it replaces is moved aside first. If the process is killed before the new one is in its place,
    `recover` brings the old one back.
    """
    recover(destination)
    # Hours may have passed since the first check.
    check_destination(destination, overwrite=overwrite, keep=keep)
    old = _aside(destination)
    try:
        _sync_files(partial)
        if destination.exists():
            os.rename(destination, old)
        os.rename(partial, destination)
        sync_directory(destination.parent)
    except OSError as error:
        raise OutputError(f"output {destination} cannot be put in place: {error}") from error
    finally:
        # Also after an interrupt between the two renames.
        if old.exists() and not destination.exists():
            os.rename(old, destination)
    shutil.rmtree(old, ignore_errors=True)


def recover(destination: Path) -> None:
    """Repair what a process killed within `publish` left: the directory that it moved aside goes back if nothing took
    its place, and away otherwise. Raises OutputError.
    """
    old = _aside(destination)
    if not old.is_dir():
        return
    try:
        if destination.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, destination)
    except OSError as error:
        raise OutputError(f"{old}, left by a run that was killed, cannot be removed: {error}") from error


def _aside(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.moe-rco-old")


def _sync_files(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            _sync_files(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def _check_replaceable(destination: Path) -> None:
    """Refuse to replace what is not empty and not ours, so that no typing error costs a home directory."""
    if destination.is_symlink() or not destination.is_dir():
        raise OutputError(
            f"output {destination} is not a directory, so it is not overwritten; name another one"
        )
    names = {path.name for path in destination.iterdir()}
    if names and not (_is_ours(destination) or _is_ours_of_several(destination)):
        raise OutputError(
            f"output {destination} was not written by moe-rco, so it is not overwritten; "
            "name another one or empty it"
        )
    if Path.cwd().resolve().is_relative_to(destination.resolve()):
        raise OutputError(
            f"output {destination} is or holds the current directory; leave it, or name another one"
        )


def _is_ours(directory: Path) -> bool:
    """By the method that only we write or, for the stock layout, which has none of ours, by its plan."""
    if not all((directory / name).is_file() for name in (CONFIG, FILE_NAME)):
        return False
    if _quant_method(directory / CONFIG) == METHOD:
        return True
    try:
        return Plan.load(directory).layout == "stock"
    except PlanError:
        return False


def _is_ours_of_several(directory: Path) -> bool:
    """Whether it has the curve and nothing beside it, its picture and the page but models that we wrote."""
    others = [path for path in directory.iterdir() if path.name not in (CURVE, CURVE_PICTURE, PAGE)]
    return (directory / CURVE).is_file() and all(_is_ours(path) for path in others)


def _quant_method(config: Path) -> object:
    try:
        entry = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return entry.get("quant_method") if isinstance(entry, dict) else None


def existing_parent(path: Path) -> Path:
    """The nearest directory above a path that is there."""
    for parent in path.absolute().parents:
        if parent.exists():
            return parent
    return path.absolute().parents[-1]
