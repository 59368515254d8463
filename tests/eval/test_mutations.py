"""The list of deliberate faults fits the package as it is, and the program that puts them in notices what the tests do."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.mutations import ROOT, changed, copy, first_failure, tried
from eval.mutations_list import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.harm}")
def test_every_fault_can_be_put_in(mutation: Mutation) -> None:
    compile(changed(mutation), mutation.file, "exec")
    for name in mutation.tests:
        assert (ROOT / "tests" / name.partition("::")[0]).exists(), name


def test_there_are_enough_in_every_room() -> None:
    for room, least in (("optim", 10), ("ckpt", 10), ("quant", 8), ("serve", 5)):
        assert sum(mutation.file.startswith(f"{room}/") for mutation in MUTATIONS) >= least


def test_a_fault_is_caught_and_what_is_sound_passes(tmp_path: Path) -> None:
    place = copy(tmp_path)
    mutation = next(m for m in MUTATIONS if m.file == "optim/gumbel.py")
    assert first_failure(place, mutation.tests) == ""
    sound = (place / "moe_rco" / mutation.file).read_bytes()
    assert "test_gumbel" in tried(mutation, place).test
    assert (place / "moe_rco" / mutation.file).read_bytes() == sound
