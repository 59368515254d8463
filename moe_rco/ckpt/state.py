"""What an interrupted run needs to go on: a few tensors and numbers in one safetensors file, tied to the run's inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

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
        plain = json.loads(json.dumps(plain))  # as they will be read
        partial = self.path.with_name(self.path.name + ".tmp")
        meta = {_META: json.dumps({"digest": self._digest(tensors, plain), "values": plain})}
        try:
            write_file(partial, [from_tensor(name, tensor) for name, tensor in tensors.items()], meta)
            os.replace(partial, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):  # on a full disk it is in the way
                partial.unlink(missing_ok=True)
            raise StoreError(f"cannot write {self.path}: {error}") from error

    def load(self) -> dict[str, Any] | None:
        """What was saved for the same inputs; None where there is nothing to go on from, or it is not what was saved."""
        if not self.path.is_file():
            return None
        try:
            data = (
                self.path.read_bytes()
            )  # opened once: another process may put a new file in its place meanwhile
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            meta = json.loads(header["__metadata__"][_META])
            plain, tensors = meta["values"], load(data)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return {**plain, **tensors} if meta.get("digest") == self._digest(tensors, plain) else None

    def _digest(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> str:
        """SHA-256 (hex) of all that is saved, and of what it is good for."""
        found = hashlib.sha256(json.dumps([self.fingerprint, plain], sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()
