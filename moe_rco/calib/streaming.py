"""How much is held at once where a model's weights are streamed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Streaming:
    """`window`: bytes of weights read ahead; `tokens`: as many go through a layer together while it is there;
    `workspace`: bytes for the experts that are quantised at once; `spill`: whether what lies between two layers of the
    calibration pass is kept in files.
    """

    window: int
    tokens: int
    workspace: int
    spill: bool = False


def give_back() -> None:
    """Return freed memory to the system, where the allocator can: GNU's keeps much of what lay between things that stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
