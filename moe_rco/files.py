"""What reading somebody's JSON file has in common, wherever it is read."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from moe_rco.errors import UserError


def check_regular(path: Path, kind: type[UserError]) -> None:
    """Raise `kind` where a pipe or a device is in a file's place: it would be read for ever. What is missing passes."""
    if path.exists() and not path.is_file():
        raise kind(f"{path} is no file; download or copy it again")


def first_complaint(error: ValidationError) -> str:
    """Where the first thing is that is wrong, and what."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
