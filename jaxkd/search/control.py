"""λ is steered: the cost that is alive follows a schedule down to the budget.

A gate that nothing pulls back closes when the thresholds it has met add up to its effort (see
`gates.effort`). So the λ that brings the cost to its scheduled value within a horizon can be
computed: it is a quantile of effort per price. What the loss pulls back is the error of this
prediction; a multiplicative integral term corrects it. Every budget has a λ of its own, those of
blocks first: what they close counts for the network's as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
      correction: float64 [budgets], the integral terms.
      penalty: float64 [budgets], λ: what the loss is charged for all that a budget is about.
      closed: bool [units] by group name: gates that have closed, and stay closed.
      strength: float32 [units] by group name: what `penalty.proximal` wants.
    """

    correction: np.ndarray
    penalty: np.ndarray
    closed: dict[str, np.ndarray]
    strength: dict[str, np.ndarray]


def initial(efforts: Mapping[str, np.ndarray], budgets: int = 1) -> State:
    """All gates open, nothing pressed."""
    return State(
        correction=np.ones(budgets),
        penalty=np.zeros(budgets),
        closed={name: np.zeros(len(e), bool) for name, e in efforts.items()},
        strength={name: np.zeros(len(e), np.float32) for name, e in efforts.items()},
    )


def alive(graph: Graph, state: State) -> dict[str, np.ndarray]:
    """The keep of the gates that are open; of branches that are interrupted, nothing."""
    return graph.complete({name: ~closed for name, closed in state.closed.items()})


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
    budgets: Sequence[blocking.Budget],
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
      budgets: from `blocks.budgets`.
      progress: how far along its way down the schedule is, in [0, 1] and beyond.
      horizon, period: how far ahead λ is chosen for, and the time between two rounds; both in
        units of progress.
      rate: the sum of learning rates over a horizon from now.

    Returns:
      The next state.
    """
    protected = {name: _best(effort, limits[name].least) for name, effort in efforts.items()}
    closed = {name: (e == 0) & ~protected[name] for name, e in efforts.items()}
    keep = alive(graph, state._replace(closed=closed))
    closed = {name: ~keep[name] for name in efforts}  # with what is left of a branch that has gone
    cost = graph.cost(keep)
    corrections, penalties = state.correction.copy(), np.zeros(len(budgets))
    strength = {name: np.zeros(len(e)) for name, e in efforts.items()}
    for i, budget in enumerate(budgets):
        goal = budget.most * (1 + MARGIN) / budget.full
        error = budget.share(cost) / schedule(progress, goal) - 1
        growth = np.clip(error / EXCESS, -1, 1) * period / horizon
        corrections[i] = np.clip(corrections[i] * GROWTH**growth, *BOUNDS)
        price = graph.price(keep, budget.resource, budget.layers)
        price = {
            name: np.where(protected[name], 0.0, price[name] * limits[name].strength / budget.full)
            for name in efforts
        }
        pressed = {name: s * rate for name, s in strength.items()}
        ahead = schedule(progress + horizon, goal)
        needed = _needed(graph, keep, efforts, pressed, price, budget, ahead)
        penalties[i] = corrections[i] * needed / max(rate, 1e-30)
        for name, p in price.items():
            strength[name] += penalties[i] * p
    strength = {
        name: np.where(closed[name], np.inf, s).astype(np.float32) for name, s in strength.items()
    }
    return State(corrections, penalties, closed, strength)


def _best(effort: np.ndarray, number: int) -> np.ndarray:
    """Which units are the `number` with the largest effort: bool [units]."""
    best = np.zeros(len(effort), bool)
    best[np.argsort(-effort, kind='stable')[:number]] = True
    return best


def _needed(
    graph: Graph,
    keep: Mapping[str, np.ndarray],
    efforts: Mapping[str, np.ndarray],
    pressed: Mapping[str, np.ndarray],
    price: Mapping[str, np.ndarray],
    budget: blocking.Budget,
    goal: float,
) -> float:
    """The least threshold per price that closes enough gates to bring a budget's share to `goal`.

    It comes on top of the thresholds that are `pressed` already.
    """
    left = {name: np.maximum(efforts[name] - pressed[name], 0.0) for name in efforts}
    ratios = np.sort(
        np.concatenate(
            [
                (left[name] / np.where(p > 0, p, 1.0))[keep[name] & (p > 0)]
                for name, p in price.items()
            ]
            or [np.zeros(0)]
        )
    )

    def met(number: int) -> bool:
        """Whether closing the gates with the `number` smallest ratios is enough."""
        edge = ratios[number - 1] if number else -1.0
        rest = keep | {
            name: keep[name]
            & ~(((p > 0) & (left[name] <= edge * p)) | _gone(pressed[name], efforts[name]))
            for name, p in price.items()
        }
        return budget.share(graph.cost(rest)) <= goal

    low, high = 0, len(ratios)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle + 1, high)
    return float(ratios[low - 1]) if low else 0.0


def _gone(pressed: np.ndarray, effort: np.ndarray) -> np.ndarray:
    """The gates that what is pressed already closes."""
    return (pressed > 0) & (effort <= pressed)
