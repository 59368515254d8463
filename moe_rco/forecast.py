"""How long every stage of a run will take: how often it does something, times what that was measured to cost."""

from __future__ import annotations

from pathlib import Path

from moe_rco.baselines import PROXY_STRIDE, starting_points, unmeasured
from moe_rco.calib.data import heldout_pool, load_tokenizer
from moe_rco.ckpt.rewrite import output_bytes
from moe_rco.job import Ready
from moe_rco.optim.races import FIRST_HEAT
from moe_rco.optim.solve import BACKWARD, SEARCHES, step_passes
from moe_rco.reload import RELOAD_SEQUENCES
from moe_rco.trial import Cost, measure_costs
from moe_rco.types import Progress

OF_EACH_BUDGET = (
    "judge the candidates",
    "search",
    "refine",
    "write the model",
    "hash what was written",
    "read it back",
    "measure on held-out text",
)
"""The stages that every budget has for itself."""


def stage_times(ready: Ready, progress: Progress, place: Path | None = None) -> dict[str, float]:
    """Seconds that each stage of a run by one process will take, for its first budget. Files for trying it are in `place`.

    Raises ModelError, StoreError.
    """
    sized, search, checkpoint = ready.sized, ready.recipe.search, ready.checkpoint
    with progress.stage("measure how fast it goes", 1) as advance:
        costs = measure_costs(ready, place)
        advance(1)
    table, (train, kept_out) = sized.table, ready.pools
    layers, length = len(table.layers), train.ids.shape[1]
    heldout = heldout_pool(ready.recipe.calibration, load_tokenizer(checkpoint.directory), kept_out)

    def run(cost: Cost, sequences: int, together: int = costs.batch) -> float:
        return cost.of(layers, sequences * length, -(-sequences // max(1, together)))

    # Dense weights are taken to cost what experts' do.
    experts = len(table.experts.groups) * table.numel / table.experts.numel
    quantising = costs.quantise * experts + costs.hessian * layers * table.floor * len(train) * length
    judging = run(costs.forward, len(kept_out))
    # Where weights are streamed, several samples share a call.
    together = search.batch if ready.streaming is None else max(search.batch, costs.batch)
    tried = search.search_steps * search.samples * search.batch
    steps = run(costs.step, tried, together)
    if search.method == "evolution":
        steps = run(costs.forward, tried * (1 + BACKWARD))
    refining = search.races * step_passes(search.samples, search.batch)
    points = starting_points(table, sized.budgets[0], *unmeasured(table))
    others = output_bytes(checkpoint, table.groups, 0)
    written = sized.budgets[0].bytes + others
    times = {
        "check expert weights": table.original_bytes * costs.check,
        "read the weights": (table.original_bytes + others) * costs.read,
        "calibrate and quantise": run(costs.forward, len(train) + len(kept_out)) + quantising,
        "measure every option": layers * costs.load + run(costs.fisher, len(train), costs.pair),
        "measure output errors": run(costs.errors, len(train) // PROXY_STRIDE),
        "judge the candidates": (1 + len(points)) * judging,  # and the seed
        "search": steps + search.search_steps // search.evaluate_every * judging,
        "refine": run(costs.forward, refining, min(costs.batch, FIRST_HEAT // 2)),
        "write the model": written * costs.write,
        "hash what was written": 2 * written * costs.read,  # by file and by tensor
        "read it back": written * costs.read + 2 * run(costs.forward, RELOAD_SEQUENCES),
        "measure on held-out text": 2 * run(costs.forward, len(heldout)),
    }
    unused = () if search.method in SEARCHES else ("search", "refine")
    return {name: round(seconds, 3) for name, seconds in times.items() if name not in unused}
