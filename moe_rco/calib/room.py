"""Large tensors that lie in memory, or in a file where that is too small."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import torch


class Room:
    """A tensor of zeros; in a file that is removed at once from its directory, and from the disk with the last use of it."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, file: Path | None
    ) -> None:
        self._map: mmap.mmap | None = None
        if file is None:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
            return
        size = math.prod(shape) * dtype.itemsize
        with file.open("w+b") as opened:
            file.unlink()
            opened.truncate(size)
            self._map = mmap.mmap(opened.fileno(), size)
        self.tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def let_go(self) -> None:
        """Give back the memory that the file's pages take; what is in them stays."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
