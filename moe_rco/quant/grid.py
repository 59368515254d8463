"""Quantisation grids: the scale and zero point of every group of weights, and rounding onto them.

A weight is represented as `(code - zero) * scale` with an integer code in [-2^(bits-1), 2^(bits-1) - 1].
Scales are rounded to bfloat16 before a code is computed, so the scale that was used is the scale that is
stored.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_rco.types import Option

SCALE_DTYPE = torch.bfloat16
_TINY = torch.finfo(SCALE_DTYPE).tiny

# Clipping ratios tried around the plain min-max scale (first: start of the search, second: its end, third:
# how many). The fewer the levels, the more it pays to clip outliers; measured, see `fit_grid`.
_RATIOS = {2: (0.45, 1.10, 14), 3: (0.55, 1.10, 12), 4: (0.65, 1.10, 10), 8: (0.95, 1.00, 14)}
_REFITS = 2
# A group none of whose columns matters still gets a sensible grid.
_LEAST_IMPORTANCE = 1e-6
# Elements worked on at once. The search reads a chunk some hundred times, so it should stay in a CPU's cache.
_CHUNK = {"cpu": 1 << 19}
_CHUNK_ELSEWHERE = 1 << 25


class Grid(NamedTuple):
    """`scale` bfloat16 [..., R, G]; `zero` int8 [..., R, G], None for a grid centred on zero."""

    scale: Tensor
    zero: Tensor | None


class Quantized(NamedTuple):
    """Quantised matrices: `codes` int8 [..., R, C], `scale` bfloat16 [..., R, G], `zero` int8 [..., R, G] or
    None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights the codes stand for, [..., R, C]."""
        return dequantize_codes(self.codes, self.scale, self.zero, dtype)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def group_width(columns: int, option: Option) -> int:
    """Number of consecutive input weights that share a scale in a matrix of `columns` inputs."""
    return option.group_size or columns


def quantize_to_grid(weight: Tensor, grid: Grid, option: Option) -> Tensor:
    """Nearest codes, int8 [..., R, C], of `weight` [..., R, C] on `grid`."""
    low, high = code_range(option.bits)
    groups = weight.unflatten(-1, (grid.scale.shape[-1], -1))
    codes = (groups / grid.scale.to(weight.dtype).unsqueeze(-1)).round_()
    if grid.zero is not None:
        codes += grid.zero.unsqueeze(-1)
    return codes.clamp_(low, high).to(torch.int8).flatten(-2)


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`(codes - zero) * scale`, [..., R, C], rounded to `dtype` once as compressed-tensors does."""
    work = torch.promote_types(dtype, torch.float32)
    values = codes.to(work, copy=True)
    groups = values.view(*codes.shape[:-1], scale.shape[-1], -1)
    if zero is not None:
        groups -= zero.to(work).unsqueeze(-1)
    groups *= scale.to(work).unsqueeze(-1)
    return values.to(dtype)


