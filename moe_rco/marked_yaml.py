"""YAML that remembers where every key stood, so that a message can name the line.

Stricter than YAML at large: a key may stand once, keys are text, there are no anchors, aliases or tags (a
recipe needs none, and aliases can blow a small file up), and plain words read as in YAML 1.2: `no` is text,
`1e-3` a number, `010` is ten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from moe_rco.errors import RecipeError

Path = tuple[str | int, ...]

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 20

_HALF = re.compile("[\ud800-\udfff]")
_STRING, _MAP = "tag:yaml.org,2002:str", "tag:yaml.org,2002:map"
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
# Tag, pattern, and the characters such a word can begin with.
_PLAIN = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", tuple("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        rf"{_NUMBER}(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
)


@dataclass(frozen=True)
class Document:
    """`data` is plain dicts, lists and scalars; `marks` says where the value at a path was written."""

    data: dict[str, Any]
    marks: dict[Path, str]

    def where(self, path: Path) -> str:
        """The mark of the path, or of the nearest thing around it."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, "recipe")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and form PyYAML looks up

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (& and *) are not allowed", problem_mark=mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and _HALF.search(node.value):
            raise yaml.MarkedYAMLError(problem="half a character (a lone surrogate)", problem_mark=mark)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our loader would take for something other than text."""


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, source: str) -> Document:
    """Read one mapping. `source` is the file's name for messages. Raises RecipeError."""
    node = _compose(text, source)
    if node is None:
        raise RecipeError(f"{source}: the recipe is empty")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{source}:{node.start_mark.line + 1}: a recipe is a mapping of keys to values")
    marks: dict[Path, str] = {(): source}
    return Document(_construct(node, (), marks, source), marks)


def parse_value(text: str, source: str) -> Any:
    """Read one value, as given on the command line. Raises RecipeError."""
    node = _compose(text, source)
    return None if node is None else _construct(node, (), {}, source)


def dump(data: dict[str, Any]) -> str:
    """YAML that `parse` reads back to the same data, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _compose(text: str, source: str) -> yaml.Node | None:
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{source}: longer than {MAX_CHARACTERS:,} characters; this is not a recipe")
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise RecipeError(f"{source}: not valid YAML: {error.reason} (#x{error.character:04x})") from error


def _construct(node: yaml.Node, path: Path, marks: dict[Path, str], source: str) -> Any:
    mark = f"{source}:{node.start_mark.line + 1}"
    marks.setdefault(path, mark)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, index), marks, source) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        try:
            return _Loader("").construct_object(node)
        except (yaml.MarkedYAMLError, ValueError) as error:
            problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
            raise RecipeError(f"{mark}: not a usable value: {problem}") from error
    if not isinstance(node, yaml.MappingNode) or node.tag != _MAP:
        raise RecipeError(f"{mark}: tags such as {node.tag} are not allowed")
    result: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != _STRING:
            raise RecipeError(f"{source}:{line}: a key must be a word, not {str(key.value)[:40]!r}")
        name = ".".join(map(str, (*path, key.value)))
        if key.value in result:
            first = marks[(*path, key.value)].rpartition(":")[2]
            raise RecipeError(f"{source}:{line}: {name}: this key stands twice, first on line {first}")
        # The key's own line: a value may begin lines below it.
        marks[(*path, key.value)] = f"{source}:{line}"
        result[key.value] = _construct(value, (*path, key.value), marks, source)
    return result
