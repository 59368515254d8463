"""One pass of the uncompressed model over the calibration text, decoder layer by decoder layer.

It quantises every expert once per option into the store, counts how experts are used, and keeps the model's own next-token
distribution. Only one layer's Hessians and the activations between two layers are held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_rco.adapters import route
from moe_rco.calib.bank import LayerBank
from moe_rco.calib.data import TokenPool
from moe_rco.calib.moe import run_experts
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.reference import Reference
from moe_rco.ckpt.store import Store
from moe_rco.quant.errors import output_error
from moe_rco.quant.gptq import quantize_gptq
from moe_rco.quant.grid import Quantized
from moe_rco.quant.hessian import HessianAccumulator, shrink
from moe_rco.quant.packing import pack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import CostTable, Option, Progress

BATCH = 8


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


class _Observer:
    """Runs one layer's original experts and gathers their inputs' second moments and their use."""

    def __init__(self, bank: LayerBank, top_k: int, renormalise: bool, hessians: bool) -> None:
        self.bank, self._top_k, self._renormalise = bank, top_k, renormalise
        gate_up, down = bank.stacks[bank.original]
        self.counts = torch.zeros(len(gate_up), dtype=torch.float64)
        self.saliency = torch.zeros(len(gate_up), dtype=torch.float64)
        self.inputs = self.hidden = None
        if hessians:
            self.inputs = HessianAccumulator(len(gate_up), gate_up.shape[2], bank.device)
            self.hidden = HessianAccumulator(len(gate_up), down.shape[2], bank.device)
        self.recording = True

    def __call__(self, layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = route(logits, self._top_k, self._renormalise)
        y = torch.zeros_like(x)
        for at in run_experts(self.bank, [self.bank.original] * self.bank.num_experts, x, ids):
            weight = weights[at.token, at.slot]
            output = at.output * weight.to(x.dtype)[:, None]
            y.index_add_(0, at.token, output)
            if self.recording:
                self.counts[at.expert] += len(at.token)
                self.saliency[at.expert] += float(output.float().norm(dim=-1).sum())
                if self.inputs is not None and self.hidden is not None:
                    self.inputs.add(at.expert, x[at.token], weight.square())
                    self.hidden.add(at.expert, at.hidden, weight.square())
        return y


@torch.no_grad()
def calibrate(
    model: AssignedModel, store: Store, pools: tuple[TokenPool, TokenPool], method: str, progress: Progress
) -> Calibrated:
    """Run both pools (gradient, kept out) through the model; Hessians and usage come from the first only.

    Options already in the store are not quantised again. Raises StoreError, and ModelError on non-finite activations.
    """
    runner, bank = model.runner, model.bank
    batches = [(pool, part) for pool in pools for part, _ in pool.batches(BATCH)]
    states = [runner.embed(pool.ids[part].to(runner.device)) for pool, part in batches]
    hidden, contexts = [h for h, _ in states], [context for _, context in states]
    usage = Usage({}, {})
    with progress.stage("calibrate and quantise", runner.num_layers * len(batches)) as advance:
        for index, layer in runner.layers():
            observer = None
            if index in runner.moe_layers:
                missing = [o for o in bank.table.options if o.is_quantized and not store.has(index, o)]
                observer = _Observer(
                    bank.original(index), model.top_k, model.renormalise, method == "gptq" and bool(missing)
                )
            for number, (pool, _) in enumerate(batches):
                if observer is not None:
                    observer.recording = pool is pools[0]
                experts = observer or _no_experts
                hidden[number] = runner.step(index, layer, hidden[number], contexts[number], experts)
                advance(1)
            if observer is not None:
                usage.counts[index] = observer.counts
                usage.saliency[index] = observer.saliency / observer.counts.clamp_min(1)
                _quantise(index, observer, missing, bank.table, store)
    references = [Reference.empty(len(pool), pool.ids.shape[1], runner.vocab_size) for pool in pools]
    for (pool, part), h in zip(batches, hidden, strict=True):
        references[0 if pool is pools[0] else 1].fill(part, h, runner.logits)
    return Calibrated(references[0], references[1], usage)


def _no_experts(layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(f"layer {layer} is dense and has no routed experts")


def _quantise(layer: int, observer: _Observer, options: list[Option], table: CostTable, store: Store) -> None:
    """Quantise the experts of one layer at every option that is missing, and keep the errors beside them."""
    weights = [weight.float() for weight in observer.bank.stacks[observer.bank.original]]
    hessians = []
    for accumulator in (observer.inputs, observer.hidden):
        if accumulator is not None:
            hessians.append(shrink(accumulator.hessians(), accumulator.counts))
    if hessians:
        store.update_stats(layer, {"undersampled": sorted({*hessians[0].experts, *hessians[1].experts})})
    for option in options:
        rounded = [quantize_rtn(weight, option) for weight in weights]
        chosen = rounded
        if hessians:
            chosen = [quantize_gptq(w, h.hessian, option) for w, h in zip(weights, hessians, strict=True)]
            errors = {
                name: _relative_error(weights, quantized, [h.hessian for h in hessians])
                for name, quantized in (("rtn", rounded), ("gptq", chosen))
            }
            store.update_stats(layer, {"error": {option.name: errors}})
        store.write(layer, option, _tensors(layer, chosen, option, table))


def _relative_error(
    weights: list[torch.Tensor], quantized: list[Quantized], hessians: list[torch.Tensor]
) -> float:
    """Squared output error of a layer's matrices on the calibration tokens, relative to the outputs' own squares."""
    lost = total = 0.0
    for weight, rounded, hessian in zip(weights, quantized, hessians, strict=True):
        lost += float(output_error(weight, rounded.dequantize(), hessian).sum())
        total += float(output_error(weight, torch.zeros_like(weight), hessian).sum())
    return lost / max(total, 1e-300)


def _tensors(
    layer: int, quantized: list[Quantized], option: Option, table: CostTable
) -> dict[str, torch.Tensor]:
    """A layer's quantised experts as they are written: gate and up apart, one set of tensors per expert."""
    joined, down = quantized
    half = joined.codes.shape[1] // 2
    parts = [
        Quantized(
            joined.codes[:, rows],
            joined.scale[:, rows],
            None if joined.zero is None else joined.zero[:, rows],
        )
        for rows in (slice(0, half), slice(half, None))
    ]
    tensors: dict[str, torch.Tensor] = {}
    for position, part in enumerate((*parts, down)):
        packed = pack(part.codes, part.scale, part.zero, option)
        for expert, row in enumerate(table.rows(layer)):
            prefix = table.groups[row].weights[position].name.removesuffix("weight")
            for suffix, stacked in packed.items():
                tensors[prefix + suffix] = stacked[expert].contiguous().cpu()
    return tensors
