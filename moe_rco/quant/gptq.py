"""GPTQ (Frantar, Ashkboos, Hoefler & Alistarh, ICLR 2023, arXiv 2210.17323), batched over the experts of a layer.

Columns are rounded one after another; the error of each is spread over the columns still to come so that the layer's output
changes least: with H^-1 = U^T U (U upper triangular), w_j -= (w_i - q_i) / U_ii * U_ij for j > i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_rco.quant.grid import (
    Grid,
    Quantized,
    code_range,
    dequantize_codes,
    fit_grid,
    group_width,
)
from moe_rco.types import Option

_BLOCK = 128
# Elements of a batch of Hessians factorised at once in float64.
_FACTOR_CHUNK = 1 << 26
_ATTEMPTS = 8


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    option: Option,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    static_groups: bool = True,
    weighted_grid: bool = False,
    search: bool = True,
) -> Quantized:
    """Quantise `weight` [E, R, C] under `hessian` [E, C, C] (mean of x x^T, symmetric positive semi-definite).

    `damping` is added to the diagonal as a fraction of its mean, ten times more for an expert whose factorisation fails.
    `act_order` rounds the columns with the largest diagonal first; it needs `static_groups` (grids fitted to the
    original weights), since a group's columns are then no longer neighbours in time. Otherwise a group's grid is fitted
    to its weights as updated when its turn comes. `weighted_grid` weighs the grid search with the diagonal.
    A column no token ever excited is simply rounded.
    """
    if act_order and not static_groups:
        raise ValueError("act_order needs static_groups")
    experts, rows, columns = weight.shape
    device = weight.device
    importance = hessian.diagonal(dim1=-2, dim2=-1).to(weight.dtype) if weighted_grid else None
    order = torch.arange(columns, device=device).expand(experts, columns)
    if act_order:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    factor = _inverse_factor(hessian, order, damping).to(weight.dtype)

    # Columns first: one column of all experts is then a contiguous row of each expert's matrix.
    current = weight.transpose(1, 2).gather(1, order.unsqueeze(-1).expand(experts, columns, rows)).contiguous()
    width = group_width(columns, option)
    group = order // width
    scale = torch.empty(experts, rows, columns // width, dtype=torch.bfloat16, device=device)
    zero = None if option.symmetric else torch.empty_like(scale, dtype=torch.int8)
    if static_groups:
        grid = fit_grid(weight, option, importance, search)
        scale.copy_(grid.scale)
        if zero is not None and grid.zero is not None:
            zero.copy_(grid.zero)
    codes = torch.empty(experts, columns, rows, dtype=torch.int8, device=device)
    for start, stop in _blocks(columns, columns if static_groups else width):
        if not static_groups and start % width == 0:
            part = slice(start, start + width)
            grid = fit_grid(
                current[:, part].transpose(1, 2),
                Option(option.bits),
                None if importance is None else importance[:, part],
                search,
            )
            scale[..., start // width] = grid.scale[..., 0]
            if zero is not None and grid.zero is not None:
                zero[..., start // width] = grid.zero[..., 0]
        block = slice(start, stop)
        codes[:, block], error = _round_block(
            current[:, block], factor[:, block, block], group[:, block], Grid(scale, zero), option
        )
        if stop < columns:
            current[:, stop:].baddbmm_(factor[:, block, stop:].transpose(1, 2), error, alpha=-1)
    inverse = order.argsort(-1)
    codes = codes.gather(1, inverse.unsqueeze(-1).expand_as(codes)).transpose(1, 2).contiguous()
    return Quantized(codes, scale, zero)


def _blocks(columns: int, span: int) -> list[tuple[int, int]]:
    """Column ranges of at most _BLOCK that do not cross a multiple of `span`."""
    return [
        (start, min(start + _BLOCK, first + span))
        for first in range(0, columns, span)
        for start in range(first, first + span, _BLOCK)
    ]


def _round_block(
    current: Tensor, factor: Tensor, group: Tensor, grid: Grid, option: Option
) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors, both [E, B, R], of the columns `current` [E, B, R].

    `factor` [E, B, B] is the block of U, `group` [E, B] the grid column of each weight column. The error of earlier columns of the
    block is applied when a column's turn comes (one product a column), not by rewriting the rest of the block.
    """
    low, high = code_range(option.bits)
    experts, width, rows = current.shape
    codes = torch.empty_like(current, dtype=torch.int8)
    errors = torch.zeros_like(current)
    scales = _columns(grid.scale, group).to(current.dtype)
    zeros = None if grid.zero is None else _columns(grid.zero, group).to(current.dtype)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    for index in range(width):
        column = current[:, index]
        if index:
            column = column - torch.bmm(factor[:, None, :index, index], errors[:, :index])[:, 0]
        code = (column / scales[:, index]).round_()
        if zeros is None:
            code.clamp_(low, high)
            codes[:, index] = code
        else:
            code.add_(zeros[:, index]).clamp_(low, high)
            codes[:, index] = code
            code.sub_(zeros[:, index])
        errors[:, index] = (column - code * scales[:, index]) / pivots[:, index, None]
    return codes, errors


