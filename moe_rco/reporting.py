"""Fills the report from what a run has done."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from moe_rco._version import __version__
from moe_rco.calib.calibrate import Usage
from moe_rco.calib.measure import Scores
from moe_rco.calib.search import Candidate as Tried
from moe_rco.calib.search import Chosen
from moe_rco.ckpt.rewrite import RewriteResult
from moe_rco.ckpt.stock import precisions, transformers_reads
from moe_rco.ckpt.store import Store
from moe_rco.clock import Clock
from moe_rco.job import Sized
from moe_rco.optim.trace import StepRecord
from moe_rco.report import (
    BudgetPart,
    BytesPart,
    Candidate,
    DenseGroup,
    Layer,
    QuantizerOption,
    QuantizerPart,
    Reload,
    Report,
    SearchPart,
    SearchStep,
    Software,
    StockPart,
)
from moe_rco.types import Budget, CostTable

PACKAGES = (
    "torch", "transformers", "tokenizers", "datasets", "compressed-tensors", "safetensors", "numpy", "numba"
)  # fmt: skip


def build_report(
    sized: Sized,
    budget: Budget,
    model_digest: str,
    manifest: str,
    store: Store,
    usage: Usage,
    chosen: Chosen,
    written: RewriteResult,
    reload: Reload,
    scores: Scores,
    clock: Clock,
    output: Path,
) -> Report:
    """Everything a user or a later program wants to know about the run for one budget, in one value."""
    recipe, table = sized.recipe, sized.table
    assignment = chosen.best.assignment
    slack = budget.bytes - written.expert_bytes
    return Report(
        version=__version__,
        software=_software(sized.device),
        model=recipe.model,
        from_hub=recipe.model_directory is None,
        model_digest=model_digest,
        manifest=manifest,
        family=sized.adapter.model_type,
        recipe_digest=recipe.digest(),
        seed=recipe.search.seed,
        output=str(output),
        budget=BudgetPart.of(budget),
        bytes=BytesPart(
            experts_before=table.original_bytes,
            experts_after=written.expert_bytes,
            budget=budget.bytes,
            slack=slack,
            slack_ratio=slack / budget.bytes,
            other=written.other_bytes,
            total=written.total_bytes,
        ),
        layers=tuple(
            Layer(
                layer=layer,
                options=tuple(option.name for option in assignment.layer_options(layer)),
                tokens=tuple(map(int, usage.counts[layer].tolist())),
            )
            for layer in table.layers
        ),
        dense=tuple(
            DenseGroup(name=group.name, kind=group.kind, layer=group.layer, option=option.name, bytes=size)
            for group, option, size in assignment.dense()
        ),
        counts=assignment.counts(),
        candidates=tuple(_candidate(tried) for tried in chosen.candidates),
        winner=chosen.best.name,
        stock=_stock(chosen),
        domains=scores.domains,
        kl=scores.all.kl,
        kl_stderr=scores.all.kl_stderr,
        quantizer=_quantizer(recipe.quantizer.method, store, table),
        reload=reload,
        search=SearchPart(
            steps=len(chosen.history),
            history=tuple(map(_step, chosen.history)),
        ),
        stages=clock.stages,
        memory=clock.memory,
        warnings=() if clock.expected is None else clock.expected.warnings,
    )


def _software(device: torch.device) -> Software:
    return Software(
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        system=platform.platform(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
    )


def _step(record: StepRecord) -> SearchStep:
    if not record.tau:
        return SearchStep(step=record.step, kl=record.loss)
    return SearchStep(
        step=record.step,
        kl=record.loss,
        budget_error=record.budget_error,
        temperature=record.tau,
        entropy=record.entropy,
    )


def _candidate(tried: Tried) -> Candidate:
    return Candidate(name=tried.name, kl=tried.kl, cost=tried.assignment.cost)


def _stock(chosen: Chosen) -> StockPart | None:
    if chosen.mixed is None:
        return None
    layers = precisions(chosen.best.assignment)
    return StockPart(
        experts_per_layer=len(chosen.best.assignment.kept(min(layers))),
        kl=chosen.best.kl,
        mixed=_candidate(chosen.mixed),
        transformers_reads=transformers_reads(layers.values()),
    )


def _quantizer(method: str, store: Store, table: CostTable) -> QuantizerPart:
    """Means over layers of each option's relative output error."""
    stats = [store.stats.get(str(layer), {}) for layer in table.layers]
    options = {}
    for option in table.options:
        errors = [layer["error"][option.name] for layer in stats if option.name in layer.get("error", {})]
        if errors:
            rtn, gptq = (sum(error[key] for error in errors) / len(errors) for key in ("rtn", "gptq"))
            options[option.name] = QuantizerOption(rtn_error=rtn, gptq_error=gptq)
    undersampled = {
        layer: tuple(found)
        for layer, of in zip(table.layers, stats, strict=True)
        if (found := of.get("undersampled"))
    }
    return QuantizerPart(
        method=method,
        options=options,
        undersampled_experts=sum(map(len, undersampled.values())),
        undersampled=undersampled,
    )
