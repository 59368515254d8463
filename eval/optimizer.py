"""The optimiser against its rivals, in one run: manifold steps, exact knapsacks, and problems with a known optimum.

    OMP_NUM_THREADS=1 python -m eval.optimizer
    python -m eval.optimizer --instances 3 --groups 100 1000 --output out/optimizer.md

Every method gets the same number of passes: a backward pass counts as two forward passes. The penalty and lagrangian
methods are run at four weights, and the best of the four *results* counts, at four times the price.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.optimize import root

from eval.synthetic import Problem, highs, overlapping, pairwise, qwen3_instance, separable
from moe_rco.optim import BudgetManifold, Knapsack, OverlappingBudgetManifold, solve

matplotlib.use("svg")
METHODS = ("rco", "rco, search alone", "penalty", "lagrangian", "evolution")
WEIGHTS = (3.0, 10.0, 30.0, 100.0)
"""Of the penalty and lagrangian methods, relative to the optimum."""
NOT_WORSE = 1e-9


def timed(work: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """Median seconds of some calls, after one that does not count, and the last result."""
    result, seconds = work(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def manifold_rows(groups: int) -> list[list[str]]:
    """A step on the manifold over a softmax of the same array, and how far from the budget it ends."""
    rows = []
    for name, spread in (("mild logits", 1.0), ("logits to +-500", 500.0)):
        generator = torch.Generator().manual_seed(0)
        costs = torch.randint(1, 10**9, (groups, 8), generator=generator).double()
        logits = spread * (2 * torch.rand(groups, 8, generator=generator, dtype=torch.float64) - 1)
        vector = torch.randn(groups, 8, generator=generator, dtype=torch.float64)
        budget = float(costs.min(1).values.sum() * 0.6 + costs.max(1).values.sum() * 0.4)
        manifold = BudgetManifold(costs, budget)
        here = manifold.retract(logits)

        ours, moved = timed(partial(_step, manifold, here, vector))
        plain, _ = timed(partial(torch.softmax, here, dim=1))
        error = float((manifold.expected_cost(moved) - budget).abs()) / budget
        rows.append(
            [f"{name}, {groups:,} groups x 8", f"{ours * 1e3:.0f} ms", f"{ours / plain:.1f}", f"{error:.1e}"]
        )
    return rows


def _step(manifold: BudgetManifold, here: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    moved = manifold.retract(here - 0.1 * manifold.project(here, vector))
    manifold.transport(moved, vector)
    return moved


def overlap_rows() -> list[list[str]]:
    """Meeting 16 budgets at once from random logits, against scipy's general root finder on the same equations."""
    costs, budgets = overlapping(0)
    manifold = OverlappingBudgetManifold(costs, budgets)
    logits = torch.randn(costs.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, moved = timed(lambda: manifold.retract(logits))

    def missed(t: np.ndarray) -> np.ndarray:
        at = logits + torch.einsum("q,qnk->nk", torch.from_numpy(t), costs)
        return (manifold.expected_cost(at) / budgets - 1).numpy()

    theirs, found = timed(lambda: root(missed, np.zeros(len(budgets)), tol=1e-13), repeats=2)
    error = float((manifold.expected_cost(moved) / budgets - 1).abs().max())
    return [
        ["moe_rco", f"{ours * 1e3:.1f} ms", "1.0", f"{error:.1e}"],
        ["scipy.optimize.root (hybr)", f"{theirs * 1e3:.0f} ms", f"{theirs / ours:.1f}", f"{np.abs(found.fun).max():.1e}"],
    ]  # fmt: skip


def knapsack_rows() -> list[list[str]]:
    """The knapsack of Qwen3-30B-A3B's shape: proved, in the loop, and by HiGHS."""
    values, costs, layer, budget = qwen3_instance(0)
    floor = np.full(48, 8)
    small = slice(0, 128)
    Knapsack(costs[small], budget // 48, floor=floor[:1], layer=layer[small]).solve(values[small])  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knapsack = Knapsack(costs, budget, floor=floor, layer=layer)
    ours, exact = timed(lambda: Knapsack(costs, budget, floor=floor, layer=layer).solve(values))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    rng, loop, warm = np.random.default_rng(1), [], exact
    for _ in range(50):
        noisy = values / np.abs(values).mean() - np.log(-np.log(rng.random(values.shape)))
        start = time.perf_counter()
        warm = knapsack.solve(noisy, warm=warm)
        loop.append(time.perf_counter() - start)
    start = time.perf_counter()
    rival = highs(values, costs, budget, floor=floor, layer=layer)
    theirs = time.perf_counter() - start
    again, worst = statistics.median(loop), max(loop)
    proved = f"{exact.value:.10g}, {exact.status}"
    return [
        ["moe_rco, from nothing", f"{ours * 1e3:.0f} ms", "1.0", proved, f"+{grown / 1024:.0f} MB"],
        ["moe_rco, new logits, warm", f"{again * 1e3:.1f} ms, worst of 50 {worst * 1e3:.1f}", f"{again / ours:.2f}", "", ""],
        ["HiGHS", f"{theirs:.1f} s", f"{theirs / ours:.0f}", f"{rival:.10g}", ""],
    ]  # fmt: skip


def gaps(problem: Problem, seed: int, steps: int, samples: int) -> dict[str, tuple[float, float]]:
    """(relative gap to the optimum, seconds) of every method."""
    found = {}
    size = abs(problem.optimum)

    def run(method: Any, **extra: Any) -> tuple[float, float, Any]:
        start = time.perf_counter()
        result = solve(
            problem.costs, problem.budget, problem.loss, method=method, steps=steps, samples=samples, seed=seed,
            **extra,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        rows = np.arange(len(problem.costs))
        if problem.costs[rows, result.choice].sum() > problem.budget:
            raise AssertionError(f"{method} is over the budget")
        return (result.value - problem.optimum) / size, seconds, result

    gap, seconds, result = run("rco")
    found["rco"] = gap, seconds
    decoded = next(record.value for record in reversed(result.history) if record.value is not None)
    found["rco, search alone"] = (decoded - problem.optimum) / size, seconds
    for method in ("penalty", "lagrangian"):
        tries = [run(method, weight=weight * size) for weight in WEIGHTS]
        found[method] = min(gap for gap, *_ in tries), sum(seconds for _, seconds, _ in tries)
    found["evolution"] = run("evolution", start=problem.start())[:2]
    return found


def solver_tables(
    groups: Sequence[int], instances: int, small: int
) -> tuple[list[list[str]], list[list[str]], dict[int, dict[str, list[float]]]]:
    """Rows for separable and for pairwise problems, and the separable gaps by size and method."""
    every: dict[int, dict[str, list[float]]] = {}
    rows = []
    for count in groups:
        found = [gaps(separable(count, seed), seed, 300, 4) for seed in range(instances)]
        every[count] = {method: [one[method][0] for one in found] for method in METHODS}
        for method in METHODS:
            values, seconds = every[count][method], statistics.median(one[method][1] for one in found)
            rows.append(
                [f"{count:,}", method, f"{statistics.median(values):.4%}", f"{max(values):.4%}", f"{seconds:.2f} s"]
            )  # fmt: skip
        print(f"separable, {count:,} groups: done", flush=True)
    found = [gaps(pairwise(seed), seed, 300, 4) for seed in range(small)]
    pairs = []
    for method in METHODS:
        values = [one[method][0] for one in found]
        hits = sum(value <= NOT_WORSE for value in values)
        seconds = statistics.median(one[method][1] for one in found)
        pairs.append([method, f"{hits} of {small}", f"{statistics.mean(values):.3%}", f"{seconds:.2f} s"])
    return rows, pairs, every


def picture(every: dict[int, dict[str, list[float]]], path: Path) -> None:
    """Gaps of the methods over the size of the problem."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    sizes = list(every)
    for method, marker in zip(METHODS, "os^vD", strict=True):
        middle = [max(statistics.median(every[count][method]), 1e-7) for count in sizes]
        axes.plot(sizes, middle, marker=marker, label=method)
    axes.set(xscale="log", yscale="log", xlabel="groups", ylabel="median gap to the optimum (1e-7: none)")
    axes.axhline(1e-3, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(fontsize=8)
    figure.savefig(path)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--small", type=int, default=50, help="pairwise instances")
    parser.add_argument("--rows", type=int, default=1_000_000, help="groups of the manifold's problem")
    parser.add_argument("--output", type=Path, default=Path("eval/results/optimizer.md"))
    arguments = parser.parse_args()
    # The knapsack first: later its peak of memory would hide below the others'.
    knapsack, manifold, overlap = knapsack_rows(), manifold_rows(arguments.rows), overlap_rows()
    print("manifold and knapsack: done", flush=True)
    separable_rows, pairs, every = solver_tables(arguments.groups, arguments.instances, arguments.small)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture(every, arguments.output.with_suffix(".svg"))
    text = "\n".join(
        [
            "# The optimiser\n",
            f"Made by `OMP_NUM_THREADS=1 python -m eval.optimizer`, {torch.get_num_threads()} thread(s).\n",
            "## A step on the budget manifold (project, move, retract, transport)\n",
            _table(["problem", "time", "over one softmax", "budget error"], manifold),
            "## 16 budgets at once, 500 groups x 32 options\n",
            _table(["method", "time", "over ours", "largest budget error"], overlap),
            "## Exact knapsack, Qwen3-30B-A3B's shape (48 x 128 groups, 6 options, at least 8 kept per layer)\n",
            _table(["method", "time", "over ours", "objective", "peak memory"], knapsack),
            "## Separable losses: gap to the knapsack's optimum\n",
            f"{arguments.instances} instances of each size, 300 steps of 4 samples and as many swaps, or as many passes.\n",
            _table(["groups", "method", "median gap", "largest", "seconds"], separable_rows),
            f"![Gaps by size]({arguments.output.with_suffix('.svg').name})\n",
            f"## Pairwise losses, 9 groups x 4 options: the optimum by enumeration, {arguments.small} instances\n",
            _table(["method", "optimum found", "mean gap", "seconds"], pairs),
        ]
    )
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
