"""Widths that match by chance, where the model's code decides by a match what it computes.

`if x.shape != y.shape: x = project(x)` is at home in many models. Two groups of different sizes may
come to the same width, and then the compact network leaves the projection out. Or one comes to a
number that stands in the code or in a field: `x + y if x.shape[-1] == self.features else y`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import itertools
import math

import numpy as np

from jaxkd import errors
from jaxkd.graph import settle
from jaxkd.graph.trace import Graph, Keep

# So many widths are avoided before the search for others is given up.
TRIES = 32
# A group is judged with the others at random widths; so often, in case these match by chance.
SPREADS = 2


def apart(
    graph: Graph,
    choose: Callable[[Mapping[str, frozenset[int]]], Keep],
    scores: Mapping[str, np.ndarray],
) -> Keep:
    """What `choose` keeps, without a width that makes the model compute something else.

    Args:
      graph: the traced network.
      choose: from what groups may not keep, numbers of units by name, to the keep; see
        `jaxkd.search.select.select`.
      scores: float [units] by group name: of two ways apart, that is taken which keeps more.

    Returns:
      `choose({})` where the model computes what the full one does, as nearly always: its code runs
      once for that, and nothing is compiled. Also where matching widths are not the reason, or
      cannot be helped; cutting to it says what is wrong.
    """
    keep = choose({})
    if settle.works(graph, keep):
        return keep
    spreads = [settle.at_random(graph, seed) for seed in range(SPREADS)]
    spreads = [spread for spread in spreads if settle.works(graph, spread)]
    if not spreads:
        return keep

    @functools.cache
    def clash(one: str, other: str) -> bool:
        """Whether the model computes something else where these two, and no others, match."""
        equal = _equal(graph, spreads[0], one, other)
        return bool(equal) and not settle.works(graph, {**spreads[0], **equal})

    @functools.cache
    def decides(name: str, number: int) -> bool:
        """Whether the model computes something else at this width, whatever the others keep."""
        some = {name: np.arange(graph.sizes[name]) < number}
        return not any(settle.works(graph, {**spread, **some}) for spread in spreads)

    def at_fault(keep: Keep) -> tuple[str, ...]:
        """Groups of which one should keep another number."""
        for pair in _matching(graph, keep):
            if clash(*pair):
                return pair
        for name, units in keep.items():
            if units.any() and not units.all() and decides(name, int(units.sum())):
                return (name,)
        return ()

    found: Keep = keep
    avoided: dict[str, frozenset[int]] = {}
    for _ in range(TRIES):
        ways = []
        for name in at_fault(found):
            number, before = int(found[name].sum()), avoided.get(name, frozenset())
            if number in before:
                continue  # it can keep no other
            numbers = {**avoided, name: before | {number}}
            try:
                other = choose(numbers)
            except errors.BudgetError:
                continue
            kept = sum(float(score[other[group]].sum()) for group, score in scores.items())
            ways.append((kept, numbers, other))
        if not ways:
            break
        _, avoided, found = max(ways, key=lambda way: way[0])
        if settle.works(graph, found):
            return found
    return keep


def _matching(graph: Graph, keep: Keep) -> list[tuple[str, str]]:
    """Pairs of groups of the same width that differ in the full network.

    Not with one that is frozen: its width is like a number in the code.
    """
    full, now = (
        {name: int(units.sum()) * graph.by_name[name].channels for name, units in alive.items()}
        for alive in (graph.keep_all(), keep)
    )
    names = [group.name for group in graph.groups if not group.frozen]
    return [
        (one, other)
        for one, other in itertools.combinations(names, 2)
        if now[one] == now[other] and full[one] != full[other]
    ]


def _equal(graph: Graph, keep: Keep, one: str, other: str) -> dict[str, np.ndarray]:
    """Keeps of the two groups with one width, which is no other group's; none if there is none."""
    groups = [graph.by_name[name] for name in (one, other)]
    taken = {int(units.sum()) * graph.by_name[name].channels for name, units in keep.items()}
    step = math.lcm(*(group.channels for group in groups))
    most = min(group.size * group.channels for group in groups) // step * step
    width = next((width for width in range(most, 0, -step) if width not in taken), 0)
    return {g.name: np.arange(g.size) < width // g.channels for g in groups if width}
