"""The curve: what it takes from the reports, and that its picture shows it."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moe_rco.curve import Curve
from moe_rco.errors import PlanError
from moe_rco.report import Report
from tests.reports import report, report_data

SVG = "{http://www.w3.org/2000/svg}"


def smaller() -> Report:
    """Half the bytes of `report()`, and another loss in one of its domains."""
    data = report_data()
    data["budget"] = {"text": "ratio 0.125", "bytes": 500_000}
    data["bytes"] |= {"experts_after": 499_000, "budget": 500_000, "slack": 1000, "total": 999_000}
    data["candidates"] = [
        {"name": "rco step 40", "kl": 0.5, "cost": 499_000},
        {"name": "near", "kl": 0.6, "cost": 498_000},
        {"name": "far", "kl": 9.0, "cost": 498_500},
    ]
    data["domains"][0] |= {"tokens": 3 * 1234, "loss_after": 2.5}
    return Report.model_validate({**data, "kl": 0.5, "kl_stderr": 0.01})


@pytest.fixture
def curve() -> Curve:
    return Curve.of(("25pct", "12.5pct"), (report(), smaller()))


def test_the_figures_are_those_of_the_reports(curve: Curve) -> None:
    assert (curve.model, curve.experts_before, curve.original_loss) == ("demo", 4_000_000, 2.0)
    large, small = curve.points
    assert (large.directory, large.expert_bytes, large.kl, large.kl_stderr) == (
        "25pct",
        999_000,
        0.0625,
        0.0007,
    )
    assert large.loss == 2.0625
    assert small.loss == pytest.approx((3 * 2.5 + 2.0625) / 4)
    assert [candidate.name for candidate in small.candidates] == ["rco step 40", "near", "far"]


def test_saved_and_read_again(curve: Curve, tmp_path: Path) -> None:
    curve.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"curve.json", "curve.svg"}
    assert Curve.load(tmp_path) == curve
    (tmp_path / "curve.json").write_text("{}")
    with pytest.raises(PlanError, match="not a curve of this version"):
        Curve.load(tmp_path)
    with pytest.raises(PlanError, match="cannot be read"):
        Curve.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["", ".", "..", "/etc", "a/b", "..\\b", "a\0", "x\n"])
def test_a_directory_that_is_not_beside_it(curve: Curve, tmp_path: Path, name: str) -> None:
    point = curve.points[0].model_copy(update={"directory": name})
    curve.model_copy(update={"points": (point,)}).save(tmp_path)
    with pytest.raises(PlanError, match="is not the name of a directory beside it"):
        Curve.load(tmp_path)


def test_the_picture(curve: Curve) -> None:
    """Points are where their values put them between the axis's ticks, in both panels."""
    root = ElementTree.fromstring(curve.picture())
    panels = root.findall(f"{SVG}g")
    assert len(panels) == 2
    for panel, values in zip(panels, ([0.0625, 0.5], [point.loss for point in curve.points]), strict=True):
        points = [c for c in panel.iter(f"{SVG}circle") if c.get("r") == "4"]
        ticks = [
            (float(text.text or ""), float(text.get("y", "")) - 4)
            for text in panel.iter(f"{SVG}text")
            if text.get("text-anchor") == "end"
        ]
        (low, bottom), (high, top) = ticks[0], ticks[-1]
        assert bottom > top
        expected = [bottom + (value - low) / (high - low) * (top - bottom) for value in reversed(values)]
        assert [float(point.get("cy", "")) for point in points] == pytest.approx(expected, abs=0.2)
        xs = [float(point.get("cx", "")) for point in points]
        assert 70 < xs[0] < xs[1] < 440
        assert {text.text for text in panel.iter(f"{SVG}text")} >= {"25pct", "12.5pct"}
    faint = [c for c in panels[0].iter(f"{SVG}circle") if c.get("r") == "2.5"]
    assert len(faint) == 3  # not the winners, and not the one that is far above
    assert not re.search("nan|inf", curve.picture())


def test_text_in_the_picture_is_text(curve: Curve) -> None:
    named = curve.model_copy(update={"model": "a <b> & c"})
    assert ElementTree.fromstring(named.picture()).find(f"{SVG}text").text.startswith("a <b> & c")  # type: ignore[union-attr]
    assert named.picture() == named.picture()


def test_models_of_equal_bytes_can_be_drawn() -> None:
    same = Curve.of(("a", "b"), (report(), report()))
    assert ElementTree.fromstring(same.picture()) is not None
