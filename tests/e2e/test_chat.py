"""A run on conversations: only what the assistant says is measured, and without a template it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_rco import load_recipe
from moe_rco.calib.data import load_tokenizer, make_pools
from tests.calib.test_chat import CHATML
from tests.e2e.test_prune import command, report_of, run
from tests.tiny_job import save_job


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many conversations as texts, of which the text file has a share as well."""
    place = tmp_path_factory.mktemp("chat")
    path = save_job(place, 2, 2)
    texts = [json.loads(line)["text"] for line in (place / "model" / "text.jsonl").read_text().splitlines()]
    talks = [
        {
            "messages": [
                {"role": "user", "content": text[:150]},
                {"role": "assistant", "content": text[150:300]},
            ]
        }
        for text in texts
    ]
    (place / "talk.jsonl").write_text("\n".join(map(json.dumps, talks)))
    source = "data: [{data: talk.jsonl, weight: 3}, {data: model/text.jsonl}]"
    path.write_text(path.read_text().replace(f"data: {place}/model/text.jsonl", source))
    return path


@pytest.mark.slow
def test_only_what_the_assistant_says_is_measured(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    refused = run(command("prune", "--recipe", "recipe.yaml"))
    assert refused.returncode == 2
    assert "no chat template" in refused.stderr
    (recipe.parent / "model" / "chat_template.jinja").write_text(CHATML)
    dry = run([*command("prune", "--recipe", "recipe.yaml"), "--dry-run"])
    assert re.search(r"talk: \d+ sequences, [\d,]+ tokens, \d\d% of it the assistant's", dry.stdout), (
        dry.stdout
    )
    done = run(command("prune", "--recipe", "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    report = report_of(recipe.parent / "out")
    assert {domain["name"] for domain in report["domains"]} > {"talk"}
    assert (recipe.parent / "out" / "chat_template.jinja").read_text() == CHATML

    loaded = load_recipe("recipe.yaml")
    _, pool = make_pools(loaded.calibration, load_tokenizer(Path("model")), 4096, loaded.search.seed)
    assert pool.weights is not None
    before, after = (_log_probabilities(name, pool.ids) for name in ("model", "out"))
    kl = (before.exp() * (before - after)).sum(-1)
    assert report["kl"] == pytest.approx(float((pool.weights * kl).mean()), rel=1e-3)
    assert report["kl"] != pytest.approx(float(kl.mean()), rel=1e-2)
    following = pool.ids[:, 1:, None]
    for name, found in (("loss_before", before), ("loss_after", after)):
        losses, weights = -found[:, :-1].gather(-1, following)[..., 0], pool.weights[:, :-1]
        talk = torch.tensor([domain == "talk" for domain in pool.domains])
        expected = ((weights * losses).sum(1) / weights.sum(1))[talk].mean()
        measured = next(domain[name] for domain in report["domains"] if domain["name"] == "talk")
        assert measured == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def _log_probabilities(directory: str, ids: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return torch.log_softmax(model(ids).logits.double(), -1)
