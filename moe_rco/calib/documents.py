"""Reading calibration documents: texts and conversations, from files and from the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moe_rco.calib.refusals import reason
from moe_rco.errors import DataError
from moe_rco.recipe import DEMO, DEMO_CALIBRATION
from moe_rco.recipe_sections import DataSource

CONVERSATIONS = ("messages", "conversations")
"""Columns where conversations usually are."""
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
"""Columns of a question and its answer, which are a conversation of two turns."""
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Document:
    """One text and the name of the part of the mix it belongs to. Of a conversation `turns` are its {role, content}."""

    text: str
    domain: str
    turns: tuple[dict[str, str], ...] = ()


def read_documents(source: DataSource, text_field: str) -> Iterator[Document]:
    """Documents of a .jsonl, .parquet or .txt file, of a Hub dataset, or of the shipped text (`demo`).

    Text or a conversation stands in `text_field`, or in what the source names instead, or else in `messages`, `conversations`
    or a pair of columns such as `prompt` and `completion`. A `domain` column names the part of the mix; without one it is the
    source's name. Raises DataError.
    """
    text_field = source.text_field or text_field
    if source.data == DEMO:
        yield from _jsonl(DEMO_CALIBRATION, text_field)
        return
    path = Path(source.data).expanduser()
    if path.is_dir():
        raise DataError(f"calibration data {path} is a directory; name a .jsonl, .parquet or .txt file in it")
    if path.is_file():
        if path.suffix in (".jsonl", ".json"):
            yield from _jsonl(path, text_field)
        elif path.suffix == ".txt":
            with _opened(path) as file:
                yield Document(file.read(), path.stem)
        elif path.suffix == ".parquet":
            yield from _rows(_parquet(path), text_field, path.stem, str(path))
        else:
            raise DataError(f"calibration data {path}: unknown kind of file; use .jsonl, .parquet or .txt")
        return
    if path.suffix in (".jsonl", ".json", ".parquet", ".txt"):
        raise DataError(f"calibration data {path}: no such file")
    part = source.data if source.name is None else f"{source.data}, {source.name}"
    yield from _rows(_hub(source), text_field, part, part)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A file of UTF-8 text, whose lines end with \\n alone. Raises DataError."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"calibration data {path} is not UTF-8 text") from error
    except OSError as error:
        raise DataError(f"calibration data {path} cannot be read: {error.strerror}") from error


def _jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"calibration data {path}, line {number}: not JSON ({error})") from error
            yield _document(row, text_field, path.stem, f"{path}, line {number}")


def _rows(rows: Iterable[Any], text_field: str, name: str, where: str) -> Iterator[Document]:
    for row in rows:
        yield _document(row, text_field, name, where)


def _document(row: Any, text_field: str, name: str, where: str) -> Document:
    value = _value(row, text_field) if isinstance(row, dict) else None
    if value is None:
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"calibration data {where}: no text in '{text_field}' (there are: {columns}); set calibration.text_field"
        )
    turns = _turns(value, where) if isinstance(value, list) else ()
    text = value if isinstance(value, str) else "\n".join(turn["content"] for turn in turns)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"calibration data {where}: half a character (a lone surrogate) in '{text_field}'; correct the file"
        )
    return Document(text, str(row.get("domain", name)), turns)


def _value(row: dict[str, Any], text_field: str) -> str | list[Any] | None:
    """A row's text or conversation."""
    for field in (text_field, *CONVERSATIONS):
        if isinstance(row.get(field), str | list):
            return row[field]
    for pair in PAIRS:
        if all(isinstance(row.get(field), str) for field in pair):
            return [
                {"role": role, "content": row[f]} for role, f in zip(("user", "assistant"), pair, strict=True)
            ]
    return None


def _turns(value: list[Any], where: str) -> tuple[dict[str, str], ...]:
    """A conversation of {role, content} or of {from, value}; content may be in parts that have text."""
    turns = []
    for number, turn in enumerate(value, 1):
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"calibration data {where}: turn {number} of the conversation is not {{role, content}} in text"
            )
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return tuple(turns)


def _parquet(path: Path) -> Iterator[Any]:
    # Not by `datasets`, which keeps a copy of all of it elsewhere and tells a server.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"calibration data {path} is damaged or no Parquet ({reason(error)})") from error


def _hub(source: DataSource) -> Iterator[Any]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(source.data, source.name, split=source.split, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"calibration data '{source.data}' could not be loaded ({reason(error)}); name a local .jsonl, .parquet or .txt file "
            "in calibration.data, or check the connection to the Hugging Face Hub"
        ) from error
