"""The model card: what the Hub's own reader finds in it, and what stands there for people."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from moe_rco import recipe
from moe_rco.model_card import model_card
from tests.conftest import MINIMAL
from tests.reports import FITTED, report, report_data, score

REPO = "you/Model-24GB"
STOCK = {
    "experts_per_layer": 6,
    "kl": 0.0625,
    "mixed": {"name": "fisher seed", "kl": 0.05, "cost": 1},
    "transformers_reads": False,
}


def card(*overrides: str, **changes: object) -> str:
    return model_card(report(**changes), recipe.parse(MINIMAL, overrides=overrides), REPO)


def test_a_model_of_the_hub_is_named_as_the_base() -> None:
    data = ModelCard(card(model="Qwen/Qwen3-30B-A3B", from_hub=True)).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-30B-A3B", "quantized")


@pytest.mark.parametrize("model", ["demo", "/models/Qwen3", "models/Qwen3"])
def test_a_directory_is_not(model: str) -> None:
    text = card(model=model)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "huggingface.co" not in text
    assert "A model of the family `qwen3_moe`" in text


def test_figures_are_the_report_s() -> None:
    text = card()
    for row in (
        "| routed experts | 3.81 MiB | 975.59 KiB |",
        "| all weights | 4.29 MiB | 1.43 MiB |",
        "| loss, nats per token | 2.0000 | 2.0625 |",
        "| KL divergence from the original, nats per token | | 0.06250 ± 0.00070 |",
        "Loss and KL divergence are those of 2,468 tokens",
        "at most 976.56 KiB (ratio 0.25)",
        "5 bf16",
    ):
        assert row in text


def test_other_groups_are_named() -> None:
    groups = [
        {
            "name": "model.layers.0.self_attn.o_proj",
            "kind": "attention",
            "layer": 0,
            "option": "int8",
            "bytes": 1,
        },
        {"name": "lm_head", "kind": "head", "layer": 3, "option": "int8", "bytes": 1},
    ]
    text = card(dense=groups)
    assert "each of the others, and at how many bits attention, head, so that they take at most" in text
    assert "| routed experts, attention, head | 3.81 MiB | 975.59 KiB |" in text


def test_scores_are_there_for_people_and_programs() -> None:
    alone = score("hellaswag", "acc_norm", baseline=None, filter="strict", num_fewshot=None)
    text = card(scores=(score("arc_easy").model_dump(), alone.model_dump()))
    assert (
        "| arc_easy | acc (0-shot) | 1,234 | 0.7000 ± 0.0121 | 0.6500 ± 0.0125 | -0.0500 ± 0.0123 | 0.032 |"
        in text
    )
    assert "| hellaswag | acc_norm (strict) | 1,234 |  | 0.6500 ± 0.0125 |  |  |" in text
    (index,) = ModelCard(text).data.to_dict()["model-index"]
    found = {
        (result["dataset"]["type"], metric["type"], metric["value"])
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert found == {("arc_easy", "acc", 0.65), ("hellaswag", "acc_norm", 0.65)}
    assert "## Scores" not in card()


def test_it_says_how_it_is_served() -> None:
    assert "```bash\nvllm serve you/Model-24GB\n```" in card()
    assert "import moe_rco" in card()
    fitted = card(budget=FITTED, bytes={**report_data()["bytes"], "budget": 2_400_000, "slack": 1_401_000})
    assert "vllm serve you/Model-24GB --max-model-len 8192 --max-num-seqs 4\n" in fitted


def test_what_needs_nothing_of_ours_says_so() -> None:
    text = card(stock=STOCK)
    assert "Every layer keeps 6 experts at one precision" in text
    assert "bit by bit" not in text
    assert "import moe_rco" not in text
    assert "AutoModelForCausalLM" not in text
    assert "AutoModelForCausalLM" in card(stock={**STOCK, "transformers_reads": True})


def test_no_path_of_this_machine_is_in_it() -> None:
    text = card(
        "model=/home/jane/models/Qwen3",
        "calibration.data=[~/secret/text.jsonl, demo]",
        "output=/home/jane/out",
    )
    assert "jane" not in text
    assert "secret" not in text
    assert "model: Qwen3\n" in text
    assert "- data: text.jsonl\n" in text
    assert "output" not in text.split("```yaml")[1].split("```")[0]


def test_warnings_of_the_run_are_passed_on() -> None:
    assert card(warnings=("the text is short",)).rstrip().endswith("- the text is short")
