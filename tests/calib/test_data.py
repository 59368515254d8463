"""Reading calibration text, and cutting it into disjoint sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_rco.calib.data import (
    PIECE,
    SPAN,
    TokenPool,
    cut_sequences,
    heldout_pool,
    load_tokenizer,
    make_pools,
    overlap,
    tokenize,
)
from moe_rco.calib.documents import read_documents
from moe_rco.errors import DataError, ModelError
from moe_rco.recipe import DEMO, DEMO_MODEL
from moe_rco.recipe_sections import Calibration, DataSource


class Words:
    """A tokenizer that gives every word of the form w12 its number."""

    eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


def calibration(*sources: DataSource, **values: Any) -> Calibration:
    return Calibration(**{"data": sources, "sequences": 20, "sequence_length": 8, "holdout": 0.25, **values})


def write_numbered(path: Path, documents: int, words: int, domain: str | None = None) -> DataSource:
    """Every token of every document is a different number, so that whatever happens to it can be followed."""
    first = int(path.stem.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
    rows: list[dict[str, str]] = []
    for number in range(documents):
        text = " ".join(f"w{first + number * words + word}" for word in range(words))
        rows.append({"text": text} | ({"domain": domain} if domain else {}))
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return DataSource(data=str(path))


def test_sides_share_no_document_and_no_token(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "x0.jsonl", documents=30, words=20)
    train, kept_out = make_pools(calibration(source), Words(), 1000, seed=0)
    documents = [{int(token) // 20 for token in pool.ids.flatten()} for pool in (train, kept_out)]
    assert not documents[0] & documents[1]
    assert len(train) == 15
    assert len(kept_out) == 5
    assert train.ids.shape[1] == kept_out.ids.shape[1] == 8
    tokens = np.concatenate([train.ids.flatten(), kept_out.ids.flatten()])
    assert len(np.unique(tokens)) == len(tokens)


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "x0.jsonl", documents=30, words=20)
    pools = [make_pools(calibration(source), Words(), 1000, seed)[0].ids for seed in (0, 0, 1)]
    assert (pools[0] == pools[1]).all()
    assert not (pools[0] == pools[2]).all()


def test_weights_share_out_the_sequences_and_domains_are_named(tmp_path: Path) -> None:
    first = write_numbered(tmp_path / "x0.jsonl", 40, 20, "first")
    second = write_numbered(tmp_path / "x1000.jsonl", 40, 20)
    sources = (first, DataSource(data=second.data, weight=3))
    train, kept_out = make_pools(calibration(*sources), Words(), 5000, seed=0)
    domains = [*train.domains, *kept_out.domains]
    assert {name: domains.count(name) for name in set(domains)} == {"first": 5, "x1000": 15}
    for pool in (train, kept_out):
        for row, name in zip(pool.ids, pool.domains, strict=True):
            assert bool((row < 1000).all()) == (name == "first")


def test_one_long_text_is_split_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"w{number}" for number in range(400)))
    train, kept_out = make_pools(calibration(DataSource(data=str(path))), Words(), 1000, seed=0)
    assert int(train.ids.max()) < int(kept_out.ids.min())
    assert set(train.domains) == {"book"}


def test_less_text_than_asked_for_gives_what_there_is(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "x0.jsonl", documents=6, words=20)
    train, kept_out = make_pools(calibration(source, sequences=500), Words(), 1000, seed=0)
    assert len(train) + len(kept_out) in (14, 15)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "x0.jsonl", documents=30, words=20)
    with pytest.raises(DataError, match="vocabulary has 100 entries"):
        make_pools(calibration(source), Words(), 100, seed=0)


def test_parquet_columns(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"body": ["one", "two"], "domain": ["a", "b"]}).to_parquet(path)
    documents = list(read_documents(DataSource(data=str(path)), "body"))
    assert [(document.text, document.domain) for document in documents] == [("one", "a"), ("two", "b")]
    with pytest.raises(DataError, match=r"set calibration\.text_field"):
        list(read_documents(DataSource(data=str(path)), "text"))


def test_a_local_parquet_file_is_copied_nowhere_and_told_to_nobody(tmp_path: Path) -> None:
    """In a process of its own, for the audit hook; `datasets` would keep a copy, and count the loading at a server."""
    from datasets import Dataset

    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"text": ["some words"] * 9}).to_parquet(path)
    program = f"""
