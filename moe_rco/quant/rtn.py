"""Round-to-nearest quantisation: the baseline that GPTQ has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_rco.quant.grid import Quantized, fit_grid, quantize_to_grid
from moe_rco.types import Option


def quantize_rtn(
    weight: Tensor, option: Option, *, importance: Tensor | None = None, search: bool = True
) -> Quantized:
    """Round `weight` [..., R, C] (finite, floating point) to the nearest codes of `option`.

    `importance` and `search` choose the grid, see `fit_grid`. Needs no calibration data when `importance` is
    None.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    grid = fit_grid(weight, option, importance, search)
    return Quantized(quantize_to_grid(weight, grid, option), grid.scale, grid.zero)
