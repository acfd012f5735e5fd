"""Networks with units more than once: wider ones that compute the same.

A copy of a unit makes the same channels again, so whatever reads them shares its weights out among
the copies (Net2WiderNet, Chen et al. 2016, https://arxiv.org/abs/1511.05641). Like a cut, this is
believed only after it has been run.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from jaxkd import errors
from jaxkd.graph import constants, cut, structure
from jaxkd.graph.trace import ChannelGroup, Graph, Member, path_string, plain

# How often each unit is there: int [units] by group name; 0 removes it, 1 keeps it. Groups that are
# not mentioned are kept.
Copies = Mapping[str, np.ndarray]

# Copies get the same gradients, so that they would stay copies for ever. So the filters of all but
# the first are multiplied by 1 + NOISE · N(0, 1): enough for training to move them apart, and
# hardly seen in the outputs, because what reads copies takes their mean.
NOISE = 0.05


def widen(
    graph: Graph, variables: Any, copies: Copies, *, noise: float = NOISE, seed: int = 0
) -> structure.CompactModel:
    """The network with each unit so many times, verified.

    Args:
      graph: the traced network.
      variables: its variables.
      copies: int [units] by group name: how often each unit is there.
      noise: by what share the filters of further copies differ; 0 for a network that computes
        exactly what the one without copies does.
      seed: of the noise.

    Raises:
      GraphError: for copies of a group that cannot have any (see `stays`), and where the wider
        network does not compute what the one without copies does.
    """
    copies = complete(graph, copies)
    found = at_fault(graph, copies)
    if found:
        raise errors.GraphError(
            f'{type(graph.model).__name__} computes something else with copies of the channels of '
            f'{", ".join(found)}, or cannot run at that width: keep these groups as they are'
        )
    return build(graph, variables, copies, noise=noise, seed=seed)


def build(
    graph: Graph, variables: Any, copies: Copies, *, noise: float = NOISE, seed: int = 0
) -> structure.CompactModel:
    """`widen` without the proof."""
    module, found = _module(graph, copies)
    wider = _disturb(graph, repeat(graph, plain(variables), copies), copies, noise, seed)
    if not all(number.any() for number in copies.values()):
        wider = constants.fold(module, wider, graph)
    return structure.CompactModel(module, wider, found)


def complete(graph: Graph, copies: Copies) -> dict[str, np.ndarray]:
    """The copies of every group, checked."""
    result = {name: alive.astype(int) for name, alive in graph.keep_all().items()}
    for name, number in copies.items():
        number = np.asarray(number)
        known = name in result and number.shape == result[name].shape
        if known and (number.dtype.kind not in 'iu' or (number < 0).any()):
            why = f'copies of group {name!r} must be whole numbers of at least 0'
            raise errors.GraphError(f'{why}, not {number.dtype} {number.tolist()}')
        graph.complete({name: number > 0})  # which has the sentences for the other mistakes
        if (number > 1).any() and (why := stays(graph.by_name[name])):
            raise errors.GraphError(f'group {name!r} cannot be widened: {why}')
        result[name] = number
    return result


def stays(group: ChannelGroup) -> str | None:
    """Why no unit of a group may be there more than once, as far as its members tell; or None."""
    if group.frozen or group.inexact:
        return f'{group.frozen or group.inexact} ({group.source})'
    if group.size == 1 and min(p.shape[1] for p in group.positions) > 1:
        return 'its channels are all tied to one another'
    if not _readers(group):
        return 'no weights read its channels, which could be shared out among copies'
    return None


def _readers(group: ChannelGroup) -> set[tuple[str, int]]:
    """The axes of weights, by path and axis, over which the group's channels are summed up."""

    def layer(member: Member) -> str:
        return member.path.rpartition('/')[0]

    members = list(zip(group.members, group.made, strict=True))
    # What stands beside a kernel that makes the channels, such as its bias, is added to them.
    makers = {layer(member): member.path for member, made in members if made}
    return {
        (member.path, member.axis)
        for member, made in members
        if not made
        and member.path.startswith('params/')
        and makers.get(layer(member), member.path) == member.path
    }


def at_fault(graph: Graph, copies: Copies, seed: int = 0) -> list[str]:
    """Which groups' copies change what the network computes, on random variables and inputs.

    Compared with the masked network, as `cut.verify` does; [] where nothing differs.
    """
    copies = complete(graph, copies)
    # Without some of these the others change, copies or not: they are left whole here.
    copies |= {g.name: np.ones(g.size, int) for g in graph.groups if g.inexact}
    keep = {name: number > 0 for name, number in copies.items()}

    def differs(names: list[str]) -> bool:
        some = {n: number if n in names else np.minimum(number, 1) for n, number in copies.items()}
        try:
            return cut.measure(graph, keep, seed, functools.partial(_run, graph, some)) > (
                cut.TOLERANCE
            )
        except errors.GraphError:
            if not names:
                raise  # it is not the copies
            return True

    wider = [name for name, number in copies.items() if (number > 1).any()]
    if not wider or not differs(wider):
        return []
    if differs([]):
        cut.verify(graph, keep, seed=seed)  # it was the cut
    return cut.at_fault(wider, differs)


