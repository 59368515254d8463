"""The recipe: everything a run is told, as one frozen value; loading it, and messages that name the line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    WrapSerializer,
    model_validator,
)

from moe_rco import marked_yaml
from moe_rco.budget import BudgetSpec
from moe_rco.errors import RecipeError
from moe_rco.recipe_errors import MisplacedError, explain
from moe_rco.recipe_overrides import apply_overrides
from moe_rco.recipe_sections import (
    Calibration,
    Execution,
    Quantizer,
    Search,
    Section,
    as_tuple,
    mode_or_section,
    or_defaults,
)
from moe_rco.types import Kind, Layout, Option

_PACKAGE = Path(__file__).resolve().parent
DEMO = "demo"
DEMO_MODEL = _PACKAGE / "demo" / "model"
DEMO_CALIBRATION = _PACKAGE / "demo" / "text" / "calibration.jsonl"
DEMO_HELDOUT = _PACKAGE / "demo" / "text" / "heldout.jsonl"
DEFAULT_GROUPS: tuple[Kind, ...] = ("experts",)
_OPTIONS = r"^(prune|bf16|int(2|3|4|8)(-g[1-9][0-9]*)?)$"


def _option(value: object) -> Option:
    if isinstance(value, Option):
        return value
    if not isinstance(value, str):
        raise ValueError(f"an option is a word such as prune or int4-g64, not {value!r}")
    try:
        return Option.parse(value)
    except RecipeError as error:
        raise ValueError(str(error)) from error


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


class Recipe(Section):
    """One run: which model, which options, how many bytes, on which text, written where."""

    version: Annotated[Literal[1], BeforeValidator(_version)]
    """Of the recipe's format."""
    model: str = Field(min_length=1)
    """A directory with a Hugging Face checkpoint, a name on the Hub, or `demo`."""
    revision: str | None = Field(default=None, min_length=1)
    """Which commit, branch or tag of a model on the Hub."""
    options: Annotated[
        tuple[Annotated[Option, PlainValidator(_option), PlainSerializer(str)], ...],
        BeforeValidator(
            as_tuple,
            json_schema_input_type=Annotated[
                list[Annotated[str, Field(pattern=_OPTIONS)]], Field(min_length=1)
            ],
        ),
        Field(min_length=1),
    ]
    """What may become of an expert: `prune`, `bf16`, `int2`, `int3`, `int4`, `int8`, and with a group size that divides the
    model's widths `int4-g64`: one scale for so many weights."""
    budget: Annotated[
        tuple[BudgetSpec, ...],
        BeforeValidator(
            _budgets,
            json_schema_input_type=BudgetSpec | str | Annotated[list[BudgetSpec | str], Field(min_length=1)],
        ),
        Field(min_length=1),
        WrapSerializer(_one_or_list),
    ]
    """The most that the routed experts' files may take. A list gives a model for each budget in one run."""
    layout: Layout = "mixed"
    """`mixed`: every expert at its own precision, served by this package's plugin. `stock`: equally many experts at one
    precision in every layer, which vLLM serves without it."""
    groups: Annotated[
        tuple[Kind, ...],
        BeforeValidator(as_tuple, json_schema_input_type=Annotated[list[Kind], Field(min_length=1)]),
        Field(min_length=1, exclude_if=lambda groups: groups == DEFAULT_GROUPS),
    ] = DEFAULT_GROUPS
    """What the budget covers and options are chosen for; all else is copied. Beside the routed `experts`: `attention` (two
    choices a layer: queries, keys and values together, and the output projection), `shared_experts`, `embeddings`, `head`.
    These take the options that keep them and whose group size divides their widths; `bf16` leaves them as they are."""
    experimental: bool = False
    """Admits 2 and 3 bits, which vLLM serves on CPUs only."""
    quantizer: Annotated[Quantizer, BeforeValidator(or_defaults, json_schema_input_type=Quantizer | None)] = (
        Quantizer()
    )
    """How weights are rounded."""
    calibration: Calibration
    """The text that the choice is made on."""
    search: Annotated[Search, BeforeValidator(or_defaults, json_schema_input_type=Search | None)] = Search()
    """How the choice is made."""
    execution: Annotated[
        Execution,
        BeforeValidator(
            mode_or_section,
            json_schema_input_type=Execution | Literal["auto", "resident", "streaming"] | None,
        ),
    ] = Execution()
    """Where and how to compute."""
    output: str = Field(min_length=1)
    """The directory to write, which must not exist, or `--overwrite` be said."""

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
        self._check_groups()
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

    def _check_groups(self) -> None:
        place = ("groups",)
        if "experts" not in self.groups:
            raise MisplacedError(place, "'experts' must be among them: routed experts are always chosen for")
        twice = [kind for index, kind in enumerate(self.groups) if kind in self.groups[:index]]
        if twice:
            raise MisplacedError(place, f"'{twice[0]}' is listed twice")
        if self.groups == DEFAULT_GROUPS:
            return
        if self.layout == "stock":
            raise MisplacedError(
                place, "layout stock knows experts only; leave out the others, or write 'layout: mixed'"
            )
        if self.search.method == "linearity":
            raise MisplacedError(place, "search.method linearity knows experts only; leave out the others")

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
