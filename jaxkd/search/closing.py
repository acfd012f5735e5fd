"""Which parameters have to be zero for a channel to be gone: found by trying, on random numbers.

A channel that is removed takes everything with it that belongs to it, also its share of the kernels
that read it. A gate closes less: a norm's scale and bias, or a kernel's outputs. Whether that comes
to the same depends on what the network computes in between (other branches of a sum, activation
functions that are not zero at zero), so the two are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import numpy as np

from jaxkd.graph import cut
from jaxkd.graph import trace as tracing
from jaxkd.graph.trace import ChannelGroup, Graph

# Largest difference, as a share of the largest output, of what is the same: the two add up the same
# numbers in the same order, but for zeros.
TOLERANCE = 1e-6


class Slice(NamedTuple):
    """The share of a group's units in a parameter.

    Attributes:
      path: of the parameter, below 'params'.
      axis: which of its axes.
      positions: int [units, k], those of each unit on it.
    """

    path: tuple[str, ...]
    axis: int
    positions: np.ndarray


class Trial:
    """A network on random variables and inputs, from which units are removed in one way or another.

    Args:
      graph: of the network. Half of the units of each group that may be cut are removed, or its
        only one.
      seed: of the random numbers.
    """

    def __init__(self, graph: Graph, seed: int = 0):
        self._graph = graph
        random = np.random.default_rng(seed)
        self._removed = {
            group.name: random.permutation(group.size)[: max(1, group.size // 2)]
            for group in graph.groups
            if not group.frozen
        }
        variables, self._inputs = cut.random_arguments(graph, seed)
        self._leaves = traverse_util.flatten_dict(variables)
        self._masked: dict[tuple[str, ...], list[np.ndarray]] = {}
        network = tracing.outputs_of(graph.model, graph.apply_kwargs)
        self._network = jax.jit(
            lambda leaves, inputs: network(traverse_util.unflatten_dict(leaves), inputs)
        )

    def differing(self, closings: Mapping[str, Sequence[Slice]]) -> list[str]:
        """The groups whose units are not gone when they are zero in these slices alone."""

        def differ(names: Sequence[str]) -> bool:
            return self._differ({name: closings[name] for name in names})

        # Without its only unit a group hands nothing on, and would hide the others.
        single = [name for name in closings if self._graph.sizes[name] == 1]
        rest = [name for name in closings if self._graph.sizes[name] > 1]
        found = [name for name in single if differ([name])]
        return found + (cut.at_fault(rest, differ) if rest and differ(rest) else [])

    def least(self, name: str) -> tuple[Slice, ...]:
        """Slices that are enough to remove a group's units, none of which could be left out.

        Of the layers that make the channels the last ones, and all norms, biases and other vectors
        that are not made zero by that. Where even all of them are not enough, because an activation
        function makes something of a zero, the kernels that read the channels.
        """
        chosen, readers = _layers(self._graph, self._graph.by_name[name])
        if self._differ({name: _together(chosen)}):
            chosen = chosen + readers
        for layer in tuple(chosen):
            rest = [other for other in chosen if other is not layer]
            if rest and not self._differ({name: _together(rest)}):
                chosen = rest
        return _together(chosen)

    def _differ(self, closings: Mapping[str, Sequence[Slice]]) -> bool:
        names = tuple(closings)
        if names not in self._masked:
            everything = [
                (self._graph.keys_of[member.path], member.axis, positions[self._removed[name]])
                for name in names
                for member, positions in _members(self._graph.by_name[name])
            ]
            self._masked[names] = self._outputs(everything)
        closed = self._outputs(
            [
                (('params', *piece.path), piece.axis, piece.positions[self._removed[name]])
                for name, pieces in closings.items()
                for piece in pieces
            ]
        )
        return not all(
            np.max(np.abs(a - b)) <= TOLERANCE * np.max(np.abs(a))
            for a, b in zip(self._masked[names], closed, strict=True)
            if a.size
        )

    def _outputs(
        self, zeros: Sequence[tuple[tuple[str, ...], int, np.ndarray]]
    ) -> list[np.ndarray]:
        """What the network computes with zeros at (path, axis, positions)."""
        leaves = dict(self._leaves)
        for path, axis, positions in zeros:
            leaf = np.moveaxis(leaves[path].copy(), axis, 0)
            leaf[positions.reshape(-1)] = 0
            leaves[path] = np.moveaxis(leaf, 0, axis)
        cpu = jax.local_devices(backend='cpu')[0]
        with jax.default_device(cpu), jax.default_matmul_precision('highest'):
            outputs = self._network(leaves, self._inputs)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(outputs)]


def _together(layers: Sequence[Sequence[Slice]]) -> tuple[Slice, ...]:
    return tuple(piece for layer in layers for piece in layer)


def _members(group: ChannelGroup) -> Any:
    return zip(group.members, group.positions, strict=True)


def _layers(
    graph: Graph, group: ChannelGroup
) -> tuple[list[tuple[Slice, ...]], list[tuple[Slice, ...]]]:
    """What makes or changes a group's channels, and what reads them: the slices of each layer.

    In the order of the computation.
    """
    order = {row.layer: i for i, row in enumerate(graph.cost().rows)}
    shapes = traverse_util.flatten_dict(graph.variables)
    makers: dict[tuple[str, ...], list[Slice]] = {}
    readers: dict[tuple[str, ...], list[Slice]] = {}
    for (member, positions), made in zip(_members(group), group.made, strict=True):
        collection, *path = graph.keys_of[member.path]
        if collection == 'params':
            vector = len(shapes[collection, *path].shape) == 1
            layers = makers if made or vector else readers
            piece = Slice(tuple(path), member.axis, positions)
            layers.setdefault(tuple(path[:-1]), []).append(piece)

    def in_order(layers: Mapping[tuple[str, ...], list[Slice]]) -> list[tuple[Slice, ...]]:
        ranked = sorted(layers.items(), key=lambda layer: order.get('/'.join(layer[0]), -1))
        return [tuple(pieces) for _, pieces in ranked]

    return in_order(makers), in_order(readers)
