"""Blocks: named sets of channel groups with settings of their own, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import numbers
import re
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np

from jaxkd import errors
from jaxkd.graph import latency
from jaxkd.graph.cost import RESOURCES, UNITS, UNMEASURED, Cost
from jaxkd.graph.trace import ChannelGroup, Graph, Keep
from jaxkd.search import repeated

AUTO = 'auto'
# What a user writes: `AUTO` or pairs of a pattern and settings; `pairs` reads it.
Blocks = str | Sequence[tuple[str, Mapping[str, Any]]]
SETTINGS = (
    'strength',
    'resource',
    'min_keep',
    'max_keep',
    'budget',
    'freeze',
    'removable',
    'start',
    'end',
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a block's settings mean for one group.

    Attributes:
      block: the pattern of the block, or '' for a group in none.
      strength: factor of the penalty.
      least, most: numbers of units; `least` is 0 where all may go, with their residual branch.
      some: the least number where `least` is 0 and not all go.
      resource: what the penalty charges for; '' for that of the budget.
      start, end: between which shares of the way down its gates are pressed.
      avoided: numbers of units that it does not keep, if it can keep another.
    """

    block: str
    strength: float
    least: int
    most: int
    some: int = 1
    resource: str = ''
    start: float = 0.0
    end: float = 1.0
    avoided: frozenset[int] = frozenset()


def resolve(graph: Graph, blocks: Blocks = (), min_keep: float = 1) -> dict[str, Limits]:
    """The limits of every group of the graph.

    Args:
      graph: the traced network.
      blocks: 'auto', or `[(pattern, settings), …]`. A pattern is a regular expression that is
        searched in the group's name and in the paths of the parameters that make its channels; the
        first that matches decides. 'auto' makes a block without settings of every module that the
        network repeats; see `repeated.find`. Settings:

        - `strength`: factor of the penalty, ≥ 0;
        - `resource`: what the penalty charges for, instead of the budget's resource: the share of
          the full network's that a channel costs;
        - `min_keep`, `max_keep`: an int counts units, a float is a share;
        - `budget`: of the block's own layers; see `budgets`;
        - `freeze`: keep all;
        - `removable`: residual branches may go whole; those that stay keep `min_keep`;
        - `start`, `end`: shares of the search's way down, 0 ≤ start < end ≤ 1. The block's gates
          are pressed, and its own budget falls, between them. (With an end of 1, as by default,
          they are pressed after it as well where the budget is not met yet.)

      min_keep: of the groups to which no block gives another.

    Raises:
      ConfigError: for a pattern that matches no group, an unknown or impossible setting or
        `min_keep`, and for 'auto' where nothing is repeated and `removable` where no branch can go.
    """
    _check_count('min_keep', min_keep)
    known = pairs(graph, blocks)
    used = set()
    limits = {}
    for group in graph.groups:
        block, settings = _first(graph, group, known) or ('', {})
        used.add(block)
        least = _count(settings.get('min_keep', min_keep), group.size)
        most = _count(settings.get('max_keep', group.size), group.size)
        if 'min_keep' not in settings:
            least = min(least, most)
        if settings.get('freeze') or group.frozen:
            least = most = group.size
        if least > most:
            raise errors.ConfigError(
                f'blocks[{block!r}].min_keep',
                settings.get('min_keep'),
                why=f'it is more than max_keep for the group {group.name} of {group.size} channels',
            )
        limits[group.name] = Limits(
            block,
            float(settings.get('strength', 1.0)),
            least,
            most,
            resource=settings.get('resource', ''),
            start=float(settings.get('start', 0.0)),
            end=float(settings.get('end', 1.0)),
        )
    for pattern, _ in known:
        if pattern not in used:
            why = f'it matches no channel group that is left; the groups are {_names(graph)}'
            raise errors.ConfigError('blocks', pattern, why=why)
    asked = [pattern for pattern, settings in known if settings.get('removable')]
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


def left(graph: Graph, blocks: Blocks) -> list[tuple[str, dict[str, Any]]]:
    """`pairs`, as far as they say something of a network that may have lost branches.

    Of one that has lost none these are all, if `resolve` takes them. Otherwise blocks of which no
    group is left are missing, and `removable` where no branch is left that could go.
    """
    found = pairs(graph, blocks)
    firsts = {group.name: _first(graph, group, found) for group in graph.groups}
    used = {name: block for name, block in firsts.items() if block}
    gone = graph.removable([name for name, (_, asked) in used.items() if asked.get('removable')])
    going = {used[name][0] for name in gone}
    there = {pattern for pattern, _ in used.values()}
    return [
        (pattern, {k: v for k, v in settings.items() if k != 'removable' or pattern in going})
        for pattern, settings in found
        if pattern in there
    ]


