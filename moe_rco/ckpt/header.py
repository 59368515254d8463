"""The header of a safetensors file: read and checked without touching the data, and written.

Format: 8 bytes little-endian header length n, n bytes of JSON, then the tensors' bytes. The JSON maps each
tensor's name to its dtype, shape and [begin, end) offsets into the data part, which the tensors fill without
a hole. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The reference implementation refuses longer headers, and so keeps a damaged length from filling the memory.
MAX_HEADER_BYTES = 100_000_000
_DIMENSIONS = 16
"""No tensor of a model has more; the product of very many would take hours."""

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class HeaderError(ValueError):
    """The file is not a whole safetensors file. The text says what is wrong, without the file's name."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file. `dtype` is safetensors' name (`BF16`), `offset` the position of its first byte in
    the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises HeaderError for dtypes that we only copy."""
        if self.dtype not in TORCH_DTYPES:
            raise HeaderError(f"tensor {self.name} has dtype {self.dtype}, which cannot be read here")
        return TORCH_DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file in the order of their bytes. Raises HeaderError, and OSError if it cannot be
    read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise HeaderError(f"the file is truncated ({size} bytes)")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise HeaderError(f"its header is damaged (it claims to be {length} bytes long)")
        if 8 + length > size:
            raise HeaderError(
                f"its header is damaged or the file is truncated (a header of {length} bytes, a file of "
                f"{size})"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise HeaderError("its header is damaged (not JSON)") from error
    if not isinstance(entries, dict):
        raise HeaderError("its header is damaged (not a JSON object)")
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = [_tensor(path, name, entry, start) for name, entry in entries.items()]
    # Of two tensors at one place the empty one comes first, so that the other does not look like an overlap.
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps another tensor" if tensor.offset < position else "leaves a hole before it"
            raise HeaderError(f"its header is damaged (tensor {tensor.name} {what})")
        position += tensor.nbytes
    if position > size:
        raise HeaderError(f"the file is truncated (its tensors end at byte {position}, the file at {size})")
    if position < size:
        raise HeaderError(f"the file is damaged ({size - position} bytes after its last tensor)")
    return {tensor.name: tensor for tensor in tensors}


def write_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a file holding (name, dtype, shape) tensors in this order; padded to a multiple of
    8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    damaged = HeaderError(f"its header is damaged (entry of tensor {name})")
    if not isinstance(entry, dict):
        raise damaged
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise damaged
    if len(shape) > _DIMENSIONS or not all(map(_is_size, [*shape, *offsets])) or offsets[1] < offsets[0]:
        raise damaged
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderError(f"tensor {name} has the unknown dtype {dtype}")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * ITEM_BYTES[dtype] != nbytes:
        raise HeaderError(f"its header is damaged (tensor {name}: shape {shape} and {nbytes} bytes disagree)")
    return TensorInfo(name, path, dtype, tuple(shape), nbytes, start + offsets[0])
