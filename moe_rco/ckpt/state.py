"""What an interrupted run needs to go on: a few tensors and numbers in one safetensors file, tied to the run's inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_META = "moe_rco"


@dataclass(frozen=True)
class SavedState:
    """The file `path`, good only for a run whose inputs have the same `fingerprint`."""

    path: Path
    fingerprint: str

    def save(self, values: Mapping[str, Any]) -> None:
        """Write tensors, numbers and strings, replacing the file in one step. Raises OSError."""
        tensors = {
            name: value.contiguous() for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        plain = {name: value for name, value in values.items() if name not in tensors}
        partial = self.path.with_name(self.path.name + ".tmp")
        save_file(tensors, partial, {_META: json.dumps({"fingerprint": self.fingerprint, "values": plain})})
        os.replace(partial, self.path)

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