import sys
from pathlib import Path
from moe_rco.calib.documents import read_documents
from moe_rco.recipe_sections import DataSource
from tests.faults.watch import watch
import datasets, requests
place = Path({str(tmp_path)!r})
sys.dont_write_bytecode = True
watch([], place, place / "watched")
print(len(list(read_documents(DataSource(data=str(place / "rows.parquet")), "text"))))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "9\n"
    assert (tmp_path / "watched").read_text() == ""


@pytest.mark.parametrize("limit", [None, 7_000])
def test_long_texts_are_made_into_tokens_piece_by_piece(limit: int | None) -> None:
    tokenizer, text = load_tokenizer(DEMO_MODEL), "Some words, and some more of them.\n" * 20_000
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenize(tokenizer, text, limit)
    assert len(text) > 2 * PIECE
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[:-1].tolist() == whole[: len(ids) - 1]
    if limit is None:
        assert len(ids) == len(whole) + 1
    else:
        assert limit < len(ids) < len(whole) / 2


@pytest.mark.parametrize("number", [2**31, 2**40])
def test_a_token_with_an_absurd_number(number: int, tmp_path: Path) -> None:
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["absurd"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=f"a token has the number {number:,}"):
        load_tokenizer(tmp_path)


def test_a_text_without_any_space_is_cut_somewhere() -> None:
    tokenizer = load_tokenizer(DEMO_MODEL)
    ids = tokenize(tokenizer, "x" * (PIECE + 1000))
    assert tokenizer.decode(ids[:-1]) == "x" * (PIECE + 1000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1: no text in 'text'"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.csv", b"a,b", "unknown kind of file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(DataSource(data=str(tmp_path / name)), "text"))


def test_cutting_drops_only_the_remainder() -> None:
    rows = cut_sequences([np.arange(5), np.arange(5, 12)], 4)
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert cut_sequences([np.arange(3)], 4) == []
    assert cut_sequences([], 4) == []


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_the_demo_is_measured_on_text_that_was_not_calibrated_on() -> None:
    settings = calibration(DataSource(data=DEMO), sequences=2000, sequence_length=256)
    tokenizer = load_tokenizer(DEMO_MODEL)
    train, kept_out = make_pools(settings, tokenizer, 4096, seed=0)
    heldout = heldout_pool(settings, tokenizer, kept_out)
    assert set(train.domains) == set(kept_out.domains) == set(heldout.domains)
    used = {row.numpy().tobytes() for pool in (train, kept_out) for row in pool.ids}
    assert not used & {row.numpy().tobytes() for row in heldout.ids}
    few = heldout_pool(settings.model_copy(update={"sequences": 40}), tokenizer, kept_out)
    assert set(few.domains) == set(heldout.domains)
    assert 38 <= len(few) <= 42 < len(heldout)


def test_overlap_is_the_share_of_spans_that_stand_in_both() -> None:
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, 1000, (8, 64)))
    pool = TokenPool(ids, ("x",) * 8)
    assert overlap(pool, TokenPool(ids.flip(0), ("x",) * 8)) == 1
    assert overlap(pool, TokenPool(ids + 1000, ("x",) * 8)) == 0
    # Two of eight sequences, cut elsewhere: of 33 spans each, those within the 48 tokens that are there.
    shifted = ids[:2].roll(16, 1)
    shifted[:, :16] = 5000
    assert overlap(pool, TokenPool(shifted, ("x",) * 2)) == 2 * (48 - SPAN + 1) / (8 * (64 - SPAN + 1))
    assert overlap(TokenPool(ids[:, : SPAN - 1], ("x",) * 8), pool) == 0  # too short to tell


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    """Unicode has line ends of its own, which may stand in a JSON string as they are."""
    texts = ["one\u2028line", "and\u0085another", "plain"]
    path = tmp_path / "x.jsonl"
    path.write_text(
        "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8"
    )
    assert [document.text for document in read_documents(DataSource(data=str(path)), "text")] == texts
