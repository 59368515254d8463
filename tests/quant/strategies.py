"""Options, shapes and weights for the property tests of this directory."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_rco.types import QUANTIZED_BITS, Option

bits = st.sampled_from(QUANTIZED_BITS)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def options_and_shapes(draw: st.DrawFn) -> tuple[Option, tuple[int, int]]:
    """A quantising option and the (output, input) shape of a matrix it fits, awkward ones included."""
    width = draw(st.integers(1, 40))
    groups = draw(st.integers(1, 4))
    option = Option(draw(bits), draw(st.sampled_from([width, None])))
    return option, (draw(st.integers(1, 40)), width * groups)


def correlated(
    experts: int, rows: int, columns: int, tokens: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [E, R, C], Hessians [E, C, C] of `tokens` tokens, and those of as many fresh ones.

    Inputs have a decaying spectrum in a random basis and channels of unequal size, as activations have.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spectrum = torch.arange(1, columns + 1) ** -0.5
    basis = torch.linalg.qr(normal(columns, columns)).Q * spectrum
    mix = basis @ torch.linalg.qr(normal(columns, columns)).Q * torch.exp(0.5 * normal(columns))
    weight = 0.02 * normal(experts, rows, columns)
    draws = (normal(experts, tokens, columns) @ mix for _ in range(2))
    hessian, fresh = (x.transpose(1, 2) @ x / tokens for x in draws)
    return weight, hessian, fresh
