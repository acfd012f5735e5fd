"""Blocks: named sets of channel groups with settings of their own, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, NamedTuple

import numpy as np

from jaxkd import errors
from jaxkd.graph import latency
from jaxkd.graph.cost import RESOURCES, UNITS, UNMEASURED, Cost
from jaxkd.graph.trace import ChannelGroup, Graph, Keep

Blocks = Sequence[tuple[str, Mapping[str, Any]]]
SETTINGS = ('strength', 'min_keep', 'max_keep', 'budget', 'freeze', 'removable')


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a block's settings mean for one group.

    Attributes:
      block: the pattern of the block, or '' for a group in none.
      strength: factor of the penalty.
      least, most: numbers of units; `least` is 0 where all may go, with their residual branch.
      some: the least number where `least` is 0 and not all go.
    """

    block: str
    strength: float
    least: int
    most: int
    some: int = 1


def resolve(graph: Graph, blocks: Blocks = ()) -> dict[str, Limits]:
    """The limits of every group of the graph.

    Args:
      graph: the traced network.
      blocks: `[(pattern, settings), …]`. A pattern is a regular expression that is searched in the
        group's name and in the paths of the parameters that make its channels; the first that
        matches decides. Settings: `strength` (factor of the penalty, ≥ 0), `min_keep` and
        `max_keep` (an int counts units, a float is a share), `budget` (see `budgets`),
        `freeze` (keep all), `removable` (its residual branches may go whole; those that stay keep
        `min_keep`).

    Raises:
      ConfigError: for a pattern that matches no group, an unknown or impossible setting, or
        `removable` where no branch can go.
    """
    checked = [(pattern, _check(pattern, settings)) for pattern, settings in blocks]
    used = set()
    limits = {}
    for group in graph.groups:
        block, settings = '', {}
        for pattern, candidate in checked:
            if any(re.search(pattern, name) for name in _producers(graph, group)):
                used.add(pattern)
                block, settings = pattern, candidate
                break
        least = _count(settings.get('min_keep', 1), group.size)
        most = _count(settings.get('max_keep', group.size), group.size)
        if settings.get('freeze') or group.frozen:
            least = most = group.size
        if least > most:
            raise errors.ConfigError(
                f'blocks[{block!r}].min_keep',
                settings.get('min_keep'),
                why=f'it is more than max_keep for the group {group.name} of {group.size} channels',
            )
        limits[group.name] = Limits(block, float(settings.get('strength', 1.0)), least, most)
    for pattern, _ in checked:
        if pattern not in used:
            names = [group.name for group in graph.groups]
            raise errors.ConfigError(
                'blocks',
                pattern,
                why=f'it matches no channel group that is left; the groups are {", ".join(names)}',
            )
    asked = [pattern for pattern, settings in checked if settings.get('removable')]
    return _allow_none(graph, limits, asked) if asked else limits


def _allow_none(graph: Graph, limits: dict[str, Limits], asked: Sequence[str]) -> dict[str, Limits]:
    """The limits, with those of the blocks `asked` lowered to 0 where a branch can go whole."""
    candidates = {name: limit.block for name, limit in limits.items() if limit.block in asked}
    gone = graph.removable(candidates)
    for pattern in asked:
        mine = {name for name, block in candidates.items() if block == pattern}
        if not mine & gone:
            others = {o for name in mine for o in graph.emptied([name]) or ()} - set(candidates)
            why = (
                f'with its groups {", ".join(sorted(others))} would go, which are not removable'
                if others
                else 'none of its groups lies in a residual branch, which something leads around; '
                f'in such lie {", ".join(sorted(graph.removable())) or "none"}'
            )
            raise errors.ConfigError(f'blocks[{pattern!r}].removable', True, why=why)
    return limits | {
        name: dataclasses.replace(limits[name], least=0, some=limits[name].least) for name in gone
    }


def pairs(blocks: Any) -> list[tuple[str, dict[str, Any]]]:
    """Blocks as a user wrote them, in plain types.

    Raises:
      ConfigError: for what is no sequence of pairs.
    """
    try:
        return [(str(pattern), dict(settings)) for pattern, settings in blocks]
    except (TypeError, ValueError):
        why = "it must be a tuple of pairs, such as (('block1/', {'strength': 2.0}),)"
        raise errors.ConfigError('blocks', blocks, why=why) from None


