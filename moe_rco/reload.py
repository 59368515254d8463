"""Reads a written checkpoint back, compares it with the model that was searched, and measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moe_rco.adapters import get_adapter
from moe_rco.calib.bank import OptionBank
from moe_rco.calib.data import TokenPool
from moe_rco.calib.measure import Model, Scores, measure
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.calib.streaming import Streaming
from moe_rco.ckpt.dequantized import read_dequantized
from moe_rco.ckpt.header import TensorInfo
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.stock import QUANT_METHOD
from moe_rco.ckpt.store import Place
from moe_rco.errors import MoeRcoError, PlanError
from moe_rco.plan import Plan, by_expert
from moe_rco.quant.packing import cost_table
from moe_rco.report import Reload
from moe_rco.serve.config import LayerOptions, dense_options, layer_options
from moe_rco.serve.hf import register
from moe_rco.types import Assignment, Group, Option, Progress

RELOAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of a logit between the written and the searched model; routing may differ by rounding in bfloat16."""
RELOAD_SEQUENCES = 4
SAMPLE_TOKENS = 64


def reload(
    model: AssignedModel,
    assignment: Assignment,
    directory: Path,
    pool: TokenPool,
    sample: torch.Tensor,
    progress: Progress,
) -> tuple[Reload, Scores]:
    """Read a written checkpoint, compare its logits with the searched model on sample [B, S], and measure it on a pool.

    transformers loads it; where the model is streamed, our own layers do, from the written files. Raises MoeRcoError where they
    differ: what was written is not what was chosen.
    """
    runner = model.runner
    searched, original = Assigned(model, assignment.choice), Assigned(model, None)
    with progress.stage("read it back", 1) as advance:
        if model.bank.streaming is None:
            by, written = "transformers", Loaded(load_model(directory, runner.device, runner.dtype))
        else:
            by = "our own layers"
            written = read_written(directory, runner.device, runner.dtype, model.bank.streaming)
        difference, tolerance = _difference(searched, written, sample, model), RELOAD_TOLERANCE[runner.dtype]
        advance(1)
    if not difference <= tolerance:
        raise MoeRcoError(
            f"the written checkpoint's logits differ from the searched model's by {difference:.3g} (tolerance {tolerance}); "
            "nothing was put in place"
        )
    found = Reload(
        by=by,
        max_logit_difference=difference,
        tolerance=tolerance,
        passed=True,
        dtype=str(runner.dtype).removeprefix("torch."),
        sample_loss=sample_loss(searched),
    )
    batch = model.batch(pool.ids.shape[1])
    return found, measure(original, written, pool, runner.vocab_size, progress, batch)


@torch.no_grad()
def _difference(first: Model, second: Model, ids: torch.Tensor, model: AssignedModel) -> float:
    """Largest absolute difference of a logit."""
    states, found = [one.hidden(ids) for one in (first, second)], 0.0
    with first.head() as ours, second.head() as theirs:
        for row in range(len(ids)):
            for part in model.positions(ids.shape[1]):
                a, b = ours(states[0][row, part]), theirs(states[1][row, part])
                found = max(found, float((a.float() - b.float()).abs().max()))
                if not bool(torch.isfinite(b).all()):
                    return float("nan")
    return found


@dataclass(frozen=True)
class Assigned:
    """Our own layers under a choice [N], or with the original weights."""

    model: AssignedModel
    choice: np.ndarray | None

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.hidden(ids, self.choice)

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        return self.model.head(self.choice)


@dataclass(frozen=True)
class Loaded:
    """A model of transformers."""

    model: Any

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.model(ids.to(self.model.device)).last_hidden_state

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        return nullcontext(self.model.lm_head)


class _Files:
    """A written checkpoint in the place of a store: what is at all options lies in the same files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def tensors(self, place: Place, option: Option) -> Mapping[str, TensorInfo]:
        return self._checkpoint.tensors


def read_written(
    directory: Path, device: torch.device, dtype: torch.dtype, streaming: Streaming | None
) -> Assigned:
    """A checkpoint that we wrote as our own layers: every group is read from its files, in the option it has there.

    Raises ModelError, PlanError where the files, config.json and the plan do not belong together.
    """
    checkpoint = Checkpoint(directory, allow_quantized=True)
    adapter = get_adapter(checkpoint.config)
    options, dense = written_options(checkpoint), written_dense(checkpoint)
    every = [option for layer in options.values() for option in layer]
    used = tuple(dict.fromkeys([*every, *dense.values()]))
    table = cost_table((*adapter.groups(checkpoint.config), *dense), used, 0, 0)
    choice = np.array([used.index(option) for option in (*every, *dense.values())])
    packed = {w.name for group, option in dense.items() if option.is_quantized for w in group.weights}
    runner = Runner(checkpoint, adapter, device, dtype, streaming, without=packed)
    bank = OptionBank(checkpoint, table, device, dtype, streaming)
    model = AssignedModel(runner, adapter, checkpoint.config, bank, _Files(checkpoint))
    return Assigned(model, choice)


def written_options(checkpoint: Checkpoint) -> LayerOptions:
    """The option of every expert of a checkpoint that we wrote, by the ids of its files.

    Raises ModelError, PlanError where config.json and the plan are not ours or do not belong together.
    """
    config, plan = checkpoint.config, Plan.load(checkpoint.directory)
    adapter = get_adapter(config)
    if plan.layout == "mixed":
        return layer_options(config.get("quantization_config") or {}, adapter, config)
    options, experts = by_expert(plan.layers), adapter.num_experts(config)
    for layer in adapter.moe_layers(config):
        if len(plan.layers.get(layer, ())) == 0 or len(plan.kept(layer)) != experts:
            raise PlanError(
                f"{checkpoint.directory}: the plan does not keep {experts} experts of layer {layer}"
            )
    return {
        layer: tuple(options[layer, expert] for expert in plan.kept(layer))
        for layer in adapter.moe_layers(config)
    }


def written_dense(checkpoint: Checkpoint) -> dict[Group, Option]:
    """The option of every dense group that was chosen for. Raises ModelError where config.json is not ours."""
    if Plan.load(checkpoint.directory).layout != "mixed":
        return {}
    adapter, config = get_adapter(checkpoint.config), checkpoint.config
    return dense_options(config.get("quantization_config") or {}, adapter, config)


@torch.no_grad()
def sample_loss(model: Assigned) -> float:
    """The next-token loss on some made-up tokens, in nats: one figure for whether a model computes what it did."""
    runner = model.model.runner
    ids = (torch.arange(SAMPLE_TOKENS)[None] * 7919 + 13) % runner.vocab_size
    hidden = model.hidden(ids)[0, :-1]
    with model.head() as head:
        logits = head(hidden).double()
    return float(F.cross_entropy(logits, ids[0, 1:].to(logits.device)))


def load_model(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A written checkpoint as a transformers model.

    Quantised experts of the stock layout are dequantised here: transformers does it in bfloat16 only, and not
    at all where layers have different widths.
    """
    register()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        checkpoint = Checkpoint(directory, allow_quantized=True)
        method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
        if method == QUANT_METHOD:
            model = _dequantized_model(checkpoint, dtype)
        else:
            model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
        return model.to(device).eval()
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _dequantized_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    config: Any = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    del config.quantization_config
    model_class = getattr(transformers, get_adapter(checkpoint.config).architecture)
    weights = read_dequantized(checkpoint, dtype)
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
