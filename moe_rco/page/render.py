"""Fills the templates with a report's figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_rco.chart import figure, intervals, option_map
from moe_rco.ckpt.destination import PAGE as FILE_NAME
from moe_rco.ckpt.writer import replace_text
from moe_rco.curve import Curve
from moe_rco.heatmap import VIRIDIS, bits, ink, legend, step_of
from moe_rco.page import figures
from moe_rco.quant.hessian import TOKENS_PER_INPUT
from moe_rco.report import Report, by_layer
from moe_rco.units import format_duration, format_size


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("moe_rco.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": format_size,
        "duration": format_duration,
        "count": "{:,}".format,
        "error": figures.error,
    }
    environment.globals |= {
        "steps": [(color, ink(step)) for step, color in enumerate(VIRIDIS)],
        "tokens_per_input": TOKENS_PER_INPUT,
    }
    return environment


def page(report: Report, recipe: str = "") -> str:
    """The page of one report; `recipe` is the recipe's text, which is shown. The same report gives the same text."""
    report = Report.model_validate_json(report.to_json())  # in the file's order, with the file's digest
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            recipe=recipe,
            data=_embedded(json.loads(report.to_json())),
            place=shlex.quote(report.output),
            recipe_place=shlex.quote(f"{report.output}/recipe.yaml"),
            headline=figures.headline(report),
            scores=figures.scores(report),
            score_charts=[
                (title, _drawn(rows, zero=False)) for title, rows in figures.score_intervals(report).items()
            ],
            accuracy=figures.accuracy(report),
            eval_commands=figures.eval_commands(report),
            domain_chart=_drawn(figures.domain_intervals(report)),
            candidates=figures.candidates(report),
            history=[Markup(figure(panel)) for panel in figures.history(report)],
            coverage=figures.coverage(report),
            dense=list(by_layer(report.dense)),
            **_options(report),
        )
    )


def compared(reports: Mapping[str, Report], curve: Curve | None = None) -> str:
    """A page of several reports beside each other, by name; those of one run with the `curve` of quality against bytes."""
    return (
        _environment()
        .get_template("compare.html.j2")
        .render(
            rows=[(name, report, figures.headline(report)) for name, report in reports.items()],
            data=_embedded({name: json.loads(report.to_json()) for name, report in reports.items()}),
            maps=[(name, _options(report)) for name, report in reports.items()],
            scores=figures.scores_beside(reports),
            curve=[Markup(figure(panel)) for panel in (curve.panels() if curve else figures.beside(reports))],
            one_run=curve is not None,
        )
    )


def save(directory: Path, report: Report, recipe: str) -> None:
    """Write a report's page into its directory, whole or not at all. Raises OSError."""
    replace_text(directory / FILE_NAME, page(report, recipe))


def save_compared(path: Path, reports: Mapping[str, Report], curve: Curve | None = None) -> None:
    """Write the page of several reports to a file, whole or not at all. Raises OSError."""
    replace_text(path, compared(reports, curve))


def _options(report: Report) -> dict[str, Any]:
    """The map of options, its legend, and each layer's shares."""
    layers = {layer.layer: layer.options for layer in report.layers}
    tokens = {layer.layer: layer.tokens for layer in report.layers}
    keys = legend(list(layers.values()))
    kinds = {key.name: "pruned" if key.shade is None else f"s{step_of(key.shade)}" for key in keys}
    shares = [
        (
            layer,
            sum(bits(option) > 0 for option in options),
            len(options),
            [(kinds[key.name], options.count(key.name), key.name) for key in keys if key.name in options],
        )
        for layer, options in layers.items()
    ]
    return {
        "map": Markup(option_map(layers, lambda *place: figures.told(tokens, *place))),
        "legend": [(kinds[key.name], key) for key in keys],
        "shares": shares,
    }


def _drawn(rows: Sequence[Any], zero: bool = True) -> Markup:
    return Markup(intervals(rows, zero)) if rows else Markup("")


def _embedded(value: Any) -> Markup:
    """JSON that may stand within a script element, whatever is in its texts."""
    return Markup(json.dumps(value, sort_keys=True).replace("<", "\\u003c"))