def pairs(graph: Graph, blocks: Blocks) -> list[tuple[str, dict[str, Any]]]:
    """Blocks as a user wrote them, as pairs of pattern and settings in plain types, checked.

    Raises:
      ConfigError: for what is neither 'auto' nor a sequence of pairs, for 'auto' where the network
        repeats no module, and for an unknown or impossible setting.
    """
    if blocks in (AUTO, (AUTO,)):  # a flag makes a tuple of the word, as the field is one
        found = [(pattern, {}) for pattern in repeated.find(_kernels(graph))]
        # One whose channels are all summed into earlier blocks' has none of its own to decide on.
        used = {block[0] for group in graph.groups if (block := _first(graph, group, found))}
        found = [block for block in found if block[0] in used]
        if not found:
            why = f'no module repeats by name; write patterns, for the groups {_names(graph)}'
            raise errors.ConfigError('blocks', AUTO, why=why)
        return found
    try:
        plain = [(str(pattern), dict(settings)) for pattern, settings in blocks]
    except (TypeError, ValueError):
        why = (
            f"it must be {AUTO!r} or a tuple of pairs, such as (('block1/', {{'strength': 2.0}}),)"
        )
        raise errors.ConfigError('blocks', blocks, why=why) from None
    for pattern, settings in plain:
        _check(pattern, settings)
    return plain


def _kernels(graph: Graph) -> list[str]:
    """The layers that have a kernel, in the order of the computation."""
    leaves = traverse_util.flatten_dict(graph.variables.get('params', {}), sep='/')
    layers = {path.rpartition('/')[0] for path, leaf in leaves.items() if leaf.ndim > 1}
    return [row.layer for row in graph.cost().rows if row.layer in layers]


