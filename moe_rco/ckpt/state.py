"""What an interrupted run needs to go on: a few tensors and numbers in one safetensors file, tied to the run's inputs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe_rco.ckpt.writer import from_tensor, sync_directory, write_file
from moe_rco.errors import StoreError

_META = "moe_rco"


@dataclass(frozen=True)
class SavedState:
    """The file `path`, good only for a run whose inputs have the same `fingerprint`. If `read_only`, another process saves."""

    path: Path
    fingerprint: str
    read_only: bool = False

    def save(self, values: Mapping[str, Any]) -> None:
        """Write tensors, numbers and strings, replacing the file in one step. Raises StoreError if that fails."""
        if self.read_only:
            return
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        plain = {name: value for name, value in values.items() if name not in tensors}
        partial = self.path.with_name(self.path.name + ".tmp")
        meta = {_META: json.dumps({"fingerprint": self.fingerprint, "values": plain})}
        try:
            write_file(partial, [from_tensor(name, tensor) for name, tensor in tensors.items()], meta)
            os.replace(partial, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):  # on a full disk it is in the way
                partial.unlink(missing_ok=True)
            raise StoreError(f"cannot write {self.path}: {error}") from error

    def load(self) -> dict[str, Any] | None:
        """What was saved for the same inputs; None where there is nothing, or nothing usable, to go on from."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get(_META, "{}"))
                if meta.get("fingerprint") != self.fingerprint:
                    return None
                names = list(file.keys())
                return {**meta["values"], **{name: file.get_tensor(name) for name in names}}
        except (SafetensorError, OSError, ValueError):
            return None
