"""Writes safetensors files as a stream: sizes are known first, bytes come one chunk at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_rco.ckpt.header import DTYPE_NAMES, ITEM_BYTES, TensorInfo, write_header
from moe_rco.ckpt.reader import INDEX

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. `dtype` is safetensors' name; `chunks` opens its bytes when their turn
    comes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def from_file(tensor: TensorInfo, name: str | None = None, dtype: torch.dtype | None = None) -> Entry:
    """An entry whose bytes are copied from another safetensors file as they are, whatever their dtype.

    With `dtype` the values are cast to it on the way, one chunk at a time; the source must then be readable.
    """
    cast = None if dtype is None or DTYPE_NAMES[dtype] == tensor.dtype else dtype
    written = tensor.dtype if cast is None else DTYPE_NAMES[cast]

    def chunks() -> Iterator[bytes | memoryview]:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            left = tensor.nbytes
            while left:
                # A regular file gives all that is asked for, so chunks end between items.
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise OSError(f"{tensor.file} became shorter while tensor {tensor.name} was read")
                left -= len(chunk)
                if cast is not None:
                    values = torch.frombuffer(bytearray(chunk), dtype=tensor.torch_dtype)
                    chunk = _bytes(values.to(cast))
                yield chunk

    return Entry(name or tensor.name, written, tensor.shape, chunks)


def from_tensor(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that is in memory."""
    return Entry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda: (_bytes(tensor),))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_file(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write one safetensors file and flush it to the disk. `advance` is told of every chunk's bytes.

    Tensors of wide dtypes come first, otherwise in the order given, so that each starts at a multiple of its
    item's size. Raises OSError, and ValueError if an entry's bytes are not as many as its shape says.
    """
    entries = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    with path.open("wb") as file:
        file.write(write_header(((entry.name, entry.dtype, entry.shape) for entry in entries), metadata))
        for entry in entries:
            written = 0
            for chunk in entry.chunks():
                file.write(chunk)
                written += len(chunk)
                advance(len(chunk))
            if written != entry.nbytes:
                raise ValueError(f"tensor {entry.name} has {written} bytes, announced were {entry.nbytes}")
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries (names, renames) to the disk, where the file system knows how."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ShardWriter:
    """Writes tensors into `model-00001-of-0000N.safetensors` files and `model.safetensors.index.json`.

    A shard takes tensors in the order given until the next would exceed `shard_bytes` of data; a tensor
    larger than that has a shard to itself. The same entries give the same bytes. Memory: one chunk of one
    tensor.
    """

    def __init__(self, directory: Path, shard_bytes: int, metadata: Mapping[str, str] | None = None) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.metadata = dict(metadata or {})

    def write(
        self, entries: Iterable[Entry], advance: Callable[[int], None] = lambda nbytes: None
    ) -> list[Path]:
        """Write all entries; the shards' paths in order. Raises OSError, ValueError as `write_file`."""
        shards: list[list[Entry]] = []
        room = 0
        for entry in entries:
            if not shards or entry.nbytes > room:
                shards.append([])
                room = self.shard_bytes
            shards[-1].append(entry)
            room -= entry.nbytes
        paths, weight_map = [], {}
        for number, shard in enumerate(shards, 1):
            path = self.directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(path, shard, self.metadata, advance)
            weight_map |= {entry.name: path.name for entry in shard}
            paths.append(path)
        total = sum(entry.nbytes for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.directory / INDEX, json.dumps(index, indent=2) + "\n")
        return paths
