"""The training of the demo models, and the models and texts that ship."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from eval import arithmetic
from eval.batches import Batches
from eval.corpus import DOMAINS, SHIPPED_TEXT, overlaps, read_jsonl, shared_shingles
from eval.demo_health import RouterCounts, document_loss, heldout_tokens
from eval.ngram import TrigramModel
from eval.train_demo import Trainer, export

REPOSITORY = SHIPPED_TEXT.parents[2]
MODELS = {
    "qwen3_moe": (SHIPPED_TEXT.parent / "model", 14e6, 32),
    "mixtral": (REPOSITORY / "eval" / "models" / "mixtral", 6e6, 8),
    "qwen2_moe": (REPOSITORY / "eval" / "models" / "qwen2_moe", 6e6, 16),
}


def tiny_config() -> Qwen3MoeConfig:
    head_dim: Any = {"head_dim": 16}
    return Qwen3MoeConfig(
        **head_dim,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        pad_token_id=1,
    )


def tiny_trainer() -> Trainer:
    stream = np.tile(np.arange(2, 62, dtype=np.uint16), 20)
    batches = Batches(dict.fromkeys(DOMAINS, stream), question=None, seed=3)
    return Trainer(tiny_config(), batches, seed=3, compiled=False)


def train(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.train_step(0.3, length=32, batch_tokens=256)[0] for _ in range(steps)]


def test_the_loss_falls() -> None:
    losses = train(tiny_trainer(), 20)
    assert losses[-1] < losses[0] - 0.5


def test_a_resumed_run_continues_identically(tmp_path: Path) -> None:
    through = tiny_trainer()
    expected = train(through, 6)[3:]
    first = tiny_trainer()
    train(first, 3)
    first.save(tmp_path / "checkpoint.pt")
    second = tiny_trainer()
    second.restore(tmp_path / "checkpoint.pt")
    assert train(second, 3) == expected


def test_the_fast_kernels_agree_with_the_stock_model() -> None:
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(tiny_config())
    tokens = torch.randint(2, 62, (2, 24))
    gradients = []
    for experts, attention in (("eager", "eager"), ("sorted", "causal_bmm")):
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-6)


def test_an_export_has_one_tensor_an_expert_and_loads(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    export(trainer.model, AutoTokenizer.from_pretrained(MODELS["qwen3_moe"][0]), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(2, 20)[None]
    trainer.model.set_experts_implementation("eager")
    trainer.model.bfloat16().float()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, trainer.model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_trigram_probabilities_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    vocabulary = 50
    tokens = rng.zipf(1.5, 5000) % vocabulary
    model = TrigramModel(tokens, vocabulary)
    words = np.arange(vocabulary)
    for before, previous in ((tokens[7], tokens[8]), (3, 44), (49, 49)):
        context = np.full(vocabulary, before), np.full(vocabulary, previous)
        assert model.probabilities(*context, words).sum() == pytest.approx(1)


def test_a_trigram_model_learns_its_text() -> None:
    text = np.tile(np.arange(40), 50)
    assert TrigramModel(text, 40).loss([np.arange(40)]) < 0.5


def test_arithmetic_is_right_and_keeps_the_held_out_pairs_apart() -> None:
    for use_held_out in (False, True):
        for line in "".join(arithmetic.documents(5, 5, use_held_out=use_held_out)).splitlines():
            if line.startswith("Answer: "):
                steps = line.removeprefix("Answer: ").split(". The answer is ")[0].split(". ")
                for step in steps:
                    left, right = step.removesuffix(".").split(" = ")
                    assert eval(left) == int(right)
    text = "\n".join(arithmetic.documents(6, 200))
    added = {(int(a), int(b)) for a, b in re.findall(r" (\d+) \+ (\d+)(?:\?| =)", text)}
    assert len(added) > 1000
    assert not added & set(arithmetic.held_out_pairs())


def test_a_copied_passage_is_found() -> None:
    rows = read_jsonl(SHIPPED_TEXT / "heldout.jsonl")
    shipped = shared_shingles([rows[0]["text"]])
    assert overlaps("Something before. " + rows[0]["text"], shipped)
    assert not overlaps(rows[1]["text"], shipped)


def test_shipped_texts_are_disjoint_and_cover_the_domains() -> None:
    calibration, heldout = (read_jsonl(SHIPPED_TEXT / f"{name}.jsonl") for name in ("calibration", "heldout"))
    for rows in (calibration, heldout):
        assert {row["domain"] for row in rows} == set(DOMAINS)
        assert all(len(row["text"]) >= 1500 for row in rows)
    # Problems may recur; everything else must not share a passage.
    written = [row["text"] for row in calibration if row["domain"] != "arithmetic"]
    shipped = shared_shingles(written)
    assert not any(overlaps(row["text"], shipped) for row in heldout if row["domain"] != "arithmetic")
    assert not {row["text"] for row in calibration} & {row["text"] for row in heldout}
    assert (SHIPPED_TEXT / "LICENSES.md").exists()


@pytest.mark.parametrize("name", MODELS)
def test_shipped_model(name: str) -> None:
    folder, limit, experts = MODELS[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    names = ("w1", "w2", "w3") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    for matrix in names:
        assert f"model.layers.0.{block}.experts.{experts - 1}.{matrix}.weight" in index
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 4096
    assert tokenizer.tokenize("1234") == list("1234")
    text = "def f(x):\n    return x + 12  # naïve\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    assert (config.num_experts, config.model_type) == (experts, name)
    assert config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    routers = RouterCounts(model, experts)
    documents = heldout_tokens(tokenizer)
    for domain in DOMAINS:
        loss = document_loss(model, [ids[:513] for ids in documents[domain][:6]])
        assert loss < {"prose": 5, "technical": 4.5, "code": 4, "arithmetic": 1}[domain]
    assert routers.take().min() >= 0.002
