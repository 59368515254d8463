"""Calibration text: documents cut into sequences of tokens.

Sequences never mix the two sides: a document is either used for gradients or kept out, so what is measured on the kept-out
sequences is not learnt by heart. Of conversations what the assistant says counts, and no more; in the arrays on the way to a pool
a token that does not count is `~token`, which is negative.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from moe_rco.calib.chat import tokenize_conversation
from moe_rco.calib.documents import read_documents
from moe_rco.calib.refusals import reason
from moe_rco.errors import DataError, ModelError, is_fault
from moe_rco.recipe import DEMO, DEMO_HELDOUT
from moe_rco.recipe_sections import Calibration, DataSource

_log = logging.getLogger(__name__)
PIECE = 1 << 18
"""Characters that are made into tokens at a time: tokenizers take hundreds of bytes for each."""
MOST_TOKENS = 1 << 24
"""More than any vocabulary has."""
SPAN = 32
"""Tokens that different texts hardly ever have in common in a row."""


@dataclass(frozen=True)
class TokenPool:
    """Sequences of equal length. ids int64 [N, S]; `domains` names where each came from.

    `weights` float32 [N, S] say how much the prediction at each position counts, 1 in the mean of every sequence; None where
    all count the same.
    """

    ids: torch.Tensor
    domains: tuple[str, ...]
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, rows: Sequence[int]) -> TokenPool:
        """Some of the sequences."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        weights = None if self.weights is None else self.weights[chosen]
        return TokenPool(self.ids[chosen], tuple(self.domains[row] for row in rows), weights)

    def every(self, step: int) -> TokenPool:
        """Every `step`-th sequence."""
        return self.of(range(0, len(self), step))

    def digest(self) -> str:
        """SHA-256 (hex) of the tokens, and of what counts where not all do."""
        found = hashlib.sha256(self.ids.numpy().tobytes())
        if self.weights is not None:
            found.update(self.weights.numpy().tobytes())
        return found.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield part, self.ids[part]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory. Raises ModelError."""
    _check_numbers(directory / "tokenizer.json")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:  # the library that parses the files raises nothing narrower
        if not is_fault(error):
            raise
        raise ModelError(
            f"{directory}: no usable tokenizer ({reason(error)}); copy the model's tokenizer files there"
        ) from error
    if not tokenizer("Any text has tokens.")["input_ids"]:  # made up by transformers where there are no files
        raise ModelError(f"{directory}: no tokenizer; copy the model's tokenizer files there")
    return tokenizer


def _check_numbers(path: Path) -> None:
    """The library that reads the file takes memory for every number up to the largest, and ends the process without it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        numbers = [*found["model"]["vocab"].values(), *(token["id"] for token in found["added_tokens"])]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return  # another kind of tokenizer, or one that the library refuses itself
    largest = max((number for number in numbers if isinstance(number, int)), default=0)
    if largest >= MOST_TOKENS:
        raise ModelError(f"{path}: a token has the number {largest:,}; download or copy the file again")


def check_sources(calibration: Calibration) -> None:
    """Read the first document of every source, so that a wrong name is told at once. Raises DataError."""
    for source in calibration.data:
        if next((d for d in read_documents(source, calibration.text_field) if d.text.strip()), None) is None:
            raise DataError(f"calibration data {source.data} has no text in it")


def make_pools(
    calibration: Calibration, tokenizer: Any, vocab_size: int, seed: int
) -> tuple[TokenPool, TokenPool]:
    """The sequences for gradients and those kept out, disjoint in documents.

    Each source gives a share of `calibration.sequences` by its weight, and each domain of a source the same fraction of
    kept-out sequences. A source with less text than its share gives all it has. Raises DataError.
    """
    total = sum(source.weight for source in calibration.data)
    train: list[tuple[str, np.ndarray]] = []
    kept_out: list[tuple[str, np.ndarray]] = []
    for source in calibration.data:
        wanted = max(2, round(calibration.sequences * source.weight / total))
        for part, rows in zip(
            (train, kept_out), _pool(source, calibration, tokenizer, wanted, seed), strict=True
        ):
            part.extend(rows)
    if not train or not kept_out:
        raise DataError(
            f"calibration data {', '.join(source.data for source in calibration.data)} is too short: it must give at "
            f"least two documents of one sequence of {calibration.sequence_length} tokens each; add text or lower "
            "calibration.sequence_length"
        )
    largest = max(int(np.maximum(row, ~row).max()) for _, row in train + kept_out)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size} entries"
        )
    return _stack(train, seed), _stack(kept_out, seed)


