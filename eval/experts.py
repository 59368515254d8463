"""A fast CPU training path for the experts of transformers' mixture-of-experts models.

The stock CPU implementations spend most of a small model's step on zero-filled weight gradients (one full
``[experts, out, in]`` tensor per expert and step). This one sorts the token-expert pairs once, runs one matrix
product per expert into preallocated buffers, and has a hand-written backward. It is registered under the
name ``sorted`` and chosen with ``model.set_experts_implementation("sorted")``; the weights and the model
format are untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# oneDNN generates code for every new matrix shape, which costs more than a small product itself: each
# expert's rows are padded with zeros to a multiple of this, so that few shapes occur.
ROW_MULTIPLE = 64


class _SortedSwiGLU(torch.autograd.Function):
    """``x`` [tokens, dim] -> the experts' outputs per token-expert pair [tokens * k, dim], token-major."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pair_row: Tensor, sizes: list[int], gate_up: Tensor, down: Tensor
    ) -> Tensor:
        inner, top_k = down.shape[2], pair_row.shape[0] // x.shape[0]
        rows = x.new_zeros(sum(sizes), x.shape[1])
        rows[pair_row] = x.repeat_interleave(top_k, dim=0)
        hidden = rows.new_empty(rows.shape[0], 2 * inner)
        for block, weight, target in zip(rows.split(sizes), gate_up, hidden.split(sizes), strict=True):
            torch.mm(block, weight.t(), out=target)
        act = F.silu(hidden[:, :inner]) * hidden[:, inner:]
        out = torch.empty_like(rows)
        for block, weight, target in zip(act.split(sizes), down, out.split(sizes), strict=True):
            torch.mm(block, weight.t(), out=target)
        ctx.save_for_backward(rows, pair_row, hidden, gate_up, down)
        ctx.sizes, ctx.top_k = sizes, top_k
        return out[pair_row]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        rows, pair_row, hidden, gate_up, down = ctx.saved_tensors
        sizes, inner = ctx.sizes, down.shape[2]
        grad_out = torch.zeros_like(rows)
        grad_out[pair_row] = grads[0]
        gate, up = hidden[:, :inner], hidden[:, inner:]
        sig = torch.sigmoid(gate)
        silu = gate * sig
        act = silu * up
        grad_act, grad_down = torch.empty_like(act), torch.empty_like(down)
        for expert, (grad, block, target) in enumerate(
            zip(grad_out.split(sizes), act.split(sizes), grad_act.split(sizes), strict=True)
        ):
            torch.mm(grad, down[expert], out=target)
            torch.mm(grad.t(), block, out=grad_down[expert])
        grad_hidden = torch.empty_like(hidden)
        torch.mul(grad_act * up, sig + silu * (1 - sig), out=grad_hidden[:, :inner])
        torch.mul(grad_act, silu, out=grad_hidden[:, inner:])
        grad_rows, grad_gate_up = torch.empty_like(rows), torch.empty_like(gate_up)
        for expert, (grad, block, target) in enumerate(
            zip(grad_hidden.split(sizes), rows.split(sizes), grad_rows.split(sizes), strict=True)
        ):
            torch.mm(grad, gate_up[expert], out=target)
            torch.mm(grad.t(), block, out=grad_gate_up[expert])
        grad_x = grad_rows[pair_row].view(-1, ctx.top_k, rows.shape[1]).sum(1)
        return grad_x, None, None, grad_gate_up, grad_down


def _rows_by_expert(choice: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """For each token-expert pair its row in the buffer sorted by expert, and each expert's padded size."""
    order = torch.argsort(choice, stable=True)
    counts = torch.bincount(choice, minlength=experts)
    sizes = ((counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE).clamp(min=1) * ROW_MULTIPLE
    shift = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
    row = torch.empty_like(choice)
    row[order] = torch.arange(choice.shape[0]) + shift[choice[order]]
    return row, sizes.tolist()


def sorted_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Drop-in for the ``forward`` of the SwiGLU experts of Qwen3-MoE, Qwen2-MoE and Mixtral."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    gate_up, down = self.gate_up_proj, self.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    pair_row, sizes = _rows_by_expert(top_k_index.reshape(-1), gate_up.shape[0])
    pairs = _SortedSwiGLU.apply(hidden_states.to(dtype), pair_row, sizes, gate_up.to(dtype), down.to(dtype))
    assert isinstance(pairs, Tensor)
    by_token = pairs.view(*top_k_index.shape, -1)
    out = torch.bmm(top_k_weights.to(dtype).unsqueeze(1), by_token).squeeze(1)
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts_forward)
