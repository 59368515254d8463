"""The table of `eval.published` in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from eval.results_file import made_at

Records = Sequence[dict[str, Any]]

_INTRODUCTION = """Experts are pruned, all others stay as they are; everyone prunes the same number of them, of the same files,
with the same calibration token ids. KL(original || pruned) in nats per token, whole vocabulary, shipped held-out text of all
domains, judged as deployed (pruned experts masked before top-k): mean over seeds +- standard deviation.

Times are wall-clock on one CPU core, without loading the model. They are compared over the seeds that both were run with at one
commit, one after another, if there are any: others may be of another machine. Preparation: for us, calibration statistics
and the effect of every expert, once a model and good for every budget; for RCO, the original's log-probabilities.

- ours: the demo recipe's search. It also looks at the sequences kept out (a fifth of the text), to choose among candidates.
- RCO (IST-DASLab/RCO): the options of its `scripts/run_search_prune.sh`, so 300 steps of 4 antithetic samples on 4
  sequences each, learning rate 0.1, KL over 20 tokens; in bfloat16, as it loads models, on a CPU with instructions for that. A
  sequence has 256 tokens here, as the models are small; it is made for 2,048. "RCO" has all our training sequences, as many
  tokens as its 64 of 2,048; "64 sequences" is its default number; "equal layers" adds `--per-layer-budget`; "float32" loads
  the model in that. Its last iterate counts: it returns no other.
- REAP (CerebrasResearch/reap): its observer and its pruning with default arguments, in bfloat16; equally many experts
  of every layer. No search.

(*) A layer keeps fewer experts than a token uses. No program writes that to a smaller checkpoint, RCO's own included ("routing
would fail"); it is judged as if the missing ones added nothing.
"""


def render(records: Records, ours: str, command: str) -> str:
    """Ours against each rival, then one table per model and share of pruned experts."""
    cases = list(dict.fromkeys((record["model"], record["ratio"]) for record in records))
    parts = [
        f"# Against published code\n\nMade by `{command}`.\n",
        _INTRODUCTION,
        *made_at(records, list(dict.fromkeys(record["method"] for record in records))),
        "",
        *_verdicts(records, cases, ours),
    ]
    for case in cases:
        parts += _case(_of(records, case), *case)
    return "\n".join(parts) + "\n"


def _of(records: Records, case: tuple[str, float], method: str | None = None) -> Records:
    return [r for r in records if (r["model"], r["ratio"]) == case and method in (None, r["method"])]


def _total(record: dict[str, Any]) -> float:
    return record["preparation"] + record["seconds"]


def _star(records: Records) -> str:
    return " *" if any(min(record["kept"]) < record["floor"] for record in records) else ""


def _verdicts(records: Records, cases: Sequence[tuple[str, float]], ours: str) -> list[str]:
    lines = [
        "| model | pruned | against | KL ours / theirs | time ours / theirs | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        known = {record["seed"]: record for record in _of(records, case, ours)}
        for method in dict.fromkeys(r["method"] for r in _of(records, case) if r["method"] != ours):
            pairs = [(known[r["seed"]], r) for r in _of(records, case, method) if r["seed"] in known]
            if not pairs:
                continue
            kl = statistics.mean(a["kl"] for a, _ in pairs) / statistics.mean(b["kl"] for _, b in pairs)
            verdict, time = "lower" if kl < 1 else "NOT lower", "–"
            if timed := [(a, b) for a, b in pairs if a["commit"] == b["commit"]]:
                seconds = sum(_total(a) for a, _ in timed) / sum(_total(b) for _, b in timed)
                verdict, time = f"{verdict} in {'less' if seconds < 1 else 'MORE'} time", f"{seconds:.2f}"
            star = _star([rival for _, rival in pairs])
            lines.append(
                f"| {case[0]} | {case[1]:.0%} | {method}{star} | {kl:.2f} | {time} | {len(pairs)} | {verdict} |"
            )
    return [*lines, ""]


def _case(records: Records, model: str, pruned: float) -> list[str]:
    lines = [
        f"## {model}, {pruned:.0%} of experts pruned\n",
        "| method | held-out KL | by seed | calibration tokens | preparation | search | fewest kept in a layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(record["method"] for record in records):
        rows = [record for record in records if record["method"] == method]
        values = [row["kl"] for row in rows]
        spread = f" +- {statistics.stdev(values):.5f}" if len(values) > 1 else ""
        fewest = min(min(row["kept"]) for row in rows)
        lines.append(
            f"| {method} | {statistics.mean(values):.5f}{spread} | {' '.join(f'{value:.5f}' for value in values)} | "
            f"{rows[0]['tokens']:,} | {statistics.mean(row['preparation'] for row in rows):.0f} s | "
            f"{statistics.mean(row['seconds'] for row in rows):.0f} s | "
            f"{fewest}{_star(rows)} |"
        )
    return [*lines, ""]
