"""Large tensors that lie in memory, or in a file where that is too small."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import torch

from moe_rco.errors import StoreError
from moe_rco.units import format_size


class Room:
    """A tensor of zeros; in a file that is removed at once from its directory, and from the disk with the last use of it.

    Raises StoreError where the file cannot be made.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, file: Path | None
    ) -> None:
        self._map: mmap.mmap | None = None
        if file is None:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
            return
        size = math.prod(shape) * dtype.itemsize
        try:
            with file.open("w+b") as opened:
                file.unlink()
                # Not a hole to be filled later: that a disk is full would then end the process without a word.
                os.posix_fallocate(opened.fileno(), 0, size)
                self._map = mmap.mmap(opened.fileno(), size)
        except OSError as error:
            raise StoreError(
                f"cannot keep {format_size(size)} of activations in {file.parent}: {error.strerror}; with fewer "
                "calibration.sequences they are less"
            ) from error
        self.tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def let_go(self) -> None:
        """Give back the memory that the file's pages take; what is in them stays."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
