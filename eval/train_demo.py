"""Train one of the demo models on the CPU and export it in the Hugging Face format::

    python -m eval.gather UNPACKED DIR                      # see eval.gather for the sources
    python -m eval.corpus DIR moe_rco/demo/text
    export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=500000000
    python -m eval.train_demo --corpus DIR --model qwen3_moe --out moe_rco/demo/model --minutes 75 --batch-tokens 2048
    for model in mixtral qwen2_moe; do
      python -m eval.train_demo --corpus DIR --model $model --tokenizer moe_rco/demo/model \\
          --out eval/models/$model --minutes 60 --batch-tokens 2048
    done

The shipped models are not the ones these commands give to the byte: they were trained by the clock on a
shared machine, one core each, with interruptions. The demo model had 1,143 steps of 8,192 tokens at 1.4 times
today's learning rates, then went on from its checkpoint with steps of 2,048 tokens (which learn more from the
same text) up to about step 5,920, and from there up to step 9,360 with ``--mix 0.55 0.22 0.15 0.08``, because
prose was the domain furthest from done: 26.2 million tokens in all. Mixtral had 744 and Qwen2-MoE 499 steps
of 8,192 tokens, and then, from those weights (``--start``) and with a new optimiser, about 7,000 and 6,000 of 2,048.
The MALLOC variables keep freed memory in the process; without them page faults take a third
of a step.

The learning rate warms up, stays, and falls linearly to zero over the last part of the run, whose length is
``--steps`` or ``--minutes``, whichever ends first. The last quarter of the run has sequences of twice the
length. A run continues from the checkpoint in its ``--run`` folder, exactly as if it had not been interrupted
when its length is given in steps.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

import eval.experts  # noqa: F401  (registers the "sorted" experts)
from eval.batches import MIX, Batches, load, prepare
from eval.cpu_kernels import chunked_cross_entropy
from eval.demo_configs import demo_config
from eval.muon import build_optimizers

BALANCE = 0.01
WARM_UP, DECAY_FROM, LONG_FROM = 0.02, 0.4, 0.75
MUON_LR, ADAM_LR = 0.007, 2.1e-3


def balance_loss(routed: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over the layers of the switch-transformer loss: 1 when every expert of every layer is equally used.

    ``routed`` holds each layer's router logits and chosen experts.
    """
    losses = []
    for logits, experts in routed:
        probabilities = logits.float().softmax(-1)
        chosen = torch.bincount(experts.flatten(), minlength=logits.shape[1])
        losses.append(logits.shape[1] * (chosen / chosen.sum() * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def schedule(progress: float) -> float:
    return min(1.0, (progress + 1e-4) / WARM_UP, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


class Trainer:
    def __init__(self, config: PretrainedConfig, batches: Batches, seed: int, compiled: bool = True) -> None:
        torch.manual_seed(seed)
        self.model: Any = AutoModelForCausalLM.from_config(config)
        self.model.set_experts_implementation("sorted")
        self.model.set_attn_implementation("causal_bmm")
        self.model.train()
        self.batches = batches
        self.step, self.elapsed = 0, 0.0
        self.optimizers = build_optimizers(self.model, MUON_LR, ADAM_LR)
        self.routed: list[tuple[Tensor, Tensor]] = []
        for name, module in self.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._keep_routing)
            if compiled and name.endswith(("self_attn", "layernorm")):
                module.compile(dynamic=False)

    def _keep_routing(self, module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.routed.append((output[0], output[2]))

    def train_step(self, progress: float, length: int, batch_tokens: int) -> tuple[float, float]:
        """One update; returns the language-modelling loss and the balance loss."""
        tokens = self.batches.draw(self.step, batch_tokens // length, length)
        self.routed.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        loss = chunked_cross_entropy(hidden.flatten(0, 1), self.model.lm_head.weight, tokens[:, 1:].flatten())
        balance = balance_loss(self.routed)
        (loss + BALANCE * len(self.routed) * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("peak_lr", group["lr"])
                group["lr"] = group["peak_lr"] * schedule(progress)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item(), balance.item()

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed = state["step"], state["elapsed"]

    def run(
        self,
        steps: int,
        minutes: float,
        length: int,
        batch_tokens: int,
        every: int,
        checkpoint: Callable[[], None],
    ) -> None:
        started, begun = time.time(), self.elapsed
        while True:
            self.elapsed = begun + time.time() - started
            progress = max(self.step / steps, self.elapsed / (60 * minutes))
            if progress >= 1:
                break
            now = length * (2 if progress >= LONG_FROM else 1)
            loss, balance = self.train_step(progress, now, batch_tokens)
            if self.step % 20 == 0:
                tokens = self.step * batch_tokens
                print(
                    f"step {self.step} {progress:.1%} loss {loss:.3f} balance {balance:.3f} "
                    f"{tokens / 1e6:.2f} M tokens {self.elapsed / 60:.1f} min",
                    flush=True,
                )
            if self.step % every == 0:
                checkpoint()
        checkpoint()


def export(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16 to ``out``, which is replaced only once the new folder is complete."""
    copy: Any = AutoModelForCausalLM.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.save_pretrained(fresh, max_shard_size="3MB")
    tokenizer.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by eval.gather")
    parser.add_argument("--model", choices=("qwen3_moe", "mixtral", "qwen2_moe"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument(
        "--start", type=Path, metavar="MODEL", help="begin with the weights of this exported model"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="MODEL", help="take this model's tokenizer, train none"
    )
    parser.add_argument("--run", type=Path, help="folder of the checkpoint (eval/runs/MODEL)")
    parser.add_argument("--cache", type=Path, help="folder of tokenizer and tokens (DIR/cache)")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence, twice as many at the end")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument(
        "--mix",
        type=float,
        nargs=4,
        default=list(MIX.values()),
        metavar="W",
        help=f"weights of {', '.join(MIX)}",
    )
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints and exports")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache = args.cache or args.corpus / "cache"
    prepare(args.corpus, cache, args.tokenizer)
    tokenizer, batches = load(cache, args.seed, dict(zip(MIX, args.mix, strict=True)))
    trainer = Trainer(demo_config(args.model), batches, args.seed)
    saved = (args.run or Path("eval/runs") / args.model) / "checkpoint.pt"
    if saved.exists():
        trainer.restore(saved)
    elif args.start:
        trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.start).float().state_dict())

    def checkpoint() -> None:
        trainer.save(saved)
        export(trainer.model, tokenizer, args.out)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    trainer.run(args.steps, args.minutes, args.length, args.batch_tokens, args.every, checkpoint)


if __name__ == "__main__":
    main()
