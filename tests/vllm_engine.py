"""Runs models in real vLLM engines on the CPU, in a process of their own: `outcomes(jobs, directory)`.

As a program it reads jobs from one JSON file and writes their outcomes to another.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = 20
"""Log-probabilities returned for each position."""


def outcomes(jobs: list[dict[str, Any]], directory: Path, *, timeout: int = 290) -> list[dict[str, Any]]:
    """Run jobs one after the other in one process, each in a fresh engine.

    A job is {"model": directory, "prompts": [[token, ...], ...], "tokens": how many to generate,
    "settings": arguments of `vllm.LLM`, "unchecked": whether to leave out the check of the files' headers}. An
    outcome is {"error": text}, or {"prompts": for every prompt and every position after the first {token:
    log-probability}, "tokens": the greedy continuations}; with "log", what all jobs printed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    given, results = directory / "jobs.json", directory / "outcomes.json"
    given.write_text(json.dumps(jobs))
    parallel = any(job.get("settings", {}).get("tensor_parallel_size", 1) > 1 for job in jobs)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(parallel)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.vllm_engine", str(given), str(results)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    log = run.stdout + run.stderr
    if not results.exists():
        raise RuntimeError(f"the engine's process died: {log[-5000:]}")
    return [{**outcome, "log": log} for outcome in json.loads(results.read_text())]


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from moe_rco.serve import vllm_plugin

    checked = vllm_plugin.check_tensors
    if job.get("unchecked"):
        vllm_plugin.check_tensors = lambda expected, found: None
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        **job.get("settings", {}),
    }
    # vLLM 0.32 takes every object in every module for one with a plain __dict__, which llvmlite's is not: with
    # numba imported, no engine starts in the process any more. The name is all that it looks for.
    sys.modules.pop("llvmlite.binding.ffi", None)
    # vLLM collects garbage eight times a start; all that was imported would be gone through every time.
    gc.collect()
    gc.freeze()
    try:
        engine = LLM(job["model"], skip_tokenizer_init=True, disable_log_stats=True, **settings)
    except Exception as error:  # noqa: BLE001 - whatever vLLM makes of a refusal is the outcome
        cleanup_dist_env_and_memory()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        vllm_plugin.check_tensors = checked
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["tokens"],
        prompt_logprobs=CANDIDATES,
        detokenize=False,
        ignore_eos=True,
    )
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    positions = [filter(None, output.prompt_logprobs or ()) for output in outputs]
    del engine
    cleanup_dist_env_and_memory()
    return {
        "prompts": [
            [{str(token): entry.logprob for token, entry in position.items()} for position in prompt]
            for prompt in positions
        ],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


def main() -> None:
    given, results = map(Path, sys.argv[1:])
    found = [_run(job) for job in json.loads(given.read_text())]
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
