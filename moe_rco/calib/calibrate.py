"""One pass of the uncompressed model over the calibration text, decoder layer by decoder layer.

It quantises every expert once per option into the store, counts how experts are used, and keeps the model's own next-token
distribution. Only one layer's Hessians and the activations between two layers are held.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moe_rco.adapters import route
from moe_rco.calib.bank import LayerBank
from moe_rco.calib.data import TokenPool
from moe_rco.calib.moments import Moments
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.quantise import WORKSPACE, LayerQuantizer, RoutedTokens
from moe_rco.calib.quantise_dense import missing, quantise
from moe_rco.calib.reference import Reference
from moe_rco.calib.room import Room
from moe_rco.ckpt.store import Store
from moe_rco.types import Group, Progress

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """How the uncompressed model uses its experts, by layer, over the calibration tokens; float64 [E] each.

    `counts` are routed tokens; `saliency` is the mean over them of routing weight times the norm of the expert's output
    (REAP, arXiv 2510.13999, eq. 5).
    """

    counts: dict[int, torch.Tensor]
    saliency: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Calibrated:
    """What the pass leaves behind: references for both pools (`train`, `kept_out`) and expert usage."""

    train: Reference
    kept_out: Reference
    usage: Usage


@torch.no_grad()
def calibrate(
    model: AssignedModel, store: Store, pools: tuple[TokenPool, TokenPool], method: str, progress: Progress
) -> Calibrated:
    """Run both pools (gradient, kept out) through the model; Hessians and usage come from the first only.

    Options already in the store are not quantised again. Raises StoreError, and ModelError on non-finite activations.
    """
    runner, bank, table = model.runner, model.bank, model.table
    ids = torch.cat([pool.ids for pool in pools])
    count, length = ids.shape
    parts = [slice(start, start + model.batch(length)) for start in range(0, count, model.batch(length))]
    home = runner.device if bank.streaming is None else torch.device("cpu")
    spill = bank.streaming is not None and bank.streaming.spill

    def room(name: str) -> Room:
        file = store.directory / f"{name}-{model.team.rank}.tmp" if spill else None
        return Room((count, length, runner.hidden_size), runner.dtype, home, file)

    rooms = [room(name) for name in ("states", "inputs", "outputs")]
    h, x, y = (each.tensor for each in rooms)
    for part in parts:
        h[part] = runner.embed(ids[part].to(runner.device))[0]
    usage, dense = Usage({}, {}), _DenseGroups(model, store, method)
    with progress.stage(
        "calibrate and quantise", runner.num_layers * len(parts) + 2 * len(table.groups)
    ) as advance:

        def done(units: int) -> None:
            for each in rooms:
                each.let_go()
            advance(units)

        dense.quantise(-1, done)
        for index, layer in runner.layers():
            routes = index in runner.moe_layers
            experts = len(table.rows(index)) if routes else 0
            # In order twice: they are run first, and quantised then.
            bank.expect((index, expert, bank.original) for _ in range(2) for expert in range(experts))
            logits = []
            moments = dense.moments(index)
            for part in parts:
                states = h[part].to(runner.device)
                moments.sequences = max(0, len(pools[0]) - part.start)
                with moments.within(layer, len(states)):
                    states, inputs = runner.attend(index, layer, states, runner.context(states))
                h[part], x[part] = states, inputs
                if routes:
                    logits.append(runner.router(layer, inputs.flatten(0, 1)).to(home))
                done(1)
            dense.quantise(index, done, moments)
            if not routes:
                continue
            weights, chosen = route(torch.cat(logits), model.top_k, model.renormalise)
            tokens = RoutedTokens(x.flatten(0, 1), weights, chosen, len(pools[0]) * length, experts)
            lacking = [o for o in table.options if o.is_quantized and not store.has(index, o)]
            made = ", ".join(option.name for option in lacking) or "nothing, all is there from an earlier run"
            seen = tokens.counts
            _log.info(
                "layer %d: %d to %d tokens an expert; quantised: %s", index, seen.min(), seen.max(), made
            )
            layer_bank = bank.layer(index)
            workspace = WORKSPACE if bank.streaming is None else bank.streaming.workspace
            quantizer = LayerQuantizer(layer_bank, tokens, method if lacking else "rtn", workspace)
            y.zero_()
            usage.counts[index] = tokens.counts.double().cpu()
            usage.saliency[index] = _run(layer_bank, tokens, quantizer, y.flatten(0, 1), done)
            usage.saliency[index] /= usage.counts[index].clamp_min(1)
            for part in parts:
                h[part] += y[part]
            if lacking:
                quantizer.quantise(index, lacking, table, store, done, model.team)
            else:
                advance(experts)
        references = [Reference.empty(len(pool), length, runner.vocab_size, pool.weights) for pool in pools]
        moments = dense.moments(runner.num_layers)
        project = moments.at_head(moments.groups[0]) if moments.groups else F.linear
        with runner.head() as head:
            for row, positions in itertools.product(range(count), model.positions(length)):
                pool, at = (0, row) if row < len(pools[0]) else (1, row - len(pools[0]))
                moments.sequences = 1 - pool
                logits = head(h[row, positions].to(runner.device), project)
                references[pool].fill(at, positions, logits)
        dense.quantise(runner.num_layers, done, moments)
    return Calibrated(references[0], references[1], usage)


class _DenseGroups:
    """The dense groups of every layer (-1 has the embeddings, the one behind the last the head), to be quantised."""

    def __init__(self, model: AssignedModel, store: Store, method: str) -> None:
        self._model, self._store, self._method = model, store, method
        self._groups: dict[int, list[Group]] = {}
        for row in model.table.dense:
            group = model.table.groups[row]
            self._groups.setdefault(group.layer, []).append(group)

    def moments(self, layer: int) -> Moments:
        """For the groups of a layer that still have to be quantised by GPTQ."""
        groups = [
            group for group in self._groups.get(layer, ()) if self._method == "gptq" and self._missing(group)
        ]
        return Moments(groups, self._model.runner.device)

    def quantise(self, layer: int, advance: Callable[[int], None], moments: Moments | None = None) -> None:
        model, groups = self._model, self._groups.get(layer, [])
        by = moments if self._method == "gptq" else None
        left = [group for group in groups if self._missing(group)]
        advance(2 * (len(groups) - len(left)))
        if left:
            quantise(
                left,
                model.bank.checkpoint,
                by,
                model.table,
                self._store,
                model.runner.device,
                model.team,
                advance,
            )

    def _missing(self, group: Group) -> bool:
        return bool(missing(group, self._model.table, self._store))


def _run(
    bank: LayerBank,
    tokens: RoutedTokens,
    quantizer: LayerQuantizer,
    y: torch.Tensor,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """Add every expert's output to y [T, H]; summed norms of what each adds, over the recorded tokens, float64 [E]."""
    saliency = torch.zeros(tokens.experts, dtype=torch.float64)
    for expert in range(tokens.experts):
        for number, x, weight in tokens.of(expert, bank.device):
            gate_up, down = bank.weights(expert, bank.original)
            hidden = bank.gated(F.linear(x, gate_up))
            output = F.linear(hidden, down) * weight.to(x.dtype)[:, None]
            y.index_add_(0, number, output.to(y.device))
            recorded = (number < tokens.recorded).to(x.device)
            saliency[expert] += float(output[recorded].float().norm(dim=-1).sum())
            quantizer.see(expert, number, x, weight, hidden)
        advance(1)
    return saliency
