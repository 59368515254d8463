"""Conversations as the model sees them: rendered with its chat template, and which of the tokens the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_rco.calib.refusals import reason
from moe_rco.errors import DataError

LONGEST = 1 << 18
"""Characters of a conversation that are read."""
Turns = Sequence[dict[str, str]]


def tokenize_conversation(tokenizer: Any, turns: Turns, where: str) -> np.ndarray:
    """Token ids int64 [n] of a conversation; what is not the assistant's is `~token`. Raises DataError."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"calibration data {where} has conversations, but the model's tokenizer has no chat template; put its "
            "chat_template.jinja into the model's directory, or name text in calibration.text_field"
        )
    text = _rendered(tokenizer, turns, where)[:LONGEST]
    spans = _spoken(tokenizer, turns, text, where)
    try:
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise DataError(
            f"calibration data {where} has conversations, for which the model needs a fast tokenizer (tokenizer.json)"
        ) from error
    ids = np.array(made["input_ids"], dtype=np.int64)
    begin, end = np.array(made["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    spoken = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        spoken |= (begin < last) & (end > first)
    return np.where(spoken, ids, ~ids)


def _rendered(tokenizer: Any, turns: Turns, where: str, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program, which can end in anything
        raise DataError(
            f"calibration data {where}: the model's chat template refuses a conversation ({reason(error)})"
        ) from error


def _spoken(tokenizer: Any, turns: Turns, text: str, where: str) -> list[tuple[int, int]]:
    """Where in the rendered text the assistant's turns are, with what ends them: from the prompt for a turn to its end.

    Templates that show earlier turns otherwise than the last (without what was thought) are searched for the words.
    """
    found = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = _rendered(tokenizer, turns[:number], where, prompt=True) if number else ""
        whole = _rendered(tokenizer, turns[: number + 1], where)
        if text.startswith(whole) and whole.startswith(prompt):
            found.append((len(prompt), len(whole)))
            continue
        words = turn["content"].rpartition("</think>")[2].strip()
        start = text.find(words, len(prompt) if text.startswith(prompt) else 0)
        if words and start >= 0:
            found.append((start, start + len(words) + 1))  # the mark that ends a turn comes next
    return found
