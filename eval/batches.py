"""Training tokens of each domain, and the mixed batches drawn from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eval.corpus import DOMAINS, training_documents
from eval.tokenizer import train_tokenizer

MIX = {"prose": 0.35, "technical": 0.25, "code": 0.25, "arithmetic": 0.15}
TOKENIZER_CHARS = 2_500_000


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents in one stream, each preceded by the end-of-text token."""
    end = tokenizer.eos_token_id
    parts = [
        np.array([end, *ids], dtype=np.uint16)
        for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[misc]
    ]
    return np.concatenate(parts)


def prepare(corpus: Path, cache: Path, tokenizer: Path | None = None) -> None:
    """Train the tokenizer (or take the one in the folder ``tokenizer``) and tokenise the text, once, into ``cache``."""
    if (cache / "done").exists():
        return
    cache.mkdir(parents=True, exist_ok=True)
    documents = {domain: training_documents(corpus, domain) for domain in DOMAINS}
    encoder = PreTrainedTokenizerFast.from_pretrained(tokenizer) if tokenizer else _train(documents)
    encoder.save_pretrained(cache / "tokenizer")
    for domain, texts in documents.items():
        tokens = encode(encoder, texts)
        np.save(cache / f"{domain}.npy", tokens)
        print(f"{domain}: {len(texts)} documents, {len(tokens) / 1e6:.2f} M tokens", flush=True)
    (cache / "done").touch()


def _train(documents: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    samples: list[str] = []
    for domain, texts in documents.items():
        chars = 0
        for text in texts:
            if chars >= TOKENIZER_CHARS * (0.1 if domain == "arithmetic" else 1):
                break
            samples.append(text)
            chars += len(text)
    return train_tokenizer(samples)


class Batches:
    """Batch ``step`` depends only on the seed and the step, so that a resumed run sees the same batches."""

    def __init__(
        self,
        streams: dict[str, np.ndarray],
        question: int | None,
        seed: int,
        mix: dict[str, float] | None = None,
    ) -> None:
        self.streams, self.seed, self.mix = streams, seed, mix or MIX
        # Arithmetic windows start at a question, often without the end-of-text token before it, so that the
        # model also answers a bare prompt.
        self.starts = {"arithmetic": np.flatnonzero(streams["arithmetic"] == question)} if question else {}

    def draw(self, step: int, sequences: int, length: int) -> Tensor:
        rng = np.random.default_rng((self.seed, step))
        names = list(self.streams)
        weights = np.array([self.mix[name] for name in names])
        rows = []
        for pick in rng.choice(len(names), size=sequences, p=weights / weights.sum()):
            stream, starts = self.streams[names[pick]], self.starts.get(names[pick])
            last = len(stream) - length - 1
            start = rng.integers(last)
            if starts is not None:
                start = min(last, starts[rng.integers(len(starts))])
            rows.append(stream[start : start + length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def load(
    cache: Path, seed: int, mix: dict[str, float] | None = None
) -> tuple[PreTrainedTokenizerFast, Batches]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(cache / "tokenizer")
    streams = {domain: np.load(cache / f"{domain}.npy") for domain in DOMAINS}
    question = tokenizer.convert_tokens_to_ids("Question")
    assert isinstance(question, int)
    return tokenizer, Batches(streams, question, seed, mix)
