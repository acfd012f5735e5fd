"""Gates: the scalars that say how much a channel matters.

The gate of a channel is the scale of the BatchNorm that follows it (Liu et al. 2017,
https://arxiv.org/abs/1708.06519). A channel group with several BatchNorms (a residual sum, a
depthwise pair) has one gate, which is closed when all of its scales are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.graph import cut
from jaxkd.graph.trace import Graph, Keep

COUPLINGS = ('max', 'l2')


class Gate(NamedTuple):
    """A BatchNorm whose scale is (one of) a group's gates.

    Attributes:
      layer: path of the BatchNorm's parameters below 'params'.
      positions: int [units, k], the channels of each unit.
      bias: whether it has a bias.
    """

    layer: tuple[str, ...]
    positions: np.ndarray
    bias: bool


Gates = Mapping[str, tuple[Gate, ...]]


def find(graph: Graph) -> dict[str, tuple[Gate, ...]]:
    """The BatchNorms of every channel group that has some and is not frozen.

    A BatchNorm is whatever has a parameter `scale` and a running `mean` under the same path.
    """
    statistics = graph.variables.get('batch_stats', {})
    found = {}
    for group in graph.groups:
        gates = []
        for member, positions in zip(group.members, group.positions, strict=True):
            collection, *layer, name = member.path.split('/')
            if (collection, name) == ('params', 'scale') and _get(statistics, (*layer, 'mean')):
                bias = bool(_get(graph.variables['params'], (*layer, 'bias')))
                gates.append(Gate(tuple(layer), positions, bias))
        if gates and not group.frozen:
            found[group.name] = tuple(gates)
    return found


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def narrow(graph: Graph, gates: Gates, keep: Keep) -> dict[str, tuple[Gate, ...]]:
    """The gates of the network that is cut to `keep`: its units, at their positions there."""
    masks = cut.alive(graph, keep)

    def narrowed(gate: Gate, units: np.ndarray) -> Gate:
        mask = masks['/'.join(('params', *gate.layer, 'scale'))].get(0)
        positions = gate.positions[units]
        if mask is not None:
            positions = (np.cumsum(mask) - 1)[positions]
        return gate._replace(positions=positions)

    return {
        name: tuple(narrowed(gate, keep[name]) for gate in group) for name, group in gates.items()
    }


def scales(gates: tuple[Gate, ...], params: Any) -> jax.Array:
    """|scale| of every BatchNorm channel of each unit: float [k in total, units]."""
    return jnp.concatenate(
        [jnp.abs(_get(params, (*g.layer, 'scale')))[g.positions].T for g in gates]
    )


def effort(gates: Gates, params: Any, coupling: str = 'max') -> dict[str, jax.Array]:
    """How much shrinking closes each unit: float [units] by group name.

    The total threshold that `shrink` needs to bring a unit to zero if nothing pulls it back: the
    sum of its scales for the coupling 'max', their norm for 'l2'. It ranks units as well.
    """
    norm = {'max': lambda s: s.sum(0), 'l2': lambda s: jnp.linalg.norm(s, axis=0)}[coupling]
    return {name: norm(scales(group, params)) for name, group in gates.items()}


def shrink(
    gates: Gates, params: Any, thresholds: Mapping[str, jax.Array], coupling: str = 'max'
) -> Any:
    """The proximal step of Σ thresholds · |gate|: soft thresholding of coupled gates.

    The biases shrink with their scales, so that a closed channel is zero, whatever follows it, and
    its removal changes nothing.

    Args:
      gates: what `find` returned.
      params: the collection 'params', nested dicts.
      thresholds: float [units] by group name; `inf` closes a unit.
      coupling: what a group's gate is. 'max' is the largest magnitude of its scales (MorphNet,
        Gordon et al. 2018, https://arxiv.org/abs/1711.06798); its proximal step lowers the largest
        to a common level θ with Σ max(|s_i| - θ, 0) = threshold. 'l2' is their norm; its proximal
        step scales all by max(0, 1 - threshold / norm).

    Returns:
      The parameters, new scales and biases in them.
    """
    changed: dict[tuple[str, ...], Any] = {}
    for name, group in gates.items():
        magnitude = scales(group, params)
        threshold = jnp.asarray(thresholds[name], magnitude.dtype)
        if coupling == 'max':
            descending = -jnp.sort(-magnitude, axis=0)
            count = jnp.arange(1, len(magnitude) + 1, dtype=magnitude.dtype)[:, None]
            level = jnp.max((jnp.cumsum(descending, axis=0) - threshold) / count, axis=0)
            shrunk = jnp.minimum(magnitude, jnp.maximum(level, 0.0))
        else:
            norm = jnp.linalg.norm(magnitude, axis=0)
            shrunk = magnitude * jnp.maximum(0.0, 1.0 - threshold / jnp.maximum(norm, 1e-30))
        factor = jnp.where(magnitude > 0, shrunk / jnp.maximum(magnitude, 1e-30), 0.0)
        row = 0
        for gate in group:
            k = gate.positions.shape[1]
            for leaf in ('scale', 'bias') if gate.bias else ('scale',):
                path = (*gate.layer, leaf)
                value = changed.get(path, _get(params, path))
                by_position = factor[row : row + k].T.astype(value.dtype)
                changed[path] = value.at[gate.positions].multiply(by_position)
            row += k
    return _replace(params, changed)


def _replace(tree: Any, changed: Mapping[tuple[str, ...], Any]) -> Any:
    below: dict[str, dict[tuple[str, ...], Any]] = {}
    result = dict(tree)
    for (key, *rest), value in changed.items():
        if rest:
            below.setdefault(key, {})[tuple(rest)] = value
        else:
            result[key] = value
    for key, inner in below.items():
        result[key] = _replace(tree[key], inner)
    return result
