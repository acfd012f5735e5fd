"""λ is steered: the cost that is alive follows a schedule down to the budget.

A gate that nothing pulls back closes when the thresholds it has met add up to its effort (see
`gates.effort`), and what its unit is worth goes with it (see `weigh`). So the λ that brings the
cost to its scheduled value within a horizon can be computed: it is a quantile of worth per price.
Only the gates below that quantile are pressed, so that the others keep what they have learned (a
trimmed ℓ1 penalty; Yun et al. 2019, Trimming the ℓ1 Regularizer,
https://proceedings.mlr.press/v97/yun19a.html). What the loss pulls back is the error of this
prediction; a multiplicative integral term corrects it. Every budget has a λ of its own, those of
blocks first: what they close counts for the network's as well. Gates whose block is not pressed
yet, or no more, leave the schedule to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import NamedTuple

import numpy as np

from jaxkd.graph.cost import Cost
from jaxkd.graph.trace import Graph
from jaxkd.search import blocks as blocking
from jaxkd.search import select as selecting

# The integral term grows by this factor over one horizon in which the cost is `EXCESS` above its
# schedule all the time, and falls likewise; it stays within `BOUNDS` (anti-windup).
GROWTH = np.e
EXCESS = 0.05
# The parts of the horizon by whose ends what is due has to be closed: with the end of the whole one
# alone, which moves on, it never would be.
AHEAD = (0.125, 0.25, 0.5, 1.0)
# The search ends a little below the budget, so that all that `select` leaves out has closed.
SPARE = 0.01
BOUNDS = (0.1, 1000.0)
# The least worth, as a share of the mean: of what has none the loss says nothing, and its price
# has to.
LEAST = 1e-6


class State(NamedTuple):
    """What the controller knows and says. All are arrays, so that a checkpoint can hold them.

    Attributes:
      correction: float64 [budgets], the integral terms.
      penalty: float64 [budgets], λ: what the loss is charged for all that a budget is about.
      scheduled: float64 [budgets], the share that was to be alive; beside it stands what is.
      closed: bool [units] by group name: gates that have closed, and stay closed.
      strength: float32 [units] by group name: what `penalty.proximal` wants.
      value: float64 [units] by group name: of one of effort; see `weigh`.
      physical: bool [units] by group name: those that have not been cut away yet.
    """

    correction: np.ndarray
    penalty: np.ndarray
    scheduled: np.ndarray
    closed: dict[str, np.ndarray]
    strength: dict[str, np.ndarray]
    value: dict[str, np.ndarray]
    physical: dict[str, np.ndarray]


def initial(graph: Graph, efforts: Mapping[str, np.ndarray], budgets: int = 1) -> State:
    """All gates open, nothing pressed, nothing cut."""
    return State(
        correction=np.ones(budgets),
        penalty=np.zeros(budgets),
        scheduled=np.ones(budgets),
        closed={name: np.zeros(len(e), bool) for name, e in efforts.items()},
        strength={name: np.zeros(len(e), np.float32) for name, e in efforts.items()},
        value={name: np.ones(len(e)) for name, e in efforts.items()},
        physical=graph.keep_all(),
    )


def weigh(
    state: State, efforts: Mapping[str, np.ndarray], worth: Mapping[str, np.ndarray]
) -> State:
    """The state where gates close in the order of what they are worth now, for their price.

    Gates of different layers are no measure of one another: their size follows from the layers'
    normalization, and the loss may not care. So the penalty of each is weighted by its effort over
    its worth (an adaptive lasso; Zou 2006, https://doi.org/10.1198/016214506000000735), and its
    worth goes with its effort from there on.

    Args:
      state: `initial`.
      efforts: float [units] by group name, of the parameters at the start.
      worth: the same, ≥ 0, on any scale. Groups that it lacks are worth the mean of the others.

    Raises:
      ConfigError: for what no group is called, and for what `select.checked` refuses.
    """
    groups = {name: len(units) for name, units in state.physical.items()}
    selecting.check_names('worth', worth, groups)
    worth = {
        name: selecting.checked(f'worth[{name!r}]', score, groups[name])
        for name, score in worth.items()
    }
    known = [score for name, score in worth.items() if name in efforts]
    mean = np.mean(np.concatenate(known)) if known else 0.0
    if not mean:
        return state  # nothing is known
    value = {}
    for name, effort in efforts.items():
        now = np.maximum(worth.get(name, np.full(len(effort), mean)), LEAST * mean)
        value[name] = now / np.where(effort > 0, effort, 1.0)
    return state._replace(value=value)


def valued(state: State, efforts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What units are worth: float64 [units] by group name; exactly 0 for closed ones."""
    return {name: effort * state.value[name] for name, effort in efforts.items()}


def alive(graph: Graph, state: State) -> dict[str, np.ndarray]:
    """The keep of the gates that are open; of branches that are interrupted, nothing."""
    return graph.complete({name: ~closed for name, closed in state.closed.items()})


def schedule(progress: float, budget: float) -> float:
    """The share of a resource that should be alive: 1 at progress 0, the budget at 1 and after.

    Geometric: every stretch of the search removes the same share of what is left, because
    the removals hurt more the smaller the network is.
    """
    return float(budget ** np.clip(progress, 0.0, 1.0))


def due(budget: blocking.Budget, progress: float) -> float:
    """The share of what a budget is about that should be alive."""
    below = (progress - budget.start) / (budget.end - budget.start)
    return schedule(below, (1 - SPARE) * budget.most / budget.full)


def record(cost: Cost, state: State, budgets: Sequence[blocking.Budget]) -> dict[str, float]:
    """What a log says of a round: by budget the share alive, the share scheduled, and λ.

    Args:
      cost: of what is alive.
      state: of that round.
      budgets: as `decide` was given them.
    """
    row = {}
    for i, budget in enumerate(budgets):
        row[f'share_{budget.name}'] = budget.share(cost)
        row[f'scheduled_{budget.name}'] = float(state.scheduled[i])
        row[f'lambda_{budget.name}'] = float(state.penalty[i])
    return row


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
      efforts: float [units] by group name, of the present parameters, as `valued`; exactly 0 is
        closed.
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
    keep = alive(
        graph,
        state._replace(closed={name: (e == 0) & ~protected[name] for name, e in efforts.items()}),
    )
    # From here on all units in one vector.
    open_, effort = graph.vector(keep), graph.vector(efforts, missing=np.inf)
    guarded = graph.vector(protected)
    corrections, penalties = state.correction.copy(), np.zeros(len(budgets))
    scheduled = np.array([due(budget, progress) for budget in budgets])
    strength = np.zeros(len(effort))
    for i, budget in enumerate(budgets):
        price = np.where(guarded, 0.0, _charges(graph, keep, limits, budget, progress))
        if not price.any():
            continue  # nothing can be pressed, so that nothing is learned from the error
        alive_now = graph.amount(open_, budget.resource, budget.layers) / budget.full
        error = alive_now / scheduled[i] - 1
        growth = np.clip(error / EXCESS, -1, 1) * period / horizon
        if progress >= budget.end and error > 0:  # overdue: what holds out gives in soon
            growth = period / (horizon * AHEAD[0])
        corrections[i] = np.clip(corrections[i] * GROWTH**growth, *BOUNDS)
        needs = None
        for part in AHEAD:
            pressed = strength * rate * part  # for other budgets as well, by now and by then
            if pressed.any() or needs is None:
                ratio = _ratios(effort, pressed, price)
                needs = _needed(
                    graph, open_ & ~((pressed > 0) & (effort <= pressed)), ratio, budget
                )
            needed = needs(due(budget, progress + horizon * part))
            penalties[i] = max(penalties[i], needed / max(rate * part, 1e-30))
        penalties[i] *= corrections[i]
        # Who is pressed: what is to close by the end of the whole horizon, the last part.
        strength += np.where(ratio <= needed, penalties[i] * price, 0.0)
    # What has closed, and what is left of a branch that has gone, stays closed.
    value = graph.vector(state.value, missing=1.0)
    strength = np.where(open_, strength / value, np.inf).astype(np.float32)
    found = graph.by_group(strength)
    return state._replace(
        correction=corrections,
        penalty=penalties,
        scheduled=scheduled,
        closed={name: ~keep[name] for name in efforts},
        strength={name: found[name] for name in efforts},
    )


def _charges(
    graph: Graph,
    keep: Mapping[str, np.ndarray],
    limits: Mapping[str, blocking.Limits],
    budget: blocking.Budget,
    progress: float,
) -> np.ndarray:
    """What a unit pays for a budget at a λ of 1: float64 [units of all groups].

    It is strength · price / F(all), of the resource that its block pays for; 0 where either the
    block or the budget is not within its part of the way down.
    """
    resources = {limit.resource or budget.resource for limit in limits.values()}
    prices = {r: graph.price(keep, r, budget.layers) for r in resources}
    charges = {}
    for name, limit in limits.items():
        resource = limit.resource or budget.resource
        strength = limit.strength * (_during(limit, progress) and _during(budget, progress))
        # Where there is none of a resource its prices are zero as well.
        charges[name] = prices[resource][name] * strength / (budget.amounts[resource] or 1)
    return graph.vector(charges, missing=0.0)


def _during(part: blocking.Limits | blocking.Budget, progress: float) -> bool:
    """Whether it is between the start and the end of this part; an end of 1 is never passed."""
    return part.start <= min(progress, 1.0) <= part.end


def _best(effort: np.ndarray, number: int) -> np.ndarray:
    """Which units are the `number` with the largest effort: bool [units]."""
    best = np.zeros(len(effort), bool)
    best[np.argsort(-effort, kind='stable')[:number]] = True
    return best


def _needed(
    graph: Graph, kept: np.ndarray, ratio: np.ndarray, budget: blocking.Budget
) -> Callable[[float], float]:
    """The least threshold per price that closes enough gates to bring a budget's share to a goal.

    Args:
      graph: the traced network.
      kept: bool [units of all groups], what would be open without it.
      ratio: of each unit, the threshold per price that closes it; see `_ratios`.
      budget: in question.
    """
    ratios = np.sort(ratio[kept & ~np.isnan(ratio)])

    @functools.cache  # goals are close to one another
    def left(number: int) -> float:
        """The share without the gates with the `number` smallest ratios."""
        edge = ratios[number - 1] if number else -1.0
        return graph.amount(kept & ~(ratio <= edge), budget.resource, budget.layers) / budget.full

    def needed(goal: float) -> float:
        low, high = 0, len(ratios)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if left(middle) <= goal else (middle + 1, high)
        return float(ratios[low - 1]) if low else 0.0

    return needed


def _ratios(effort: np.ndarray, pressed: np.ndarray, price: np.ndarray) -> np.ndarray:
    """What is left to press per price: float64 [units]; NaN where there is no price."""
    return np.maximum(effort - pressed, 0.0) / np.where(price > 0, price, np.nan)