def _run(graph: Graph, copies: Copies, variables: Any, inputs: Any, precise: bool) -> list[Any]:
    """The outputs of the wider network, given the full network's variables."""
    module, _ = _module(graph, copies)
    return cut.run_at(graph, module, repeat(graph, variables, copies), inputs, precise)


def _module(graph: Graph, copies: Copies) -> tuple[nn.Module, structure.Structure]:
    found = structure.repeated(graph, copies, repeat(graph, graph.variables, copies))
    return structure.module(graph.model, found), found


def repeat(graph: Graph, variables: Any, copies: Copies) -> Any:
    """The variables with each unit so many times, and what reads it shared out among its copies.

    Leaves may be arrays or `jax.ShapeDtypeStruct`s.
    """
    orders = _orders(graph, copies)
    readers = set().union(*map(_readers, graph.groups))

    def visit(path, leaf):
        path = path_string(path)
        axes = orders.get(path, {})
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = list(leaf.shape)
            for axis, order in axes.items():
                shape[axis] = len(order)
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
        array = np.asarray(leaf)
        for axis, order in axes.items():
            array = np.take(array, order, axis)
            if array.ndim > 1 and (path, axis) in readers:
                times = np.bincount(order)[order]
                array = (array / _along(times, axis, array.ndim)).astype(array.dtype)
        return jax.numpy.asarray(array) if isinstance(leaf, jax.Array) else array

    return jax.tree_util.tree_map_with_path(visit, variables)


def _orders(graph: Graph, copies: Copies) -> dict[str, dict[int, np.ndarray]]:
    """By variable and axis, which position of the full network stands at each position."""
    pieces: dict[tuple[str, int], list[list[int]]] = {}
    for group in graph.groups:
        changed = np.flatnonzero(copies[group.name] != 1)
        for member, positions in zip(group.members, group.positions, strict=True):
            if not len(changed):
                continue
            size = graph.shapes[member.path][member.axis]
            axis = pieces.setdefault((member.path, member.axis), [[i] for i in range(size)])
            for unit in changed:
                for run in _runs(group, positions[unit]):
                    for position in run:
                        axis[position] = []
                    axis[run[0]] = run.tolist() * int(copies[group.name][unit])
    orders: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), parts in pieces.items():
        order = np.array([position for part in parts for position in part], int)
        orders.setdefault(path, {})[axis] = order
    return orders


def _runs(group: ChannelGroup, positions: np.ndarray) -> list[np.ndarray]:
    """The stretches of a unit's positions that a copy repeats as a whole.

    Positions side by side are what one unit is (the channels of a GroupNorm's group, those that a
    depthwise convolution makes of one); those apart are one each of several (pixels, groups of a
    convolution), with the other units between them. Where there are no others, a stretch is as
    long as a unit is at least.
    """
    apart = np.flatnonzero(np.diff(positions) > 1) + 1
    if group.size == 1:
        least = min(p.shape[1] for p in group.positions)
        apart = np.union1d(apart, np.arange(least, len(positions), least))
    return np.split(positions, apart)


def _disturb(graph: Graph, wider: Any, copies: Copies, noise: float, seed: int) -> Any:
    """Makes the filters of further copies a little different from those of the first."""
    orders = _orders(graph, copies)
    random = np.random.default_rng(seed)
    makers = {
        (member.path, member.axis)
        for group in graph.groups
        for member, made in zip(group.members, group.made, strict=True)
        if made
    }

    def visit(path, leaf):
        path = path_string(path)
        array = np.asarray(leaf)
        for axis, order in orders.get(path, {}).items():
            if (path, axis) in makers and array.ndim > 1:
                first = np.zeros(len(order), bool)
                first[np.unique(order, return_index=True)[1]] = True
                share = np.where(_along(first, axis, array.ndim), 0.0, noise)
                factor = 1 + share * random.standard_normal(array.shape)
                array = (array * factor).astype(array.dtype)
        return jax.numpy.asarray(array) if isinstance(leaf, jax.Array) else array

    return jax.tree_util.tree_map_with_path(visit, wider) if noise else wider


def _along(vector: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """A vector as an array of `ndim` dimensions that runs along one of them."""
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])
