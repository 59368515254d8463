"""How well cheap measurements foretell what pruning an expert, or narrowing a layer's experts, does to the KL.

    python -m eval.effects

For the three trained models, on the calibration text: the true KL to the original model of pruning one expert alone,
against the second-order prediction with gradients softened by temperatures, the output error, REAP's score and the
share of routed tokens; and of moving all experts of a layer to one option, against the sum of the predictions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from eval.prepared import MODELS, Lines, Subject, recipe_of, subject
from moe_rco.baselines import output_errors
from moe_rco.calib.data import TokenPool
from moe_rco.calib.fisher import log_likelihood_of_samples
from moe_rco.calib.losses import KeptOut
from moe_rco.calib.objective import Pass
from moe_rco.calib.reference import Reference

TEMPERATURES = (1.0, 1.5, 2.0, 4.0, 8.0)
STRIDE = 4
"""Every fourth calibration sequence is measured; of those, every fourth gives the true KL."""


def predictions(found: Subject, pool: TokenPool, seed: int) -> dict[str, np.ndarray]:
    """By name, float64 [N, K]."""
    model, usage = found.prepared.model, found.prepared.calibrated.usage
    named: dict[str, np.ndarray] = {}
    for temperature in TEMPERATURES:
        draws = torch.rand(pool.ids.shape, generator=torch.Generator().manual_seed(seed))
        total = np.zeros(model.table.costs.shape)
        for part, ids in pool.batches(8):
            loss = log_likelihood_of_samples(draws[part], temperature)
            ((_, effects),) = model.effects([Pass(None, loss)], ids)
            total += 0.5 * effects.squared * len(ids) / len(pool)
        named[f"second order, T = {temperature:g}"] = total
    named["output error / block's output"] = output_errors(model, pool, Lines()).losses("block")
    for name, scores in (("REAP", usage.saliency), ("frequency", usage.counts)):
        named[name] = np.zeros(model.table.costs.shape)
        for layer in model.table.layers:
            share = scores[layer] / scores[layer].sum()
            named[name][model.table.rows(layer)] = share.numpy()[:, None]
    return named


def report(found: Subject, seed: int) -> str:
    """The tables of one model."""
    model = found.prepared.model
    table, prune = model.table, model.table.prune_index
    pool = found.prepared.pools[0].every(STRIDE)
    sample = pool.every(STRIDE)
    reference = Reference.empty(len(sample), sample.ids.shape[1], model.runner.vocab_size)
    for part, ids in sample.batches(8):
        for row, logits in enumerate(model.runner.logits(model.hidden(ids)), part.start):
            reference.fill(row, slice(None), logits)
    judge = KeptOut(model, sample, reference)
    original = len(table.options)

    def true_kl(rows: np.ndarray, option: int) -> float:
        choice = np.full(len(table.groups), original)
        choice[rows] = option
        return judge(choice)

    named = predictions(found, pool, seed)
    assert prune is not None
    layers = [table.layers[i] for i in sorted({0, len(table.layers) // 2, len(table.layers) - 1})]
    truth = {
        layer: np.array(
            [true_kl(table.rows(layer)[[e]].copy(), prune) for e in range(len(table.rows(layer)))]
        )
        for layer in layers
    }
    lines = [
        f"## {found.name}\n",
        f"Pruning one expert of layer {', '.join(map(str, layers))}: Spearman's rank correlation with the true KL within each,",
        "over all of them, and the median of true over predicted.\n",
        "| prediction | " + " | ".join(f"layer {layer}" for layer in layers) + " | all | true / predicted |",
        "|:--|" + "--:|" * (len(layers) + 2),
    ]
    everything = np.concatenate([truth[layer] for layer in layers])
    for name, values in named.items():
        predicted = {layer: values[table.rows(layer), prune] for layer in layers}
        joined = np.concatenate([predicted[layer] for layer in layers])
        ranks = [_rank(predicted[layer], truth[layer]) for layer in layers]
        ratio = np.median(everything / np.maximum(joined, 1e-12))
        cells = [f"{rank:.2f}" for rank in (*ranks, _rank(joined, everything))]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {f'{ratio:.2f}' if name.startswith('second') else ''} |"
        )
    lines += [
        "\nMoving all experts of a layer to one option: true KL over the sum of predictions, at T = 1 and (T = 4).\n",
        "| layer | " + " | ".join(o.name for o in table.options if o.is_quantized) + " |",
        "|--:|" + "--:|" * sum(o.is_quantized for o in table.options),
    ]
    for layer in table.layers:
        rows, cells = table.rows(layer), []
        for option, kind in enumerate(table.options):
            if kind.is_quantized:
                true = true_kl(rows, option)
                sums = [named[f"second order, T = {t}"][rows, option].sum() for t in (1, 4)]
                cells.append(f"{true / sums[0]:.2f} ({true / sums[1]:.2f})")
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rank(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rank correlation."""
    found: Any = spearmanr(predicted, truth)
    return float(found.statistic)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("eval/results/effects.md"))
    arguments = parser.parse_args()
    parts = ["# Predicting what a move does to the KL\n\nMade by `python -m eval.effects`.\n"]
    for name in arguments.models:
        parts.append(report(subject(name, recipe_of(name)), 0))
        print(parts[-1], flush=True)
    arguments.output.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
