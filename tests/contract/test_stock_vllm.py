"""Outputs in the stock layout in an unmodified vLLM, without this package's plugin."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_rco.adapters import FAMILIES
from moe_rco.ckpt.stock import precisions
from tests.compressed import Job
from tests.stock import READABLE, stock_job
from tests.tiny_models import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
PROMPTS = [[5, 6, 7, 8, 9, 10, 40, 50, 60, 70, 80, 90], [3, 9, 27, 81, 50, 55]]
# vLLM's CPU attention wants heads of 32.
SHAPE: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 7}

# argv: the prompts, then pairs of a pruned model to run, and a quantised one whose config vLLM is to read.
RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import CompressedTensorsMoEMethod

def read(model, path):
    # The scheme that vLLM finds for every module of its own model; no kernel of this machine runs them.
    with open(path + "/config.json") as file:
        config = CompressedTensorsConfig.from_config(json.load(file)["quantization_config"])
    config.packed_modules_mapping = dict(getattr(model, "packed_modules_mapping", {}))
    experts, linears = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            layer = module.layer_name
            names = (module.ckpt_gate_proj_name, module.ckpt_up_proj_name, module.ckpt_down_proj_name)
            schemes = [config.get_scheme_dict(module, f"{layer}.{i}.{n}") for i in (0, 3) for n in names]
            assert all(scheme == schemes[0] for scheme in schemes)
            experts[layer] = None
            try:
                method = type(CompressedTensorsMoEMethod.get_moe_method(config, module, layer)).__name__
            except NotImplementedError as error:  # the right method, but no kernel of its for this machine
                method = "CompressedTensorsWNA16MoEMethod" if "WNA16 MoE backend" in str(error) else str(error)
            except AssertionError:  # that method again: on some CPUs it is made, and knows groups only
                assert schemes[0]["weights"].strategy == "channel", schemes[0]
                method = "CompressedTensorsWNA16MoEMethod"
            expected = "Unquantized" if schemes[0] is None else "CompressedTensorsWNA16"
            assert method.startswith(expected), method
            if schemes[0] is not None:
                weights = schemes[0]["weights"]
                experts[layer] = [weights.num_bits, weights.group_size, weights.symmetric]
        elif isinstance(module, LinearBase):
            method = config.get_quant_method(module, module.prefix)
            assert isinstance(method, UnquantizedLinearMethod), (name, method)
            linears += 1
    return experts, linears

found = []
for run, quantised in zip(sys.argv[2::2], sys.argv[3::2]):
    llm = LLM(
        run, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        max_logprobs=-1, max_num_seqs=2,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[1])],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False),
    )
    logprobs = [
        [[at[token].logprob for token in range(len(at))] for at in output.prompt_logprobs[1:]]
        for output in outputs
    ]
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        experts, linears = llm.apply_model(lambda model: read(model, quantised))[0]
    found.append({"logprobs": logprobs, "experts": experts, "linears": linears})
    del llm
assert not [name for name in sys.modules if name.split(".")[0] == "moe_rco"]
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Job, Any]]:
    """family -> a pruned output, a quantised job, and what vLLM made of them."""
    place, jobs = tmp_path_factory.mktemp("vllm"), {}
    arguments: list[str] = [json.dumps(PROMPTS)]
    for family in FAMILIES:
        head: dict[str, Any] = {"head_dim": 32} if family == "qwen3_moe" else {}
        source = save_tiny(family, place / family, **SHAPE, **head)
        pruned = stock_job(source, place / f"{family}-s", 0, ["prune", "bf16"], count=5)
        pruned.write(place / f"{family}-pruned")
        mixed = stock_job(source, place / f"{family}-m", 0, READABLE, count=5)
        mixed.write(place / f"{family}-quantised")
        arguments += [str(place / f"{family}-pruned"), str(place / f"{family}-quantised")]
        jobs[family] = place / f"{family}-pruned", mixed
    environment = os.environ | {
        "VLLM_PLUGINS": "",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=place, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if "FOUND" in line)
    found = json.loads(line.partition("FOUND")[2])
    return {family: (*jobs[family], result) for family, result in zip(jobs, found, strict=True)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pruned_models_give_the_log_probabilities_of_transformers(served: Any, family: str) -> None:
    out, _, found = served[family]
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for prompt, logprobs in zip(PROMPTS, found["logprobs"], strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], -1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_vllm_finds_the_scheme_of_every_layer(served: Any, family: str) -> None:
    _, job, found = served[family]
    expected = {}
    for layer, option in precisions(job.assignment).items():
        name = job.adapter.expert(job.checkpoint.config, layer, 0).name.removesuffix(".0")
        expected[name] = [option.bits, option.group_size, True] if option.is_quantized else None
    assert found["experts"] == expected
    assert found["linears"] >= 2 * 7  # attention of every layer: nothing outside the experts is quantised
