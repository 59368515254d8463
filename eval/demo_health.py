"""Health of the demo models: held-out loss against a 3-gram, two-digit addition, and use of the experts.

::

    python -m eval.demo_health --corpus DIR moe_rco/demo/model eval/models/mixtral eval/models/qwen2_moe \\
        > eval/results/demo_models.md

The 3-gram (``eval.ngram``) is trained on all the training tokens that the models drew their batches from, once on the
domain's own and once on all domains'; the better of the two is reported. Additions are the pairs that no
training text contains, answered greedily from the bare question.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import arithmetic
from eval.corpus import DOMAINS, SHIPPED_TEXT, read_jsonl
from eval.ngram import TrigramModel

WINDOW = 512


def heldout_tokens(tokenizer: Any, name: str = "heldout") -> dict[str, list[np.ndarray]]:
    documents: dict[str, list[np.ndarray]] = {domain: [] for domain in DOMAINS}
    for row in read_jsonl(SHIPPED_TEXT / f"{name}.jsonl"):
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        documents[row["domain"]].append(np.array([tokenizer.eos_token_id, *ids]))
    return documents


class RouterCounts:
    """How often each expert of each layer was chosen since the last ``take``."""

    def __init__(self, model: nn.Module, experts: int) -> None:
        self.routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        self.experts = experts
        self.counts = torch.zeros(len(self.routers), experts, dtype=torch.long)
        for router in self.routers:
            router.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        chosen = torch.bincount(output[2].flatten(), minlength=self.experts)
        self.counts[self.routers.index(module)] += chosen

    def take(self) -> Tensor:
        counts, self.counts = self.counts, torch.zeros_like(self.counts)
        return counts / counts.sum(-1, keepdim=True)


@torch.inference_mode()
def document_loss(model: Any, documents: list[np.ndarray]) -> float:
    total, count = 0.0, 0
    for ids in documents:
        for start in range(0, len(ids) - 1, WINDOW):
            window = torch.from_numpy(ids[start : start + WINDOW + 1]).long()[None]
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
            total += F.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    return total / count


@torch.inference_mode()
def addition_accuracy(model: Any, tokenizer: Any, pairs: list[tuple[int, int]]) -> float:
    """Share of the pairs whose greedy continuation of the bare question reaches the right answer."""
    prompts = tokenizer(
        [arithmetic.question(a, b) for a, b in pairs], return_tensors="pt", add_special_tokens=False
    )
    output = model.generate(**prompts, max_new_tokens=48, do_sample=False)
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])
    right = sum(
        f"The answer is {a + b}." in text.split("\n")[0] for (a, b), text in zip(pairs, texts, strict=True)
    )
    return right / len(pairs)


def router_table(shares: dict[str, Tensor]) -> list[str]:
    """Per layer: shares over the even mix of domains, and how far each domain's own shares are from the mix's."""
    mixed = torch.stack(list(shares.values())).mean(0)
    lines = [
        "| layer | least used expert | most used expert | "
        + " | ".join(f"{domain} shift" for domain in shares)
        + " |",
        "|---:|---:|---:|" + "---:|" * len(shares),
    ]
    for layer, row in enumerate(mixed):
        shifts = [f"{(share[layer] - row).abs().sum() / 2:.2f}" for share in shares.values()]
        lines.append(f"| {layer} | {row.min():.2%} | {row.max():.2%} | " + " | ".join(shifts) + " |")
    return lines


def trigram_losses(tokenizer: Any, streams: dict[str, np.ndarray]) -> dict[str, float]:
    everything = TrigramModel(np.concatenate(list(streams.values())), len(tokenizer))
    losses = {}
    for domain, documents in heldout_tokens(tokenizer).items():
        own = TrigramModel(streams[domain], len(tokenizer))
        losses[domain] = min(own.loss(documents), everything.loss(documents))
    return losses


def report(folder: Path, baseline: dict[str, float]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    config = model.config
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    lines = [
        f"## {config.model_type}",
        "",
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_experts} experts, "
        f"top {config.num_experts_per_tok}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{size:.1f} MB on disk.",
        "",
        "| domain | held-out tokens | model, nats/token | 3-gram, nats/token |",
        "|:--|---:|---:|---:|",
    ]
    documents = heldout_tokens(tokenizer)
    routers = RouterCounts(model, config.num_experts)
    shares: dict[str, Tensor] = {}
    for domain, texts in documents.items():
        loss = document_loss(model, texts)
        shares[domain] = routers.take()
        count = sum(len(ids) - 1 for ids in texts)
        lines.append(f"| {domain} | {count} | {loss:.3f} | {baseline[domain]:.3f} |")
    pairs = arithmetic.held_out_pairs()
    accuracy = addition_accuracy(model, tokenizer, pairs)
    lines += ["", f"Held-out two-digit additions solved greedily: {accuracy:.1%} of {len(pairs)}.", ""]
    return [*lines, *router_table(shares), ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder of the training tokens (DIR/cache)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache = args.cache or args.corpus / "cache"
    streams = {domain: np.load(cache / f"{domain}.npy") for domain in DOMAINS}
    print(
        "# The demo models\n\nWritten by `python -m eval.demo_health`; the shift of a domain in a layer is the"
    )
    print(
        "total variation distance between its use of the experts and the use over the even mix of domains.\n"
    )
    baseline = trigram_losses(AutoTokenizer.from_pretrained(args.models[0]), streams)
    for folder in args.models:
        print("\n".join(report(folder, baseline)), flush=True)


if __name__ == "__main__":
    main()
