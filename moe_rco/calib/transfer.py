"""Moves weights to the device they are used on, beside its computations."""

from __future__ import annotations

import torch


class Mover:
    """Copies tensors to a device; on a CUDA device through pinned memory and on a stream of its own.

    A copy is complete when the call returns, so any thread may make it ahead of need.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = (torch.cuda.current_stream(device), torch.cuda.Stream(device))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._streams is None:
            return tensor.to(self._device)
        used_on, side = self._streams
        with torch.cuda.stream(side):
            moved = tensor.pin_memory().to(self._device, non_blocking=True)
            side.synchronize()
        moved.record_stream(used_on)  # its memory is not given away before what uses it there is done
        return moved
