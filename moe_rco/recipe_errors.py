"""Turns a failed validation into one line: where, which key, what is wrong, what was probably meant."""

from __future__ import annotations

import difflib
import json
import re
from types import UnionType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moe_rco.marked_yaml import Document, Path


class MisplacedError(ValueError):
    """Raised by a check over several keys, naming the one the message is about."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


def explain(error: ValidationError, document: Document, schema: type[BaseModel]) -> str:
    """One line for the first thing worth repairing, and how many more there are."""
    details = sorted(error.errors(include_url=False), key=_urgency)
    first = details[0]
    path, message = _path(first, document.data), _message(first, schema)
    key = ".".join(map(str, path))
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{document.where(path)}: {key + ': ' if key else ''}{message}{more}"


def _urgency(detail: ErrorDetails) -> int:
    # A misspelt key is also a missing one; the misspelling is what the user can see.
    return {"extra_forbidden": 0, "missing": 2}.get(detail["type"], 1)


def _path(detail: ErrorDetails, data: Any) -> Path:
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, MisplacedError):
        return cause.path
    path = list(detail["loc"])
    # One value in place of a list was wrapped into one; what was written has no index.
    for depth, part in enumerate(path):
        if isinstance(part, int) and not isinstance(data, list):
            return tuple(path[:depth] + (path[depth + 1 :] if isinstance(data, dict) else []))
        data = data.get(part) if isinstance(data, dict) else data[part] if isinstance(part, int) else None
    return tuple(path)


def _message(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    shown = _shown(detail["input"])
    match kind:
        case "extra_forbidden":
            known = _keys(schema, detail["loc"][:-1])
            hint = _near(str(detail["loc"][-1]), known) or f"; known keys are {', '.join(known)}"
            return f"unknown key{hint}"
        case "missing":
            return "this key is missing"
        case "value_error":
            return str(context["error"])
        case "literal_error":
            wanted = context["expected"]
            near = _near(str(detail["input"]), re.findall(r"'([^']*)'", wanted))
            return f"must be {wanted}, not {shown}{near}"
        case "model_type" | "dict_type":
            return f"must be a mapping of keys to values, not {shown}"
        case "tuple_type":
            return f"must be a list, not {shown}"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case _:
            return f"{detail['msg'].replace('Input should', 'must', 1)}, not {shown}"


def _keys(schema: type[BaseModel], path: Path) -> list[str]:
    """The keys known at a path of the schema."""
    current: Any = schema
    for part in path:
        current = current.model_fields[part].annotation if isinstance(part, str) else get_args(current)[0]
        if isinstance(current, UnionType):  # of a section that may be missing
            current = get_args(current)[0]
    return list(current.model_fields)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