def _check(pattern: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    field = f'blocks[{pattern!r}]'
    try:
        re.compile(pattern)
    except re.error as error:
        raise errors.ConfigError('blocks', pattern, why=f'no regular expression: {error}') from None
    for name, value in settings.items():
        if name not in SETTINGS:
            raise errors.ConfigError(field, name, allowed=SETTINGS)
        if name in ('freeze', 'removable'):
            if not isinstance(value, bool):
                raise errors.ConfigError(f'{field}.{name}', value, allowed=[True, False])
        elif name == 'budget':
            if not isinstance(value, Mapping):
                why = "it must be a dict of resources, such as {'flops': 0.5}"
                raise errors.ConfigError(f'{field}.budget', value, why=why)
        elif not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise errors.ConfigError(f'{field}.{name}', value, why='it must be a number ≥ 0')
        elif isinstance(value, float) and value > 1 and name != 'strength':
            raise errors.ConfigError(
                f'{field}.{name}', value, why='a float is a share in [0, 1]; units are an int'
            )
    if settings.get('removable') and settings.get('freeze'):
        raise errors.ConfigError(f'{field}.removable', True, why='freeze keeps all of the block')
    return dict(settings)


def _count(value: float, size: int) -> int:
    number = int(np.ceil(value * size - 1e-9)) if isinstance(value, float) else value
    return min(max(number, 1), size)


def _producers(graph: Graph, group: ChannelGroup) -> list[str]:
    """The group's name, and the parameters whose last axis it has: those that make its channels."""
    paths = [group.name]
    for member in group.members:
        leaf = graph.variables
        for key in member.path.split('/'):
            leaf = leaf[key]
        if member.path.startswith('params/') and member.axis == len(leaf.shape) - 1:
            paths.append(member.path.removeprefix('params/'))
    return paths


class Budget(NamedTuple):
    """At most `most` of a resource.

    Attributes:
      resource: which.
      most: an absolute number.
      full: what there is of it in the full network.
      block: the pattern of the block whose layers it is about; '' for the whole network.
      layers: the names of these layers; None for all.
    """

    resource: str
    most: float
    full: float
    block: str = ''
    layers: frozenset[str] | None = None

    def share(self, cost: Cost) -> float:
        """How much of the full network's is left in a network of this cost."""
        if self.layers is None:
            return getattr(cost, self.resource) / self.full
        rows = (getattr(row, self.resource) for row in cost.rows if row.layer in self.layers)
        return sum(rows) / self.full


def budgets(graph: Graph, blocks: Blocks = (), **asked: float | None) -> list[Budget]:
    """What must hold at the end: the blocks' own budgets, then the network's.

    Args:
      graph: the traced network.
      blocks: see `resolve`. A layer belongs to the first block whose pattern is found in its name;
        a block's `budget` is {resource: share of what these layers cost, or absolute number}.
      **asked: by resource, a share of the full network in (0, 1] or an absolute number > 1, which
        for latency is in milliseconds.

    Returns:
      The budgets that set a limit.

    Raises:
      ConfigError: for an unknown resource or a budget that is no positive number, for a latency
        below the full network's where it has not been measured, and for a block that has a budget
        but no layers.
    """
    cost = graph.cost()
    result = []
    taken: set[str] = set()
    for pattern, settings in blocks:
        layers = frozenset(r.layer for r in cost.rows if re.search(pattern, r.layer)) - taken
        taken |= layers
        for resource, most in settings.get('budget', {}).items():
            field = f'blocks[{pattern!r}].budget'
            _check_budget(field, graph, resource, most)
            if not layers:
                why = f'no layer belongs to it; there are {", ".join(r.layer for r in cost.rows)}'
                raise errors.ConfigError(field, settings['budget'], why=why)
            full = sum(getattr(row, resource) for row in cost.rows if row.layer in layers)
            result.append(_budget(resource, most, full, pattern, layers))
    for resource, most in asked.items():
        _check_budget('budget', graph, resource, most)
        if resource in graph.resources:
            result.append(_budget(resource, most, getattr(cost, resource)))
    return [budget for budget in result if budget.most < budget.full]


def _budget(resource: str, most: float | None, full: float, *block: Any) -> Budget:
    unit, _ = UNITS.get(resource, (1, ''))
    most = full if most is None else most * (full if most <= 1 else unit)
    return Budget(resource, most, full, *block)


def _check_budget(field: str, graph: Graph, resource: str, asked: Any) -> None:
    if resource not in RESOURCES:
        raise errors.ConfigError(field, resource, allowed=RESOURCES)
    if asked is None:
        return
    _check_number(f'{field}.{resource}', asked)
    if asked != 1 and resource not in graph.resources:
        raise errors.ConfigError(f'{field}.{resource}', asked, why=UNMEASURED)


def _check_number(field: str, asked: Any) -> None:
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not asked > 0:
        raise errors.ConfigError(
            field,
            asked,
            why='it must be a share of the full network in (0, 1], or a number above 1',
        )


def measured(graph: Graph, budget: float | None) -> Graph:
    """The graph, measured on the present device if the budget in latency asks for it."""
    if budget is None:
        return graph
    _check_number('budget.latency', budget)
    return graph if budget == 1 else latency.with_latency(graph)


def least(graph: Graph, limits: Mapping[str, Limits]) -> dict[str, np.ndarray]:
    """The smallest keep that the limits allow."""
    return {group.name: np.arange(group.size) < limits[group.name].least for group in graph.groups}


def check_reachable(
    graph: Graph, limits: Mapping[str, Limits], wanted: Sequence[Budget], keep: Keep
) -> None:
    """Raises BudgetError if even `keep`, the smallest allowed, costs more than a budget."""
    cost = graph.cost(keep)
    for budget in wanted:
        share = budget.share(cost)
        if share * budget.full > budget.most:
            blocks = sorted({l.block for l in limits.values() if l.block and l.least > 1})
            stuck = sorted(g.name for g in graph.groups if g.frozen)
            way = f'blocks {", ".join(blocks)}' if blocks else f'frozen groups {", ".join(stuck)}'
            unit, word = UNITS.get(budget.resource, (1, ''))
            most, rest = (
                f'{x / unit:,.3f} {word}' if word else f'{x:,.0f}'
                for x in (budget.most, share * budget.full)
            )
            whole = f'block {budget.block!r}' if budget.block else 'full network'
            raise errors.BudgetError(
                f'{budget.resource} of {most} ({budget.most / budget.full:.3f} of the {whole}) '
                f'cannot be reached: with every limit used up {rest} ({share:.3f}) remain; '
                f'in the way: {way}'
            )
