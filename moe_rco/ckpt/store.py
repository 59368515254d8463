"""The quantised groups of a model, made once: one safetensors file per place and option, so that a run can resume."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moe_rco.ckpt.header import HeaderError, TensorInfo, read_header
from moe_rco.ckpt.writer import (
    Entry,
    from_file,
    from_tensor,
    sha256_of,
    sync_directory,
    write_file,
    write_text,
)
from moe_rco.errors import StoreError
from moe_rco.types import Group, Option

INDEX = "index.json"
VERSION = 1
Place = int | str
"""Whose tensors a file holds: those of all experts of a layer, by its number, or of a dense group, by its name."""


class Store:
    """Tensors by (place, option), named as they will be in the output checkpoint.

    `fingerprint` digests everything the tensors depend on: weights, calibration data, quantiser settings.
    Opening a store made with another one raises StoreError. A file counts only once `index.json` lists it
    with its SHA-256, so a run killed at any moment leaves a usable store. One process writes at a time.
    """

    def __init__(self, directory: str | Path, fingerprint: str) -> None:
        self.directory = Path(directory)
        self.fingerprint = fingerprint
        self._checked: set[str] = set()
        self._index: dict[str, Any] = {
            "version": VERSION, "fingerprint": fingerprint, "files": {}, "stats": {}
        }  # fmt: skip
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if (self.directory / INDEX).exists():
                self._index = self._open()
            else:
                self._save()
            for left in self.directory.glob("*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot use {self.directory} as the store of quantised experts: {error}"
            ) from error

    @property
    def stats(self) -> dict[str, Any]:
        """A copy of the layers' statistics: `{"<layer>": {...}}`."""
        return copy.deepcopy(self._index["stats"])

    def update_stats(self, layer: int, values: Mapping[str, Any]) -> None:
        """Merge JSON values into a layer's statistics, dictionaries key by key, and save them. Raises
        StoreError.
        """
        _merge(self._index["stats"].setdefault(str(layer), {}), values)
        self._save_or_raise()

    def has(self, place: Place, option: Option) -> bool:
        """Whether what is in this place is stored at this option. Reads no data."""
        name = _file_name(place, option)
        return name in self._index["files"] and (self.directory / name).is_file()

    def digest(self, place: Place, option: Option) -> str:
        """The SHA-256 of what is stored for this place and option; empty where nothing is."""
        return self._index["files"].get(_file_name(place, option), "")

    def write(self, place: Place, option: Option, tensors: Mapping[str, Tensor]) -> None:
        """Store what is in one place at one option. Raises StoreError if they cannot be written."""
        self._write(place, option, [from_tensor(key, tensor) for key, tensor in tensors.items()])

    def _write(self, place: Place, option: Option, entries: list[Entry]) -> None:
        name = _file_name(place, option)
        partial = self.directory / (name + ".tmp")
        try:
            digest = write_file(partial, sorted(entries, key=lambda entry: entry.name))
            os.replace(partial, self.directory / name)
            sync_directory(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StoreError(f"cannot write {self.directory / name}: {error}") from error
        self._checked.discard(name)
        self._index["files"][name] = digest
        self._save_or_raise()

    def write_part(self, place: Place, option: Option, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Leave some of what is in a place for `join`, under a number of their own. Raises StoreError."""
        partial = self.directory / f"{_file_name(place, option)}.{number}.tmp"
        try:
            entries = [from_tensor(key, tensor) for key, tensor in tensors.items()]
            write_file(partial, entries, flush=False)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StoreError(f"cannot write {partial}: {error}") from error

    def join(self, place: Place, option: Option) -> None:
        """Store what is in one place at one option from all parts there are, without holding them. Raises StoreError."""
        found = list(self.directory.glob(f"{_file_name(place, option)}.*.tmp"))
        try:
            self._write(
                place, option, [from_file(tensor) for path in found for tensor in read_header(path).values()]
            )
            for path in found:
                path.unlink()
        except (HeaderError, OSError) as error:
            raise StoreError(f"cannot join the parts of {_said(place)} at {option}: {error}") from error

    def refresh(self) -> None:
        """Take in what another process has written meanwhile. Raises StoreError."""
        self._index = self._open()

    def read(self, place: Place, option: Option) -> dict[str, Tensor]:
        """The tensors written, memory mapped. The file's SHA-256 is checked once. Raises StoreError."""
        path = self._checked_path(place, option)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def tensors(self, place: Place, option: Option) -> dict[str, TensorInfo]:
        """Where the tensors written lie in their file, to be copied as bytes. Checked as by `read`. Raises
        StoreError.
        """
        path = self._checked_path(place, option)
        try:
            return read_header(path)
        except HeaderError as error:
            raise StoreError(f"{path}: {error}; delete it and run again") from error

    def _checked_path(self, place: Place, option: Option) -> Path:
        name = _file_name(place, option)
        path = self.directory / name
        if not self.has(place, option):
            raise StoreError(
                f"the store {self.directory} has no {_said(place)} at {option}; run again to quantise it"
            )
        if name not in self._checked:
            if sha256_of(path) != self._index["files"][name]:
                raise StoreError(
                    f"{path} is damaged (its SHA-256 is not the one in {INDEX}); delete it and run again"
                )
            self._checked.add(name)
        return path

    def _open(self) -> dict[str, Any]:
        path = self.directory / INDEX
        damaged = f"{path} is damaged; delete the directory {self.directory} and run again"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(damaged) from error
        if not isinstance(index, dict) or not all(
            isinstance(index.get(key), dict) for key in ("files", "stats")
        ):
            raise StoreError(damaged)
        if index.get("version") != VERSION:
            raise StoreError(
                f"the store {self.directory} has format version {index.get('version')}, this program writes "
                f"{VERSION}; "
                "delete the directory and run again"
            )
        if index.get("fingerprint") != self.fingerprint:
            raise StoreError(
                f"the store {self.directory} was made from other weights, data or quantiser settings; "
                "delete the directory to quantise again, or name another one"
            )
        return index

    def _save_or_raise(self) -> None:
        try:
            self._save()
        except OSError as error:
            raise StoreError(f"cannot write {self.directory / INDEX}: {error}") from error

    def _save(self) -> None:
        partial = self.directory / (INDEX + ".tmp")
        write_text(partial, json.dumps(self._index, indent=1, sort_keys=True) + "\n")
        os.replace(partial, self.directory / INDEX)
        sync_directory(self.directory)


def place_of(group: Group) -> Place:
    """Where a group is stored."""
    return group.name if group.is_dense else group.layer


def _said(place: Place) -> str:
    return f"layer {place}" if isinstance(place, int) else place


def _file_name(place: Place, option: Option) -> str:
    name = f"layer-{place}" if isinstance(place, int) else place.replace(".", "-")
    return f"{name}.{option.name}.safetensors"


def _merge(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(old.get(str(key)), dict):
            _merge(old[str(key)], value)
        else:
            old[str(key)] = copy.deepcopy(value)


def listed(directory: Path) -> tuple[str, list[str]]:
    """The fingerprint of a store and the option of every file in it; empty where there is no sound store."""
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        return str(index["fingerprint"]), [name.split(".")[1] for name in index["files"]]
    except (OSError, ValueError, TypeError, LookupError):
        return "", []
