"""The budget as a user writes it, and its resolution to integer bytes, which happens once."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moe_rco.errors import BudgetError
from moe_rco.types import Budget, CostTable, Room, covered
from moe_rco.units import exact_size, format_size, parse_size

FORMS = ("bytes", "ratio", "avg_bits", "fit")
_FORMS_TEXT = "bytes (as in 12MiB), ratio (as in 0.35), avg_bits (as in 4.25) or fit (as in 24GB)"

Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str)]
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")


class _Spec(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _memory_alone(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError(f"write the memory of a GPU with its unit, as in {value or 24}GB")
    return {"gpu_memory": value} if isinstance(value, str) else value


class Fit(_Spec):
    """GPUs, and what is to be served on them, by the names of vLLM's options.

    What the budget covers gets the bytes that other weights, the KV cache of `max_num_seqs` sequences of `max_model_len` tokens,
    and activations leave. The memory alone may be given, as in `fit: 24GB`.
    """

    gpu_memory: Size
    """Of one GPU. A card sold as 24 GB has 24GB at least, but not 24GiB."""
    max_model_len: int = Field(default=8192, ge=1, le=10**9)
    """Tokens of a sequence, prompt and answer."""
    max_num_seqs: int = Field(default=4, ge=1, le=10**6)
    """Sequences at once."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """The share of its memory that vLLM may take."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    """GPUs that share the model."""

    @property
    def text(self) -> str:
        devices = f"{self.tensor_parallel_size} GPUs" if self.tensor_parallel_size > 1 else "a GPU"
        sequences = f"{self.max_num_seqs} x {self.max_model_len:,} tokens"
        return f"fits {devices} of {exact_size(self.gpu_memory)} with {sequences}"

    @property
    def serve(self) -> str:
        """The options of vLLM that it stands for."""
        options = f"--max-model-len {self.max_model_len} --max-num-seqs {self.max_num_seqs}"
        options += f" --gpu-memory-utilization {self.gpu_memory_utilization:g}"
        devices = self.tensor_parallel_size
        return options + (f" --tensor-parallel-size {devices}" if devices > 1 else "")

    @property
    def name(self) -> str:
        devices = f"{self.tensor_parallel_size}x" if self.tensor_parallel_size > 1 else ""
        share = (
            ""
            if self.gpu_memory_utilization == 0.9
            else f"-{_decimal(Fraction(str(self.gpu_memory_utilization)))}"
        )
        return f"fit-{devices}{exact_size(self.gpu_memory)}{share}-{self.max_num_seqs}x{self.max_model_len}"


class BudgetSpec(_Spec):
    """Exactly one of four ways to say how many bytes the routed experts, and what else is named in `groups`, may take on disk.

    The texts `35%` and `20GiB` are short for a ratio and for bytes.
    """

    bytes: Size | None = None
    """So many, with a unit as in `20GiB` or `20GB`."""
    ratio: float | None = Field(default=None, gt=0, le=1)
    """A fraction of what they take in the model as given."""
    avg_bits: float | None = Field(default=None, gt=0, le=64)
    """Bits for each of their original weights, scales and all else that is written included."""
    fit: Annotated[Fit | None, BeforeValidator(_memory_alone, json_schema_input_type=Fit | str | None)] = (
        Field(default=None, exclude_if=lambda value: value is None)
    )
    """What is left of the GPU that the model is to be served on."""

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, value: Any) -> Any:
        value = {} if value is None else value
        if isinstance(value, list | tuple):
            raise ValueError("a list within the list of budgets; give one list")
        value = _short(value) if isinstance(value, str) else value
        if isinstance(value, str | int | float):
            raise ValueError(f"say what {value} counts: {_FORMS_TEXT}, as in 'budget: {{ratio: 0.35}}'")
        if isinstance(value, dict):
            given = [form for form in FORMS if value.get(form) is not None]
            if len(given) > 1:
                raise ValueError(f"two budget forms, {' and '.join(map(repr, given))}; keep one of them")
            if not given and not set(value) - set(FORMS):
                raise ValueError(f"no budget given; write {_FORMS_TEXT}")
        return value

    @property
    def form(self) -> str:
        return next(form for form in FORMS if getattr(self, form) is not None)

    @property
    def text(self) -> str:
        """The budget as the user put it, for people."""
        if self.bytes is not None:
            return format_size(self.bytes)
        if self.fit is not None:
            return self.fit.text
        return f"ratio {self.ratio:g}" if self.ratio is not None else f"{self.avg_bits:g} bits per weight"

    @property
    def name(self) -> str:
        """What the directory of this budget is called where there are several; no two budgets share one."""
        if self.bytes is not None:
            return exact_size(self.bytes)
        if self.fit is not None:
            return self.fit.name
        if self.ratio is not None:
            return f"{_decimal(Fraction(str(self.ratio)) * 100)}pct"
        return f"{_decimal(Fraction(str(self.avg_bits)))}bit"

    def resolve(self, table: CostTable, room: Room | None = None) -> Budget:
        """Integer bytes, rounded down. Raises BudgetError, naming the smallest and largest possible figure.

        `room` is what the form `fit` leaves, and needed for it alone.
        Refused are a budget below what the cheapest option everywhere costs (with each layer keeping the
        experts a token needs), and one above what the routed experts take uncompressed. A budget between the
        dearest option everywhere and that is granted: the search may then give every expert its dearest
        option, and the rest is slack.
        """
        unit = self._bytes_per_unit(table)
        value = getattr(self, self.form) if room is None else room.left
        # Through the decimal digits: 0.35 means 35/100, not the binary float next to it.
        size = math.floor(Fraction(str(value)) * unit)
        smallest, largest = table.range[0], max(table.range[1], table.original_bytes)
        if smallest <= size <= largest:
            return Budget(size, self.text, self.name, room)
        if size < smallest:
            problem = f"is too small for the options {', '.join(option.name for option in table.options)}"
            if table.prune_index is not None:
                problem += f" (every layer keeps at least {table.floor} experts)"
        else:
            problem = f"is more than {covered(table)} take uncompressed: nothing needs to be done"
        raise BudgetError(
            f"budget {self._figure(value, size)}{' is what fit leaves, and' if room else ''} {problem}; the smallest possible is "
            f"{self._show(smallest, unit, up=True)}, the largest {self._show(largest, unit)}"
        )

    def _bytes_per_unit(self, table: CostTable) -> Fraction:
        if self.bytes is not None or self.fit is not None:
            return Fraction(1)
        return Fraction(table.original_bytes) if self.ratio is not None else Fraction(table.numel, 8)

    def _show(self, size: int, unit: Fraction, up: bool = False) -> str:
        """Bytes in the user's own unit, rounded so that the figure shown can be typed into the recipe."""
        scaled = Fraction(size) / unit * 10_000
        return self._figure((math.ceil(scaled) if up else math.floor(scaled)) / 10_000, size)

    def _figure(self, value: float, size: int) -> str:
        if self.bytes is not None or self.fit is not None:
            return f"{size:,} bytes ({format_size(size)})"
        return f"{self.form} {value:g} ({size:,} bytes)"


def _short(text: str) -> object:
    """The full form of `35%` and of a size with a unit; other texts as they are."""
    if match := _PERCENT.fullmatch(text):
        if not 0 < Fraction(match[1]) <= 100:
            raise ValueError(f"a budget in % must be greater than 0% and at most 100%, not {text.strip()}")
        return {"ratio": float(Fraction(match[1]) / 100)}
    try:
        size = parse_size(text)
    except ValueError:
        return text
    return {"bytes": size} if text.strip()[-1].isalpha() else text


def _decimal(value: Fraction) -> str:
    """All its decimal digits, without an exponent: values that differ read differently."""
    whole, rest = divmod(value, 1)
    digits = ""
    while rest:
        digit, rest = divmod(rest * 10, 1)
        digits += str(digit)
    return f"{whole}.{digits}" if digits else str(whole)
