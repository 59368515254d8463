"""What a page shows, as plain values."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from moe_rco.chart import Interval, Mark, Panel
from moe_rco.curve import Curve
from moe_rco.report import SIGNIFICANT, Candidate, Report, TaskScore

Row = tuple[str, tuple[Interval, ...]]


@dataclass(frozen=True)
class Headline:
    """Losses are over the tokens of all domains, in nats."""

    share: float
    loss_before: float
    loss_after: float

    @property
    def perplexities(self) -> tuple[float, float]:
        return math.exp(min(self.loss_before, 700)), math.exp(min(self.loss_after, 700))


def headline(report: Report) -> Headline:
    before, after = report.losses
    return Headline(report.bytes.experts_after / max(1, report.bytes.experts_before), before, after)


def scores(report: Report) -> list[TaskScore]:
    return list(report.scores)


def score_intervals(report: Report) -> dict[str, list[Row]]:
    """By metric and backend, and of every task that is in no group shown, the original above this model."""
    charts: dict[str, list[Row]] = {}
    backends = {score.backend for score in report.scores}
    for score in report.scores:
        if score.group is not None:
            continue
        row = []
        if score.baseline is not None:
            row.append(
                _interval(f"{score.baseline.model}", score.baseline.score, score.baseline.stderr, "faint")
            )
        better = {True: ", higher is better", False: ", lower is better", None: ""}[score.higher_is_better]
        title = f"{score.metric}{better}" + (f" ({score.backend})" if len(backends) > 1 else "")
        charts.setdefault(title, []).append(
            (score.task, (*row, _interval("compressed", score.score, score.stderr)))
        )
    return charts


@dataclass(frozen=True)
class Accuracy:
    """The mean over `tasks` that are scored between 0 and 1, before and after, and the standard error of the difference.

    `different` of all that were compared differ by more than chance.
    """

    tasks: int
    before: float
    after: float
    stderr: float | None
    compared: int
    different: int


def accuracy(report: Report) -> Accuracy | None:
    """Of the scores of one backend, the last that was used; None where nothing was compared."""
    rows = [score for score in report.scores if score.group is None and score.baseline is not None]
    rows = [score for score in rows if score.backend == rows[-1].backend]
    pairs = [
        (score.score, score.baseline)
        for score in rows
        if score.baseline
        and score.higher_is_better
        and 0 <= score.score <= 1
        and 0 <= score.baseline.score <= 1
    ]
    if not pairs:
        return None
    errors = [before.difference_stderr for _, before in pairs]
    known = [error for error in errors if error is not None]
    p = [score.baseline.p for score in rows if score.baseline and score.baseline.p is not None]
    return Accuracy(
        len(pairs),
        sum(before.score for _, before in pairs) / len(pairs),
        sum(after for after, _ in pairs) / len(pairs),
        math.hypot(*known) / len(pairs) if len(known) == len(pairs) else None,
        len(p),
        sum(value < SIGNIFICANT for value in p),
    )


def eval_commands(report: Report) -> list[str]:
    """What gave the scores: a command for each directory of lm-eval's output."""
    tasks: dict[tuple[str, str, int | None], dict[str, None]] = {}
    for score in report.scores:
        tasks.setdefault((score.files, score.backend, score.limit), {})[score.group or score.task] = None
    commands = []
    for (files, backend, limit), names in tasks.items():
        shots = re.search(r"-(\d+)shot$", files)
        commands.append(
            f"moe-rco eval {shlex.quote(report.output)} --backend {backend} --tasks {','.join(names)}"
            + (f" --limit {limit}" if limit is not None else "")
            + (f" --num-fewshot {shots[1]}" if shots else "")
        )
    return commands


def domain_intervals(report: Report) -> list[Row]:
    """The KL to the original on each part of the held-out text, and on all of it."""
    rows: list[Row] = [(part.name, (_interval("KL", part.kl, part.kl_stderr),)) for part in report.domains]
    return [*rows, ("all", (_interval("KL", report.kl, report.kl_stderr),))]


def error(stderr: float | None) -> str:
    return "unknown" if stderr is None else f"{stderr:.5f}"


