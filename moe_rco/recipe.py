"""The recipe: everything a run is told, as one frozen value; loading it, and messages that name the line."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    WrapSerializer,
    model_validator,
)

from moe_rco import marked_yaml
from moe_rco.budget import BudgetSpec, Size
from moe_rco.errors import RecipeError
from moe_rco.recipe_errors import MisplacedError, explain
from moe_rco.recipe_overrides import apply_overrides
from moe_rco.types import Layout, Option

_PACKAGE = Path(__file__).resolve().parent
DEMO = "demo"
DEMO_MODEL = _PACKAGE / "demo" / "model"
DEMO_CALIBRATION = _PACKAGE / "demo" / "text" / "calibration.jsonl"
DEMO_HELDOUT = _PACKAGE / "demo" / "text" / "heldout.jsonl"


def _option(value: object) -> Option:
    if isinstance(value, Option):
        return value
    if not isinstance(value, str):
        raise ValueError(f"an option is a word such as prune or int4-g64, not {value!r}")
    try:
        return Option.parse(value)
    except RecipeError as error:
        raise ValueError(str(error)) from error


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _sources(value: object) -> object:
    listed = (value,) if isinstance(value, str | dict) else _tuple(value)
    if not isinstance(listed, tuple):
        return listed
    return tuple({"data": item} if isinstance(item, str) else item for item in listed)


def _budgets(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _one_or_list(value: object, serialize: SerializerFunctionWrapHandler) -> Any:
    """A single budget is written without the list."""
    written = serialize(value)
    return written[0] if len(written) == 1 else written


def _version(value: object) -> object:
    if isinstance(value, bool) or value != 1:
        raise ValueError(f"this program reads recipes of version 1, not {value}")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", value):
        raise ValueError(f"must be auto, cpu, mps, cuda or a numbered GPU as in cuda:1, not '{value}'")
    return value


def _or_defaults(value: object) -> object:
    """A section whose every key is commented out reads as null."""
    return {} if value is None else value


def _execution(value: object) -> object:
    """`execution: streaming` says the mode alone."""
    return {"mode": value} if isinstance(value, str) else _or_defaults(value)


def _is_none(value: object) -> bool:
    """Whether a key that came later is left out, so that digests of older recipes stay what they were."""
    return value is None


MOST = 10**9
"""No count in a recipe is larger."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Quantizer(_Section):
    """How weights are rounded: `gptq` compensates errors on calibration tokens, `rtn` rounds to nearest."""

    method: Literal["gptq", "rtn"] = "gptq"


class DataSource(_Section):
    """A Hub dataset, a .jsonl, .parquet or .txt file, or `demo`; `weight` is its share of all.

    `name` and `split` are those of `datasets.load_dataset`, for a Hub dataset. `text_field` is where its text or its
    conversations are, if elsewhere than in the others'.
    """

    data: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    name: str | None = Field(default=None, min_length=1, exclude_if=_is_none)
    split: str = Field(default="train", min_length=1, exclude_if=lambda split: split == "train")
    text_field: str | None = Field(default=None, min_length=1, exclude_if=_is_none)


class Calibration(_Section):
    """The text the choice is made on. `holdout` is the fraction of sequences never used for gradients."""

    data: Annotated[tuple[DataSource, ...], BeforeValidator(_sources), Field(min_length=1)]
    sequences: int = Field(default=512, ge=2, le=MOST)
    sequence_length: int = Field(default=2048, ge=8, le=MOST)
    holdout: float = Field(default=0.1, gt=0, lt=1)
    text_field: str = Field(default="text", min_length=1)

    @property
    def holdout_sequences(self) -> int:
        """Sequences kept out of the gradient: at least one, and at least one is left."""
        return min(max(1, round(self.sequences * self.holdout)), self.sequences - 1)

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length


SearchMethod = Literal[
    "rco",
    "fisher",
    "proxy",
    "linearity",
    "uniform",
    "frequency",
    "reap",
    "evolution",
    "penalty",
    "lagrangian",
]


