"""From scores to a keep that meets the budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxkd.graph.trace import Graph
from jaxkd.search import blocks as blocking

# Share of the surplus that is removed at today's prices before prices are taken anew.
STRIDE = 0.1


def select(
    graph: Graph,
    scores: Mapping[str, np.ndarray],
    *,
    flops: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency: float | None = None,
    blocks: blocking.Blocks = (),
) -> dict[str, np.ndarray]:
    """Keeps the units with the best score for their price, within all budgets at once.

    Removes the units with the least score per price, prices taken anew as the network shrinks,
    until the budget holds; then takes back what still fits, best first.

    Args:
      graph: the traced network.
      scores: float [size] by group name, ≥ 0. Groups without scores are kept whole.
      flops, params, activations, latency: budgets: shares of the full network in (0, 1], or
        absolute numbers above 1 (of latency: milliseconds); None or 1 sets no limit. A budget in
        latency needs a graph from `jaxkd.with_latency`.
      blocks: see `jaxkd.search.blocks.resolve`.

    Returns:
      The keep: at most the budget, and within the cost of one unit below it.

    Raises:
      BudgetError: where the limits of groups and blocks leave more than the budget.
    """
    limits = blocking.resolve(graph, blocks)
    budget = blocking.budgets(
        graph, flops=flops, params=params, activations=activations, latency=latency
    )
    names = [group.name for group in graph.groups]
    offsets = dict(zip(names, np.cumsum([0, *(g.size for g in graph.groups)]), strict=False))

    # Units in the order of their groups, in one vector.
    score = np.concatenate(
        [np.asarray(scores.get(g.name, np.full(g.size, np.inf)), float) for g in graph.groups]
    )
    alive = np.ones(len(score), bool)
    movable = np.zeros(len(score), bool)
    essential = np.zeros(len(score), bool)
    for group in graph.groups:
        start, limit = offsets[group.name], limits[group.name]
        if group.frozen or group.name not in scores:
            essential[start : start + group.size] = True
            continue
        best = start + np.argsort(-score[start : start + group.size], kind='stable')
        essential[best[: limit.least]] = True
        movable[best[limit.least : limit.most]] = True
        alive[best[limit.most :]] = False

    def keep(alive: np.ndarray) -> dict[str, np.ndarray]:
        return {g.name: alive[offsets[g.name] :][: g.size] for g in graph.groups}

    def prices(alive: np.ndarray) -> dict[str, np.ndarray]:
        by_resource = {resource: graph.price(keep(alive), resource) for resource in budget}
        return {r: np.concatenate([p[name] for name in names]) for r, p in by_resource.items()}

    def shares(alive: np.ndarray) -> dict[str, float]:
        cost = graph.cost(keep(alive))
        return {resource: getattr(cost, resource) / b for resource, b in budget.items()}

    def worth(alive: np.ndarray) -> np.ndarray:
        """Score per price, the budgets weighted by how far they are exceeded at present."""
        share = shares(alive)
        weight = {r: max(s - 1, 0.0) for r, s in share.items()}
        if not any(weight.values()):
            weight = share
        price = sum(weight[r] / budget[r] * p for r, p in prices(alive).items())
        return score / np.maximum(price, 1e-30)

    def excess(alive: np.ndarray) -> float:
        return max(shares(alive).values(), default=0.0) - 1

    blocking.check_reachable(graph, limits, budget, keep(essential))
    while (over := excess(alive)) > 0:
        candidates = np.flatnonzero(alive & movable)
        candidates = candidates[np.argsort(worth(alive)[candidates], kind='stable')]
        # As many as bring the cost a stride nearer to the budget; at the end, one by one.
        low, high = 1, len(candidates)
        while low < high:
            middle = (low + high) // 2
            trial = alive.copy()
            trial[candidates[:middle]] = False
            low, high = (
                (low, middle) if excess(trial) <= over * (1 - STRIDE) else (middle + 1, high)
            )
        alive[candidates[:low]] = False

    while budget:
        # A unit's price never exceeds what it adds, so a unit whose price does not fit cannot.
        room = {resource: 1 - share for resource, share in shares(alive).items()}
        fits = ~alive & movable
        for resource, price in prices(alive).items():
            fits &= price <= room[resource] * budget[resource]
        if not fits.any():
            break
        best = np.flatnonzero(fits)[np.argmax(worth(alive)[fits])]
        alive[best] = True
        if excess(alive) > 0:
            alive[best] = movable[best] = False
    return graph.complete(keep(alive))
