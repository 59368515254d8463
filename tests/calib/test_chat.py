"""Conversations: rendered by the model's template, and what the assistant says is told from the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_rco.calib.chat import tokenize_conversation
from moe_rco.calib.data import load_tokenizer, make_pools
from moe_rco.calib.documents import PAIRS, read_documents
from moe_rco.errors import DataError
from moe_rco.recipe import DEMO_MODEL
from moe_rco.recipe_sections import Calibration, DataSource

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same, marked for transformers' own mask of what the assistant says.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: what was thought is shown in the last turn only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}{% if '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1].strip() }}{% endif %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCTIONS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content.strip() }}</s>{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
TALK = (
    {"role": "user", "content": "Which letter comes first?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "And after it? Is it a?"},
    {"role": "assistant", "content": "It is b, not a."},
)
THOUGHT = (*TALK[:1], {"role": "assistant", "content": "<think>\nWell.\n</think>\n\na"}, *TALK[2:])


def tokenizer(template: str | None) -> Any:
    found = load_tokenizer(DEMO_MODEL)
    found.chat_template = template
    return found


def spoken(found: Any, ids: np.ndarray) -> list[str]:
    """The stretches of text that count, in their order."""
    parts, before = [], False
    for token in ids:
        if token >= 0 and before:
            parts[-1].append(int(token))
        elif token >= 0:
            parts.append([int(token)])
        before = token >= 0
    return [found.decode(part) for part in parts]


@pytest.mark.parametrize(
    ("template", "talk", "expected"),
    [
        (CHATML, TALK, ["a<|im_end|>\n", "It is b, not a.<|im_end|>\n"]),
        (INSTRUCTIONS, TALK, [" a</s>", " It is b, not a.</s>"]),
        (THINKING, TALK, ["a<", "<think>\n\n</think>\n\nIt is b, not a.<|im_end|>\n"]),
        (THINKING, THOUGHT, ["a<", "<think>\n\n</think>\n\nIt is b, not a.<|im_end|>\n"]),
    ],
    ids=["chatml", "instructions", "thinking", "thought"],
)
def test_what_the_assistant_says_counts(template: str, talk: Any, expected: list[str]) -> None:
    found = tokenizer(template)
    ids = tokenize_conversation(found, talk, "x")
    assert found.decode(np.maximum(ids, ~ids)) == found.apply_chat_template(list(talk), tokenize=False)
    parts = spoken(found, ids)
    # A token may reach over the edge of what is said.
    assert len(parts) == len(expected)
    for part, said in zip(parts, expected, strict=True):
        assert said in part
        assert len(part) <= len(said) + 8
        assert "Which" not in part
        assert "after" not in part


def test_it_is_what_transformers_marks_where_a_template_can_be_asked() -> None:
    found = tokenizer(MARKED)
    made = found.apply_chat_template(
        list(TALK), return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ids = tokenize_conversation(found, TALK, "x")
    assert np.maximum(ids, ~ids).tolist() == made["input_ids"]
    assert (ids >= 0).astype(int).tolist() == made["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        (None, TALK, "no chat template; put its chat_template.jinja"),
        (
            INSTRUCTIONS,
            ({"role": "system", "content": "Be brief."}, *TALK),
            "refuses a conversation .*only user",
        ),
        ("{{ messages[0].nothing.at.all }}", TALK, "refuses a conversation"),
        ("{% for x in range(10**9) %}x{% endfor %}", TALK, "refuses a conversation .*OverflowError"),
        ("{{ ().__class__.__base__.__subclasses__() }}", TALK, "refuses a conversation .*Security"),
    ],
)
def test_what_cannot_be_rendered_says_why(template: str | None, talk: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_conversation(tokenizer(template), talk, "x")


def write(path: Path, rows: list[Any]) -> DataSource:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return DataSource(data=str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": list(TALK)},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]}
                for t in TALK
            ]
        },
        {"messages": [t | {"content": [{"type": "text", "text": t["content"]}]} for t in TALK]},
        {"text": list(TALK), "messages": "not this"},
        {"prompt": list(TALK), "messages": list(TALK)},
    ],
    ids=["messages", "conversations", "parts", "the field that is named", "beside another"],
)
def test_the_forms_conversations_come_in(row: dict[str, Any], tmp_path: Path) -> None:
    (document,) = read_documents(write(tmp_path / "x.jsonl", [row]), "text")
    assert document.turns == TALK


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_a_question_and_its_answer_are_a_conversation(question: str, answer: str, tmp_path: Path) -> None:
    row = {question: TALK[0]["content"], answer: TALK[1]["content"], "more": "x"}
    (document,) = read_documents(write(tmp_path / "x.jsonl", [row]), "text")
    assert document.turns == TALK[:2]
    (text,) = read_documents(write(tmp_path / "x.jsonl", [row]), answer)
    assert (text.text, text.turns) == (TALK[1]["content"], ())


@pytest.mark.parametrize(
    "turn", [3, {}, {"role": "user"}, {"role": "user", "content": 5}, {"from": None, "value": "x"}]
)
def test_a_turn_that_is_none_is_refused(turn: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: turn 2 of the conversation"):
        list(read_documents(write(tmp_path / "x.jsonl", [{"messages": [TALK[0], turn]}]), "text"))


def test_sources_name_their_own_fields(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [{"text": "no", "body": "yes"}])
    (document,) = read_documents(source.model_copy(update={"text_field": "body"}), "text")
    assert document.text == "yes"


def test_sequences_of_conversations_count_what_is_predicted_for_the_assistant(tmp_path: Path) -> None:
    talks = [{"messages": [t | {"content": f"{t['content']} {n}"} for t in TALK]} for n in range(40)]
    source = write(tmp_path / "talk.jsonl", talks)
    plain = write(tmp_path / "plain.jsonl", [{"text": f"Some words, number {n}. " * 8} for n in range(40)])
    settings = Calibration(data=(source, plain), sequences=20, sequence_length=64, holdout=0.25)
    found = tokenizer(CHATML)
    for pool in make_pools(settings, found, 4096, seed=0):
        assert pool.weights is not None
        assert set(pool.domains) == {"talk", "plain"}
        for ids, weights, domain in zip(pool.ids, pool.weights, pool.domains, strict=True):
            assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
            if domain == "plain":
                assert bool((weights == 1).all())
                continue
            assert len(set(weights.tolist())) == 2
            # Of every position that counts the next token is the assistant's: nothing of the user's question.
            said = found.decode([int(ids[at + 1]) for at in range(63) if weights[at] > 0])
            assert "Which" not in said
            assert "letter" not in said
            assert "It is b" in said or "a " in said


def test_without_anything_said_there_is_nothing_to_calibrate_on(tmp_path: Path) -> None:
    source = write(tmp_path / "talk.jsonl", [{"messages": [TALK[0]] * 9} for _ in range(30)])
    settings = Calibration(data=(source,), sequences=8, sequence_length=16, holdout=0.25)
    with pytest.raises(DataError, match="too short"):
        make_pools(settings, tokenizer(CHATML), 4096, seed=0)
