"""The table of `eval.quality` in Markdown, with a verdict for every row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from eval.results_file import made_at
from eval.rivals import FISHER, RCO

Records = Sequence[dict[str, Any]]


def render(records: Records, methods: Sequence[str], command: str) -> str:
    """One table per model and ratio, after a summary of them all."""
    cases = list(dict.fromkeys((record["model"], record["ratio"]) for record in records))
    parts = [
        "# Held-out KL at equal bytes\n",
        f"Made by `{command}`.\n",
        _INTRODUCTION,
        *made_at(records, methods),
        "",
        *_summary(records, cases, methods),
    ]
    for case in cases:
        tried = {record["method"] for record in records if (record["model"], record["ratio"]) == case}
        parts += _case(_of(records, case), *case, [method for method in methods if method in tried])
    return "\n".join(parts) + "\n"


_INTRODUCTION = """KL(original || compressed) in nats per token, whole
vocabulary, shipped held-out text of all domains: mean over seeds +- standard deviation. A rival is the best
of its variants *on the held-out text*; one run with fewer seeds is compared with RCO's results of those.
RCO / rival has the standard error of the seeds' ratios: what is within two of it of 1 is undecided, won or lost.
Every method of one (model, seed) chooses among the same GPTQ weights, to rounding
where machines differed. What was run at different commits may be of different machines: compare times within one.
"""


def _of(records: Records, case: tuple[str, float], method: str | None = None) -> Records:
    return [
        record
        for record in records
        if (record["model"], record["ratio"]) == case
        and method in (None, record["method"])
        and record["kl"] is not None
    ]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def _summary(records: Records, cases: list[tuple[str, float]], methods: Sequence[str]) -> list[str]:
    lines = [
        "| model | budget | best rival | its KL | Fisher seed | RCO | RCO / rival | RCO - Fisher | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    over_seed: dict[tuple[str, float], float] = {}
    for case in cases:
        by_method = {m: {r["seed"]: r["kl"] for r in _of(records, case, m)} for m in methods}
        rivals = {m: v for m, v in by_method.items() if v and m not in (FISHER, RCO)}
        fisher, rco = by_method[FISHER], by_method[RCO]
        if not rco or rco.keys() != fisher.keys():
            continue
        means = {m: statistics.mean(kls.values()) for m, kls in rivals.items()}
        # A rival that was run with some of the seeds is compared over those.
        ratios = {m: statistics.mean(rco[seed] for seed in kls) / means[m] for m, kls in rivals.items()}
        rival = max(ratios, key=ratios.__getitem__, default="-")
        cells, verdict = ["-", "-"], "no rival was run"
        if ratios:
            each = [rco[seed] / kl for seed, kl in rivals[rival].items()]
            cells = [f"{means[rival]:.5f}", f"{ratios[rival]:.2f}{_error(each)}"]
            verdict = "below every rival" if ratios[rival] < 1 else f"LOST to {rival}"
        pairs = [rco[seed] - fisher[seed] for seed in rco]
        # Two standard errors of the paired difference; with one seed there is no spread to go by.
        noise = 2 * _spread(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
        verdict += "" if statistics.mean(pairs) <= noise else ", above the Fisher seed"
        figures = [_figure(list(kls.values())) for kls in (fisher, rco)]
        lines.append(
            f"| {case[0]} | {case[1]:.0%} | {rival} | {cells[0]} | {figures[0]} | {figures[1]} | "
            f"{cells[1]} | {statistics.mean(pairs):+.5f} +- {_spread(pairs):.5f} | {verdict} |"
        )
        over_seed[case] = statistics.mean(rco.values()) / statistics.mean(fisher.values())
    if not over_seed:
        return []
    small = [ratio for case, ratio in over_seed.items() if case[1] <= 0.25]
    rows = [(f"the {len(over_seed)} rows", list(over_seed.values()))]
    if 0 < len(small) < len(over_seed):
        rows.append((f"the {len(small)} at 25 % and below", small))
    text = ", ".join(f"{statistics.mean(values):.3f} over {name}" for name, values in rows if values)
    return [*lines, "", *([f"RCO / Fisher seed on average: {text}.", ""] if text else [])]


def _error(values: Sequence[float]) -> str:
    return f" +- {_spread(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""


def _figure(values: Sequence[float]) -> str:
    spread = f" +- {_spread(values):.5f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.5f}{spread}"


def _case(records: Records, model: str, ratio: float, methods: Sequence[str]) -> list[str]:
    if not records:
        return []
    budget = records[0]["budget"]
    lines = [
        f"## {model} at {ratio:.0%}: {budget:,} of {records[0]['original']:,} bytes\n",
        "| method | held-out KL | by seed | variant | most bytes | largest slack | choosing took |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        rows = [record for record in records if record["method"] == method]
        if not rows:
            lines.append(f"| {method} | does not fit | | | | | |")
            continue
        seeds = " ".join(f"{row['kl']:.5f}" for row in rows)
        variants = ", ".join(dict.fromkeys(row["variant"] or "-" for row in rows))
        cost = max(row["cost"] for row in rows)
        slack = max(1 - row["cost"] / row["budget"] for row in rows)
        seconds = statistics.mean(row["seconds"] for row in rows)
        lines.append(
            f"| {method} | {_figure([row['kl'] for row in rows])} | {seeds} | {variants} | {cost:,} | "
            f"{slack:.3%} | {seconds:.0f} s |"
        )
    return [*lines, ""]
