"""Builds the data of the demo's lm-eval tasks from the held-out text that ships with the package::

    python -m eval.make_tasks [eval/tasks]

Three kinds of task, one ``.jsonl`` each beside its YAML:

- ``demo_choice_{prose,technical,code}``: which of four continuations follows a passage; the wrong ones follow passages of
  other documents of the same domain.
- ``demo_arithmetic``: problems whose question stands neither in the training text nor in ``calibration.jsonl``. Additions are all
  of pairs that training never saw (``eval.arithmetic.held_out``).
- ``demo_text_{prose,technical,code,arithmetic}``: the documents in passages short enough for one context window of the demo
  models, for perplexity.

The only source is ``moe_rco/demo/text/heldout.jsonl`` (sources and licences: ``LICENSES.md`` beside it); the same source
and seed give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from eval import arithmetic
from eval.corpus import DOMAINS, SHIPPED_TEXT, TRAIN_ARITHMETIC_DOCUMENTS, read_jsonl

TASKS = Path(__file__).resolve().parent / "tasks"
SEED = 0
# Characters. So short a continuation leaves the small demo models something to get right: 120 items of each domain gave 50,
# 65 and 58 % right, a continuation twice as long 41, 55 and 60 %.
CONTEXT, CONTINUATION = 240, 40
CHOICES = 4
PASSAGE = 1200
TEXT_DOMAINS = tuple(domain for domain in DOMAINS if domain != "arithmetic")

Rows = list[dict[str, Any]]


def _documents(domain: str, name: str = "heldout") -> list[str]:
    return [row["text"] for row in read_jsonl(SHIPPED_TEXT / f"{name}.jsonl") if row["domain"] == domain]


def _excerpts(text: str, separator: str) -> list[tuple[str, str]]:
    """Disjoint (passage, what follows) pairs; what follows starts at a separator and ends with a word."""
    found, start = [], 0
    while (cut := text.find(separator, start + CONTEXT)) >= 0:
        space = re.compile(r"\s").search(text, cut + CONTINUATION)
        if space is None:
            break
        found.append((text[start:cut].strip(), text[cut : space.start()]))
        start = space.start()
    return found


def choice_rows(domain: str) -> Rows:
    """Items of ``{"text", "choices", "answer"}``; ``answer`` is the right choice's index."""
    rng = random.Random(SEED)
    # Code is cut at the end of a line, so that every continuation starts with one and its indentation.
    separator = "\n" if domain == "code" else " "
    excerpts = [
        (number, passage, following)
        for number, text in enumerate(_documents(domain))
        for passage, following in _excerpts(text, separator)
    ]
    rows = []
    for number, passage, following in excerpts:
        others = sorted({other for place, _, other in excerpts if place != number and other != following})
        choices = [following, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(choices)
        rows.append({"text": passage, "choices": choices, "answer": choices.index(following)})
    return rows


def problems(text: str) -> list[tuple[str, int]]:
    """(question, answer) of the problems in a text of ``eval.arithmetic``."""
    found = re.findall(r"Question: (.*)\nAnswer: .*The answer is (\d+)\.\n", text)
    return [(question, int(answer)) for question, answer in found]


def arithmetic_rows() -> Rows:
    """Items of ``{"question", "answer"}``, each question once, none of them learnt or calibrated on."""
    training = arithmetic.documents(1, TRAIN_ARITHMETIC_DOCUMENTS)
    seen = {
        question
        for text in [*training, *_documents("arithmetic", "calibration")]
        for question, _ in problems(text)
    }
    found = dict(problem for text in _documents("arithmetic") for problem in problems(text))
    return [
        {"question": question, "answer": answer} for question, answer in found.items() if question not in seen
    ]


def text_rows(domain: str) -> Rows:
    """Items of ``{"text"}``: the documents cut after the last line, or else the last word, that fits."""
    rows = []
    for document in _documents(domain):
        rest = document.strip()
        while len(rest) > PASSAGE:
            end = max(rest.rfind("\n", PASSAGE // 2, PASSAGE), 0) or rest.rfind(" ", 0, PASSAGE)
            rows.append({"text": rest[:end].rstrip()})
            rest = rest[end:].strip("\n")
        rows.append({"text": rest})
    return rows


def all_rows() -> dict[str, Rows]:
    """Task name -> its items."""
    return {
        **{f"demo_choice_{domain}": choice_rows(domain) for domain in TEXT_DOMAINS},
        "demo_arithmetic": arithmetic_rows(),
        **{f"demo_text_{domain}": text_rows(domain) for domain in DOMAINS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=TASKS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in all_rows().items():
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{name}: {len(rows)} items")


if __name__ == "__main__":
    main()
