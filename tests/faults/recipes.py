"""Recipes and settings that no program should trust."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from tests.faults.judge import Case
from tests.faults.values import NASTY, damage, edited

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
WHOLE: tuple[bytes, ...] = (
    b"",
    b"\n",
    b"null",
    b"[]",
    b"- version: 1",
    b"version",
    b"42",
    b"\x00",
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf",
    b"---\n---\n",
    b"%YAML 9.9\n",
    b"{" * 20_000,
    b"[" * 100_000,
    b"a: " * 5_000,
    b"\t" * 100,
    b"a: b\n" * 50_000,
    b"x" * (1 << 22),
    b"!!python/object/apply:os.system ['true']",
    b"version: !!python/name:os.system\n",
    b"&a [*a]",
    b"*a",
    b"? {a: b}\n: c",
    b"<<: {version: 1}",
    b"version: 1\nversion: 1",
    b"model: !!binary aGFsbG8=",
    b"version: 2001-12-14t21:59:43.10-05:00",
    b"version: 0x1",
    b"version: 1_000",
    b"version: .inf",
)
LINES = (
    "version: 1",
    "  nested: 1",
    "\tmodel: x",
    "budget: {ratio: .nan}",
    "budget: {ratio: .inf}",
    "budget: 1e400",
    "budget: -5GiB",
    "budget: [50%, 50%]",
    "budget: []",
    "budget: {ratio: 0.3, bytes: 5}",
    "budget: 999999999999999999999TiB",
    "budget: 0x10",
    "budget: {fit: 24GB}",
    "budget: {fit: ~}",
    "budget: {fit: []}",
    "budget: {fit: 0}",
    "budget: {fit: -24GB}",
    "budget: {fit: 1e400GB}",
    "budget: {fit: {}}",
    "budget: {fit: 24GB, ratio: 0.3}",
    "budget: {fit: {gpu_memory: 24GB, max_model_len: 1e9999}}",
    "budget: {fit: {gpu_memory: 24GB, max_model_len: 99999999999999999999}}",
    "budget: {fit: {gpu_memory: 24GB, max_num_seqs: -1}}",
    "budget: {fit: {gpu_memory: 24GB, gpu_memory_utilization: 90}}",
    "budget: {fit: {gpu_memory: 24GB, gpu_memory_utilization: .nan}}",
    "budget: {fit: {gpu_memory: 24GB, tensor_parallel_size: 0}}",
    "budget: {fit: {gpu_memory: 24GB, tensor_parallel_size: 3}}",
    "budget: {fit: {gpu_memory: 24GB, max_model_len: 64, max_num_seqs: 1}}",
    "budget: [{fit: 24GB}, {fit: 24GB}]",
    "options: [prune, prune]",
    "options: prune",
    "options: [int5]",
    "options: [int4-g0]",
    "options: [int4-g-64]",
    "options: [[int4]]",
    "options: []",
    "options: [prune]",
    "options: [int4-g99999999999999999999]",
    "model: ''",
    "model: ../../../..",
    "model: /dev/zero",
    "model: ~",
    "output: ''",
    "output: /",
    "output: .",
    "output: ..",
    "output: recipe.yaml",
    "output: model/x",
    "output: 'a\\0b'",
    "search: {steps: 1e9999}",
    "search: {steps: -1}",
    "search: {method: RCO}",
    "search: {seed: 99999999999999999999999}",
    "search: {learning_rate: nan}",
    "search: [steps, 3]",
    "search: ~",
    "calibration: {data: []}",
    "calibration: {data: {}}",
    "calibration: {data: [{data: x, weight: -1}]}",
    "calibration: {data: model/text.jsonl, sequences: 0}",
    "execution: {device: gpu}",
    "calibration: {data: model/text.jsonl, sequence_length: 1}",
    "calibration: {data: model/text.jsonl, holdout: 1.0}",
    "execution: {memory_limit: -1}",
    "execution: {memory_limit: 1e99}",
    "execution: streamin",
    "layout: Stock",
    "quantizer: {method: awq}",
    "trust_remote_code: true",
    "\u202emodel: x",
    "model: \U0001f4a9",
    "&x : *x",
    "<<: *nothing",
    "!!set {a, b}",
    "? : ?",
    "%TAG ! x:",
)


def cases(base: Path, count: int, rng: random.Random) -> list[Case]:
    """Of a directory that holds a sound job."""
    fixed = [
        Case("recipe", f"whole {n}", base, _whole(text)) for n, text in enumerate((*WHOLE, BOMB.encode()))
    ]
    fixed += [Case("recipe", line, base, _line(line)) for line in LINES]
    rng.shuffle(fixed)
    made = [Case("recipe", "edit", base, rng.choice((_edit, _damage, _twice, _set))) for _ in range(count)]
    return [*fixed, *made][:count]


def _command(rng: random.Random) -> list[str]:
    if rng.random() < 0.8:
        return ["validate", "recipe.yaml"]
    return ["prune", "--recipe", "recipe.yaml", "--dry-run"]


def _whole(text: bytes):
    def make(place: Path, rng: random.Random) -> list[str]:
        (place / "recipe.yaml").write_bytes(text)
        return _command(rng)

    return make


def _line(line: str):
    """One line in the place of the one of the same key, or after all others."""

    def make(place: Path, rng: random.Random) -> list[str]:
        path = place / "recipe.yaml"
        key = line.split(":")[0]
        lines = [old for old in path.read_text(encoding="utf-8").splitlines() if old.split(":")[0] != key]
        path.write_text("\n".join([*lines, line]) + "\n", encoding="utf-8")
        return _command(rng)

    return make


def _edit(place: Path, rng: random.Random) -> list[str]:
    path = place / "recipe.yaml"
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    for _ in range(rng.randrange(1, 4)):
        value = edited(value, rng)
    path.write_text(
        json.dumps(value) if rng.random() < 0.5 else yaml.safe_dump(value, allow_unicode=True),
        encoding="utf-8",
    )
    return _command(rng)


def _damage(place: Path, rng: random.Random) -> list[str]:
    damage(place / "recipe.yaml", rng)
    return _command(rng)


def _twice(place: Path, rng: random.Random) -> list[str]:
    path = place / "recipe.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    at = rng.randrange(len(lines))
    lines.insert(rng.randrange(len(lines)), " " * rng.randrange(4) + lines[at])
    path.write_text("\n".join(lines), encoding="utf-8")
    return _command(rng)


def _set(place: Path, rng: random.Random) -> list[str]:
    keys = (
        "model",
        "options",
        "budget",
        "budget.ratio",
        "budget.fit",
        "budget.fit.gpu_memory",
        "budget.fit.max_model_len",
        "search",
        "search.steps",
        "search.x",
        "calibration.data",
        "output",
        "",
        ".",
        "a.b.c",
    )
    value = rng.choice(NASTY)
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\u0000", "\\0")  # no argument of a process has one
    return [*_command(rng), "--set", f"{rng.choice(keys)}={text}"]