def _first(
    graph: Graph, group: ChannelGroup, blocks: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[str, dict[str, Any]] | None:
    """The first block whose pattern matches the group."""
    names = _producers(graph, group)
    return next((b for b in blocks if any(re.search(b[0], name) for name in names)), None)


def _names(graph: Graph) -> str:
    return ', '.join(group.name for group in graph.groups)


def _check(pattern: str, settings: Mapping[str, Any]) -> None:
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
        elif name == 'resource':
            if value not in RESOURCES:
                raise errors.ConfigError(f'{field}.resource', value, allowed=RESOURCES)
        elif name == 'budget':
            if not isinstance(value, Mapping):
                why = "it must be a dict of resources, such as {'flops': 0.5}"
                raise errors.ConfigError(f'{field}.budget', value, why=why)
        elif name in ('min_keep', 'max_keep'):
            _check_count(f'{field}.{name}', value)
        else:
            _check_not_negative(f'{field}.{name}', value)
            if name in ('start', 'end') and value > 1:
                raise errors.ConfigError(f'{field}.{name}', value, why='it is a share in [0, 1]')
    if settings.get('removable') and settings.get('freeze'):
        raise errors.ConfigError(f'{field}.removable', True, why='freeze keeps all of the block')
    start, end = settings.get('start', 0.0), settings.get('end', 1.0)
    if start >= end:
        why = f'it must be less than end, which is {end}'
        raise errors.ConfigError(f'{field}.start', start, why=why)


def _check_not_negative(field: str, value: Any) -> None:
    if not errors.is_number(value) or value < 0:
        raise errors.ConfigError(field, value, why='it must be a number ≥ 0')


def _check_count(field: str, value: Any) -> None:
    _check_not_negative(field, value)
    if not isinstance(value, numbers.Integral) and value > 1:
        why = 'a float is a share in [0, 1]; units are an int'
        raise errors.ConfigError(field, value, why=why)


def _count(value: float, size: int) -> int:
    share = not isinstance(value, numbers.Integral)
    number = int(np.ceil(value * size - 1e-9)) if share else int(value)
    return min(max(number, 1), size)


def _producers(graph: Graph, group: ChannelGroup) -> list[str]:
    """The group's name, and the parameters whose last axis it has: those that make its channels."""
    paths = [group.name]
    for member in group.members:
        last = len(graph.shapes[member.path]) - 1
        if member.path.startswith('params/') and member.axis == last:
            paths.append(member.path.removeprefix('params/'))
    return paths


class Budget(NamedTuple):
    """At most `most` of a resource.

    Attributes:
      resource: which.
      most: an absolute number.
      amounts: what there is of every resource in the full network, or in these layers of it.
      block: the pattern of the block whose layers it is about; '' for the whole network.
      layers: the names of these layers; None for all.
      start, end: between which shares of the search's way down it falls.
    """

    resource: str
    most: float
    amounts: Mapping[str, float]
    block: str = ''
    layers: frozenset[str] | None = None
    start: float = 0.0
    end: float = 1.0

    @property
    def name(self) -> str:
        """'flops' for the network's, 'flops[block1/]' for a block's."""
        return f'{self.resource}[{self.block}]' if self.block else self.resource

    @property
    def full(self) -> float:
        """What there is of the resource in the full network."""
        return self.amounts[self.resource]

    def share(self, cost: Cost) -> float:
        """How much of the full network's is left in a network of this cost."""
        return _amount(cost, self.resource, self.layers) / self.full


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
        below the full network's or as a block's resource where it has not been measured, and for a
        block that has a budget but no layers.
    """
    return [budget for budget in every_budget(graph, blocks, **asked) if budget.most < budget.full]


def every_budget(graph: Graph, blocks: Blocks = (), **asked: float | None) -> list[Budget]:
    """`budgets`, with those that the full network meets: a share of 1 is all that it has."""
    cost = graph.cost()
    result = []
    taken: set[str] = set()
    for pattern, settings in pairs(graph, blocks):
        field = f'blocks[{pattern!r}]'
        if settings.get('resource') in set(RESOURCES) - set(graph.resources):
            raise errors.ConfigError(f'{field}.resource', settings['resource'], why=UNMEASURED)
        layers = frozenset(r.layer for r in cost.rows if re.search(pattern, r.layer)) - taken
        taken |= layers
        for resource, most in settings.get('budget', {}).items():
            _check_budget(f'{field}.budget', graph, resource, most)
            if not layers:
                why = f'no layer belongs to it; there are {", ".join(r.layer for r in cost.rows)}'
                raise errors.ConfigError(f'{field}.budget', settings['budget'], why=why)
            during = settings.get('start', 0.0), settings.get('end', 1.0)
            result.append(_budget(cost, resource, most, pattern, layers, *during))
    for resource, most in asked.items():
        _check_budget('budget', graph, resource, most)
        if resource in graph.resources:
            result.append(_budget(cost, resource, most))
    return result


def _budget(
    cost: Cost,
    resource: str,
    most: float | None,
    block: str = '',
    layers: frozenset[str] | None = None,
    *during: float,
) -> Budget:
    amounts = {r: _amount(cost, r, layers) for r in RESOURCES}
    unit, _ = UNITS.get(resource, (1, ''))
    most = 1.0 if most is None else float(most)  # a product in float32 could round it up
    most *= amounts[resource] if most <= 1 else unit
    return Budget(resource, most, amounts, block, layers, *during)


def _amount(cost: Cost, resource: str, layers: frozenset[str] | None) -> float:
    """What a network costs of a resource, in all layers or in some."""
    if layers is None:
        return getattr(cost, resource)
    return sum(getattr(row, resource) for row in cost.rows if row.layer in layers)


def _check_budget(field: str, graph: Graph, resource: str, asked: Any) -> None:
    if resource not in RESOURCES:
        raise errors.ConfigError(field, resource, allowed=RESOURCES)
    if asked is None:
        return
    _check_number(f'{field}.{resource}', asked)
    if asked != 1 and resource not in graph.resources:
        raise errors.ConfigError(f'{field}.{resource}', asked, why=UNMEASURED)


def _check_number(field: str, asked: Any) -> None:
    if not errors.is_number(asked) or asked <= 0:
        raise errors.ConfigError(
            field,
            asked,
            why='it must be a share of the full network in (0, 1], or a number above 1',
        )


def measured(graph: Graph, budget: float | None, blocks: Blocks = ()) -> Graph:
    """The graph, measured on the present device if the budget in latency or a block asks for it."""
    if budget is not None:
        _check_number('budget.latency', budget)
    of_blocks = any(
        settings.get('resource') == 'latency' or 'latency' in settings.get('budget', {})
        for _, settings in pairs(graph, blocks)
    )
    return latency.with_latency(graph) if of_blocks or budget not in (None, 1) else graph


def least(graph: Graph, limits: Mapping[str, Limits]) -> dict[str, np.ndarray]:
    """The smallest keep that the limits allow."""
    return {group.name: np.arange(group.size) < limits[group.name].least for group in graph.groups}


def check_reachable(
    graph: Graph, wanted: Sequence[Budget], keep: Keep, obstacles: Callable[[], str]
) -> None:
    """Raises BudgetError if even `keep`, the smallest allowed, costs more than a budget.

    It says what stands in the way, which `obstacles` tells.
    """
    cost = graph.cost(keep)
    for budget in wanted:
        share = budget.share(cost)
        if share * budget.full > budget.most:
            unit, word = UNITS.get(budget.resource, (1, ''))
            most, rest = (
                f'{x / unit:,.3f} {word}' if word else f'{x:,.0f}'
                for x in (budget.most, share * budget.full)
            )
            whole = f'block {budget.block!r}' if budget.block else 'full network'
            raise errors.BudgetError(
                f'{budget.resource} of {most} ({budget.most / budget.full:.3f} of the {whole}) '
                f'cannot be reached: with every limit used up {rest} ({share:.3f}) remain; '
                f'in the way: {obstacles()}'
            )
