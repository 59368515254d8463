"""Checks of the knapsack's arguments: arrays from numpy or torch, turned into contiguous numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_rco.errors import UserError


def as_array(data: Any) -> NDArray:
    """The data of a torch tensor (on any device) or of anything numpy understands."""
    return np.asarray(data.detach().cpu().numpy() if hasattr(data, "detach") else data)


def as_integers(data: Any, name: str, dims: int) -> NDArray[np.int64]:
    """Integers as int64; raises UserError for another dtype or another number of dimensions."""
    array = as_array(data)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != dims:
        shape = list(array.shape)
        raise UserError(f"{name} must be integers in {dims} dimensions, got {array.dtype} {shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


def as_mask(allowed: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask of available options, all True when None; every group must have one."""
    if allowed is None:
        return np.ones(shape, bool)
    mask = np.ascontiguousarray(as_array(allowed))
    if mask.dtype != np.bool_ or mask.shape != shape:
        raise UserError(f"allowed must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise UserError(f"group {empty[0]} has no allowed option")
    return mask


def as_layers(
    layer: Any, floor: Any, groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(layer [N], start [L + 1], order [N]): the groups of layer l are order[start[l]:start[l + 1]]."""
    index = np.zeros(groups, np.int64) if layer is None or floor is None else as_integers(layer, "layer", 1)
    if index.shape != (groups,) or index.min() < 0:
        raise UserError(f"layer must have one number >= 0 for each of the {groups} groups")
    count = max(int(index.max()) + 1, 1 if floor is None else np.size(as_array(floor)))
    start = np.r_[0, np.cumsum(np.bincount(index, minlength=count))].astype(np.int64)
    return index, start, np.argsort(index, kind="stable")


def as_floors(floor: Any, layers: int) -> NDArray[np.int64]:
    """The floor of every layer [L]; zeros when None."""
    if floor is None:
        return np.zeros(layers, np.int64)
    array = as_array(floor)
    if not np.issubdtype(array.dtype, np.integer) or array.shape not in ((), (layers,)):
        raise UserError(f"floor must be an integer or integers [{layers}], one for each layer")
    return np.ascontiguousarray(np.broadcast_to(array, (layers,)), dtype=np.int64)
