"""λ is steered: the cost that is alive follows a schedule down to the budget.

A gate that nothing pulls back closes when the thresholds it has met add up to its effort (see
`gates.effort`). So the λ that brings the cost to its scheduled value within a horizon can be
computed: it is a quantile of effort per price. What the loss pulls back is the error of this
prediction; a multiplicative integral term corrects it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxkd.graph.trace import Graph
from jaxkd.search import blocks as blocking

# The integral term grows by this factor over one horizon in which the cost is `EXCESS` above its
# schedule all the time, and falls likewise; it stays within `BOUNDS` (anti-windup).
GROWTH = np.e
EXCESS = 0.05
BOUNDS = (0.1, 1000.0)
# The search stops pressing a little above the budget: `select` takes the last per cent, by rank.
MARGIN = 0.01


class State(NamedTuple):
    """What the controller knows and says. All are arrays, so that a checkpoint can hold them.

    Attributes:
      correction: float64 [], the integral term.
      penalty: float64 [], λ: what the loss is charged for the cost of the full network.
      closed: bool [units] by group name: gates that have closed, and stay closed.
      strength: float32 [units] by group name: what `penalty.proximal` wants.
    """

    correction: np.ndarray
    penalty: np.ndarray
    closed: dict[str, np.ndarray]
    strength: dict[str, np.ndarray]


def initial(efforts: Mapping[str, np.ndarray]) -> State:
    """All gates open, nothing pressed."""
    return State(
        correction=np.array(1.0),
        penalty=np.array(0.0),
        closed={name: np.zeros(len(e), bool) for name, e in efforts.items()},
        strength={name: np.zeros(len(e), np.float32) for name, e in efforts.items()},
    )


def alive(graph: Graph, state: State) -> dict[str, np.ndarray]:
    """The keep of the gates that are open."""
    return graph.keep_all() | {name: ~closed for name, closed in state.closed.items()}


def schedule(progress: float, budget: float) -> float:
    """The share of a resource that should be alive: 1 at progress 0, the budget at 1 and after.

    Geometric: every stretch of the search removes the same share of what is left, because
    the removals hurt more the smaller the network is.
    """
    return float(budget ** np.clip(progress, 0.0, 1.0))


def decide(
    graph: Graph,
    state: State,
    efforts: Mapping[str, np.ndarray],
    limits: Mapping[str, blocking.Limits],
    budget: Mapping[str, float],
    *,
    progress: float,
    horizon: float,
    period: float,
    rate: float,
) -> State:
    """One round of control.

    Args:
      graph: the traced network.
      state: from the round before, or `initial`.
      efforts: float [units] by group name, of the present parameters; exactly 0 is closed.
      limits: from `blocks.resolve`.
      budget: absolute, by resource, from `blocks.budgets`.
      progress: how far along its way down the schedule is, in [0, 1] and beyond.
      horizon, period: how far ahead λ is chosen for, and the time between two rounds; both in
        units of progress.
      rate: the sum of learning rates over a horizon from now.

    Returns:
      The next state.
    """
    full = graph.cost()
    protected = {name: _best(effort, limits[name].least) for name, effort in efforts.items()}
    closed = {name: (e == 0) & ~protected[name] for name, e in efforts.items()}
    state = state._replace(closed=closed)
    keep = alive(graph, state)
    cost = graph.cost(keep)
    share = {r: getattr(cost, r) / getattr(full, r) for r in budget}
    goal = {r: b * (1 + MARGIN) / getattr(full, r) for r, b in budget.items()}
    target = {r: schedule(progress, g) for r, g in goal.items()}
    ahead = {r: schedule(progress + horizon, g) for r, g in goal.items()}

    # Several budgets: each price counts by how far its resource still has to go.
    way = {r: max(np.log(share[r] / goal[r]), 0.0) for r in budget}
    weight = {r: w / max(sum(way.values()), 1e-30) for r, w in way.items()}
    price = {name: np.zeros(len(e)) for name, e in efforts.items()}
    for resource, w in weight.items():
        for name, p in graph.price(keep, resource).items():
            if name in price:
                price[name] += w * p / getattr(full, resource) * limits[name].strength
    for name, p in price.items():
        p[protected[name]] = 0.0

    error = max((share[r] / target[r] - 1 for r in budget), default=0.0)
    growth = np.clip(error / EXCESS, -1, 1) * period / horizon
    correction = float(np.clip(state.correction * GROWTH**growth, *BOUNDS))

    penalty = correction * _needed(graph, keep, efforts, price, ahead) / max(rate, 1e-30)
    strength = {
        name: np.where(closed[name], np.inf, penalty * price[name]).astype(np.float32)
        for name in efforts
    }
    return State(np.array(correction), np.array(penalty), closed, strength)


def _best(effort: np.ndarray, number: int) -> np.ndarray:
    """Which units are the `number` with the largest effort: bool [units]."""
    best = np.zeros(len(effort), bool)
    best[np.argsort(-effort, kind='stable')[:number]] = True
    return best


def _needed(
    graph: Graph,
    keep: Mapping[str, np.ndarray],
    efforts: Mapping[str, np.ndarray],
    price: Mapping[str, np.ndarray],
    goal: Mapping[str, float],
) -> float:
    """The least threshold per price that closes enough gates to bring every cost to its goal."""
    full = graph.cost()
    ratios = np.sort(
        np.concatenate(
            [
                (efforts[name] / np.where(p > 0, p, 1.0))[keep[name] & (p > 0)]
                for name, p in price.items()
            ]
            or [np.zeros(0)]
        )
    )

    def met(number: int) -> bool:
        """Whether closing the gates with the `number` smallest ratios is enough."""
        edge = ratios[number - 1] if number else -1.0
        rest = keep | {
            name: keep[name] & ~((p > 0) & (efforts[name] <= edge * p)) for name, p in price.items()
        }
        cost = graph.cost(rest)
        return all(getattr(cost, r) <= g * getattr(full, r) for r, g in goal.items())

    low, high = 0, len(ratios)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle + 1, high)
    return float(ratios[low - 1]) if low else 0.0
