"""How much memory a run takes, resident or streamed, and how much is streamed at once so that it stays within a limit."""

from __future__ import annotations

from dataclasses import dataclass

from moe_rco.calib.dense_bank import CHUNK as FULL
from moe_rco.calib.objective import BATCH, HEAD_LOGITS
from moe_rco.calib.quantise import WORKSPACE, working_bytes
from moe_rco.calib.quantise_dense import CHUNK as QUANTISED
from moe_rco.calib.reference import TOP
from moe_rco.calib.streaming import Streaming
from moe_rco.errors import UserError
from moe_rco.units import format_size

LIBRARIES = 730 * 10**6
"""Resident bytes of the interpreter with torch, transformers and numba."""
CUDA_LIBRARIES = 2 * 10**9
"""What they take beside a CUDA device, on the host."""
_TOKENS = 1 << 15
"""More tokens in a layer at once gain nothing."""


@dataclass(frozen=True)
class Shapes:
    """A model and its job in numbers. `kept` options keep an expert; `compact` bytes hold all of them of one layer as on
    disk, with the original; `dense` are all parameters but routed experts', `head` those of the head; `tokens` in
    `length` are all calibration text; a step has `samples` of `batch` sequences.
    Of the dense parameters `chosen` are chosen for, the largest matrix among them has `widest`.
    """

    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    attention: int
    vocabulary: int
    kept: int
    compact: int
    expert_numel: int
    dense: int
    tokens: int
    length: int
    samples: int
    batch: int
    item: int
    chosen: int = 0
    widest: int = 0

    @property
    def choosing(self) -> int:
        """Bytes for quantising dense groups that are chosen for, and for measuring what that does."""
        return 24 * min(QUANTISED, self.widest) + 2 * self.widest + (4 * BATCH + 12) * min(FULL, self.widest)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def references(self) -> int:
        """What the search keeps of every token, and of every sequence for every option of an expert, on the host."""
        sequence = 4 * self.layers * self.experts * (self.kept + 1)
        return self.tokens * (min(TOP, self.vocabulary - 1) * 8 + 4) + self.tokens // self.length * sequence

    @property
    def activations(self) -> int:
        """What the calibration pass keeps of every token."""
        return 3 * self.tokens * self.hidden * self.item

    @property
    def graph(self) -> int:
        """Bytes that one token's way through one layer leaves for its backward pass."""
        # The norms work in float32; queries, keys and values are normalised and turned.
        attention = (6 * self.hidden + 5 * self.attention) * self.item + 4 * (
            3 * self.hidden + self.attention
        )
        inputs = (3 * self.hidden + self.attention) * self.item if self.chosen else 0
        return attention + inputs + 12 * self.experts + 12 * self.top_k

    @property
    def routed(self) -> int:
        """Bytes of one token's results in its experts."""
        return self.top_k * (2 * self.inner + self.hidden) * self.item

    @property
    def backward(self) -> int:
        """Bytes that the experts' backward pass takes for one token beside its graph."""
        busiest = min(1.0, 4 * self.top_k / self.experts)
        return (
            int((3 * self.hidden + busiest * (6 * self.inner + 4 * self.hidden)) * self.item)
            + 24 * self.experts
        )

    @property
    def quantising(self) -> int:
        """Bytes for quantising one expert."""
        return working_bytes(self.hidden, self.inner)

    @property
    def logits(self) -> int:
        """Bytes at the head: some positions' logits and what the divergence makes of them."""
        return 5 * 4 * min(HEAD_LOGITS, self.length * self.vocabulary)


@dataclass(frozen=True)
class Footprint:
    """Predicted peaks in bytes, on the host and on a device (0 where the host computes), and how weights are held."""

    host: int
    device: int
    streaming: Streaming | None


def resident(shapes: Shapes, on_host: bool) -> Footprint:
    """All weights at every option in memory."""
    s = shapes
    dense, expert = (
        (s.dense + s.kept * s.chosen) * s.item + s.choosing,
        s.layers * s.experts * s.expert_numel * s.item,
    )
    text = s.batch * s.length
    search = s.layers * text * (s.graph + s.routed) + text * s.backward + s.logits
    calibrate = s.activations + min(WORKSPACE, s.experts * s.quantising)
    memory = dense + max(expert + calibrate, expert * (1 + s.kept) + search) + s.references * on_host
    return _placed(s, memory, 0, None, on_host)


def streamed(shapes: Shapes, limit: int, available: int, on_host: bool) -> Footprint:
    """As much at once as the limit allows, and what is `available` on the host. Raises UserError where the least is more."""
    s = shapes
    layer = max(0, s.dense - 2 * s.head) // s.layers * s.item
    expert = s.expert_numel * s.item
    # Of chosen dense weights those that are at work are there at every option.
    held = s.kept * max(s.widest, s.chosen // s.layers) * s.item + s.choosing
    fixed = 3 * layer + s.head * s.item + 4 * expert + s.logits + held
    free = limit - fixed - LIBRARIES - s.references if on_host else available - LIBRARIES - CUDA_LIBRARIES
    spill = s.activations > free // 2
    activations = 0 if spill else s.activations
    on_limited = fixed + (LIBRARIES + s.references + activations if on_host else 0)
    token = s.graph + s.backward + (s.layers * s.hidden * s.item if on_host else 0)
    least = on_limited + max(s.length * token + 2 * layer, s.quantising + layer)
    if least > limit:
        raise UserError(
            f"the run needs at least {format_size(least)} of memory even with weights streamed, and may take "
            f"{format_size(limit)}: set execution.memory_limit to that or more where there is as much, or lower "
            f"calibration.sequences or sequence_length"
        )
    everything = limit - on_limited
    wanted = max(s.batch * s.samples, 8) * s.length
    fitting = min(everything // 2, everything - 2 * layer) // token
    tokens = max(s.length, min(_TOKENS, wanted, fitting))
    room = everything - tokens * token
    workspace = max(s.quantising, min(WORKSPACE, room // 2))
    window = min(2 * (s.compact + layer), room // 2, everything - workspace, *((1 << 28,) if on_host else ()))
    window = max(layer, window)
    memory = fixed + max(tokens * token + 2 * window, workspace + window)
    boundary = 0 if on_host else s.layers * tokens * s.hidden * s.item
    if on_host:
        memory += s.references + activations
    else:
        boundary = max(boundary, activations)
    return _placed(s, memory, boundary, Streaming(window, tokens, workspace, spill), on_host)


def _placed(s: Shapes, memory: int, boundary: int, streaming: Streaming | None, on_host: bool) -> Footprint:
    if on_host:
        return Footprint(LIBRARIES + memory, 0, streaming)
    return Footprint(LIBRARIES + CUDA_LIBRARIES + s.references + boundary, memory, streaming)
