"""The sections of a recipe, and what each key means: its documentation and its JSON Schema are made from here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from moe_rco.budget import Size

_DEVICE = r"auto|cpu|mps|cuda(:[0-9]+)?"
MOST = 10**9
"""No count in a recipe is larger."""

SearchMethod = Literal[
    "rco", "fisher", "proxy", "linearity", "uniform", "frequency", "reap", "evolution", "penalty", "lagrangian",
]  # fmt: skip


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def or_defaults(value: object) -> object:
    """A section whose every key is commented out reads as null."""
    return {} if value is None else value


def mode_or_section(value: object) -> object:
    """`execution: streaming` says the mode alone."""
    return {"mode": value} if isinstance(value, str) else or_defaults(value)


def _sources(value: object) -> object:
    listed = (value,) if isinstance(value, str | dict) else as_tuple(value)
    if not isinstance(listed, tuple):
        return listed
    return tuple({"data": item} if isinstance(item, str) else item for item in listed)


def _device(value: str) -> str:
    if not re.fullmatch(_DEVICE, value):
        raise ValueError(f"must be auto, cpu, mps, cuda or a numbered GPU as in cuda:1, not '{value}'")
    return value


def _is_none(value: object) -> bool:
    """Whether a key that came later is left out, so that digests of older recipes stay what they were."""
    return value is None


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Quantizer(Section):
    """How weights are rounded."""

    method: Literal["gptq", "rtn"] = "gptq"
    """`gptq` makes up for errors on the calibration tokens, `rtn` rounds to nearest: faster, and worse."""


class DataSource(Section):
    """Text or conversations of one origin."""

    data: str = Field(min_length=1)
    """A dataset on the Hub, a `.jsonl`, `.parquet` or `.txt` file, or `demo`. Rows with `messages`, `conversations`, or a
    question and its answer are rendered with the model's chat template; then only what the assistant says counts."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the sequences, relative to the other sources'."""
    name: str | None = Field(default=None, min_length=1, exclude_if=_is_none)
    """Which configuration of a Hub dataset, as for `datasets.load_dataset`."""
    split: str = Field(default="train", min_length=1, exclude_if=lambda split: split == "train")
    """Which split of a Hub dataset."""
    text_field: str | None = Field(default=None, min_length=1, exclude_if=_is_none)
    """Where its text or its conversations are, if elsewhere than in the others'."""


class Calibration(Section):
    """The text that experts are quantised and chosen on: like what the model will be used for."""

    data: Annotated[
        tuple[DataSource, ...],
        BeforeValidator(
            _sources,
            json_schema_input_type=str | DataSource | Annotated[list[str | DataSource], Field(min_length=1)],
        ),
        Field(min_length=1),
    ]
    """One source, or a list of several. A name alone is short for `{data: NAME}`."""
    sequences: int = Field(default=512, ge=2, le=MOST)
    """How many. More text is the best protection against learning the calibration set by heart."""
    sequence_length: int = Field(default=2048, ge=8, le=MOST)
    """Tokens of each."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """The fraction of the sequences that is never used for gradients: it decides between candidates."""
    text_field: str = Field(default="text", min_length=1)
    """The field or column that holds the text."""

    @property
    def holdout_sequences(self) -> int:
        """Sequences kept out of the gradient: at least one, and at least one is left."""
        return min(max(1, round(self.sequences * self.holdout)), self.sequences - 1)

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length


class Search(Section):
    """How the choice is made, and how long for.

    Every `evaluate_every` steps the most probable assignment is judged on the kept-out sequences. Then `rco` refines the best
    one by races for as long as `refine` steps take; where the first assignment's loss is more than 1.75 times what was predicted,
    more steps come before, for as long as one of the last two looks found something better. Other searches take
    so many steps more.
    """

    method: SearchMethod = "rco"
    """`rco`, or what it is compared with."""
    steps: int = Field(default=300, ge=0, le=MOST)
    """Steps of gradient search. With 0 the first assignment, an exact knapsack, is refined at once."""
    refine: int = Field(default=300, ge=0, le=MOST)
    """How long the best assignment is refined, in steps."""
    samples: int = Field(default=4, ge=2, le=MOST, multiple_of=2)
    """Gumbel samples a step, in antithetic pairs: each is a model that could be deployed."""
    batch: int = Field(default=4, ge=1, le=MOST)
    """Sequences that a sample runs on."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Of Adam, on the logits."""
    tau_start: float = Field(default=1.0, gt=0)
    """The temperature of the Gumbel-softmax at the first step."""
    tau_end: float = Field(default=0.05, gt=0)
    """At the last one; between the two it falls geometrically."""
    evaluate_every: int = Field(default=10, ge=1, le=MOST)
    """Steps between two looks at the kept-out sequences."""
    penalty: float = Field(default=10.0, gt=0)
    """The weight of the methods `penalty` and `lagrangian`, relative to the KL they start from."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The same recipe, seed and machine give the same bytes."""

    @property
    def races(self) -> int:
        """How long races may refine what the search found, in steps."""
        return self.refine if self.method == "rco" else 0

    @property
    def search_steps(self) -> int:
        """Steps of the search itself: a method without races takes all."""
        return self.steps + self.refine - self.races


class Execution(Section):
    """Where and how to compute; the mode alone may be given, as in `execution: streaming`."""

    device: Annotated[
        str, AfterValidator(_device), WithJsonSchema({"type": "string", "pattern": f"^({_DEVICE})$"})
    ] = "auto"
    """`auto`, `cpu`, `mps`, `cuda` or a numbered GPU, as in `cuda:1`."""
    mode: Literal["auto", "resident", "streaming"] = "auto"
    """`resident` has all weights in memory at every option, `streaming` reads them as they are needed, and `auto` decides by
    the model's size."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in: `auto` is bfloat16 on a GPU, float32 elsewhere."""
    memory_limit: Size | None = None
    """The most to take of the GPU's memory, or of the machine's where there is none; otherwise what is free."""
