"""Widths that match by chance, where the model's code decides by a match what it computes.

`if x.shape != y.shape: x = project(x)` is at home in many models. Two groups of different sizes may
come to the same width, and then the compact network leaves the projection out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import itertools

import numpy as np

from jaxkd import errors
from jaxkd.graph import settle
from jaxkd.graph.trace import Graph, Keep

# So many widths are avoided before the search for others is given up.
TRIES = 32


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
    spread = settle.at_random(graph)
    if not settle.works(graph, spread):
        return keep

    @functools.cache
    def clash(one: str, other: str) -> bool:
        """Whether the model computes something else where these two, and no others, match."""
        equal = _equal(graph, spread, one, other)
        return bool(equal) and not settle.works(graph, {**spread, **equal})

    found: Keep = keep
    avoided: dict[str, frozenset[int]] = {}
    for _ in range(TRIES):
        ways = []
        for name in next((pair for pair in _matching(graph, found) if clash(*pair)), ()):
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
    """Pairs of groups of the same width that differ in the full network."""
    return [
        (one.name, other.name)
        for one, other in itertools.combinations(graph.groups, 2)
        if _width(graph, one.name, keep[one.name].sum())
        == _width(graph, other.name, keep[other.name].sum())
        and _width(graph, one.name, one.size) != _width(graph, other.name, other.size)
    ]


def _width(graph: Graph, name: str, units: int) -> int:
    """How long axes with so many units of a group are."""
    return int(units) * max(positions.shape[1] for positions in graph.by_name[name].positions)


def _equal(graph: Graph, keep: Keep, one: str, other: str) -> dict[str, np.ndarray]:
    """Keeps of the two groups with one width, which is no other group's; none if there is none."""
    taken = {_width(graph, name, units.sum()) for name, units in keep.items()}
    sizes = graph.sizes[one], graph.sizes[other]
    for units in itertools.product(*(range(size, 0, -1) for size in sizes)):
        width, second = (_width(graph, *pair) for pair in zip((one, other), units, strict=True))
        if width == second and width not in taken and units != sizes:
            return {
                name: np.arange(size) < number
                for name, size, number in zip((one, other), sizes, units, strict=True)
            }
    return {}
