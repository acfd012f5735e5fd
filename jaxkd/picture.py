"""A network drawn as a graph: its layers from top to bottom, the channels they make, and the cost.

Beside the layers run the channel groups, each a line from the layer that first makes its channels
to the last that reads them, so that a residual sum is a line that many layers meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxkd import errors, workdir
from jaxkd.graph import table as tables
from jaxkd.graph.trace import Graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ('svg', 'png', 'pdf')

# Colours: of groups that one layer makes, of frozen ones, and in turn of those that several make.
ALONE, FROZEN = '#93a9bf', '#b9b9b9'
SHARED = ('#d1495b', '#edae49', '#00798c', '#8f5aa8', '#5b8c3a', '#c96f2e', '#3566b8', '#a8577e')
INK, PALE, COST, STRIPE = '#2b2b2b', '#8a8a8a', '#5c6b7a', '#f5f6f8'

# Inches.
ROW, LANE, CHARACTER, BAR, NUMBER, SHARE, MARGIN = 0.2, 0.15, 0.062, 3.2, 0.42, 0.9, 0.25

MONO: dict[str, Any] = {'family': 'DejaVu Sans Mono', 'fontsize': 7, 'va': 'center_baseline'}
DOT: dict[str, Any] = {'marker': 'o', 'ms': 6, 'mew': 0, 'zorder': 4}
RING: dict[str, Any] = {'marker': 'o', 'ms': 4.5, 'mew': 1.2, 'mfc': 'white', 'zorder': 3}


class Node(NamedTuple):
    """A row of the picture: a layer, with the norms and the like that stand next to it.

    Attributes:
      layer: what it makes and reads.
      flops, params: its shares of the network's, in [0, 1].
    """

    layer: tables.Layer
    flops: float
    params: float


def save(graph: Graph, path: str | os.PathLike, title: str | None = None) -> None:
    """Draws the network into a file, which is never half-written.

    Args:
      graph: the traced network.
      path: ends in one of `FORMATS`.
      title: stands above it; by default the name of the model's class.

    Raises:
      ConfigError: where that cannot be, in the words of the command line.
    """
    path = pathlib.Path(path)
    check(path)
    try:
        with workdir.written_aside(path) as aside:
            draw(graph, title).savefig(aside, format=path.suffix[1:].lower(), dpi=150)
    except OSError as error:
        why = f'it cannot be written: {error.strerror or error}'
        raise errors.ConfigError('--plot', str(path), why=why) from None


def check(path: pathlib.Path) -> None:
    """Raises ConfigError if no picture can be written to `path`: cheap, so it can be done first."""
    if path.suffix[1:].lower() not in FORMATS:
        why = f'the name of a picture ends in .{", .".join(FORMATS)}'
    elif not path.parent.is_dir():
        why = f'there is no folder {path.parent}; make it first'
    elif path.is_dir() or not os.access(path.parent, os.W_OK):
        why = 'it cannot be written; name a file in a folder of yours'
    else:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            why = "it needs matplotlib: pip install 'jaxkd[plot]'"
        else:
            return
    raise errors.ConfigError('--plot', str(path), why=why)


def draw(graph: Graph, title: str | None = None) -> Figure:
    """The network as a figure, as tall as it has layers.

    A dot stands where a layer makes channels of a group, a ring where it reads them, and the line
    between them is the layer. A depthwise convolution passes on what it reads: a dot alone.
    Groups that several layers make together have a colour, frozen ones are grey.
    """
    from matplotlib.figure import Figure

    nodes = _nodes(graph)
    colours = _colours(graph, nodes)
    lanes = _lanes(nodes)
    names = [_shorten(node.layer.name) for node in nodes]
    trunk = MARGIN + LANE * (1 + max(lanes.values(), default=0))
    bars = trunk + LANE + CHARACTER * max(map(len, names), default=0) + 0.15
    flops = bars + BAR + 0.55
    params = flops + NUMBER + SHARE + 0.3
    width, top = params + NUMBER + SHARE + MARGIN, 1.25
    height = top + ROW * len(nodes) + MARGIN

    figure = Figure(figsize=(width, height), facecolor='white')
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis('off')
    _head(axes, graph, title or type(graph.model).__name__, colours)
    for x, heading in ((bars, 'channels'), (flops, 'multiply-adds'), (params, 'parameters')):
        axes.text(x, top - 0.13, heading, fontsize=8, weight='bold', color=INK, va='center')

    def across(group: str) -> float:
        return MARGIN + LANE * lanes[group] + LANE / 2

    def down(row: int) -> float:
        return top + ROW * (row + 0.5)

    for group, rows in _spans(nodes).items():
        heights = [down(rows[0]), down(rows[-1])]
        axes.plot([across(group)] * 2, heights, color=colours[group], lw=2.2, zorder=1)
    widest = max((sum(node.layer.makes.values()) for node in nodes), default=0)
    largest = max((max(node.flops, node.params) for node in nodes), default=0) or 1
    for row, (node, name) in enumerate(zip(nodes, names, strict=True)):
        y = down(row)
        if row % 2:
            left = trunk + LANE / 2
            axes.barh(y, width - MARGIN - left, ROW, left=left, color=STRIPE, lw=0, zorder=0)
        _touch(axes, node.layer, across, y, colours)
        ink = INK if node.layer.makes else PALE
        axes.text(trunk + LANE, y, name, color=ink, **MONO)
        x = bars
        for group, channels in node.layer.makes.items():
            length = BAR * channels / widest
            axes.barh(y, length, ROW * 0.68, left=x, color=colours[group], lw=0)
            x += length
        if node.layer.makes:
            axes.text(x + 0.05, y, f'{sum(node.layer.makes.values()):,}', color=PALE, **MONO)
        for share, x in ((node.flops, flops), (node.params, params)):
            axes.text(x + NUMBER - 0.08, y, f'{share:.1%}', color=PALE, ha='right', **MONO)
            axes.barh(y, SHARE * share / largest, ROW * 0.5, left=x + NUMBER, color=COST, lw=0)
    return figure


def _nodes(graph: Graph) -> list[Node]:
    """The convolutions and dots; what only has parameters is added to the one before it."""
    cost = graph.cost()
    nodes: list[Node] = []
    for layer, row in zip(tables.layers(graph), cost.rows, strict=True):
        params = row.params / max(cost.params, 1)
        if nodes and not row.activations:
            nodes[-1] = nodes[-1]._replace(params=nodes[-1].params + params)
        else:
            nodes.append(Node(layer, row.flops / max(cost.flops, 1), params))
    return nodes


def _spans(nodes: Sequence[Node]) -> dict[str, list[int]]:
    """The rows in which each group is made or read."""
    spans: dict[str, list[int]] = {}
    for row, node in enumerate(nodes):
        for group in (*node.layer.reads, *node.layer.makes):
            spans.setdefault(group, []).append(row)
    return spans


def _lanes(nodes: Sequence[Node]) -> dict[str, int]:
    """A column for each group, such that no two lines overlap; the longest are leftmost."""
    lanes: dict[str, int] = {}
    taken: list[list[tuple[int, int]]] = []
    for group, rows in sorted(_spans(nodes).items(), key=lambda span: span[1][0] - span[1][-1]):
        first, last = rows[0], rows[-1]
        for lane in range(len(taken) + 1):
            if lane == len(taken):
                taken.append([])
            if all(last < start or end < first for start, end in taken[lane]):
                taken[lane].append((first, last))
                lanes[group] = lane
                break
    return lanes


def _colours(graph: Graph, nodes: Sequence[Node]) -> dict[str, str]:
    """Colours by group."""
    makers: dict[str, int] = {}
    for node in nodes:
        for group in node.layer.makes:
            # A layer that reads nothing, such as a depthwise convolution, makes nothing new.
            makers[group] = makers.get(group, 0) + bool(node.layer.reads)
    colours, shared = {}, 0
    for group in graph.groups:
        colours[group.name] = FROZEN if group.frozen else ALONE
        if not group.frozen and makers.get(group.name, 0) > 1:
            colours[group.name] = SHARED[shared % len(SHARED)]
            shared += 1
    return colours


def _touch(
    axes: Axes, layer: tables.Layer, across: Any, y: float, colours: Mapping[str, str]
) -> None:
    """The layer as a line between the groups that it reads and makes."""
    places = [across(group) for group in (*layer.reads, *layer.makes)]
    if places:
        axes.plot([min(places), max(places)], [y, y], color=INK, lw=0.8, zorder=2)
    for group in layer.reads:
        axes.plot(across(group), y, color=colours[group], **RING)
    for group in layer.makes:
        axes.plot(across(group), y, color=colours[group], **DOT)


def _head(axes: Axes, graph: Graph, title: str, colours: Mapping[str, str]) -> None:
    """The title, the totals, and what dots and colours mean."""
    cost = graph.cost()
    words = (
        f'{cost.flops:,} multiply-adds   {cost.params:,} parameters   '
        f'{len(graph.groups):,} channel groups'
    )
    axes.text(MARGIN, 0.35, title, fontsize=14, weight='bold', color=INK, va='center')
    axes.text(MARGIN, 0.62, words, fontsize=8.5, color=INK, va='center')
    shared = next((colour for colour in colours.values() if colour in SHARED), SHARED[0])
    square = {'marker': 's', 'ms': 6, 'mew': 0}
    x = MARGIN + 0.05
    for mark, colour, meaning in (
        (DOT, INK, 'makes'),
        (RING, INK, 'reads'),
        (square, shared, 'channels made by several layers'),
        (square, ALONE, 'by one layer'),
        (square, FROZEN, 'frozen'),
    ):
        axes.plot(x, 0.86, color=colour, **mark)
        axes.text(x + 0.1, 0.86, meaning, fontsize=7.5, color=INK, va='center')
        x += 0.3 + 0.058 * len(meaning)


def _shorten(name: str, most: int = 48) -> str:
    return name if len(name) <= most else f'…{name[1 - most :]}'