def fit_grid(weight: Tensor, option: Option, importance: Tensor | None = None, search: bool = True) -> Grid:
    """Scale and zero point of every group of `weight` [..., R, C].

    With `search` the squared rounding error is minimised over clipping ratios and zero points, followed by
    least-squares refits of the scale to the codes; a symmetric grid may then have a negative scale, which
    spends its one unpaired code (-8 of 4 bits) on the side of the group's largest weight: 10 % less squared
    error at int4-g64. Without `search` the grid spans the group's smallest to largest weight. `importance`
    [..., C] weighs the columns' squared errors (the leading dimensions are those of `weight`). Finite weights
    give finite grids whatever their magnitude; a group of zeros gets scale 1.
    """
    *lead, rows, columns = weight.shape
    width = group_width(columns, option)
    groups = weight.reshape(-1, columns // width, width)
    scale = torch.empty(groups.shape[:-1], dtype=SCALE_DTYPE, device=weight.device)
    zero = None if option.symmetric else torch.empty_like(scale, dtype=torch.int8)
    if importance is not None:
        # Only relative importance matters; dividing by the largest keeps sums of squares in range.
        importance = importance / importance.amax(-1, keepdim=True).clamp_min(_TINY)
        importance = (
            importance.to(weight.dtype).clamp_min(_LEAST_IMPORTANCE).reshape(-1, columns // width, width)
        )
    step = max(1, _CHUNK.get(weight.device.type, _CHUNK_ELSEWHERE) // columns)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        chunk = groups[part]
        weights = None
        if importance is not None:
            matrix = torch.arange(start, start + len(chunk), device=weight.device) // rows
            weights = importance[matrix].flatten(0, 1)
        chunk_scale, chunk_zero = _fit(chunk.flatten(0, 1), option, weights, search)
        scale[part] = chunk_scale.view(chunk.shape[:-1])
        if zero is not None:
            zero[part] = chunk_zero.view(chunk.shape[:-1]).to(torch.int8)
    shape = (*lead, rows, columns // width)
    return Grid(scale.view(shape), None if zero is None else zero.view(shape))


def _fit(weight: Tensor, option: Option, importance: Tensor | None, search: bool) -> tuple[Tensor, Tensor]:
    """Scale (bfloat16 [M]) and zero point (float [M]) of the groups `weight` [M, width]."""
    low, high = code_range(option.bits)
    # Work on groups scaled by a power of two to about 1, which is exact: squares neither overflow nor vanish.
    smallest, largest = weight.amin(-1), weight.amax(-1)
    exponent = torch.frexp(torch.maximum(largest, -smallest)).exponent.clamp(-125, 126)
    power = torch.exp2(exponent.to(weight.dtype))
    smallest, largest = (smallest / power).clamp_max(0), (largest / power).clamp_min(0)
    if option.symmetric:
        base = torch.maximum(largest, -smallest) * (2 / (high - low))
        zeros = [torch.zeros_like(base)]
        if search:
            power = torch.where(largest > -smallest, -power, power)
    else:
        base = (largest - smallest) / (high - low)
        exact = (low - smallest / base.clamp_min(_TINY)).clamp(low, high)
        zeros = [exact.floor(), exact.ceil()] if search else [exact.round()]
    scale, zero = _representable(base), zeros[0]
    if search:
        scale, zero = _search(weight / power.unsqueeze(-1), base, zeros, importance, option.bits)
    # The largest value a code can stand for must be finite, and so must 1 / scale be.
    limit = torch.finfo(SCALE_DTYPE).max / (1 << option.bits)
    stored = (scale * power.abs()).clamp(_TINY, limit).copysign(power).to(SCALE_DTYPE)
    return torch.where(base > 0, stored, torch.ones_like(stored)), zero


def _search(
    unit: Tensor, base: Tensor, zeros: list[Tensor], importance: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """The best of all clipping ratios and zero points by squared error, then refitted; [M] each."""
    low, high = code_range(bits)
    first, last, count = _RATIOS[bits]
    best_error = torch.full_like(base, math.inf)
    best_scale, best_zero = _representable(base), zeros[0]
    for zero in zeros:
        bounds = (low - zero).unsqueeze(-1), (high - zero).unsqueeze(-1)
        for ratio in torch.linspace(first, last, count).tolist():
            scale = _representable(base * ratio)
            error, _ = _error(unit, scale, bounds, importance)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    bounds = (low - best_zero).unsqueeze(-1), (high - best_zero).unsqueeze(-1)
    best_error, best_codes = _error(unit, best_scale, bounds, importance)
    for _ in range(_REFITS):
        weighted = best_codes if importance is None else best_codes * importance
        squares = (weighted * best_codes).sum(-1)
        fitted = (weighted * unit).sum(-1) / squares.clamp_min(_TINY)
        scale = torch.where(fitted > 0, _representable(fitted), best_scale)
        error, codes = _error(unit, scale, bounds, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
    return best_scale, best_zero


def _representable(scale: Tensor) -> Tensor:
    """`scale` rounded to what is stored, kept in the working type; never zero."""
    return scale.clamp_min(_TINY).to(SCALE_DTYPE).to(scale.dtype)


def _error(
    unit: Tensor, scale: Tensor, bounds: tuple[Tensor, Tensor], importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Squared error [M] of rounding `unit` [M, width] with `scale` [M], and codes less the zero point."""
    step = scale.unsqueeze(-1)
    codes = torch.div(unit, step).round_().clamp_(*bounds)
    residual = torch.addcmul(unit, codes, step, value=-1).square_()
    if importance is not None:
        residual *= importance
    return residual.sum(-1), codes
