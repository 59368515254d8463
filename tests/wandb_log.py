"""Reads what W&B wrote offline: a log in LevelDB's format of messages that the library has the definitions of."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

_protocol: Any = wandb_internal_pb2
_BLOCK, _HEADER, _FULL, _LAST = 32768, 7, 1, 4


@dataclass
class Logged:
    """Of all files of a run, in their order: the history's rows with their step, and the summary; its id and settings."""

    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)


def read(directory: Path) -> Logged:
    """The runs below `directory`/wandb."""
    wandb.teardown()  # until then the library's own process may be writing
    found = Logged()
    for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        for message in _messages(path.read_bytes()):
            record = _protocol.Record.FromString(message)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {_key(item): json.loads(item.value_json) for item in record.history.item}
                found.rows.append((record.history.step.num, {k: v for k, v in row.items() if k[0] != "_"}))
            elif kind == "summary":
                found.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "run":
                found.ids.add(record.run.run_id)
                found.config |= {_key(item): json.loads(item.value_json) for item in record.run.config.update}
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _messages(data: bytes) -> Iterator[bytes]:
    """Records come in parts that fit blocks; the first block begins with the file's own header, as long as a record's."""
    place, whole = _HEADER, b""
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