class Search(_Section):
    """Steps of the search: `samples` Gumbel samples a step (antithetic pairs), each on `batch` sequences.

    Every `evaluate_every` steps the most probable assignment is judged on the kept-out sequences. Then `rco` refines the
    best one by races, for as long as `refine` steps take; other searches take so many steps more. `method` names what
    chooses: `rco`, or what it is compared with. `penalty` is the weight of the `penalty` and `lagrangian` methods,
    relative to the KL they start from.
    """

    method: SearchMethod = "rco"
    steps: int = Field(default=300, ge=0, le=MOST)
    refine: int = Field(default=300, ge=0, le=MOST)
    samples: int = Field(default=4, ge=2, le=MOST, multiple_of=2)
    batch: int = Field(default=4, ge=1, le=MOST)
    learning_rate: float = Field(default=0.1, gt=0)
    tau_start: float = Field(default=1.0, gt=0)
    tau_end: float = Field(default=0.05, gt=0)
    evaluate_every: int = Field(default=10, ge=1, le=MOST)
    penalty: float = Field(default=10.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def races(self) -> int:
        """How long races refine what the search found, in steps."""
        return self.refine if self.method == "rco" else 0

    @property
    def search_steps(self) -> int:
        """Steps of the search itself: a method without races takes all."""
        return self.steps + self.refine - self.races


class Execution(_Section):
    """Where and how to compute; `auto` decides from the hardware and the model's size.

    `mode` resident has all weights in memory at every option, streaming reads them as they are needed. `memory_limit` is of the
    GPU's memory, or of the process's where there is none; without it what is free counts.
    """

    device: Annotated[str, AfterValidator(_device)] = "auto"
    mode: Literal["auto", "resident", "streaming"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_limit: Size | None = None


class Recipe(_Section):
    """One run: which model, which options, how many bytes, on which text, written where.

    `budget` is one, or a list of several: each gives a model of its own.
    """

    version: Annotated[Literal[1], BeforeValidator(_version)]
    model: str = Field(min_length=1)
    revision: str | None = Field(default=None, min_length=1)
    options: Annotated[
        tuple[Annotated[Option, PlainValidator(_option), PlainSerializer(str)], ...],
        BeforeValidator(_tuple),
        Field(min_length=1),
    ]
    budget: Annotated[
        tuple[BudgetSpec, ...],
        BeforeValidator(_budgets),
        Field(min_length=1),
        WrapSerializer(_one_or_list),
    ]
    layout: Layout = "mixed"
    experimental: bool = False
    quantizer: Annotated[Quantizer, BeforeValidator(_or_defaults)] = Quantizer()
    calibration: Calibration
    search: Annotated[Search, BeforeValidator(_or_defaults)] = Search()
    execution: Annotated[Execution, BeforeValidator(_execution)] = Execution()
    output: str = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [option.name for option in self.options]
        twice = [name for index, name in enumerate(names) if name in names[:index]]
        if twice:
            raise MisplacedError(("options",), f"'{twice[0]}' is listed twice")
        if all(option.is_prune for option in self.options):
            raise MisplacedError(
                ("options",), "at least one option must keep an expert, such as int4-g64 or bf16"
            )
        for index, budget in enumerate(self.budget):
            if budget in self.budget[:index]:
                raise MisplacedError(("budget", index), f"{budget.text} is listed twice; keep one of them")
        low = [option.name for option in self.options if option.bits in (2, 3)]
        if low and self.layout == "stock":
            raise MisplacedError(
                ("options",),
                f"{' and '.join(low)}: without this package neither vLLM nor transformers reads experts of 2 or "
                "3 bits; leave out, or write 'layout: mixed'",
            )
        if low and not self.experimental:
            raise MisplacedError(
                ("options",),
                f"{' and '.join(low)} cannot be served by vLLM's fast CUDA kernels yet; leave out, or "
                "write 'experimental: true'",
            )
        method = self.search.method
        if method in ("frequency", "reap") and not any(option.is_prune for option in self.options):
            raise MisplacedError(
                ("search", "method"), f"{method} prunes experts: 'prune' must be among the options"
            )
        if method in ("evolution", "penalty", "lagrangian") and self.layout == "stock":
            raise MisplacedError(
                ("search", "method"), f"{method} knows layout mixed only; use rco, or write 'layout: mixed'"
            )
        if self.search.tau_end > self.search.tau_start:
            raise MisplacedError(("search", "tau_end"), "must not be greater than tau_start")
        return self

    @property
    def model_directory(self) -> Path | None:
        """The local directory `model` names (`demo`: the shipped one), or None if it is not one here."""
        path = DEMO_MODEL if self.model == DEMO else Path(self.model).expanduser()
        return path if path.is_dir() else None

    def digest(self) -> str:
        """sha256 of everything that decides the result: all keys but `output`, defaults included."""
        return self._digest({"output"})

    def search_digest(self) -> str:
        """The same of what a search goes on from: how much memory it may take changes no more than rounding."""
        return self._digest({"output": True, "execution": {"mode", "memory_limit"}})

    def _digest(self, exclude: Any) -> str:
        data = self.model_dump(mode="json", exclude=exclude)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every default written out; `parse` reads it back to an equal value."""
        return marked_yaml.dump(self.model_dump(mode="json", exclude_none=True))


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name without `.yaml`."""
    # A wheel carries them inside the package; in a source checkout they stand beside it.
    place = _PACKAGE / "recipes"
    if not place.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        place = _PACKAGE.parent / "recipes"
    return {path.stem: path for path in sorted(place.glob("*.yaml"))}


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped one by name. `overrides` are texts `a.b=value`. Raises RecipeError."""
    path = Path(path_or_name)
    if not path.is_file():
        path = _find_shipped(str(path_or_name))
    try:
        if (
            path.stat().st_size > 4 * marked_yaml.MAX_CHARACTERS
        ):  # before it is read: a character has up to four bytes
            raise RecipeError(f"{path}: {path.stat().st_size:,} bytes long; this is not a recipe")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text; is this a recipe?") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(text, str(path), overrides)


def parse(text: str, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe's YAML; `source` names it in messages. Raises RecipeError, one line with the place."""
    document = marked_yaml.parse(text, source)
    apply_overrides(document, overrides)
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(explain(error, document, Recipe)) from error


def _find_shipped(name: str) -> Path:
    known = shipped()
    if (stem := name.removesuffix(".yaml")) in known:
        return known[stem]
    kind = "is a directory, not a recipe file" if Path(name).is_dir() else "no such recipe file"
    near = difflib.get_close_matches(stem, known, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"{name}: {kind}{hint} (recipes that come with moe_rco: {', '.join(known)})")
