"""What vLLM is told about our checkpoints, and what it is refused, without starting an engine."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from transformers import AutoConfig
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers.quantization import get_quantization_config

from moe_rco.errors import ModelError, UserError
from moe_rco.serve.vllm_compat import check_version
from moe_rco.serve.vllm_deployment import _check_cuda, check_deployment
from moe_rco.serve.vllm_plugin import MoeRcoConfig, register
from moe_rco.types import Option
from tests.serve.vllm_models import write


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plugin")
    write("mixtral", directory)
    return directory / "out"


@pytest.fixture(scope="module")
def config(out: Path) -> MoeRcoConfig:
    entries = json.loads((out / "config.json").read_text())["quantization_config"]
    config = MoeRcoConfig.from_config(entries)
    config.maybe_update_config(str(out), AutoConfig.from_pretrained(out))
    return config


def test_vllm_finds_the_plugin() -> None:
    [plugin] = entry_points(group="vllm.general_plugins", name="moe_rco")
    assert plugin.load() is register
    register()
    register()
    assert get_quantization_config("moe_rco") is MoeRcoConfig


def test_the_plugin_loads_no_kernels() -> None:
    code = (
        "import vllm.config, sys; before = set(sys.modules)\n"
        "from moe_rco.serve.vllm_plugin import register; register()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'numba', 'scipy', 'datasets', 'compressed_tensors'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_a_vllm_we_do_not_know_is_named_with_those_we_do() -> None:
    for known in ("0.26.0", "0.32.0+cpu", "0.32.1.dev3"):
        check_version(known)
    for unknown in ("0.25.9", "0.33.0", "1.0", "unknown"):
        with pytest.raises(UserError, match=rf"^vLLM {unknown} .* 0\.26 up to, not including, 0\.33"):
            check_version(unknown)


def test_the_config_travels_to_other_processes(config: MoeRcoConfig) -> None:
    copy = pickle.loads(pickle.dumps(config))  # noqa: S301 - as vLLM does
    assert copy.layers == config.layers


def test_a_plan_with_too_few_experts_is_refused(out: Path, config: MoeRcoConfig) -> None:
    model = AutoConfig.from_pretrained(out)
    model.num_experts_per_tok = 7
    with pytest.raises(ModelError, match=r"keeps \d experts of layer \d, but 7 are used per token"):
        MoeRcoConfig(config.entries).maybe_update_config(str(out), model)


def deploy(config: MoeRcoConfig, **settings: Any) -> None:
    with set_current_vllm_config(VllmConfig(**settings)):
        check_deployment(config.layers, config._groups, config.dense)


def test_deployments_that_fit_are_let_through(config: MoeRcoConfig) -> None:
    deploy(config)
    deploy(config, parallel_config=ParallelConfig(tensor_parallel_size=2))
    deploy(config, parallel_config=ParallelConfig(tensor_parallel_size=4, enable_expert_parallel=True))


@pytest.mark.parametrize(
    ("processes", "message"), [(4, "is int[248]-g64: 4 processes"), (3, "3 processes cannot share")]
)
def test_a_tensor_parallel_size_that_splits_groups_is_refused(
    processes: int, message: str, config: MoeRcoConfig
) -> None:
    with pytest.raises(ModelError, match=message):
        deploy(config, parallel_config=ParallelConfig(tensor_parallel_size=processes))


def test_what_we_lack_is_refused(config: MoeRcoConfig) -> None:
    settings = VllmConfig()
    settings.parallel_config.enable_eplb = True  # on a CPU vLLM itself would not let it come this far
    with set_current_vllm_config(settings), pytest.raises(UserError, match="--enable-eplb"):
        check_deployment(config.layers, config._groups, config.dense)
    with pytest.raises(UserError, match="--enable-lora"):
        deploy(config, lora_config=LoRAConfig(lora_dtype="bfloat16"))


def test_what_no_cuda_kernel_runs_is_refused(config: MoeRcoConfig) -> None:
    group = config._groups(0)[0]  # its hidden size is 64
    _check_cuda(group, Option.parse("bf16"))
    with pytest.raises(ModelError, match=r"experts\.0 is int3-g32, which no CUDA kernel"):
        _check_cuda(group, Option.parse("int3-g32"))
    with pytest.raises(ModelError, match=r"is int4-g64 of 64 inputs; .* multiples of 128"):
        _check_cuda(group, Option.parse("int4-g64"))
