"""What `serve` computes before vLLM starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_rco import capacity, serving
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import UserError
from moe_rco.recipe import DEMO_MODEL

pytest.importorskip("vllm", reason="vLLM is not installed")

# The demo model: 6 layers, 2 heads of keys and values with 32 dimensions, 1,024 positions.
DEMO_KV = 2 * 6 * 2 * 32


def demo_numel() -> int:
    return sum(tensor.nbytes for tensor in Checkpoint(DEMO_MODEL).tensors.values()) // 2


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(serving.CPU_CACHE, raising=False)


def test_weights_and_cache_of_the_demo_model() -> None:
    plan = serving.plan_serving(DEMO_MODEL)
    assert plan.weights == 2 * demo_numel()
    assert plan.context == 1024
    assert plan.kv_cache == DEMO_KV * 2 * 1024
    assert plan.options == ("--host", "127.0.0.1")


@pytest.mark.parametrize(
    ("options", "weights", "kv_cache"),
    [
        (("--dtype", "float32"), 4.0, DEMO_KV * 4 * 1024),
        (("--max-model-len", "512"), 2.0, DEMO_KV * 2 * 512),
        (("--max-model-len=1K",), 2.0, DEMO_KV * 2 * 1024),
        (("--max_model_len", "2k"), 2.0, DEMO_KV * 2 * 2000),
        (("-tp", "2"), 1.0, DEMO_KV * 1024),
        (("-tp", "2", "-pp", "3"), 1 / 3, DEMO_KV * 1024 / 3),
        (("--seed", "3", "--enforce-eager"), 2.0, DEMO_KV * 2 * 1024),
    ],
)
def test_vllm_s_options_are_heeded_and_passed_on(
    options: tuple[str, ...], weights: float, kv_cache: float
) -> None:
    plan = serving.plan_serving(DEMO_MODEL, options)
    assert plan.weights == pytest.approx(weights * demo_numel(), abs=1)
    assert plan.kv_cache == pytest.approx(kv_cache, abs=1)
    assert plan.options == (*options, "--host", "127.0.0.1")


@pytest.mark.parametrize(
    "options", [("--host", "0.0.0.0"), ("--host=::",), ("--uds", "/run/x"), ("--config", "x.yaml")]
)
def test_it_listens_to_this_machine_alone_unless_told(options: tuple[str, ...]) -> None:
    assert serving.plan_serving(DEMO_MODEL, options).options == options
    assert serving.plan_serving(DEMO_MODEL).options == ("--host", "127.0.0.1")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("-tp", "two"), "-tp"),
        (("--tensor-parallel-size", "0"), "--tensor-parallel-size"),
        (("--dtype", "int4"), "int4"),
        (("--max-model-len", "900000000"), "does not fit"),
    ],
)
def test_refused(options: tuple[str, ...], word: str) -> None:
    with pytest.raises(UserError, match=word):
        serving.plan_serving(DEMO_MODEL, options)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )


def test_a_gpu_needs_room_for_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 2 << 30)
    few = ("--max-num-seqs", "4", "--max-num-batched-tokens", "64")
    plan = serving.plan_serving(DEMO_MODEL, few)
    # 4 hidden states of 128; 4 experts' gate and up, 2 x 64 each, and what comes of them; the logits three times in float32.
    assert plan.activations == capacity.RESERVE + 64 * (4 * 128 + 4 * (128 + 64)) * 2 + 3 * 4 * 4 * 4096
    assert plan.available == int(0.9 * (2 << 30))
    assert serving.plan_serving(DEMO_MODEL).activations > plan.activations
    with pytest.raises(UserError, match="a lower --max-num-seqs"):
        serving.plan_serving(DEMO_MODEL, ("--max-num-seqs", "40000"))


def test_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        serving.plan_serving(DEMO_MODEL)


def test_the_cpu_cache_is_modest_and_left_alone_where_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= int(serving.plan_serving(DEMO_MODEL).environment[serving.CPU_CACHE]) <= serving.MOST_CPU_CACHE
    assert not serving.plan_serving(DEMO_MODEL, ("--kv-cache-memory-bytes", "1G")).environment
    monkeypatch.setenv(serving.CPU_CACHE, "2")
    assert not serving.plan_serving(DEMO_MODEL).environment


def test_low_bits_need_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="int2-g64 and int3 cannot be served on a GPU"):
        serving._check_gpu_options({"prune", "int4-g64", "int3", "int2-g64", "bf16"})
    serving._check_gpu_options({"prune", "int4-g64", "int8", "bf16"})
