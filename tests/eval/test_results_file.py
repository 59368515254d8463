"""What a long measurement keeps: every result survives a stop, and one of other inputs is not taken for it."""

from __future__ import annotations

import json
from pathlib import Path

from eval.results_file import Results, commit, made_at

KEY = ("demo", 0.25, 0, "RCO")


def _record(kl: float, inputs: str = "here", seed: int = 0) -> dict[str, object]:
    return {"model": "demo", "ratio": 0.25, "seed": seed, "method": "RCO", "inputs": inputs, "kl": kl}


def test_a_rerun_finds_what_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    Results(path).put(_record(1.0))
    assert Results(path).get(KEY, "here") == _record(1.0) | {"commit": commit()}


def test_a_result_of_other_inputs_is_made_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.put(_record(1.0))
    assert results.get(KEY, "elsewhere") is None
    results.put(_record(2.0, "elsewhere"))
    assert [record["kl"] for record in json.loads((tmp_path / "results.json").read_text())] == [2.0]


def test_the_table_tells_the_commits(tmp_path: Path) -> None:
    records = [
        _record(1.0) | {"commit": "b"},
        _record(1.0, seed=1) | {"commit": "a"},
        _record(1.0) | {"method": "old"},
    ]
    assert made_at(records, ["old", "RCO", "never run"]) == ["Commit unknown: old.", "Commit a, b: RCO."]
