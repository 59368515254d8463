"""Dense groups: the effects of moves against gradients of transformers' own model, and how they are quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moe_rco.calib.bank import OptionBank
from moe_rco.calib.objective import AssignedModel, Pass
from moe_rco.calib.runner import Runner
from moe_rco.calib.search import knapsack
from moe_rco.calib.streaming import Streaming
from moe_rco.quant.errors import output_error
from moe_rco.quant.packing import dequantize
from moe_rco.quant.rtn import quantize_rtn
from moe_rco.types import Budget, Option
from tests.calibrated import Calibration, calibration_of
from tests.compressed import Job, random_job
from tests.serve.reference import reference_model
from tests.tiny_models import save_tiny

CPU = torch.device("cpu")
IDS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(5))
CASES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"family": "qwen2_moe"},
    "mixtral": {"family": "mixtral"},
    "tied": {"family": "qwen3_moe", "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=CASES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("dense")
    model = save_tiny(path=place / "model", **CASES[request.param])
    job = random_job(model, place / "store", 2, ("int4-g64", "int3-g32", "bf16"), dense=True)
    job.write(place / "out")
    return job


def model_of(job: Job, streaming: Streaming | None = None) -> AssignedModel:
    bank = OptionBank(job.checkpoint, job.assignment.table, CPU, torch.float32, streaming)
    runner = Runner(job.checkpoint, job.adapter, CPU, torch.float32, streaming)
    return AssignedModel(runner, job.adapter, job.checkpoint.config, bank, job.store)


def nll(row: int, positions: slice, logits: torch.Tensor) -> torch.Tensor:
    """Of made-up labels, which have nothing to do with the text."""
    labels = (IDS[row] * 7 + 1) % 96
    return F.cross_entropy(logits, labels[positions], reduction="sum")


@pytest.mark.parametrize("start", ["the original", "an assignment"])
def test_effects_are_the_weights_gradients_times_their_changes(job: Job, start: str) -> None:
    model, table = model_of(job), job.assignment.table
    directory = job.checkpoint.directory
    choice = None if start == "the original" else job.assignment.choice
    reference: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    if choice is not None:
        reference = reference_model(job, directory.parent / "out")
    reference = reference.double()
    ((_, effects),) = model.own_effects([Pass(choice, nll)], IDS)
    groups = {row: table.groups[row] for row in table.dense.tolist()}
    names = [weight.name for group in groups.values() for weight in group.weights]
    expected = {row: np.zeros((len(IDS), len(table.options))) for row in groups}
    for sequence, ids in enumerate(IDS):
        logits = reference(ids[None]).logits[0]
        parameters = [reference.get_parameter(name) for name in names]
        found = torch.autograd.grad(nll(sequence, slice(None), logits), parameters)
        gradients = dict(zip(names, found, strict=True))
        for row, group in groups.items():
            for part, weight in enumerate(group.weights):
                original = job.checkpoint.read(weight.name).float()
                now = reference.get_parameter(weight.name).detach()
                for option in range(len(table.options)):
                    moved = model.bank.dense.weight((row, part, option), original).double()
                    expected[row][sequence, option] += float((gradients[weight.name] * (moved - now)).sum())
    for row, values in expected.items():
        assert np.abs(values).max() > 0
        scale = np.abs(values).max()
        np.testing.assert_allclose(
            effects.linear[row], values.sum(0) / IDS.numel(), rtol=1e-3, atol=1e-4 * scale / IDS.numel()
        )
        np.testing.assert_allclose(
            effects.squared[row], np.square(values).sum(0) / IDS.numel(), rtol=2e-3, atol=1e-4 * scale**2
        )


@pytest.mark.parametrize("tokens", [1, 1000])
def test_streamed_effects_are_the_same(job: Job, tokens: int) -> None:
    """One pass after the other, or two assignments at once; of all tokens, or of every second one."""
    streamed = model_of(job, Streaming(1 << 20, tokens, 1))
    passes = [Pass(job.assignment.choice, nll), Pass(None, nll, [0])]
    for stride in (1, 2):
        ours = model_of(job).own_effects(passes, IDS, stride)
        theirs = streamed.own_effects(passes, IDS, stride)
        for (total, effects), (other, found) in zip(ours, theirs, strict=True):
            assert total == pytest.approx(other, rel=1e-5)
            np.testing.assert_allclose(found.linear, effects.linear, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(found.squared, effects.squared, rtol=1e-3, atol=1e-5)
        assert (ours[1][1].linear[:, 1:] == 0).all()  # only what is asked for is measured


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibration_of("qwen2_moe", tmp_path_factory.mktemp("calibrated"), dense=True)


def test_gptq_beats_rounding_on_what_goes_in(calibrated: Calibration) -> None:
    """And it saw the tokens for gradients only. Embeddings are looked up, so they are just rounded."""
    model, table = calibrated.model, calibrated.model.table
    directory: Path = model.bank.checkpoint.directory
    transformers_model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    option = Option.parse("int3-g64")
    for row in table.dense.tolist():
        group = table.groups[row]
        for weight in group.weights:
            base = weight.name.removesuffix(".weight")
            module = transformers_model.get_submodule(base)
            seen = list[torch.Tensor]()
            hook = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                transformers_model(calibrated.pools[0].ids)
            hook.remove()
            stored = calibrated.store.read(group.name, option)
            made = {
                name.removeprefix(f"{base}."): stored[name] for name in stored if name.startswith(f"{base}.")
            }
            original = module.weight.detach()
            gptq, rounded = dequantize(made, option), quantize_rtn(original, option).dequantize()
            if group.kind == "embeddings":
                assert torch.equal(gptq, rounded)
                continue
            x = seen[0].reshape(-1, original.shape[1])
            errors = [float(output_error(original[None], w[None], (x.T @ x)[None])) for w in (gptq, rounded)]
            assert errors[0] < errors[1], weight.name


def test_fisher_effects_rank_single_moves_as_the_true_divergence_does(calibrated: Calibration) -> None:
    model, table, q = calibrated.model, calibrated.model.table, calibrated.q
    bf16 = table.option_index(Option.parse("bf16"))
    truth, predicted = [], []
    for row in table.dense.tolist():
        for name in ("int3-g64", "int4-g64"):
            choice = np.full(len(table.groups), bf16)
            choice[row] = option = table.option_index(Option.parse(name))
            truth.append(model.divergences(choice, calibrated.pools[0], calibrated.calibrated.train).mean())
            predicted.append(q[row, option])
    ranks = np.argsort(np.argsort(truth)), np.argsort(np.argsort(predicted))
    assert np.corrcoef(*ranks)[0, 1] > 0.8
    assert (q[table.dense, bf16] == 0).all()  # the model is bf16 on disk: nothing moves
    assert (q[table.dense, table.option_index(Option.parse("prune"))] == 0).all()


def test_a_knapsack_never_prunes_them(calibrated: Calibration) -> None:
    table, q = calibrated.model.table, calibrated.q
    smallest, largest = table.range
    for size in (smallest, (smallest + largest) // 2, largest):
        found = knapsack(q, table, Budget(size, ""))
        assert found.cost <= size
        found.check(Budget(size, ""))
        assert not any(option.is_prune for _, option, _ in found.dense())