def _pool(
    source: DataSource, calibration: Calibration, tokenizer: Any, wanted: int, seed: int
) -> tuple[list[tuple[str, np.ndarray]], list[tuple[str, np.ndarray]]]:
    length = calibration.sequence_length
    documents: dict[str, list[np.ndarray]] = {}
    tokens, ahead = (
        0,
        2 * wanted * length,
    )  # read ahead of need, so that the sample is not only a stream's first lines
    for document in read_documents(source, calibration.text_field):
        if not document.text.strip():
            continue
        if document.turns:
            ids = tokenize_conversation(tokenizer, document.turns, source.data)
        else:
            ids = tokenize(tokenizer, document.text, ahead)
        documents.setdefault(document.domain, []).append(ids)
        tokens += len(ids)
        if tokens >= ahead and source.data != DEMO:
            break
    if not documents:
        raise DataError(f"calibration data {source.data} has no text in it")
    generator = np.random.default_rng(seed)
    train: list[tuple[str, np.ndarray]] = []
    kept_out: list[tuple[str, np.ndarray]] = []
    for domain in sorted(documents):
        order = generator.permutation(len(documents[domain]))
        shuffled = [documents[domain][index] for index in order]
        if len(shuffled) == 1:  # one long text: its end is kept out
            cut = int(len(shuffled[0]) * (1 - calibration.holdout))
            shuffled = [shuffled[0][:cut], shuffled[0][cut:]]
        sizes = np.cumsum([len(ids) for ids in shuffled])
        first = int(np.searchsorted(sizes, sizes[-1] * (1 - calibration.holdout)))
        first = min(max(first, 1), len(shuffled) - 1)
        share = wanted * sizes[-1] / max(tokens, 1)
        for rows, part, fraction in (
            (train, shuffled[:first], 1 - calibration.holdout),
            (kept_out, shuffled[first:], calibration.holdout),
        ):
            # Of a sequence's first token nothing is predicted.
            cut_rows = [row for row in cut_sequences(part, length) if (row[1:] >= 0).any()]
            rows.extend((domain, row) for row in cut_rows[: max(1, round(share * fraction))])
        _log.info(
            "calibration text %s: %d documents, %d tokens read", domain, len(documents[domain]), sizes[-1]
        )
    return train, kept_out


def heldout_pool(calibration: Calibration, tokenizer: Any, kept_out: TokenPool) -> TokenPool:
    """The text the result is measured on: what ships for it beside the demo's calibration text, else what was kept out.

    Of the demo's at most about as many sequences as there are for calibration, of every domain the same share.
    """
    if any(source.data != DEMO for source in calibration.data):
        return kept_out
    rows: dict[str, list[np.ndarray]] = {}
    for document in read_documents(DataSource(data=str(DEMO_HELDOUT)), "text"):
        rows.setdefault(document.domain, []).append(tokenize(tokenizer, document.text))
    cut = {name: cut_sequences(rows[name], calibration.sequence_length) for name in sorted(rows)}
    share = min(1.0, calibration.sequences / max(1, sum(map(len, cut.values()))))
    chosen = [(name, row) for name in cut for row in cut[name][: max(1, round(share * len(cut[name])))]]
    if not chosen:
        return kept_out
    return TokenPool(
        torch.from_numpy(np.stack([row for _, row in chosen])), tuple(name for name, _ in chosen)
    )


def tokenize(tokenizer: Any, text: str, limit: int | None = None) -> np.ndarray:
    """Token ids int64 [n] of a document, ended by the tokenizer's end-of-text token if it has one.

    Of a text that has more than `limit` tokens not much more than its beginning is read.
    """
    ids, start = list[int](), 0
    while start < len(text) and (limit is None or len(ids) < limit):
        end = start + PIECE
        if end < len(text):
            space = text.rfind(" ", start + 1, end)
            end = space if space > 0 else end
        ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        start = end
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return np.array(ids, dtype=np.int64)


def cut_sequences(documents: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Join documents and cut them into sequences of `length` tokens; the remainder is dropped."""
    if not documents:
        return []
    joined = np.concatenate(documents)
    count = len(joined) // length
    return list(joined[: count * length].reshape(count, length))


def _stack(rows: list[tuple[str, np.ndarray]], seed: int) -> TokenPool:
    order = np.random.default_rng(seed).permutation(len(rows))
    tokens = np.stack([rows[index][1] for index in order])
    ids = torch.from_numpy(np.maximum(tokens, ~tokens))
    return TokenPool(ids, tuple(rows[index][0] for index in order), _weights(tokens >= 0))


def _weights(counted: np.ndarray) -> torch.Tensor | None:
    """Of positions, each of which predicts the next token: bool [N, S] says which tokens count."""
    if counted.all():
        return None
    following = np.concatenate([counted[:, 1:], counted[:, -1:]], axis=1).astype(np.float32)
    return torch.from_numpy(following / following.mean(1, keepdims=True))


def overlap(pool: TokenPool, others: TokenPool) -> float:
    """The share of a pool's text that also stands in another's: of all its spans of `SPAN` tokens."""
    own = _spans(pool)
    return float(np.isin(own, _spans(others)).mean()) if own.size else 0.0


def _spans(pool: TokenPool) -> np.ndarray:
    """A number for every span, uint64: equal ones have the same, and others hardly ever."""
    ids = pool.ids.numpy().astype(np.uint64)
    width = ids.shape[1] - SPAN + 1
    factors = np.random.default_rng(0).integers(1 << 63, size=SPAN, dtype=np.uint64) | np.uint64(1)
    total = np.zeros((len(ids), max(0, width)), dtype=np.uint64)
    for place, factor in enumerate(factors if width > 0 else ()):
        total += ids[:, place : place + width] * factor
    return total.ravel()
