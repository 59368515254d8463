"""The demo's lm-eval tasks: the committed files are what the program makes, from held-out text alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from eval import arithmetic
from eval.corpus import DOMAINS, SHIPPED_TEXT, overlaps, read_jsonl, shared_shingles
from eval.make_tasks import CHOICES, PASSAGE, TASKS, TEXT_DOMAINS, all_rows, problems

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def made() -> dict[str, Rows]:
    return all_rows()


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def documents(name: str, domain: str) -> list[str]:
    return [row["text"] for row in read_jsonl(SHIPPED_TEXT / f"{name}.jsonl") if row["domain"] == domain]


def test_committed_files_are_what_the_program_makes(made: dict[str, Rows]) -> None:
    assert {path.stem for path in TASKS.glob("*.jsonl")} == made.keys()
    for name, rows in made.items():
        assert read_jsonl(TASKS / f"{name}.jsonl") == rows


def test_every_task_has_its_data(made: dict[str, Rows]) -> None:
    files = {path.stem for path in TASKS.glob("*.yaml")}
    assert files == made.keys()
    for name in files:
        text = (TASKS / f"{name}.yaml").read_text().replace("!function ", "")
        config = yaml.safe_load(text)
        assert (config["task"], config["dataset_kwargs"]["file"]) == (name, f"{name}.jsonl")


@pytest.mark.parametrize("domain", TEXT_DOMAINS)
def test_choices_follow_passages_of_held_out_documents(domain: str, made: dict[str, Rows]) -> None:
    texts = [squeezed(text) for text in documents("heldout", domain)]
    rows = made[f"demo_choice_{domain}"]
    assert len(rows) > 150
    for row in rows:
        assert len(set(row["choices"])) == CHOICES
        right = row["choices"][row["answer"]]
        home = [text for text in texts if squeezed(row["text"] + right) in text]
        assert home
        for wrong in row["choices"]:
            assert wrong[0].isspace()
            assert any(squeezed(wrong) in text for text in texts)
            if wrong != right:
                assert not any(squeezed(row["text"] + wrong) in text for text in home)
    # No position is right much more often than another.
    places = [sum(row["answer"] == index for row in rows) for index in range(CHOICES)]
    assert min(places) > len(rows) / CHOICES * 0.7


def test_texts_are_the_held_out_documents_in_passages(made: dict[str, Rows]) -> None:
    for domain in DOMAINS:
        rows = made[f"demo_text_{domain}"]
        assert max(len(row["text"]) for row in rows) <= PASSAGE
        assert squeezed(" ".join(row["text"] for row in rows)) == squeezed(
            " ".join(documents("heldout", domain))
        )


def test_passages_fit_one_window_of_both_backends(made: dict[str, Rows]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_TEXT.parent / "model")
    longest = max(
        len(tokenizer(row["text"])["input_ids"]) for domain in DOMAINS for row in made[f"demo_text_{domain}"]
    )
    # lm-eval cuts longer text into windows, which differ between its backends by one token.
    assert longest <= 1024 - 2


def test_arithmetic_was_never_seen(made: dict[str, Rows]) -> None:
    rows = made["demo_arithmetic"]
    assert len(rows) > 200
    calibration = {
        question for text in documents("calibration", "arithmetic") for question, _ in problems(text)
    }
    additions = 0
    for row in rows:
        assert row["question"] not in calibration
        if found := re.fullmatch(r"What is (\d+) \+ (\d+)\?", row["question"]):
            a, b = map(int, found.groups())
            assert arithmetic.held_out(a, b)
            assert row["answer"] == a + b
            additions += 1
    assert additions > 100


def test_nothing_overlaps_with_the_calibration_text(made: dict[str, Rows]) -> None:
    for domain in TEXT_DOMAINS:
        calibration = shared_shingles(documents("calibration", domain))
        texts = [row["text"] for row in made[f"demo_text_{domain}"]]
        assert not [text for text in texts if overlaps(text, calibration)]
