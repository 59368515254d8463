"""Calibration text that is none, or not what its name says."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tests.faults.judge import Case
from tests.faults.values import damage, replace


def _parquet(columns: dict[str, list[object]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _talk(*contents: str, **more: str) -> bytes:
    """Lines of a conversation whose turns are the user's and the assistant's in turn."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return (json.dumps({"messages": turns} | more) + "\n").encode() * 200


TURNS: tuple[object, ...] = (
    None, 3, {}, [], "words", {"role": "user"}, {"role": 5, "content": "x"}, {"role": "user", "content": None},
    {"role": "user", "content": [{"image": "x"}]}, {"role": "assistant", "content": ""}, {"from": "gpt", "value": "words"},
    {"role": "nobody", "content": "words"}, {"role": "user", "content": "\ud800"},
)  # fmt: skip
CONTENTS: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "null.jsonl": b"null\n" * 9,
    "numbers.jsonl": b'{"text": 3}\n' * 9,
    "list.jsonl": b"[1, 2]\n" * 9,
    "column.jsonl": b'{"body": "words"}\n' * 9,
    "nothing.jsonl": b'{"text": ""}\n' * 9,
    "half.jsonl": b'{"text": "words',
    "nan.jsonl": b'{"text": NaN}\n',
    "deep.jsonl": b"[" * 100_000,
    "surrogate.jsonl": b'{"text": "\\ud800"}\n' * 99,
    "nul.jsonl": b'{"text": "a\\u0000b c d e"}\n' * 400,
    "short.txt": b"Few words.",
    "empty.txt": b"",
    "binary.txt": bytes(range(256)) * 99,
    "utf16.txt": "words ".encode("utf-16") * 99,
    "line.txt": b"word " * 400_000,
    "same.txt": b"\x00" * 50_000,
    "empty.parquet": b"",
    "not.parquet": b"PAR1" + b"x" * 500 + b"PAR1",
    "sound.parquet": _parquet({"text": [f"some words to read here, {n} of them" for n in range(600)]}),
    "number.parquet": _parquet({"text": [1, 2, 3]}),
    "other.parquet": _parquet({"body": ["words"]}),
    "null.parquet": _parquet({"text": [None, None]}),
    "rows.parquet": _parquet({"text": []}),
    "other.csv": b"a,b\n1,2\n",
    "array.json": b'[{"text": "words"}]',
    "none": b"words",
    "bom.jsonl": b'\xef\xbb\xbf{"text": "words"}\n' * 9,
    "long.jsonl": b'{"text": "' + b"word " * 300_000 + b'"}\n',
    "domains.jsonl": b'{"text": "some words to read here", "domain": {"a": 1}}\n' * 200,
    "huge.txt": b"word " * 10_000_000,
    "emoji.txt": ("\U0001f4a9\u202e" * 9_000).encode(),
    "talk.jsonl": _talk("What is it?", "It is what it is."),
    "silent.jsonl": _talk("Only a question, and another one."),
    "nobody.jsonl": b'{"messages": []}\n' * 200,
    "turns.jsonl": b"".join(
        _talk("a", "b").splitlines()[0][:-2] + b"," + json.dumps(t).encode() + b"]}\n" for t in TURNS
    ),
    "long-talk.jsonl": _talk("a" * 300_000, "b" * 300_000)[: 3 * 600_100],
    "pairs.jsonl": b'{"prompt": "What is it, and why?", "completion": "It is what it is, and that is why."}\n'
    * 200,
    "talk.parquet": _parquet(
        {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 600}
    ),
}
_CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TEMPLATES = (
    _CHAT, _CHAT, _CHAT, "", "{{", "{{ messages[99].content }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for a in range(10**9) %}x{% endfor %}", "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}", "{% set ns = namespace(x=1) %}{{ cycler.__init__.__globals__.os.system('touch stray') }}",
)  # fmt: skip


def cases(base: Path, count: int, rng: random.Random) -> list[Case]:
    """Of a directory that holds a sound job."""
    fixed = [Case("calibration text", name, base, _content(name)) for name in CONTENTS]
    made = [
        Case("calibration text", "changed", base, rng.choice((_damaged, _replaced, _mixed, _foreign, _chat)))
        for _ in range(count)
    ]
    return [*fixed, *made][:count]


def _prune(*settings: str) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["prune", "--recipe", "recipe.yaml", "--dry-run", *sets]


def _content(name: str):
    def make(place: Path, rng: random.Random) -> list[str]:
        (place / name).write_bytes(CONTENTS[name])
        return _prune(f"calibration.data={name}")

    return make


def _damaged(place: Path, rng: random.Random) -> list[str]:
    damage(place / "model" / "text.jsonl", rng)
    return _prune()


def _replaced(place: Path, rng: random.Random) -> list[str]:
    replace(place / "model" / "text.jsonl", rng)
    return _prune()


def _mixed(place: Path, rng: random.Random) -> list[str]:
    """Sound and unsound sources together, with weights."""
    names = rng.sample(list(CONTENTS), 2)
    for name in names:
        (place / name).write_bytes(CONTENTS[name])
    weights = [rng.choice((0, -1, 1e-9, 1, 10**12, "x", None)) for _ in range(3)]
    sources = [
        {"data": name, "weight": w} for name, w in zip([*names, "model/text.jsonl"], weights, strict=True)
    ]
    return _prune(f"calibration.data={json.dumps(sources)}")


def _chat(place: Path, rng: random.Random) -> list[str]:
    """Conversations, sound ones and others, and a template of the model that is sound or is not."""
    (place / "model" / "chat_template.jinja").write_text(rng.choice(TEMPLATES), encoding="utf-8")
    name = rng.choice(
        [
            name
            for name in CONTENTS
            if name.startswith(("talk", "silent", "nobody", "turns", "long-talk", "pairs"))
        ]
    )
    content = CONTENTS[name]
    if name == "turns.jsonl":
        content = rng.choice(content.splitlines(keepends=True)) * 200
    (place / name).write_bytes(content)
    return _prune(f"calibration.data={name}", f"calibration.sequence_length={rng.choice((8, 16, 64))}")


def _foreign(place: Path, rng: random.Random) -> list[str]:
    """A tokenizer of another vocabulary: its tokens are not the model's, by much or by one."""
    path = place / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    moved = rng.choice((1, 1000, 10**6, 2**31, 2**40))
    last = max(vocabulary.values())
    for token, number in vocabulary.items():
        if moved > 1 or number == last:
            vocabulary[token] = number + moved
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return _prune()