def _interval(name: str, value: float, error: float | None, kind: str = "dot") -> Interval:
    told = f"{name}: {value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    return Interval(value, error or 0.0, told, kind)


def candidates(report: Report) -> list[tuple[Candidate, float]]:
    """The best first, each with the length of its bar, 0 to 1, on a logarithmic scale."""
    ordered = sorted(report.candidates, key=lambda candidate: candidate.kl)
    values = [math.log(min(max(candidate.kl, 1e-12), 1e12)) for candidate in ordered]
    low, high = values[0] - 0.1, values[-1]
    return [
        (candidate, (value - low) / max(high - low, 1e-12))
        for candidate, value in zip(ordered, values, strict=True)
    ]


def history(report: Report) -> list[Panel]:
    """How the search went; only what was recorded. Races, whose loss is of other text each, are apart from steps."""
    every = list(enumerate(report.search.history, 1))
    steps = [(number, step) for number, step in every if step.temperature is not None]
    shown = (
        ("loss of a step's samples (nats per token)", [(number, step.kl) for number, step in steps]),
        ("error of the budget, |C - B| / B", [(number, step.budget_error) for number, step in steps]),
        ("temperature", [(number, step.temperature) for number, step in steps]),
        ("entropy of an expert's options (nats)", [(number, step.entropy) for number, step in steps]),
        (
            "loss of the best in its races so far (nats per token)" if steps else "loss (nats per token)",
            [(number, step.kl) for number, step in every if step.temperature is None],
        ),
    )
    return [
        Panel(
            title,
            [Mark(number, value) for number, value in values if value is not None],
            of_bytes=False,
            dots=False,
        )
        for title, values in shown
        if len(values) > 1
    ]


@dataclass(frozen=True)
class Coverage:
    """Calibration tokens by expert; `bars` are (from, to, how many experts, share of the highest bar)."""

    least: int
    middle: float
    most: int
    unseen: int
    bars: list[tuple[int, int, int, float]]


def coverage(report: Report) -> Coverage | None:
    """None where the report does not tell."""
    tokens = sorted(count for layer in report.layers for count in layer.tokens)
    if not tokens:
        return None
    width = max(1, math.ceil((tokens[-1] + 1) / 12))
    counts = [
        sum(start <= count < start + width for count in tokens) for start in range(0, tokens[-1] + 1, width)
    ]
    bars = [
        (index * width, (index + 1) * width - 1, count, count / max(counts))
        for index, count in enumerate(counts)
    ]
    return Coverage(tokens[0], median(tokens), tokens[-1], sum(not count for count in tokens), bars)


def told(tokens: Mapping[int, Sequence[int]], layer: int, expert: int, option: str) -> str:
    """What is shown of an expert where it is pointed at."""
    seen = tokens[layer]
    if not seen:
        return f"layer {layer}, expert {expert}: {option}"
    share = seen[expert] * len(seen) / max(1, sum(seen))
    return (
        f"layer {layer}, expert {expert}: {option}; {seen[expert]:,} tokens, {share:.2f} of its layer's mean"
    )


def scores_beside(reports: Mapping[str, Report]) -> list[tuple[str, list[TaskScore | None]]]:
    """A row for every score that any of the reports has."""
    by_key = {
        name: {(s.backend, s.task, s.metric, s.filter, s.num_fewshot, s.limit): s for s in report.scores}
        for name, report in reports.items()
    }
    keys = dict.fromkeys(key for found in by_key.values() for key in found)
    return [
        (
            f"{key[1]} {key[2]}" + (f" ({key[5]} items)" if key[5] else ""),
            [found.get(key) for found in by_key.values()],
        )
        for key in keys
    ]


def beside(reports: Mapping[str, Report]) -> list[Panel]:
    """Results of any runs over their bytes; the loss only where all were made from one model."""
    panels = Curve.of(tuple(reports), tuple(reports.values())).panels()
    alike = len({report.model_digest for report in reports.values()}) == 1
    return [replace(panel, joined=False) for panel in panels[: 2 if alike else 1]]
