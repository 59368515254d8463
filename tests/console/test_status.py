"""What `status` says."""

from __future__ import annotations

import re

from moe_rco import console
from moe_rco.progress import Status
from tests.console.screens import screen, shown


def test_status_shows_what_is_kept_and_what_was_there() -> None:
    target = screen()
    found = Status.model_validate(
        {
            "output": "out/[demo]",
            "state": "interrupted",
            "process": {"pid": 4711, "host": "box", "started": "2026-01-02T03:04:05+00:00"},
            "stages": [
                {"name": "refining passes", "done": 1200, "total": 3840},
                {"name": "shards written", "done": 0, "total": 0},
            ],
            "results": [
                {
                    "model": "demo",
                    "budget": "ratio 0.25",
                    "budget_bytes": 1_000_000,
                    "expert_bytes": 999_000,
                    "total_bytes": 1_499_000,
                    "kl": 0.0625,
                    "kl_stderr": 0.001,
                }
            ],
        }
    )
    console.show_status(found, target)
    text = shown(target)
    assert text.startswith("out/[demo]: interrupted\nIt was process 4711 on box")
    assert re.search(r"refining passes +1,200 +3,840\n", text)
    assert re.search(r"shards written +0 +-\n", text)
    assert "goes on from here" in text
    assert "An earlier run's output" in text
    assert re.search(r"budget +976.56 KiB \(1,000,000 bytes\) \(ratio 0.25\)", text)
    assert "0.06250 ± 0.00100" in text

    target = screen()
    console.show_status(found.model_copy(update={"state": "finished", "process": None, "stages": ()}), target)
    assert "goes on" not in shown(target)
    assert "An earlier" not in shown(target)
