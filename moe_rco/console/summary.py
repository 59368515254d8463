"""What a run ends with."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from moe_rco.console.map import show_map
from moe_rco.console.parts import share, show, stdout, table_of, uncertainty
from moe_rco.page import FILE_NAME as PAGE
from moe_rco.quant.hessian import TOKENS_PER_INPUT
from moe_rco.report import Report, StockPart
from moe_rco.units import format_duration, format_size

_NAMED = 16
"""Experts that the summary lists; the report has all."""


def show_summary(report: Report, console: Console | None = None) -> None:
    """What `prune` ends with."""
    console = console or stdout()
    sizes = report.bytes
    console.rule(f"{report.model} ({report.family})")

    table = table_of("", "size>", "bytes>", "of before>")
    for name, size in (
        ("before", sizes.experts_before),
        (f"budget ({report.budget.text})", sizes.budget),
        ("after", sizes.experts_after),
    ):
        style = "bold" if name == "after" else None
        table.add_row(name, format_size(size), f"{size:,}", share(size, sizes.experts_before), style=style)
    table.add_row("slack", format_size(sizes.slack), f"{sizes.slack:,}", f"{sizes.slack_ratio:.3%} of budget")
    table.add_row("everything else", format_size(sizes.other), f"{sizes.other:,}")
    table.add_row("whole model", format_size(sizes.total), f"{sizes.total:,}")
    show(console, f"{report.covers.capitalize()} on disk", table)

    show(console, "Held-out text (nats per token; KL to the original)", _domains(report))
    show(console, "Candidates (KL on calibration text kept out of the search)", _candidates(report))
    if report.quantizer.options:
        title = f"Rounding ({report.quantizer.method}): relative error of the experts' outputs"
        show(console, title, _quantizer(report))
    for line in _coverage(report):
        console.print(line, soft_wrap=True)
    console.print()
    show_map([(layer.layer, layer.options) for layer in report.layers], console)
    if report.dense:
        show(console, "Options of all else that was chosen for", _dense(report))
    if report.stock is not None:
        _show_stock(report.stock, console)

    state = "agrees with" if report.reload.passed else "DIFFERS from"
    console.print(
        f"Reloaded: the written model {state} the searched one "
        f"(read by {report.reload.by}, largest logit difference {report.reload.max_logit_difference:.1e}, "
        f"tolerance {report.reload.tolerance:.0e})",
        style=None if report.reload.passed else "bold red",
    )
    for warning in report.warnings:
        console.print(f"note: {warning}", style="yellow", soft_wrap=True)
    console.print(_resources(report), soft_wrap=True)
    console.print(
        f"\nWritten to {report.output}, with a page for your browser: {report.output}/{PAGE}", soft_wrap=True
    )
    if report.budget.room is not None:
        console.print("To serve it on what it was made to fit:\n")
        console.print(
            f"    moe-rco serve {shlex.quote(report.output)} {report.budget.room.serve}\n", soft_wrap=True
        )
    console.print("To use it from Python:\n")
    for line in _usage(report):
        console.print(f"    {line}", soft_wrap=True)


def _coverage(report: Report) -> Iterator[str]:
    """How many calibration tokens the experts saw, and what was done for those that saw few."""
    tokens = sorted(count for layer in report.layers for count in layer.tokens)
    if tokens:
        unseen = sum(not count for count in tokens)
        yield (
            f"Calibration: {tokens[0]:,} to {tokens[-1]:,} tokens an expert, {tokens[len(tokens) // 2]:,} in the middle"
            + (f"; {unseen} saw none." if unseen else ".")
        )
    few = report.quantizer.undersampled_experts
    if few:
        by_layer = report.quantizer.undersampled.items()
        which = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in by_layer)
        named = f" ({which})" if which and few <= _NAMED else ""
        yield (
            f"{few} experts saw fewer than {TOKENS_PER_INPUT} tokens for each input of a matrix{named}: to quantise them, "
            "their statistics were mixed with those of their layer."
        )


def _dense(report: Report) -> Table:
    table = table_of("", "groups by option", "bytes>")
    for kind, counts in report.dense_counts.items():
        size = sum(group.bytes for group in report.dense if group.kind == kind)
        options = ", ".join(f"{option} ({count})" for option, count in counts.items())
        table.add_row(kind.replace("_", " "), options, f"{size:,}")
    return table


def _domains(report: Report) -> Table:
    table = table_of("domain", "tokens>", "loss before>", "loss after>", "KL>", "±>")
    for part in report.domains:
        losses = (f"{part.loss_before:.4f}", f"{part.loss_after:.4f}")
        table.add_row(part.name, f"{part.tokens:,}", *losses, f"{part.kl:.5f}", uncertainty(part.kl_stderr))
    tokens = sum(part.tokens for part in report.domains)
    table.add_row(
        "all", f"{tokens:,}", "", "", f"{report.kl:.5f}", uncertainty(report.kl_stderr), style="bold"
    )
    return table


def _candidates(report: Report) -> Table:
    table = table_of("candidate", "KL>", "bytes>", "")
    for candidate in sorted(report.candidates, key=lambda candidate: candidate.kl):
        mark, style = ("chosen", "bold") if candidate.name == report.winner else ("", None)
        table.add_row(candidate.name, f"{candidate.kl:.5f}", f"{candidate.cost:,}", mark, style=style)
    return table


def _quantizer(report: Report) -> Table:
    table = table_of("option", "rtn>", "gptq>")
    for name, option in report.quantizer.options.items():
        gptq = "-" if option.gptq_error is None else f"{option.gptq_error:.5f}"
        table.add_row(name, f"{option.rtn_error:.5f}", gptq)
    return table


def _show_stock(part: StockPart, console: Console) -> None:
    console.print(
        f"Layout stock: {part.experts_per_layer} experts in every layer, numbered anew. KL {part.kl:.5f}; layout "
        f"mixed has {part.mixed.kl:.5f} within the same budget before any search ({part.mixed.name}; both on the "
        "calibration text kept out).",
        soft_wrap=True,
    )
    readers = "vLLM and transformers" if part.transformers_reads else "vLLM"
    console.print(f"Read without moe_rco by {readers}.\n")


def _resources(report: Report) -> str:
    """Time and memory, and what had been predicted of them."""
    took = sum(stage.seconds for stage in report.stages)
    known = [stage for stage in report.stages if stage.predicted is not None]
    line = f"Time: {format_duration(took)}"
    if known:
        line += f" (predicted {format_duration(sum(stage.predicted or 0.0 for stage in known))})"
    if report.memory is not None:
        m = report.memory
        line += f". Memory: {format_size(m.host)} (predicted {format_size(m.predicted_host)})"
        if m.device:
            line += f", {format_size(m.device)} on the device (predicted {format_size(m.predicted_device)})"
    return line


def _usage(report: Report) -> tuple[str, ...]:
    if report.stock is not None and not report.stock.transformers_reads:
        return ("from vllm import LLM", f"model = LLM({report.output!r})")
    ours = ("import moe_rco  # teaches transformers to read the result",) if report.stock is None else ()
    return (
        *ours,
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({report.output!r})",
    )


def show_comparison(reports: Mapping[str, Report], written: str, console: Console | None = None) -> None:
    """Several results beside each other; `written` says where they are. What `prune` ends with for several budgets."""
    console = console or stdout()
    table = table_of(
        "", "in the budget>", "of before>", "whole model>", "loss before>", "loss after>", "KL>", "±>"
    )
    for name, report in reports.items():
        sizes = report.bytes
        table.add_row(
            name,
            f"{sizes.experts_after:,}",
            share(sizes.experts_after, sizes.experts_before),
            f"{sizes.total:,}",
            *(f"{loss:.4f}" for loss in report.losses),
            f"{report.kl:.5f}",
            uncertainty(report.kl_stderr),
        )
    show(console, "Bytes, and held-out text (nats per token; KL to the original)", table)
    console.print(written, soft_wrap=True)
