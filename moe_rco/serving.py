"""What `moe-rco serve` checks before it hands over to `vllm serve`: the files, and that they fit into memory."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moe_rco.adapters import get_adapter
from moe_rco.capacity import LARGE_GPU, RESERVE, activation_bytes, batched_tokens, kv_bytes
from moe_rco.ckpt.header import DTYPE_NAMES
from moe_rco.ckpt.manifest import check_quickly
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError, UserError
from moe_rco.inspection import inspect
from moe_rco.types import Option
from moe_rco.units import format_size

GPU_SHARE = 0.9
"""vLLM's own default of --gpu-memory-utilization is this or a little more."""
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
LOCALHOST = "127.0.0.1"
MOST_CPU_CACHE = 4
"""GiB of KV cache on a CPU when nobody says; vLLM itself would ask for nearly all memory of the machine."""
_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmMgG]?)")
_COUNT_UNITS = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30}


@dataclass(frozen=True)
class ServePlan:
    """What serving a model takes of each device, in bytes. `kv_cache` is that of one sequence of `context` tokens, `activations`
    about what a GPU needs for a batch and CUDA.

    `devices` share the weights (tensor times pipeline parallel); `environment` is what vLLM gets beside ours.
    """

    directory: Path
    options: tuple[str, ...]
    environment: dict[str, str]
    device: str
    devices: int
    weights: int
    kv_cache: int
    activations: int
    context: int
    available: int


def plan_serving(directory: str | Path, options: Sequence[str] = ()) -> ServePlan:
    """Check a model directory and its memory for `vllm serve DIRECTORY OPTIONS`; no weights are read.

    Raises ModelError, PlanError (files, manifest and plan disagree), UserError (no vLLM, or it does not fit).
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed here: pip install 'moe_rco[serve]' (on a machine without a GPU, see the README)"
        )
    checkpoint = Checkpoint(directory, allow_quantized=True)
    check_quickly(checkpoint.directory, checkpoint.config.get("quantization_config"))
    found = inspect(directory)  # compares every expert tensor with the plan
    asked = _asked(options)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        _check_gpu_options({option for layer in found.layers for option in layer.options})
    config = checkpoint.config
    itemsize = _itemsize(asked.dtype, config)
    devices = asked.tensor_parallel_size * asked.pipeline_parallel_size
    weights = _resident_bytes(checkpoint, itemsize) // devices
    context = _count(asked.max_model_len) or int(config.get("max_position_embeddings") or 2048)
    kv_cache = (
        kv_bytes(config, asked.tensor_parallel_size, itemsize) * context // asked.pipeline_parallel_size
    )
    environment: dict[str, str] = {}
    activations = 0
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        available = int(total * (asked.gpu_memory_utilization or GPU_SHARE))
        sequences = asked.max_num_seqs or (1024 if total >= LARGE_GPU else 256)
        batch = asked.max_num_batched_tokens or batched_tokens(total)
        activations = RESERVE + activation_bytes(config, get_adapter(config), batch, sequences)
    else:
        available = psutil.virtual_memory().available // devices
        if (
            not asked.kv_cache_memory_bytes
            and asked.gpu_memory_utilization is None
            and CPU_CACHE not in os.environ
        ):
            left = max(0, available - weights) // 2**31  # half of what is left, in GiB
            environment[CPU_CACHE] = str(max(1, math.ceil(kv_cache / 2**30), min(MOST_CPU_CACHE, left)))
    # vLLM's own default is to listen on every network.
    told = asked.host is not None or asked.uds is not None or asked.config is not None
    plan = ServePlan(
        checkpoint.directory,
        tuple(options) if told else (*options, "--host", LOCALHOST),
        environment,
        f"GPU ({torch.cuda.get_device_name(0)})" if on_gpu else "CPU",
        devices,
        weights,
        kv_cache,
        activations,
        context,
        available,
    )
    if weights + kv_cache + activations > available:
        batch = f", about {format_size(activations)} for a batch and CUDA" if activations else ""
        raise UserError(
            f"{directory} does not fit: {format_size(weights)} of weights and {format_size(kv_cache)} of KV cache for one "
            f"sequence of {context:,} tokens{batch}, of {format_size(available)} usable on each {plan.device}; use a smaller "
            f"budget, a shorter --max-model-len{', a lower --max-num-seqs' if on_gpu else ''} or a larger "
            "--tensor-parallel-size"
        )
    return plan


def start(plan: ServePlan) -> None:
    """Become vLLM's server: the process is replaced, so that signals and the exit code are vLLM's own."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(plan.directory), *plan.options]
    os.execve(sys.executable, command, {**os.environ, **plan.environment})


def _asked(options: Sequence[str]) -> argparse.Namespace:
    """The vLLM options that decide about memory; all others are vLLM's own business."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "--tensor_parallel_size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "--pipeline_parallel_size", "-pp", type=int, default=1)
    for name in ("--host", "--uds", "--config"):
        parser.add_argument(name)
    parser.add_argument("--max-model-len", "--max_model_len")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gpu-memory-utilization", "--gpu_memory_utilization", type=float)
    parser.add_argument("--max-num-seqs", "--max_num_seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", "--max_num_batched_tokens", type=int)
    parser.add_argument("--kv-cache-memory-bytes", "--kv_cache_memory_bytes")
    try:
        asked, _ = parser.parse_known_args(list(options))
    except argparse.ArgumentError as error:
        raise UserError(f"vLLM option {error}") from error
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(asked, name) < 1:
            raise UserError(f"vLLM option --{name.replace('_', '-')} must be at least 1")
    return asked


def _count(text: str | None) -> int | None:
    """`4096`, `32k` or `1K` as vLLM reads them; None where vLLM decides itself."""
    match = _COUNT.fullmatch(text or "")
    return int(float(match[1]) * _COUNT_UNITS[match[2]]) if match else None


def _itemsize(dtype: str, config: dict) -> int:
    """Bytes of an activation or unquantised weight as vLLM will hold it."""
    if dtype == "auto":
        # vLLM serves float32 models in a half precision unless told otherwise.
        return 2
    if dtype not in ("half", "float16", "bfloat16", "float", "float32"):
        raise UserError(f"vLLM option --dtype: '{dtype}' is none of auto, half, bfloat16, float32")
    return 4 if dtype in ("float", "float32") else 2


def _resident_bytes(checkpoint: Checkpoint, itemsize: int) -> int:
    """Unquantised weights in the served type; codes, scales and zero points as they are on disk."""
    floating = {DTYPE_NAMES[dtype] for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    total = 0
    for name, tensor in checkpoint.tensors.items():
        plain = name.endswith((".weight", ".bias")) and tensor.dtype in floating
        total += (tensor.nbytes // int(tensor.torch_dtype.itemsize)) * itemsize if plain else tensor.nbytes
    return total


def _check_gpu_options(names: set[str]) -> None:
    low = sorted(
        name for name in names if name.startswith(("int2", "int3")) and Option.parse(name).is_quantized
    )
    if low:
        raise ModelError(
            f"{' and '.join(low)} cannot be served on a GPU: vLLM's CUDA kernels run 4, 8 and 16 bits; "
            "choose again without 2 and 3 bits, or serve on a CPU"
        )