def _columns(values: Tensor, group: Tensor) -> Tensor:
    """Per-column grid values [E, B, R] from per-group ones [E, R, G]."""
    experts, rows, _ = values.shape
    return values.transpose(1, 2).gather(1, group.unsqueeze(-1).expand(experts, group.shape[1], rows))


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper triangular U [E, C, C], float32 or wider, with U^T U = (P H P^T + damping)^-1 for the permutation `order` [E, C]."""
    experts, columns, _ = hessian.shape
    out = torch.empty_like(hessian, dtype=torch.promote_types(hessian.dtype, torch.float32))
    step = max(1, _FACTOR_CHUNK // (columns * columns))
    for start in range(0, experts, step):
        part = slice(start, start + step)
        index = order[part]
        permuted = hessian[part].gather(1, index.unsqueeze(-1).expand(-1, -1, columns))
        permuted = permuted.gather(2, index.unsqueeze(1).expand(-1, columns, -1))
        out[part] = _factor_chunk(permuted.double(), damping)
    return out


def _factor_chunk(hessian: Tensor, damping: float) -> Tensor:
    """U of every matrix of a float64 batch [E, C, C]; the batch is overwritten."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    usable = (mean > 0) & mean.isfinite()
    # Unit mean diagonal: the scale of H has no influence on the result, and neither tiny nor huge activations hurt.
    hessian.div_(torch.where(usable, mean, torch.ones_like(mean)).view(-1, 1, 1))
    dead = diagonal <= 0
    hessian.masked_fill_(dead.unsqueeze(-1), 0).masked_fill_(dead.unsqueeze(-2), 0)
    diagonal.masked_fill_(dead, 1)
    added = torch.full_like(mean, damping)
    diagonal += added.unsqueeze(-1)
    # H = A A^T with A upper triangular, from the Cholesky factor of H read backwards; then U = A^-1.
    lower, info = torch.linalg.cholesky_ex(hessian.flip(-1, -2))
    for _ in range(_ATTEMPTS):
        failed = (info != 0).nonzero().flatten()
        if len(failed) == 0:
            break
        hessian[failed].diagonal(dim1=-2, dim2=-1)
        more = added[failed].clamp_min(1e-6) * 9
        hessian[failed] += torch.diag_embed(more.unsqueeze(-1).expand(-1, hessian.shape[-1]))
        added[failed] += more
        lower[failed], info[failed] = torch.linalg.cholesky_ex(hessian[failed].flip(-1, -2))
    upper = lower.flip(-1, -2)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    # Not positive definite by any reasonable damping (never seen): plain rounding, which needs no Hessian.
    upper[(info != 0).nonzero().flatten()] = identity
    return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
