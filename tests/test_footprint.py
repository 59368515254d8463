"""Predicted memory: within the limit where weights are streamed, whatever the model; refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_rco.errors import UserError
from moe_rco.footprint import LIBRARIES, Shapes, resident, streamed

GIB = 1 << 30
QWEN = Shapes(
    layers=48, experts=128, top_k=8, hidden=2048, inner=768, attention=5120, vocabulary=151_936, kept=3,
    compact=128 * 4_718_592 * 5 // 2, expert_numel=4_718_592, dense=1_500_000_000, tokens=1 << 18, length=2048,
    samples=4, batch=4, item=2,
)  # fmt: skip


@given(
    layers=st.integers(1, 100),
    tokens=st.integers(11, 24),
    length=st.sampled_from([128, 512, 2048]),
    limit=st.integers(2 * GIB, 64 * GIB),
    on_host=st.booleans(),
)
@example(layers=1, tokens=19, length=512, limit=2_832_251_008, on_host=True)  # all room was given away twice
def test_streamed_stays_within_the_limit_or_is_refused(
    layers: int, tokens: int, length: int, limit: int, on_host: bool
) -> None:
    shapes = replace(
        QWEN, layers=layers, dense=20_000_000 * layers + 2 * QWEN.head, tokens=1 << tokens, length=length
    )
    try:
        found = streamed(shapes, limit, 256 * GIB, on_host)
    except UserError:
        return
    assert found.streaming is not None
    assert (found.host if on_host else found.device) <= limit
    assert found.streaming.tokens >= length
    assert found.streaming.workspace >= shapes.quantising
    assert found.streaming.window > 0


def test_streamed_does_not_grow_with_the_model_but_for_what_lies_between_layers() -> None:
    first, second = (
        streamed(replace(QWEN, layers=n, dense=20_000_000 * n + 2 * QWEN.head), 8 * GIB, 64 * GIB, False)
        for n in (8, 96)
    )
    assert second.device <= first.device * 1.01
    assert resident(replace(QWEN, layers=96), False).device > 10 * second.device


def test_on_a_device_the_host_keeps_little() -> None:
    found = resident(QWEN, False)
    assert found.device > 57 * 10**9  # the original alone
    assert LIBRARIES < found.host < 8 * GIB


def test_a_limit_that_is_too_small_is_named_with_what_would_do() -> None:
    with pytest.raises(UserError, match=r"at least .* set execution.memory_limit"):
        streamed(QWEN, GIB, 64 * GIB, True)
