"""The text of the demo models: what is trained on, what ships, and how the two are kept apart.

A corpus folder ``DIR`` holds plain text, one document a file, in ``DIR/{prose,technical,code}/*.txt``. Build it
from public packages with ``eval.gather``, whose docstring lists the sources; more books (e.g. from Project
Gutenberg) may be added to ``DIR/prose`` as files of a chapter or so. Arithmetic is generated.

::

    python -m eval.corpus DIR moe_rco/demo/text

selects the shipped text from the files named ``ship-*`` (in the order of a hash of the name, taking turns
between sources; every fourth of a source is held out) and writes ``calibration.jsonl`` and ``heldout.jsonl``, lines of
``{"domain": ..., "text": ...}``. Training (``eval.train_demo``) then reads every document of ``DIR`` that
shares no passage with either file, whatever its name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from eval import arithmetic

DOMAINS = ("prose", "technical", "code", "arithmetic")
SHIPPED_TEXT = Path(__file__).resolve().parent.parent / "moe_rco" / "demo" / "text"
SHIPPED_CHARS = {"prose": 270_000, "technical": 235_000, "code": 240_000, "arithmetic": 160_000}
SECTION = (1500, 6000)
HELD_OUT_EVERY = 4
TRAIN_ARITHMETIC_DOCUMENTS = 4000
SHINGLE_WORDS = 13
# A long licence header makes up to 7 shingles in common; the shortest shipped section has about 15.
SHARED_SHINGLES = 8


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _section(text: str) -> str:
    """The start of a document, up to the last paragraph that fits."""
    if len(text) <= SECTION[1]:
        return text
    end = text.rfind("\n\n", SECTION[0], SECTION[1])
    return text[: end if end > 0 else SECTION[1]].rstrip() + "\n"


def select_shipped(corpus: Path) -> dict[str, list[dict[str, str]]]:
    """The shipped documents: ``calibration`` and ``heldout``, lists of ``{"domain", "text"}``."""
    chosen: dict[str, list[dict[str, str]]] = {"calibration": [], "heldout": []}
    for domain in DOMAINS:
        if domain == "arithmetic":
            for name, seed, share, unseen in (("calibration", 11, 0.75, False), ("heldout", 12, 0.25, True)):
                count = round(SHIPPED_CHARS[domain] * share / 2500)
                texts = arithmetic.documents(seed, count, use_held_out=unseen)
                chosen[name] += [{"domain": domain, "text": text} for text in texts]
            continue
        sources: defaultdict[str, list[Path]] = defaultdict(list)
        for path in sorted((corpus / domain).glob("ship-*.txt"), key=lambda path: _digest(path.name)):
            sources[path.name.split("-")[1]].append(path)
        turns = (path for turn in zip_longest(*sources.values()) for path in turn if path)
        chars, seen, taken = 0, set(), Counter[str]()
        for path in turns:
            text, source = _section(path.read_text()), path.name.split("-")[1]
            if chars >= SHIPPED_CHARS[domain]:
                break
            if len(text) < SECTION[0] or text in seen:
                continue
            seen.add(text)
            taken[source] += 1
            part = "calibration" if taken[source] % HELD_OUT_EVERY else "heldout"
            chosen[part].append({"domain": domain, "text": text})
            chars += len(text)
    return chosen


def read_jsonl(path: Path) -> list[dict[str, str]]:
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _shingles(text: str, stride: int) -> Iterator[int]:
    words = _words(text)
    return (
        hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(0, len(words) - SHINGLE_WORDS + 1, stride)
    )


def shared_shingles(shipped: Iterable[str]) -> frozenset[int]:
    return frozenset(shingle for text in shipped for shingle in _shingles(text, SHINGLE_WORDS))


def overlaps(text: str, shipped: frozenset[int]) -> bool:
    """Whether a training document contains a passage of the shipped text."""
    found: set[int] = set()
    for shingle in _shingles(text, 1):
        if shingle in shipped:
            found.add(shingle)
            if len(found) >= SHARED_SHINGLES:
                return True
    return False


def training_documents(corpus: Path, domain: str, shipped_text: Path = SHIPPED_TEXT) -> list[str]:
    if domain == "arithmetic":
        return arithmetic.documents(1, TRAIN_ARITHMETIC_DOCUMENTS)
    shipped = shared_shingles(
        row["text"]
        for name in ("calibration", "heldout")
        for row in read_jsonl(shipped_text / f"{name}.jsonl")
        if row["domain"] == domain
    )
    paths = sorted((corpus / domain).glob("*.txt"), key=lambda path: _digest(path.name))
    return [text for text in (path.read_text() for path in paths) if not overlaps(text, shipped)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in select_shipped(args.corpus).items():
        with (args.out / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for domain in DOMAINS:
            texts = [row["text"] for row in rows if row["domain"] == domain]
            print(f"{name} {domain}: {len(texts)} documents, {sum(map(len, texts)) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
