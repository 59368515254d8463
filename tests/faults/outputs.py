"""Finished outputs that were changed by hand, by a bad copy or by a bad disk."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.judge import Case
from tests.faults.values import NASTY, damage, edit_json, replace
from tests.forging import change_json, sign

WORKER = "moe_rco.scoring.worker"
FILES = ("plan.json", "report.json", "manifest.json", "config.json")


def cases(base: Path, several: Path, count: int, rng: random.Random) -> list[Case]:
    """Of a directory that holds an output, `done`, and of one whose `done` has outputs for several budgets."""
    kinds = (
        Case("output", "changed, verified", base, _verify, refused=True),
        Case("output", "changed, read", base, _read),
        Case("output", "forged plan", base, _forged, refused=True),
        Case("output", "changed, verified", base, _verify, refused=True),
        Case("output", "changed, read", base, _read),
        Case("output", "curve", several, _curve),
        Case("output", "changed, scored", base, _scored, starts=WORKER, writes=("done/",)),
    )
    return [kinds[number % len(kinds)] for number in range(count)]


def _change(place: Path, rng: random.Random) -> None:
    path = place / "done" / rng.choice(FILES)
    before = path.read_bytes()
    while path.is_file() and not path.is_symlink() and path.read_bytes() == before:
        rng.choice((edit_json, edit_json, damage, replace))(path, rng)
        if not path.exists():
            return


def _verify(place: Path, rng: random.Random) -> list[str]:
    """Any change must be found, also one bit in the weights."""
    if rng.random() < 0.3:
        path = rng.choice(sorted((place / "done").glob("*.safetensors")))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        _change(place, rng)
    return ["verify", "done"]


def _read(place: Path, rng: random.Random) -> list[str]:
    _change(place, rng)
    return rng.choice(
        (
            ["inspect", "done"],
            ["status", "done"],
            ["serve", "done", "--dry-run"],
            ["status", "done", "--json"],
            ["compare", "done", "--output", "out/page.html"],
        )
    )


def _scored(place: Path, rng: random.Random) -> list[str]:
    """Damage that is seen when the model is loaded, if not before."""
    _change(place, rng)
    return ["eval", "done", "--tasks", "demo_text_prose", "--limit", "1", "--no-baseline"]


def _forged(place: Path, rng: random.Random) -> list[str]:
    """A plan edited by hand, with the digests made anew: what it says is wrong in itself."""
    done = place / "done"
    change_json(done / "plan.json", rng.choice(_FORGERIES))
    if rng.random() < 0.5:
        layers = json.loads((done / "plan.json").read_text())["layers"]
        change_json(done / "config.json", lambda config: config["quantization_config"].update(layers=layers))
        sign(done, "config.json")
    sign(done, "plan.json")
    return rng.choice((["verify", "done"], ["serve", "done", "--dry-run"]))


def _over_budget(plan: dict[str, Any]) -> None:
    plan.update(budget=plan["cost"] - 1, slack=-1)


def _other_model(plan: dict[str, Any]) -> None:
    plan["model"] = "0" * 64


def _other_recipe(plan: dict[str, Any]) -> None:
    plan["recipe"] = "0" * 64


def _unknown_option(plan: dict[str, Any]) -> None:
    layer = plan["layers"]["1"]
    layer["int5-g64"] = layer.pop(next(iter(layer)))


def _too_few(plan: dict[str, Any]) -> None:
    ids = sorted(expert for ids in plan["layers"]["0"].values() for expert in ids)
    plan["layers"]["0"] = {"prune": ids[1:], "bf16": ids[:1]}


def _nobody(plan: dict[str, Any]) -> None:
    plan["layers"]["0"].setdefault("bf16", []).append(99)


def _twice(plan: dict[str, Any]) -> None:
    layer = plan["layers"]["0"]
    next(iter(layer.values())).append(next(iter(layer.values()))[0])


def _no_layer(plan: dict[str, Any]) -> None:
    del plan["layers"]["2"]


def _swapped(plan: dict[str, Any]) -> None:
    layer = next(layer for layer in plan["layers"].values() if len(layer) > 1)
    first, second = list(layer.values())[:2]
    first[0], second[0] = second[0], first[0]


_FORGERIES: tuple[Callable[[dict[str, Any]], None], ...] = (
    _over_budget,
    _other_model,
    _other_recipe,
    _unknown_option,
    _too_few,
    _nobody,
    _twice,
    _no_layer,
    _swapped,
)


def _curve(place: Path, rng: random.Random) -> list[str]:
    """The file that says which outputs there are."""
    path = place / "done" / "curve.json"
    if rng.random() < 0.4:
        rng.choice((damage, replace))(path, rng)
    elif rng.random() < 0.5:
        edit_json(path, rng)
    else:
        outside = ("..", "/etc", "", ".", "a/../..", "nowhere", "x" * 300, *NASTY)
        change_json(path, lambda curve: curve["points"][0].update(directory=rng.choice(outside)))
    return rng.choice(
        (["verify", "done"], ["status", "done"], ["inspect", "done"], ["status", "done", "--json"])
    )
