"""Quantises dense groups at every option that the store does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_rco.calib.moments import Moments
from moe_rco.calib.team import Team
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.store import Store
from moe_rco.quant.gptq import quantize_gptq
from moe_rco.quant.grid import Quantized
from moe_rco.quant.hessian import shrink
from moe_rco.quant.packing import pack
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import CostTable, Group, Option

CHUNK = 1 << 24
"""Weights quantised at once: rows do not depend on each other."""


def missing(group: Group, table: CostTable, store: Store) -> list[Option]:
    """The options of a group that are still to be quantised."""
    options = (option for option in table.options if option.is_quantized and group.admits(option))
    return [option for option in options if not store.has(group.name, option)]


def quantise(
    groups: Sequence[Group],
    checkpoint: Checkpoint,
    moments: Moments | None,
    table: CostTable,
    store: Store,
    device: torch.device,
    team: Team,
    advance: Callable[[int], None],
) -> None:
    """Write the missing options of some groups to the store; by GPTQ where there are moments, else rounded to nearest.

    The team shares the groups. Raises StoreError, and ModelError where inputs were not finite.
    """
    todo = [(group, options) for group in groups if (options := missing(group, table, store))]

    def quantised(item: tuple[Group, list[Option]]) -> np.ndarray:
        group, options = item
        for option in options:
            tensors: dict[str, Tensor] = {}
            for part, weight in enumerate(group.weights):
                values = checkpoint.read(weight.name)
                made = quantise_matrix(values, option, _hessian(moments, group, part), device)
                prefix = weight.name.removesuffix("weight")
                tensors |= {prefix + suffix: t for suffix, t in pack(*made, option).items()}
            store.write_part(group.name, option, 0, tensors)
        advance(2)
        return np.zeros(1)

    team.map(quantised, todo)
    team.wait()
    if team.leads:
        for group, options in todo:
            for option in options:
                store.join(group.name, option)
    team.wait()
    store.refresh()


def quantise_matrix(
    weight: Tensor, option: Option, hessian: Tensor | None, device: torch.device
) -> Quantized:
    """A matrix [R, C] at an option, on the host; `hessian` [C, C] is the mean of x x^T."""
    step, found = max(1, CHUNK // weight.shape[1]), list[Quantized]()
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].to(device).float()
        made = (
            quantize_rtn(rows[None], option)
            if hessian is None
            else quantize_gptq(rows[None], hessian[None], option)
        )
        zero = None if made.zero is None else made.zero[0].cpu()
        found.append(Quantized(made.codes[0].cpu(), made.scale[0].cpu(), zero))
    zeros = [made.zero for made in found if made.zero is not None]
    return Quantized(
        torch.cat([made.codes for made in found]),
        torch.cat([made.scale for made in found]),
        torch.cat(zeros) if zeros else None,
    )


def _hessian(moments: Moments | None, group: Group, part: int) -> Tensor | None:
    if moments is None or group.kind == "embeddings":
        return None  # embeddings are looked up, not multiplied
    found = moments.of(group, part)
    return shrink(found.hessians(), found.counts).hessian[0]
