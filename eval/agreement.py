"""Log-probabilities of served models against transformers with the same files.

    python -m eval.agreement demo
    python -m eval.agreement out/gpu/random-4 --variants gpu

For every variant of `eval.serving` the probability of each token of held-out text is asked of vLLM and of transformers,
in the type given. Shown are the largest and the mean absolute difference of the log-probabilities. In bfloat16 the
original's own line says what two programs differ by anyway: routers decide ties by rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from eval.serving import ORIGINAL, STOCK, VARIANTS, compressed
from moe_rco.recipe import DEMO_HELDOUT

SEQUENCES, LENGTH = 16, 256


def sequences(directory: Path) -> list[list[int]]:
    """Token ids of the first shipped held-out documents that are long enough."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    texts = [json.loads(line)["text"] for line in DEMO_HELDOUT.read_text(encoding="utf-8").splitlines()]
    ids = (tokenizer(text)["input_ids"][:LENGTH] for text in texts[:: max(1, len(texts) // 64)])
    return [row for row in ids if len(row) == LENGTH][:SEQUENCES]


def transformers_log_probabilities(directory: Path, dtype: str, rows: list[list[int]]) -> torch.Tensor:
    """float32 [sequences, length - 1]"""
    # Imported here, because the other process must not: vLLM does not start where numba is loaded.
    from moe_rco.reload import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(directory, device, getattr(torch, dtype))
    found = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        found.append(log_p.gather(-1, ids[0, 1:, None])[:, 0].cpu())
    return torch.stack(found)


def vllm_log_probabilities(directory: Path, dtype: str, rows: list[list[int]]) -> torch.Tensor:
    """The same from vLLM; call it in a process of its own."""
    from vllm import LLM, SamplingParams

    engine = LLM(str(directory), dtype=dtype, max_model_len=2 * LENGTH, gpu_memory_utilization=0.5)  # type: ignore[arg-type]
    prompts: Any = [{"prompt_token_ids": row} for row in rows]
    answers = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    found = []
    for row, answer in zip(rows, answers, strict=True):
        given: Any = answer.prompt_logprobs
        found.append([given[at][token].logprob for at, token in enumerate(row) if at])
    return torch.tensor(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--variants", choices=VARIANTS, default="cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--output", type=Path, default=Path("eval/results/agreement.md"))
    parser.add_argument("--worker", nargs=2, metavar=("DIR", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        directory = Path(arguments.worker[0])
        torch.save(
            vllm_log_probabilities(directory, arguments.dtype, sequences(directory)), arguments.worker[1]
        )
        return
    lines = [
        "# vLLM against transformers\n",
        f"Made by `python -m eval.agreement {arguments.model}`, {arguments.dtype}: absolute difference of the",
        f"log-probabilities of {SEQUENCES} x {LENGTH} held-out tokens.\n",
        "| variant | largest | mean |\n|---|---|---|",
    ]
    place = Path("out/agreement.pt")
    for name, directory in compressed(arguments.model, arguments.variants).items():
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        if STOCK in name or name == ORIGINAL:
            environment["VLLM_PLUGINS"] = ""
        place.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "eval.agreement", arguments.model, "--dtype", arguments.dtype]
        command += ["--worker", str(directory), str(place)]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        served = torch.load(place)
        reference = transformers_log_probabilities(directory, arguments.dtype, sequences(directory))
        difference = (served - reference).abs()
        lines.append(f"| {name} | {float(difference.max()):.2e} | {float(difference.mean()):.2e} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
