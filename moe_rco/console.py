"""What the user sees: progress, the dry run, the summary, the map of options. Nothing is decided here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moe_rco.curve import Curve
from moe_rco.heatmap import Key, legend
from moe_rco.inspection import Inspection
from moe_rco.progress import Status
from moe_rco.report import Preflight, Report, StockPart
from moe_rco.serving import ServePlan
from moe_rco.units import format_duration, format_size

# Eight steps of viridis: ordered in lightness too, so that they read in grey and by colour-blind eyes.
_VIRIDIS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
_FIRST_LIGHT = 4
_QUIET_SECONDS = 10.0

_LAYOUTS = {
    "mixed": "mixed: every expert has its own precision",
    "stock": "stock: equally many experts in every layer, one precision per layer",
}

Layers = Sequence[tuple[int, Sequence[str]]]


def stdout() -> Console:
    """Results go here. Brackets in paths are text, not markup."""
    return Console(markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """Progress goes here, so that results can be piped."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


class RichProgress:
    """Bars with elapsed and remaining time; without a terminal plain lines, at most one in ten seconds."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or stderr()
        self._clock = clock
        self._bars: Progress | None = None

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """See types.Progress. Stages may be opened inside one another."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            with self._lines(title, total) as advance:
                yield advance
        elif self._bars is not None:
            with _bar(self._bars, title, total) as advance:
                yield advance
        else:
            self._bars = Progress(
                TextColumn("{task.description:<28}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            try:
                with self._bars as bars, _bar(bars, title, total) as advance:
                    yield advance
            finally:
                self._bars = None

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        start = said = self._clock()
        done = 0

        def advance(units: int) -> None:
            nonlocal done, said
            done += units
            now = self._clock()
            if now - said >= _QUIET_SECONDS and 0 < done < total:
                said = now
                left = (now - start) * (total - done) / done
                self._console.print(
                    f"{title}: {done * 100 // total} %, {format_duration(left)} left", soft_wrap=True
                )

        self._console.print(f"{title} ...", soft_wrap=True)
        yield advance
        self._console.print(f"{title}: done in {format_duration(self._clock() - start)}", soft_wrap=True)


@contextmanager
def _bar(bars: Progress, title: str, total: int) -> Iterator[Callable[[int], None]]:
    task = bars.add_task(title, total=max(total, 1))

    def advance(units: int) -> None:
        bars.advance(task, units)

    yield advance
    bars.update(task, completed=max(total, 1))


def show_preflight(preflight: Preflight, console: Console | None = None) -> None:
    """The table of `--dry-run`."""
    console = console or stdout()
    p = preflight
    table = _table("", "")
    table.add_row(
        "family", f"{p.family}: {p.layers} MoE layers x {p.experts_per_layer} experts, {p.top_k} per token"
    )
    table.add_row("layout", _LAYOUTS[p.layout])
    for option in p.options:
        table.add_row("option", f"{option.name}: {format_size(option.bytes_per_expert)} per expert")
    table.add_row("experts now", _bytes(p.experts_before))
    for budget in p.budgets:
        share = _share(budget.bytes, p.experts_before)
        table.add_row("budget", f"{_bytes(budget.bytes)}, {share} of now ({budget.text})")
    table.add_row("possible", f"{_bytes(p.smallest)} to {_bytes(p.largest)}")
    table.add_row(
        "calibration", f"{p.sequences:,} sequences ({p.holdout_sequences:,} held out), {p.tokens:,} tokens"
    )
    races = f", then races for as long as {p.search_races} steps" if p.search_races else ""
    table.add_row("search", f"{p.search_method}: {p.search_steps} steps of {p.search_samples} samples{races}")
    held = "weights streamed from disk" if p.streamed else "all weights resident"
    on_device = f", {format_size(p.device_memory)} on the device" if p.device_memory else ""
    table.add_row("memory", f"about {format_size(p.memory)}{on_device} ({held})")
    table.add_row("disk", f"{format_size(p.disk_needed)} needed, {format_size(p.disk_free)} free")
    if p.stages:
        table.add_row("time", f"about {format_duration(sum(p.stages.values()))}")
    for name, seconds in p.stages.items():
        table.add_row("", f"{name}: {format_duration(seconds)}")
    table.add_row("output", p.output)
    _show(console, f"Dry run: {p.model}", table)
    for warning in p.warnings:
        console.print(f"note: {warning}", style="yellow", soft_wrap=True)
    console.print("Nothing was written.")


def show_forecast(preflight: Preflight, console: Console | None = None) -> None:
    """What a run says of itself before the long work begins."""
    console = console or stderr()
    p = preflight
    on_device = f" and {format_size(p.device_memory)} on the device" if p.device_memory else ""
    held = "streamed from disk" if p.streamed else "all in memory"
    line = f"Takes about {format_size(p.memory)} of memory{on_device} (weights {held}), {format_size(p.disk_needed)} of disk"
    if p.stages:
        longest = max(p.stages, key=lambda name: p.stages[name])
        line += f", and {format_duration(sum(p.stages.values()))}, most for: {longest}"
    console.print(f"{line}.", soft_wrap=True)


def show_serving(plan: ServePlan, console: Console | None = None) -> None:
    """What `serve` says before vLLM takes over."""
    console = console or stdout()
    each = f" on each of {plan.devices}" if plan.devices > 1 else ""
    table = _table("", "")
    table.add_row("device", f"{plan.device}{each}, {format_size(plan.available)} usable")
    table.add_row("weights", f"{_bytes(plan.weights)}{each}")
    table.add_row("KV cache", f"{format_size(plan.kv_cache)} for one sequence of {plan.context:,} tokens")
    table.add_row("command", " ".join(("vllm serve", str(plan.directory), *plan.options)))
    for name, value in plan.environment.items():
        table.add_row("set", f"{name}={value}")
    _show(console, f"Serve: {plan.directory}", table)


def show_summary(report: Report, console: Console | None = None) -> None:
    """What `prune` ends with."""
    console = console or stdout()
    sizes = report.bytes
    console.rule(f"{report.model} ({report.family})")

    table = _table("", "size>", "bytes>", "of before>")
    for name, size in (
        ("before", sizes.experts_before),
        (f"budget ({report.budget.text})", sizes.budget),
        ("after", sizes.experts_after),
    ):
        style = "bold" if name == "after" else None
        table.add_row(name, format_size(size), f"{size:,}", _share(size, sizes.experts_before), style=style)
    table.add_row("slack", format_size(sizes.slack), f"{sizes.slack:,}", f"{sizes.slack_ratio:.3%} of budget")
    table.add_row("everything else", format_size(sizes.other), f"{sizes.other:,}")
    table.add_row("whole model", format_size(sizes.total), f"{sizes.total:,}")
    _show(console, "Routed experts on disk", table)

    _show(console, "Held-out text (nats per token; KL to the original)", _domains(report))
    _show(console, "Candidates (KL on calibration text kept out of the search)", _candidates(report))
    if report.quantizer.options:
        title = f"Rounding ({report.quantizer.method}): relative error of the experts' outputs"
        _show(console, title, _quantizer(report))
        few = report.quantizer.undersampled_experts
        console.print(f"{few} experts saw too few calibration tokens for statistics of their own.\n")
    show_map([(layer.layer, layer.options) for layer in report.layers], console)
    if report.stock is not None:
        _show_stock(report.stock, console)

    state = "agrees with" if report.reload.passed else "DIFFERS from"
    console.print(
        f"Reloaded: the written model {state} the searched one "
        f"(read by {report.reload.by}, largest logit difference {report.reload.max_logit_difference:.1e}, "
        f"tolerance {report.reload.tolerance:.0e})",
        style=None if report.reload.passed else "bold red",
        soft_wrap=True,
    )
    console.print(_resources(report))
    console.print(f"\nWritten to {report.output}. To use it from Python:\n", soft_wrap=True)
    for line in _usage(report):
        console.print(f"    {line}", soft_wrap=True)


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


def show_curve(curve: Curve, output: str, console: Console | None = None) -> None:
    """What `prune` ends with for several budgets."""
    console = console or stdout()
    console.rule(curve.model)
    table = _table("directory", "experts>", "of before>", "whole model>", "loss>", "KL>", "±>")
    for point in curve.points:
        table.add_row(
            point.directory,
            f"{point.expert_bytes:,}",
            _share(point.expert_bytes, curve.experts_before),
            f"{point.total_bytes:,}",
            f"{point.loss:.4f}",
            f"{point.kl:.5f}",
            f"{point.kl_stderr:.5f}",
        )
    _show(console, "Bytes, and held-out text (nats per token; KL to the original)", table)
    console.print(f"Loss of the original: {curve.original_loss:.4f}")
    console.print(
        f"\nWritten to {output}: a model and its report in each directory, and the curve in curve.json and curve.svg.",
        soft_wrap=True,
    )


def _usage(report: Report) -> tuple[str, ...]:
    if report.stock is not None and not report.stock.transformers_reads:
        return ("from vllm import LLM", f"model = LLM({report.output!r})")
    ours = ("import moe_rco  # teaches transformers to read the result",) if report.stock is None else ()
    return (
        *ours,
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({report.output!r})",
    )


def _show_stock(part: StockPart, console: Console) -> None:
    console.print(
        f"Layout stock: {part.experts_per_layer} experts in every layer, numbered anew. KL {part.kl:.5f}; layout "
        f"mixed has {part.mixed.kl:.5f} within the same budget before any search ({part.mixed.name}; both on the "
        "calibration text kept out).",
        soft_wrap=True,
    )
    readers = "vLLM and transformers" if part.transformers_reads else "vLLM"
    console.print(f"Read without moe_rco by {readers}.\n")


def show_status(status: Status, console: Console | None = None) -> None:
    """What `status` says: the state, what is kept of every stage, and the finished output."""
    console = console or stdout()
    console.print(f"{status.output}: {status.state}", style="bold", soft_wrap=True)
    if status.process is not None:
        p, verb = status.process, "is" if status.state == "running" else "was"
        console.print(f"It {verb} process {p.pid} on {p.host}, started {p.started}.", soft_wrap=True)
    if status.stages:
        console.print()
        table = _table("stage", "done>", "of>")
        for stage in status.stages:
            table.add_row(stage.name, f"{stage.done:,}", f"{stage.total:,}" if stage.total else "-")
        console.print(table)
    if status.state == "interrupted":
        console.print("\nThe same command goes on from here.")
    if status.results and status.state != "finished":
        console.print("\nAn earlier run's output is there until this one has finished:")
    for r in status.results:
        console.print()
        table = _table("", "")
        table.add_row("model", r.model)
        table.add_row("budget", f"{_bytes(r.budget_bytes)} ({r.budget})")
        table.add_row("routed experts", _bytes(r.expert_bytes))
        table.add_row("whole model", _bytes(r.total_bytes))
        table.add_row("KL, held-out text", f"{r.kl:.5f} ± {r.kl_stderr:.5f} nats per token")
        console.print(table)


def show_inspect(found: Inspection, console: Console | None = None) -> None:
    """The table of `inspect`, and the map where experts differ."""
    console = console or stdout()
    layers = [(layer.layer, layer.options) for layer in found.layers]
    keys = legend([options for _, options in layers])
    console.print(
        f"{found.directory}: {found.family}, {len(found.layers)} MoE layers x {found.num_experts} experts "
        f"({found.hidden} x {found.intermediate}), {found.top_k} used per token",
        soft_wrap=True,
    )
    table = _table("layer>", "kept>", *(f"{key.name}>" for key in keys), "bytes>")
    for layer in found.layers:
        counts = (str(layer.options.count(key.name)) for key in keys)
        table.add_row(str(layer.layer), str(layer.kept), *counts, f"{layer.bytes:,}")
    kept = sum(layer.kept for layer in found.layers)
    table.add_section()
    table.add_row(
        "all", str(kept), *(str(key.count) for key in keys), f"{found.expert_bytes:,}", style="bold"
    )
    console.print(table)
    bits = 8 * found.expert_bytes / found.expert_numel
    console.print(
        f"routed experts {format_size(found.expert_bytes)} ({bits:.2f} bits per original weight), "
        f"everything else {format_size(found.other_bytes)}",
        soft_wrap=True,
    )
    if found.layout == "stock":
        console.print(
            f"Layout stock: experts are shown by their original ids; the {found.layers[0].kept} kept of each layer "
            "are numbered anew in the files, in the same order (plan.json lists the original ids).",
            soft_wrap=True,
        )
    if len(keys) > 1:
        console.print()
        show_map(layers, console)


def show_map(layers: Layers, console: Console) -> None:
    """One cell per expert, one row per layer (several where the window is narrow), and the legend."""
    keys = {key.name: key for key in legend([options for _, options in layers])}
    most = max(len(options) for _, options in layers)
    room = max(8, console.width - 8)
    # Two columns a cell are nearer to a square; the characters alone tell the options apart without colour.
    wide = 2 if 2 * most <= room else 1
    per_row = min(most, room // wide)
    console.print("Options by layer (rows) and expert (columns)", style="bold")
    for layer, options in layers:
        for start in range(0, len(options), per_row):
            line = Text(f"{layer:>5}  " if start == 0 else " " * 7)
            for name in options[start : start + per_row]:
                line.append(keys[name].symbol.center(wide), _style(keys[name]))
            console.print(line, no_wrap=True, crop=False)
    line = Text()
    for key in keys.values():
        entry = Text.assemble((f" {key.symbol} ", _style(key)), f" {key.name} ({key.count})   ")
        if line and len(line) + len(entry) > room:
            console.print(Text(" " * 7) + line)
            line = Text()
        line.append_text(entry)
    console.print(Text(" " * 7) + line)
    console.print()


def _style(key: Key) -> Style:
    if key.shade is None:
        return Style(color="bright_black")
    step = round(key.shade * (len(_VIRIDIS) - 1))
    return Style(color="#000000" if step >= _FIRST_LIGHT else "#ffffff", bgcolor=_VIRIDIS[step])


def _domains(report: Report) -> Table:
    table = _table("domain", "tokens>", "loss before>", "loss after>", "KL>", "±>")
    for part in report.domains:
        losses = (f"{part.loss_before:.4f}", f"{part.loss_after:.4f}")
        table.add_row(part.name, f"{part.tokens:,}", *losses, f"{part.kl:.5f}", f"{part.kl_stderr:.5f}")
    tokens = sum(part.tokens for part in report.domains)
    table.add_row("all", f"{tokens:,}", "", "", f"{report.kl:.5f}", f"{report.kl_stderr:.5f}", style="bold")
    return table


def _candidates(report: Report) -> Table:
    table = _table("candidate", "KL>", "bytes>", "")
    for candidate in sorted(report.candidates, key=lambda candidate: candidate.kl):
        mark, style = ("chosen", "bold") if candidate.name == report.winner else ("", None)
        table.add_row(candidate.name, f"{candidate.kl:.5f}", f"{candidate.cost:,}", mark, style=style)
    return table


def _quantizer(report: Report) -> Table:
    table = _table("option", "rtn>", "gptq>")
    for name, option in report.quantizer.options.items():
        gptq = "-" if option.gptq_error is None else f"{option.gptq_error:.5f}"
        table.add_row(name, f"{option.rtn_error:.5f}", gptq)
    return table


def _table(*columns: str) -> Table:
    """A plain table; a column whose name ends in `>` is set right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left")
    return table


def _show(console: Console, title: str, table: Table) -> None:
    console.print(title, style="bold")
    console.print(table)
    console.print()


def _bytes(size: int) -> str:
    return f"{format_size(size)} ({size:,} bytes)"


def _share(size: int, whole: int) -> str:
    return f"{size / whole:.1%}" if whole else "-"
