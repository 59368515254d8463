"""One plain forward and backward pass with the original weights, in several ways: what a search step is compared to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from eval.prepared import Subject
from moe_rco.adapters import route
from moe_rco.calib.bank import LayerBank, StackedLayer
from moe_rco.calib.dispatch import by_expert
from moe_rco.calib.runner import Runner

Pass = Callable[[torch.Tensor], None]
"""ids [B, S]: forward, next-token loss, backward."""


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def our_runner(subject: Subject) -> Pass:
    """The same layer-by-layer code as the search's, every weight a leaf that gets its gradient."""
    model = subject.prepared.model
    bank, device = model.bank, model.runner.device
    # A runner of its own: the search's must go on without weight gradients.
    runner = Runner(subject.prepared.checkpoint, subject.sized.adapter, device, model.runner.dtype)
    for leaf in leaves(runner):
        leaf.requires_grad_()
    experts = {
        layer: _LeafExperts(bank.layer(layer), model.top_k, model.renormalise) for layer in model.table.layers
    }

    def run(ids: torch.Tensor) -> None:
        h = runner.run(ids, lambda layer, x, logits: experts[layer](x, logits))
        next_token_loss(runner.logits(h), ids).backward()
        for leaf in leaves(runner):
            leaf.grad = None
        for module in experts.values():
            module.zero_grad(set_to_none=True)

    return run


def leaves(runner: Runner) -> list[torch.Tensor]:
    """All weights of the dense part."""
    outer = [weight for weight in (runner._embedding, runner._head) if weight is not None]
    inner = [p for _, layer in runner.layers() for p in layer.parameters()]
    return [*outer, *runner._norm.parameters(), *inner]


def our_runner_frozen(subject: Subject) -> Pass:
    """The same without weight gradients: the leanest pass that gives the gradient of every activation."""
    model = subject.prepared.model

    def run(ids: torch.Tensor) -> None:
        h, context = model.runner.embed(ids)
        h.requires_grad_()
        experts = model.experts(None)
        for index, layer in model.runner.layers():
            h = model.runner.step(index, layer, h, context, experts)
        next_token_loss(model.runner.logits(h), ids).backward()

    return run


def transformers_model(subject: Subject, implementation: str) -> Pass:
    """transformers' own model in training mode with one of its implementations of the experts."""
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        subject.prepared.checkpoint.directory,
        dtype=subject.prepared.model.runner.dtype,
        experts_implementation=implementation,
    )
    model.to(subject.prepared.model.runner.device).train()

    def run(ids: torch.Tensor) -> None:
        next_token_loss(model(ids, use_cache=False).logits.float(), ids).backward()
        model.zero_grad(set_to_none=True)

    return run


class _LeafExperts(nn.Module):
    """The original experts of one layer as parameters, differentiated by autograd."""

    def __init__(self, bank: LayerBank, top_k: int, renormalise: bool) -> None:
        super().__init__()
        if not isinstance(bank, StackedLayer):
            raise TypeError("needs all of a layer's experts in memory")
        gate_up, down = bank.stacks[bank.original]
        self.gate_up = nn.ParameterList([nn.Parameter(weight.clone()) for weight in gate_up])
        self.down = nn.ParameterList([nn.Parameter(weight.clone()) for weight in down])
        self._activation, self._top_k, self._renormalise = bank.activation, top_k, renormalise

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = route(logits, self._top_k, self._renormalise)
        y = torch.zeros_like(x)
        for expert, (token, slot) in enumerate(by_expert(ids, len(self.down))):
            if len(token):
                gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2, dim=-1)
                output = F.linear(self._activation(gate) * up, self.down[expert])
                y = y.index_add(0, token, output * weights[token, slot, None].to(x.dtype))
        return y
