"""Reads tensors from safetensors files into memory of their own.

Not memory mapped: pages of a mapped file count as the process's memory until the kernel wants them back, and a run under a
memory limit must give them up at once. What is read again soon comes from the file cache anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from moe_rco.ckpt.header import ITEM_BYTES, TensorInfo


def read_tensor(tensor: TensorInfo) -> Tensor:
    """The whole tensor. Raises HeaderError for a dtype that we only copy, OSError if the file is not as it was."""
    return _read(tensor, [(tensor.offset, tensor.nbytes)]).view(tensor.shape)


def read_rows(tensor: TensorInfo, rows: Iterable[int]) -> Tensor:
    """Some rows of the first dimension, in the order given."""
    size = math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
    return _read(tensor, [(tensor.offset + row * size, size) for row in rows]).view(-1, *tensor.shape[1:])


def _read(tensor: TensorInfo, parts: list[tuple[int, int]]) -> Tensor:
    data = torch.empty(sum(size for _, size in parts), dtype=torch.uint8)
    target, done = data.numpy().data, 0
    with tensor.file.open("rb", buffering=0) as file:
        for offset, size in parts:
            file.seek(offset)
            end = done + size
            while done < end:
                count = file.readinto(target[done:end])
                if not count:
                    raise OSError(f"{tensor.file} became shorter while tensor {tensor.name} was read")
                done += count
    return data.view(tensor.torch_dtype)
