"""The option of every expert: all are there, told apart without colour, inside the window."""

from __future__ import annotations

import pytest

from moe_rco import console
from moe_rco.heatmap import legend
from tests.console.screens import ESCAPES, screen, shown
from tests.reports import LAYERS


def test_map_has_one_cell_per_expert() -> None:
    target = screen()
    console.show_map(list(enumerate(LAYERS)), target)
    lines = shown(target).splitlines()
    assert lines[1].split() == ["0", ".", "4", "4", "F", "2", "8", ".", "3"]
    assert lines[2].split() == ["1", *"44444444"]
    assert lines[3].split() == ["2", *"FFFF...."]
    assert "4  int4-g64 (10)" in lines[4]
    assert "F  bf16 (5)" in "".join(lines[4:])


@pytest.mark.parametrize("width", [40, 80, 133, 140, 300])
def test_map_of_many_experts_wraps_inside_the_window(width: int) -> None:
    options = ["prune", "int4-g64", "int8-g64", "bf16"] * 33
    target = screen(width)
    console.show_map([(7, options), (47, options)], target)
    lines = shown(target).splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines[1:] if set(line[7:].replace(" ", "")) <= set(".48F") and line.strip()]
    assert "".join(row[7:] for row in rows).replace(" ", "") == ".48F" * 33 * 2
    assert len(rows) == 2 or width < 140
    assert sum(row.strip().startswith(("7 ", "47 ")) for row in rows) == 2


def test_colour_only_adds_to_the_characters() -> None:
    plain, coloured = screen(), screen(color=True)
    for target in (plain, coloured):
        console.show_map(list(enumerate(LAYERS)), target)
    assert "\x1b[" in shown(coloured)
    assert ESCAPES.sub("", shown(coloured)) == shown(plain)


def test_no_two_options_share_a_symbol_or_a_shade() -> None:
    names = ["bf16", "int4", "int4-g64", "int4-g128", "int2-g64", "prune", "int8-g64", "f32"]
    keys = legend([names, ["prune"] * 8])
    assert len({key.symbol for key in keys}) == len(names)
    assert keys[0].name == "prune"
    assert [key.symbol for key in keys if key.name in ("prune", "int2-g64", "int4")] == [".", "2", "4"]
    shades = [key.shade for key in keys if key.shade is not None]
    assert shades == sorted(shades)
    assert len(set(shades)) == len(names) - 1
    assert next(key.count for key in keys if key.name == "prune") == 9
