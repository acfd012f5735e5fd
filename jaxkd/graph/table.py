"""A network told to people: what its layers make, read and cost, and its channel groups as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from flax import traverse_util

from jaxkd.graph import cost as costs

if TYPE_CHECKING:
    from jaxkd.graph.trace import Graph


class Layer(NamedTuple):
    """What one layer does to channels.

    Attributes:
      name: the module's path, as in `Cost.rows`.
      makes: channels by group on the last axis of its kernel, or of its vectors if it has none.
      reads: the groups on the other axes of its kernel. A depthwise convolution, whose kernel has
        no axis of input channels, reads none.
    """

    name: str
    makes: Mapping[str, int]
    reads: tuple[str, ...]


def table(
    graph: Graph, keep: costs.Keep | None = None, blocks: Mapping[str, str] | None = None
) -> str:
    """The layers, the groups with their members, what is frozen and why, for people to read.

    Args:
      graph: the traced network.
      keep: what is kept; without it everything.
      blocks: the block of each group by name, for a column of its own.
    """
    keep = graph.complete(keep)
    cost = graph.cost(keep)
    sections = [
        costs_table('layer', cost.rows, cost),
        grid(_group_cells(graph, keep, blocks), left=(0, *((2, 3) if blocks else (2,)))),
    ]
    for title in ('frozen', 'inexact'):
        concerned = [group for group in graph.groups if getattr(group, title)]
        cells = [(g.name, getattr(g, title), g.primitive, g.source) for g in concerned]
        if cells:
            sections.append(grid([(title, 'why', 'primitive', 'line'), *cells], left=range(4)))
    if graph.unknown:
        notes = (f'primitive {name} {note}' for name, note in graph.unknown.items())
        sections.append('\n'.join(notes))
    return '\n\n'.join(sections)


def costs_table(title: str, rows: Iterable[costs.Row], total: costs.Cost) -> str:
    """Rows of cost with their shares of `total`, which stands below them."""
    measured = total.latency > 0
    cells = [
        (
            *(title, 'multiply-adds', '%', 'parameters', '%', 'bytes out'),
            *(('ms', '%') if measured else ()),
        )
    ]
    whole = costs.Row('total', *(getattr(total, resource) for resource in costs.RESOURCES))
    for row in (*rows, whole):
        latency = f'{1000 * row.latency:.3f}', percent(row.latency, total.latency)
        cells.append(
            (
                row.layer,
                f'{row.flops:,}',
                percent(row.flops, total.flops),
                f'{row.params:,}',
                percent(row.params, total.params),
                f'{row.activations:,}',
                *(latency if measured else ()),
            )
        )
    return grid(cells, left=(0,))


def percent(part: float, whole: float) -> str:
    return f'{100 * part / whole if whole else 0:.1f}'


def grid(rows: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    """Lines of cells in columns as wide as they need to be.

    >>> print(grid([('layer', 'parameters'), ('stem', '864')], left=(0,)))
    layer  parameters
    stem          864

    Args:
      rows: texts, as many in each row.
      left: the columns that are flush left.
    """
    left = set(left)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        '  '.join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return '\n'.join(line.rstrip() for line in lines)


def layers(graph: Graph) -> tuple[Layer, ...]:
    """What every layer of `graph.cost().rows` makes and reads, in the order of the computation."""
    kernels = _kernels(graph)
    makes: dict[str, dict[str, int]] = {}
    reads: dict[str, dict[str, None]] = {}  # an ordered set
    for group in graph.groups:
        for member, positions in zip(group.members, group.positions, strict=True):
            path = member.path.removeprefix('params/')
            if path not in kernels:
                continue
            if member.axis == kernels[path] - 1:
                makes.setdefault(_layer(path), {})[group.name] = positions.size
            else:
                reads.setdefault(_layer(path), {})[group.name] = None
    return tuple(
        Layer(row.layer, makes.get(row.layer, {}), tuple(reads.get(row.layer, ())))
        for row in graph.cost().rows
    )


def _kernels(graph: Graph) -> dict[str, int]:
    """The parameters with the most axes of their layer, and how many these are."""
    leaves = traverse_util.flatten_dict(graph.variables.get('params', {}), sep='/')
    most: dict[str, int] = {}
    for path, leaf in leaves.items():
        most[_layer(path)] = max(most.get(_layer(path), 0), leaf.ndim)
    return {path: leaf.ndim for path, leaf in leaves.items() if leaf.ndim == most[_layer(path)]}


def _layer(path: str) -> str:
    """'stem/conv' for 'stem/conv/kernel'; a parameter of the network itself is a layer of its own,
    as in `Cost.rows`."""
    return path.rpartition('/')[0] or f'params/{path}'


def _group_cells(
    graph: Graph, keep: costs.Keep, blocks: Mapping[str, str] | None
) -> list[tuple[str, ...]]:
    order = {row.layer: i for i, row in enumerate(graph.cost().rows)}
    kernels = _kernels(graph)

    def rank(path: str) -> tuple[bool, int]:
        """What is convolved before what is added, and each in the order of the computation."""
        return kernels.get(path, 0) < 2, order.get(_layer(path), len(order))

    cells = [('group', 'kept', *(('block',) if blocks else ()), 'members')]
    for group in graph.groups:
        kept = f'{int(keep[group.name].sum())}/{group.size}'
        block = (blocks[group.name],) if blocks else ()
        members = [
            (member.path.removeprefix('params/'), member.axis)
            for member in group.members
            if member.path.startswith('params/')
        ]
        members.sort(key=lambda member: rank(member[0]))
        words = _shorten([f'{path}[{axis}]' for path, axis in members])
        cells.append((group.name, kept, *block, words))
    return cells


def _shorten(words: Sequence[str], width: int = 64) -> str:
    """'a, b, … (12 more)': as many of the words as there is room for, and at least one."""
    shown = len(words)
    while shown > 1 and len(', '.join(words[:shown])) > width:
        shown -= 1
    rest = [f'… ({len(words) - shown} more)'] if shown < len(words) else []
    return ', '.join([*words[:shown], *rest])
