"""Widening a structure that was found until the budget is used up again.

The second half of MorphNet (Gordon et al. 2018, https://arxiv.org/abs/1711.06798): the search says
how wide the layers are relative to one another, a common factor how wide they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from jaxkd import errors
from jaxkd.graph import settle, structure, widen
from jaxkd.graph.trace import Graph, Keep
from jaxkd.search import blocks as blocking
from jaxkd.search import select as selecting

# The share of a budget from which on it counts as used up.
USED = 0.999
# No factor is larger; the largest that fits is found by so many halvings.
LARGEST, HALVINGS = 2.0**20, 30
# Units of a group whose block says nothing.
UNLIMITED = 2**60
# Why a group of a residual branch that has gone whole is not widened.
GONE = 'nothing of it is left'


class Expansion(NamedTuple):
    """How a structure was widened.

    Attributes:
      factor: the largest common factor of the counts that all budgets allow. What they leave over
        after rounding goes to single channels on top.
      counts: units by group name.
      held: by group name, why a group that could be cut is not widened.
    """

    factor: float
    counts: dict[str, int]
    held: dict[str, str]


def expand(
    graph: Graph,
    variables: Any,
    keep: Keep,
    *,
    flops: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency: float | None = None,
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    noise: float = widen.NOISE,
    seed: int = 0,
) -> structure.CompactModel:
    """Cuts a network, and widens all that can be by a common factor until the budgets are met.

    Groups may become wider than they are in the full network. Further channels are copies, whose
    readers share their weights out among them, so that the network computes what the one that is
    only cut does, but for `noise`; this is verified. Train it on, or anew from
    `small.module.init`.

    Args:
      graph: the traced network.
      variables: its variables.
      keep: what was found, for less than the budgets; see `jaxkd.select`.
      flops, params, activations, latency: budgets; see `jaxkd.select`. Unlike there, 1 is a limit:
        what the full network has. None sets none.
      blocks: see `jaxkd.select`. Groups of a block with `freeze` stay, others get no wider than
        `max_keep` where that is set.
      round_to: see `jaxkd.select`; groups that are widened become multiples.
      noise: by what share the filters of copies differ from the first; see `graph.widen`.
      seed: which units are copied once more than others, by chance, and the noise.

    Returns:
      The network, at most at the budgets, and near one: within the cost of a few units.

    Raises:
      BudgetError: where what was found costs more than a budget.
      ConfigError: without any budget, and for budgets, blocks, rounding or noise that cannot be.
      GraphError: where nothing can be widened, or the network cannot be cut.
    """
    if not errors.is_number(noise) or noise < 0:
        raise errors.ConfigError('noise', noise, why='it must be a number ≥ 0')
    asked = {'flops': flops, 'params': params, 'activations': activations, 'latency': latency}
    asked = {resource: budget for resource, budget in asked.items() if budget is not None}
    budgets = blocking.every_budget(graph, blocks, **asked)
    if all(budget.block for budget in budgets):
        why = 'give flops=, params=, activations= or latency='
        raise errors.ConfigError('budget', None, why=why)
    if not settle.works(graph, keep):
        graph = settle.settle(graph)
    small, _ = expanded(
        graph,
        variables,
        keep,
        budgets,
        blocks=blocks,
        round_to=round_to,
        noise=noise,
        seed=seed,
    )
    return small


def expanded(
    graph: Graph,
    variables: Any,
    keep: Keep,
    budgets: Sequence[blocking.Budget],
    *,
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    noise: float = widen.NOISE,
    seed: int = 0,
) -> tuple[structure.CompactModel, Expansion]:
    """`expand` to budgets in absolute numbers, of this network or the one that it was made from."""
    selecting.check_round_to(round_to)
    keep = graph.complete(keep)
    most = _most(graph, keep, blocks)
    held = {g.name: why for g in graph.groups if not g.frozen and (why := widen.stays(g))}
    held |= {name: GONE for name, alive in keep.items() if not alive.any()}
    while True:
        free = {name: limit for name, limit in most.items() if name not in held}
        factor, counts = grown(graph, keep, free, budgets, round_to, seed)
        copies = _copies(keep, counts, seed)
        found = widen.at_fault(graph, copies)
        if not found:
            break
        held |= dict.fromkeys(found, 'the network computes something else with copies of it')
    if not any((number > 1).any() for number in copies.values()):
        reasons = '; '.join(f'{name}: {why}' for name, why in held.items())
        raise errors.GraphError(
            f'nothing of {type(graph.model).__name__} can be widened within the budgets'
            + (f' ({reasons})' if reasons else '')
        )
    small = widen.build(graph, variables, copies, noise=noise, seed=seed)
    return small, Expansion(factor, counts, held)


def grown(
    graph: Graph,
    keep: Keep,
    most: Mapping[str, int],
    budgets: Sequence[blocking.Budget],
    round_to: int = 1,
    seed: int = 0,
) -> tuple[float, dict[str, int]]:
    """The largest common factor, and the counts that use the budgets up.

    Args:
      graph: the traced network.
      keep: what was found.
      most: units at most, by the names of the groups that may be widened.
      budgets: see `blocks.budgets`.
      round_to: see `select`.
      seed: see `expand`.

    Returns:
      ω and the units of every group. n units became ω · n, rounded; and then, as long as the
      network's budgets are not used up, the groups that still can be a step wider get it, and the
      largest factor for them alone.

    Raises:
      BudgetError: where what was found costs more than a budget.
    """
    start = {name: int(alive.sum()) for name, alive in keep.items()}
    steps = {name: selecting.step(graph.by_name[name], round_to) for name in most}
    whole = [i for i, budget in enumerate(budgets) if not budget.block]

    def usage(counts: Mapping[str, int]) -> np.ndarray:
        cost = graph.polynomial.cost(_copies(keep, counts, seed))
        return np.array([budget.share(cost) * budget.full / budget.most for budget in budgets])

    def widened(counts: Mapping[str, int], names: Sequence[str], factor: float) -> dict[str, int]:
        wider = dict(counts)
        for name in names:
            wanted = math.floor(factor * start[name] / steps[name] + 0.5) * steps[name]
            wider[name] = max(
                counts[name], int(min(wanted, most[name] // steps[name] * steps[name]))
            )
        return wider

    def largest(counts: Mapping[str, int], names: Sequence[str], factor: float) -> float:
        above = 2 * factor
        while above < LARGEST and usage(widened(counts, names, above)).max() <= 1:
            factor, above = above, 2 * above
        for _ in range(HALVINGS):
            middle = (factor + above) / 2
            fits = usage(widened(counts, names, middle)).max() <= 1
            factor, above = (middle, above) if fits else (factor, middle)
        return factor

    used = usage(start).max()
    if used > 1:
        raise errors.BudgetError(
            f'what was found uses {used:.3f} of the budget, so that it cannot be widened to it; '
            'select it for less'
        )
    counts, left, factors = start, list(steps), [1.0]
    while left and usage(counts)[whole].max(initial=0.0) < USED:
        factors.append(largest(counts, left, factors[-1]))
        counts = widened(counts, left, factors[-1])
        for name in sorted(left, key=lambda name: (counts[name] + steps[name]) / start[name]):
            more = counts | {name: (counts[name] // steps[name] + 1) * steps[name]}
            if more[name] <= most[name] and usage(more).max() <= 1:
                counts = more
            else:
                left.remove(name)
    return factors[min(1, len(factors) - 1)], counts


def _most(graph: Graph, keep: Keep, blocks: blocking.Blocks) -> dict[str, int]:
    """How many units the blocks let each group have, by the names of those that may be widened."""
    settings = dict(blocking.pairs(graph, blocks))
    most: dict[str, int] = {}
    for name, limit in blocking.resolve(graph, blocks).items():
        mine = settings.get(limit.block, {})
        if not graph.by_name[name].frozen and not mine.get('freeze'):
            number = mine.get('max_keep', UNLIMITED)
            number = limit.most if isinstance(number, float) else number
            most[name] = max(number, int(keep[name].sum()))
    return most


def _copies(keep: Keep, counts: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """How often each unit is there: alike, and by chance once more where that does not come out."""
    random = np.random.default_rng(seed)
    copies = {}
    for name, alive in keep.items():
        units = np.flatnonzero(alive)
        times, rest = divmod(counts[name], max(len(units), 1))
        copies[name] = times * alive.astype(int)
        copies[name][random.permutation(units)[:rest]] += 1
    return copies
