"""Values and edits that nobody expects."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    10**9,
    10**30,
    10**400,
    -(10**18),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "-1",
    "nan",
    "prune",
    "bf16",
    "../x",
    "/etc/passwd",
    "a" * 10_000,
    "\u0000",
    "\ud7ff\u202e\U0001f600",
    [],
    [[]],
    [None],
    [1] * 1000,
    {},
    {"": {}},
    {"a": [1, {"b": None}]},
)


def edited(value: Any, rng: random.Random) -> Any:
    """JSON with one thing in it, at any depth, removed, doubled, renamed, or replaced by something nasty."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        rest = {name: item for name, item in value.items() if name != key}
        if action < 0.15:
            return rest
        if action < 0.25:
            return {
                **rest,
                str(rng.choice(("", key + "x", key.upper(), "9999999999999999999999"))): value[key],
            }
        return {**value, key: edited(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        action = rng.random()
        if action < 0.15:
            return value[:at] + value[at + 1 :]
        if action < 0.3:
            return [*value, value[at]]
        return [*value[:at], edited(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 1000, str(value)))
    return rng.choice(NASTY)


def edit_json(path: Path, rng: random.Random) -> None:
    """Edit a JSON file until it is another value."""
    before = json.loads(path.read_text(encoding="utf-8"))
    after = before
    while json.dumps(after) == json.dumps(before):
        after = edited(before, rng)
    path.write_text(json.dumps(after), encoding="utf-8", errors="surrogatepass")


def damage(path: Path, rng: random.Random) -> None:
    """Cut a file, or change, insert or remove some of its bytes."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) + 1) if rng.random() < 0.5 else rng.randrange(min(len(content), 2000) + 1)
    action = rng.randrange(5)
    if action == 0:
        del content[at:]
    elif action == 1:
        content[at:at] = rng.randbytes(rng.randrange(1, 100))
    elif action == 2:
        del content[at : at + rng.randrange(1, 100)]
    elif action == 3 and len(content) > at:
        content[at] ^= 1 << rng.randrange(8)
    else:
        content[at : at + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, b'{["\\u', b"NaN"))
    path.write_bytes(content)


def replace(path: Path, rng: random.Random) -> None:
    """Put something else in a file's place: a directory, a pipe, a link to nowhere, to itself or out."""
    path.unlink()
    action = rng.randrange(6)
    if action == 0:
        path.mkdir()
    elif action == 1:
        import os

        os.mkfifo(path)
    elif action == 2:
        path.symlink_to(path.name)
    elif action == 3:
        path.symlink_to("/etc/hostname")
    elif action == 4:
        path.symlink_to("/dev/zero")
    # otherwise it is missing
