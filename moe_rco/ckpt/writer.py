"""Writes safetensors files as a stream: sizes are known first, bytes come one chunk at a time."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_rco.ckpt.header import DTYPE_NAMES, ITEM_BYTES, TensorInfo, write_header

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
    flush: bool = True,
) -> str:
    """Write one safetensors file, flush it to the disk if it is to stay, and return its SHA-256 (hex). `advance` is told of
    every chunk's bytes.

    Tensors of wide dtypes come first, otherwise in the order given, so that each starts at a multiple of its
    item's size. Raises OSError, and ValueError if an entry's bytes are not as many as its shape says.
    """
    entries = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    header = write_header(((entry.name, entry.dtype, entry.shape) for entry in entries), metadata)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for entry in entries:
            written = 0
            for chunk in entry.chunks():
                file.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                advance(len(chunk))
            if written != entry.nbytes:
                raise ValueError(f"tensor {entry.name} has {written} bytes, announced were {entry.nbytes}")
        if flush:
            file.flush()
            os.fsync(file.fileno())
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """A file's SHA-256 (hex). Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: whoever reads it sees the old text or the new one. Raises OSError."""
    partial = path.with_name(path.name + ".tmp")
    write_text(partial, text)
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries (names, renames) to the disk, where the file system knows how."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
