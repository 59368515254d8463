"""Speed and memory in vLLM: the original model, our mixed outputs, and everything at 4 bits, side by side.

    python -m eval.serving
    python -m eval.serving --model eval/models/mixtral --rounds 9

Every variant is a vLLM engine in a process of its own. All are started first; then they take turns, each measuring
once a round while the others wait, so that all see the same machine. Shown is the median over rounds and, for
speeds, the median of the ratios to the original in the same round with their 10 % and 90 % quantiles. Prefill is
a batch of prompts with one token out; decode is the time of the further tokens of short prompts. Memory is the
process's own resident memory (USS), and the bytes of all tensors the model holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

WORK = Path("out/serving")
BATCHES = (1, 16)
PROMPT, SHORT, NEW = 256, 16, 64
# A random model has nothing to calibrate: little text, rounding to nearest.
RANDOM = ["quantizer.method=rtn", "calibration.sequences=16", "calibration.sequence_length=64"]
GPU = ["options=[prune, int4-g128, int8-g128, bf16]", *RANDOM]
ALL_INT4 = ["options=[int4-g128]", "budget={avg_bits: 4.13}", *RANDOM]
ORIGINAL = "original bf16, stock vLLM"
VARIANTS = {
    "cpu": {
        "mixed, 50 %": ["budget={ratio: 0.5}"],
        "mixed, 25 %": ["budget={ratio: 0.25}"],
        "without 2 and 3 bits, 25 %": ["budget={ratio: 0.25}", "options=[prune, int4-g64, int8-g64, bf16]"],
        "all int4-g64, our plugin": ["options=[int4-g64]", "budget={avg_bits: 4.5}"],
    },
    "gpu": {
        "mixed, 50 %": ["budget={ratio: 0.5}", *GPU],
        "mixed, bytes of all int4-g128": ["budget={avg_bits: 4.13}", *GPU],
        "all int4-g128, our plugin": ALL_INT4,
        "all int4-g128, stock vLLM": ["layout=stock", *ALL_INT4],
    },
}
STOCK = "stock vLLM"


def compressed(model: str, which: str) -> dict[str, Path]:
    """The directory of every variant by name; what `moe-rco prune` writes is kept between runs."""
    from moe_rco import load_recipe, prune
    from moe_rco.recipe import DEMO, DEMO_MODEL

    found = {ORIGINAL: DEMO_MODEL if model == DEMO else Path(model)}
    for name, settings in VARIANTS[which].items():
        output = WORK / Path(model).name / "".join(char for char in name if char.isalnum())
        if not output.exists():
            common = [f"model={model}", "search.steps=0", "search.refine=0", f"output={output}"]
            prune(load_recipe("demo", [*common, *settings]))
        found[name] = output
    return found


class Worker:
    """The process of one engine, told by lines on its standard input to measure."""

    def __init__(self, directory: Path, dtype: str, plugins: bool, share: float) -> None:
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        if not plugins:
            environment["VLLM_PLUGINS"] = ""
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "eval.serving",
                "--worker",
                str(directory),
                "--dtype",
                dtype,
                "--share",
                str(share),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.memory = self._read()

    def measure(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("measure\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended with exit code {self._process.wait()}; its messages are above")
        return json.loads(line)


def work(directory: str, dtype: str, share: float) -> None:
    """The life of a worker: start, report memory, measure whenever asked."""
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with redirect_stdout(sys.stderr):  # vLLM prints
        import psutil
        from vllm import LLM

        engine = LLM(
            directory,
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=2 * PROMPT,
            max_num_seqs=max(BATCHES),
            gpu_memory_utilization=share,
        )
        measure(engine)  # compiles and warms up
        memory = {
            "uss": psutil.Process().memory_full_info().uss,
            "tensors": sum(engine.apply_model(tensor_bytes)),
        }
        print(json.dumps(memory), file=reply, flush=True)
        for _ in sys.stdin:
            print(json.dumps(measure(engine)), file=reply, flush=True)


def tensor_bytes(model: Any) -> int:
    """Bytes of every storage the model's parameters and buffers live in, each counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def measure(engine: Any) -> dict[str, float]:
    """Tokens per second, by kind and batch."""
    from vllm import SamplingParams

    vocabulary = engine.get_tokenizer().vocab_size
    rng = np.random.default_rng(0)
    results = {}

    def seconds(batch: int, length: int, new: int) -> float:
        # Fresh tokens each time, so that no prefix is found in the cache.
        prompts = [
            {"prompt_token_ids": row.tolist()} for row in rng.integers(10, vocabulary, (batch, length))
        ]
        sampling = SamplingParams(max_tokens=new, min_tokens=new, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    for batch in BATCHES:
        results[f"prefill, batch {batch}"] = batch * PROMPT / seconds(batch, PROMPT, 1)
        first, all_of_them = seconds(batch, SHORT, 1), seconds(batch, SHORT, NEW + 1)
        results[f"decode, batch {batch}"] = batch * NEW / (all_of_them - first)
    return results


def render(model: str, dtype: str, memory: Mapping[str, dict], rounds: Mapping[str, list[dict]]) -> str:
    kinds = list(rounds[ORIGINAL][0])
    lines = [
        "# Serving\n",
        f"Made by `python -m eval.serving` with {model}, {dtype}, {len(rounds[ORIGINAL])} rounds: tokens per second, and",
        "the ratio to the original in the same round (median, 10 % to 90 %). Memory in MB (10^6 bytes).\n",
        f"| variant | {' | '.join(kinds)} | model tensors | process |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for name, runs in rounds.items():
        cells = []
        for kind in kinds:
            speed = np.array([run[kind] for run in runs])
            ratios = speed / [run[kind] for run in rounds[ORIGINAL]]
            low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
            spread = "" if name == ORIGINAL else f" {middle:.2f} ({low:.2f} to {high:.2f})"
            cells.append(f"{np.median(speed):.0f}{spread}")
        sizes = (f"{memory[name][key] / 1e6:.1f}" for key in ("tensors", "uss"))
        lines.append(f"| {name} | {' | '.join(cells)} | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", choices=VARIANTS, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("eval/results/serving.md"))
    parser.add_argument("--worker", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=0.9, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.dtype, arguments.share)
        return
    variants = compressed(arguments.model, arguments.variants)
    share = 0.9 / len(variants)  # of a GPU's memory: all engines are there at once
    workers = {
        name: Worker(path, arguments.dtype, STOCK not in name, share) for name, path in variants.items()
    }
    rounds: dict[str, list[dict]] = {name: [] for name in workers}
    for number in range(arguments.rounds):
        names = list(workers)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            rounds[name].append(workers[name].measure())
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    memory = {name: worker.memory for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    text = render(arguments.model, arguments.dtype, memory, rounds)
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
