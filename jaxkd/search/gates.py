"""Gates: the scalars that say how much a channel matters.

A channel group has one gate for each of its units, of one of three kinds:

- 'norm': the scales of the norms that follow its channels (Liu et al. 2017,
  https://arxiv.org/abs/1708.06519): BatchNorm, GroupNorm and whatever has a vector `scale`. Several
  of them (a residual sum, a depthwise pair) are one gate, closed when all are zero. Only where
  a channel is gone with their scales and biases at zero.
- 'explicit': a number of its own, at first 1, that multiplies parameters which make the channel.
- 'sigmoid': the logit of the probability that the channel is there (FiGS, Chaudhuri et al. 2020,
  https://arxiv.org/abs/2006.09581); see `fold`.

Numbers and logits are parameters among the others, in the entry `KEY` of the collection 'params',
so that optimizers, averages and checkpoints carry them. The model never sees them: `fold` makes
the parameters that it is applied to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import errors
from jaxkd.graph import cut as cutting
from jaxkd.graph.trace import Graph, Keep
from jaxkd.search import closing

KINDS = ('norm', 'explicit', 'sigmoid')
COUPLINGS = ('max', 'mean', 'l2')

# The entry of the parameters with the vectors of gates that are no norm's scale, and what comes
# after the group's name there: no variable of a model is called so.
KEY = 'jaxkd_gates'
SUFFIX = ':gate'

# Logits of 'sigmoid': a channel is there with a probability of 0.92 at first and gone at 0.1, both
# as in the authors' code. Above 0.993 float32 would round a logit's small steps away.
INITIAL, SHUT, TOP = 2.5, -float(np.log(9.0)), 5.0
# The logit is so many times the parameter: the factor for which a gate closes, at first, by a total
# threshold of 1, as an explicit gate does. Otherwise it would take a pressure thirty times as high,
# under which what the loss says about a channel counts for nothing.
GAIN = float(np.sqrt(2 * (np.sinh(INITIAL) + INITIAL - np.sinh(SHUT) - SHUT)))
TEMPERATURE = 0.5
# What a channel gets back of itself that had gone and stays after all. At exactly zero no gradient
# would pass the ReLU behind it.
REOPENED = 0.01
# Closed logits, and open ones that nothing presses, keep so far away from `SHUT` that rounding in
# `old + (new - old)` takes none across.
MARGIN = 1e-3


class Scale(NamedTuple):
    """A vector that is, or is a part of, the gate of a group.

    Attributes:
      path: of the parameter, below 'params'.
      positions: int [units, k], those of each unit.
      bias: path of the vector that shrinks with it, or None.
    """

    path: tuple[str, ...]
    positions: np.ndarray
    bias: tuple[str, ...] | None = None


class Gate(NamedTuple):
    """The gates of a group's units.

    Attributes:
      kind: one of `KINDS`.
      scales: of norms, or the one vector of its own.
      closes: what a vector of its own multiplies.
    """

    kind: str
    scales: tuple[Scale, ...]
    closes: tuple[closing.Slice, ...] = ()


Gates = Mapping[str, Gate]


def find(graph: Graph, gates: str = 'norm') -> dict[str, Gate]:
    """A gate for every channel group that is not frozen.

    Args:
      graph: the traced network. It is run a few times on random numbers, to see which parameters
        close a channel; see `jaxkd.search.closing`.
      gates: 'norm' takes the scales of norms where closing them removes the channel, and 'explicit'
        gates elsewhere: without norms, on a branch that no norm follows, under a LayerNorm (whose
        mean the channel would still be part of). 'explicit' and 'sigmoid' give all groups theirs.

    Raises:
      ConfigError: for another kind of gates.
    """
    if gates not in KINDS:
        raise errors.ConfigError('gates', gates, allowed=KINDS)
    trial = closing.Trial(graph)
    found: dict[str, Gate] = {}
    if gates == 'norm':
        scales = norms(graph)
        slices = {name: _slices(group) for name, group in scales.items()}
        differing = trial.differing(slices)
        found = {name: Gate('norm', scales[name]) for name in slices if name not in differing}
    own = 'sigmoid' if gates == 'sigmoid' else 'explicit'
    for group in graph.groups:
        if not group.frozen and group.name not in found:
            vector = Scale((KEY, group.name + SUFFIX), np.arange(group.size)[:, None])
            found[group.name] = Gate(own, (vector,), trial.least(group.name))
    return found


def norms(graph: Graph) -> dict[str, tuple[Scale, ...]]:
    """The norms of every channel group that has some and is not frozen.

    A norm is a layer whose parameters are a vector `scale` and perhaps a vector `bias`.
    """
    found = {}
    for group in graph.groups:
        scales = []
        for member, positions in zip(group.members, group.positions, strict=True):
            collection, *layer, name = graph.keys_of[member.path]
            if (collection, name) == ('params', 'scale'):
                vectors = _get(graph.variables['params'], tuple(layer))
                others = set(vectors) - {'scale', 'bias'}
                if not others and all(len(v.shape) == 1 for v in vectors.values()):
                    bias = (*layer, 'bias') if 'bias' in vectors else None
                    scales.append(Scale((*layer, 'scale'), positions, bias))
        if scales and not group.frozen:
            found[group.name] = tuple(scales)
    return found


def batch_norms(graph: Graph) -> dict[str, tuple[Scale, ...]]:
    """Those of `norms` that have a running `mean`, which other norms have not."""
    statistics = graph.variables.get('batch_stats', {})
    found = {
        name: tuple(scale for scale in scales if _get(statistics, (*scale.path[:-1], 'mean')))
        for name, scales in norms(graph).items()
    }
    return {name: scales for name, scales in found.items() if scales}


def _slices(scales: tuple[Scale, ...]) -> tuple[closing.Slice, ...]:
    return tuple(
        closing.Slice(path, 0, scale.positions)
        for scale in scales
        for path in (scale.path, scale.bias)
        if path
    )


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def gated(gates: Gates, params: Any) -> Any:
    """The parameters with the gates that are no norm's scale; those that are there stay.

    Args:
      gates: what `find` returned.
      params: the collection 'params', nested dicts.

    Returns:
      `params` with float32 [units] under `KEY` for each group that needs it; the same object if
      none does.
    """
    vectors = {
        gate.scales[0].path[1]: jnp.full(
            len(gate.scales[0].positions), _MULTIPLIERS[gate.kind].initial, jnp.float32
        )
        for gate in gates.values()
        if gate.closes
    }
    return {**params, KEY: {**vectors, **params.get(KEY, {})}} if vectors else params


def fold(gates: Gates, params: Any, key: jax.Array | None = None) -> Any:
    """The parameters that the model is applied to: multiplied by their gates, without `KEY`.

    A pure function, to be differentiated through: called in each step of training, in evaluation,
    and once when the search is over. A closed gate makes its channel exactly zero.

    An explicit gate s is the factor. A 'sigmoid' gate with the logit a = GAIN · s is, in training,
    a sample of the Logistic-Sigmoid distribution for each unit, σ((a + L) / 0.5) with L from the
    logistic distribution; without a key it is the probability σ(a), as in the authors' code (which
    has 0 for σ(a) ≤ ½). With and without, it is 0 for σ(a) ≤ 0.1. So what is evaluated is the
    network that the search hands on, and a channel that goes was at zero before.

    Args:
      gates: what `find` returned.
      params: what `gated` returned, of any values.
      key: of the samples of 'sigmoid' gates, in training.

    Raises:
      ConfigError: if the parameters lack their gates.
    """
    changed: dict[tuple[str, ...], jax.Array] = {}
    for index, gate in enumerate(gates.values()):
        if gate.closes:
            noise = None if key is None else jax.random.fold_in(key, index)
            factor = _MULTIPLIERS[gate.kind].factor(_vector(params, gate.scales[0].path), noise)
            for path, axis, positions in gate.closes:
                leaf = changed.get(path, _get(params, path))
                along = jnp.ones(leaf.shape[axis], leaf.dtype)
                along = along.at[positions].set(factor[:, None].astype(leaf.dtype))
                shape = [-1 if i == axis else 1 for i in range(leaf.ndim)]
                changed[path] = leaf * along.reshape(shape)
    if not changed:
        return params
    return {name: value for name, value in _replace(params, changed).items() if name != KEY}


def cut(tree: Any, keep: Mapping[str, np.ndarray]) -> Any:
    """Slices the removed units away from the vectors under `KEY`, in any tree that has such.

    The complement of `jaxkd.cut`, which leaves them as they are: parameters, gradients, averages,
    the state of an optimizer. `keep` is bool [units] by group name; other groups stay whole.
    """
    alive = {name + SUFFIX: {0: np.asarray(units)} for name, units in keep.items()}

    def visit(path, leaf):
        above, name = ([None, *(getattr(entry, 'key', None) for entry in path)])[-2:]
        return cutting.take(leaf, alive[name]) if above == KEY and name in alive else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)


def narrow(graph: Graph, gates: Gates, keep: Keep) -> dict[str, Gate]:
    """The gates of the network that is cut to `keep`: its units, at their positions there."""
    masks = cutting.alive(graph, keep)

    def moved(path: tuple[str, ...], axis: int, positions: np.ndarray) -> np.ndarray:
        mask = masks['/'.join(('params', *path))].get(axis)
        return positions if mask is None else (np.cumsum(mask) - 1)[positions]

    found = {}
    for name, gate in gates.items():
        units = keep[name]
        scales = tuple(
            scale._replace(
                positions=np.arange(units.sum())[:, None]
                if gate.closes
                else moved(scale.path, 0, scale.positions[units])
            )
            for scale in gate.scales
        )
        closes = tuple(
            piece._replace(positions=moved(piece.path, piece.axis, piece.positions[units]))
            for piece in gate.closes
        )
        found[name] = Gate(gate.kind, scales, closes)
    return found


def close(gates: Gates, params: Any, keep: Keep) -> Any:
    """Folded parameters, as numpy arrays, with zeros where the gates of removed units have them."""
    changed: dict[tuple[str, ...], np.ndarray] = {}
    for name, gate in gates.items():
        for path, axis, positions in gate.closes or _slices(gate.scales):
            leaf = changed.setdefault(path, np.array(_get(params, path)))
            np.moveaxis(leaf, axis, 0)[positions[~keep[name]]] = 0
    return _replace(params, changed)


def reopen(gates: Gates, params: Any, keep: Keep, start: Any) -> Any:
    """Folded parameters, as numpy arrays, in which kept units that are closed can be trained again.

    Args:
      gates: what `find` returned.
      params: of the full network, folded.
      keep: bool [units] by group name.
      start: parameters of the full network in which they were open. The units get `REOPENED` of
        what closing has taken: too little to change what the network computes.
    """

    def values(tree: Any, path: tuple[str, ...], axis: int, there: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.asarray(_get(tree, path)), axis, 0)[there]

    changed: dict[tuple[str, ...], np.ndarray] = {}
    for name, gate in gates.items():
        slices = [
            (path, axis, positions[keep[name]])
            for path, axis, positions in gate.closes or _slices(gate.scales)
        ]
        parts = [values(params, *piece) for piece in slices]
        open_ = np.any([part.any(tuple(range(1, part.ndim))) for part in parts], axis=0)
        for path, axis, positions in slices:
            there = positions[~open_]
            leaf = changed.setdefault(path, np.array(_get(params, path)))
            np.moveaxis(leaf, axis, 0)[there] = REOPENED * values(start, path, axis, there)
    return _replace(params, changed)


def magnitudes(scales: tuple[Scale, ...], params: Any) -> jax.Array:
    """|scale| of every channel of each unit: float [k in total, units]."""
    return jnp.abs(_values(scales, params))


def _values(scales: tuple[Scale, ...], params: Any) -> jax.Array:
    return jnp.concatenate([_vector(params, s.path)[s.positions].T for s in scales])


def _vector(params: Any, path: tuple[str, ...]) -> jax.Array:
    vector = _get(params, path)
    if vector is None:
        why = 'they lack the gates of the search; start the training with search.gated(params)'
        raise errors.ConfigError('params', list(params), why=why)
    return vector


def effort(gates: Gates, params: Any, coupling: str = 'max') -> dict[str, jax.Array]:
    """How much shrinking closes each unit: float [units] by group name.

    The total threshold that `shrink` needs to bring a unit to zero if nothing pulls it back, which
    is exactly 0 for a closed one. It ranks units as well. For the coupling 'max' it is the sum of a
    unit's scales, for 'mean' the largest times their number, for 'l2' their norm. For a logit a it
    is (F(a) - F(SHUT)) / GAIN² with F(a) = 2 (sinh a + a), the integral of 1 / σ'(a).
    """
    return {
        name: _flow(gate, coupling).effort(_values(gate.scales, params))
        for name, gate in gates.items()
    }


def shrink(
    gates: Gates, params: Any, thresholds: Mapping[str, jax.Array], coupling: str = 'max'
) -> Any:
    """The proximal step of Σ thresholds · |gate|: soft thresholding of coupled gates.

    The biases of norms shrink with their scales, so that a closed channel is zero, whatever follows
    it, and its removal changes nothing.

    Args:
      gates: what `find` returned.
      params: the collection 'params', nested dicts, with the gates in it (see `gated`).
      thresholds: float [units] by group name; `inf` closes a unit.
      coupling: what the gate of several scales is. 'max' is the largest magnitude (MorphNet, Gordon
        et al. 2018, https://arxiv.org/abs/1711.06798); its proximal step lowers the largest to
        a common level θ with Σ max(|s_i| - θ, 0) = threshold. 'mean' is the mean of the k
        magnitudes, each of which the step lowers by threshold / k. 'l2' is their norm; the
        step scales all by max(0, 1 - threshold / norm). (Parikh and Boyd 2014, Proximal Algorithms,
        section 6.5.) An explicit gate is a single scale. A 'sigmoid' gate is the probability
        σ(a) with the logit a = GAIN · s; its penalty is not convex, so instead of a proximal step
        it takes the gradient flow ds/dt = -dσ/ds for the time `threshold`, exactly: the new
        effort is the old one less the threshold. At a threshold of zero it stays open, whatever
        the optimizer did to it.

    Returns:
      The parameters, new scales and biases in them.
    """
    changed: dict[tuple[str, ...], Any] = {}
    for name, gate in gates.items():
        values = _values(gate.scales, params)
        shrunk = _flow(gate, coupling).shrink(values, jnp.asarray(thresholds[name], values.dtype))
        factor = jnp.where(values != 0, shrunk / jnp.where(values != 0, values, 1.0), 0.0)
        row = 0
        for scale in gate.scales:
            rows = slice(row, row + scale.positions.shape[1])
            old = changed.get(scale.path, _get(params, scale.path))
            changed[scale.path] = old.at[scale.positions].set(shrunk[rows].T.astype(old.dtype))
            if scale.bias:
                bias = changed.get(scale.bias, _get(params, scale.bias))
                by_position = factor[rows].T.astype(bias.dtype)
                changed[scale.bias] = bias.at[scale.positions].multiply(by_position)
            row = rows.stop
    return _replace(params, changed)


class _Flow(NamedTuple):
    """How gates close: functions of their values, float [k, units].

    Attributes:
      effort: values → float [units].
      shrink: values, thresholds float [units] → values.
    """

    effort: Callable[[jax.Array], jax.Array]
    shrink: Callable[[jax.Array, jax.Array], jax.Array]


def _flow(gate: Gate, coupling: str) -> _Flow:
    return _FLOWS['sigmoid' if gate.kind == 'sigmoid' else coupling]


def _shrink_max(values: jax.Array, threshold: jax.Array) -> jax.Array:
    descending = -jnp.sort(-jnp.abs(values), axis=0)
    count = jnp.arange(1, len(values) + 1, dtype=values.dtype)[:, None]
    level = jnp.max((jnp.cumsum(descending, axis=0) - threshold) / count, axis=0)
    level = jnp.maximum(level, 0.0)
    return jnp.clip(values, -level, level)


def _shrink_mean(values: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.sign(values) * jnp.maximum(jnp.abs(values) - threshold / len(values), 0.0)


def _shrink_l2(values: jax.Array, threshold: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(values, axis=0)
    return values * jnp.maximum(0.0, 1.0 - threshold / jnp.maximum(norm, 1e-30))


def _sigmoid_effort(values: jax.Array) -> jax.Array:
    logits = jnp.clip(GAIN * values[0], SHUT, TOP)
    return jnp.where(logits <= SHUT, 0.0, (_integral(logits) - _SHUT_INTEGRAL) / GAIN**2)


def _integral(logits: Any) -> Any:
    return 2 * (jnp.sinh(logits) + logits)


def _shrink_sigmoid(values: jax.Array, threshold: jax.Array) -> jax.Array:
    """Solves F(a) - F(a - d) = GAIN² · threshold, F(a) = 2 (sinh a + a), for the way d."""
    effort = _sigmoid_effort(values)
    closes = (threshold > 0) & (threshold >= effort)
    lowest = jnp.where(threshold > 0, SHUT, SHUT + MARGIN)
    start = jnp.clip(GAIN * values, SHUT, TOP)
    due = GAIN**2 * jnp.minimum(threshold, effort)
    # From the far side of the solution, where Newton's steps all lead towards it: F is odd, convex
    # above zero, and more than 2 sinh there. In terms of d, so that short ways are not rounded off.
    way = start - jnp.arcsinh((_integral(start) - due) / 2)
    for _ in range(5):
        # F(a) - F(a - d), without the difference of large numbers.
        done = 2 * way + 4 * jnp.cosh(start - way / 2) * jnp.sinh(way / 2)
        way = way - (done - due) / (2 + 2 * jnp.cosh(start - way))
    return jnp.where(closes, SHUT - MARGIN, jnp.maximum(start - way, lowest)) / GAIN


_SHUT_INTEGRAL = 2 * (float(np.sinh(SHUT)) + SHUT)
_FLOWS = {
    'max': _Flow(lambda values: jnp.abs(values).sum(0), _shrink_max),
    'mean': _Flow(lambda values: len(values) * jnp.abs(values).max(0), _shrink_mean),
    'l2': _Flow(lambda values: jnp.linalg.norm(values, axis=0), _shrink_l2),
    'sigmoid': _Flow(_sigmoid_effort, _shrink_sigmoid),
}


class _Multiplier(NamedTuple):
    """A gate that is a vector of its own.

    Attributes:
      initial: what it starts from.
      factor: vector, key or None → what it multiplies parameters by, float [units].
    """

    initial: float
    factor: Callable[[jax.Array, jax.Array | None], jax.Array]


def _sigmoid_factor(vector: jax.Array, key: jax.Array | None) -> jax.Array:
    logits = GAIN * vector
    if key is None:
        opened = jax.nn.sigmoid(logits)
    else:
        noise = jax.random.logistic(key, logits.shape, logits.dtype)
        opened = jax.nn.sigmoid((logits + noise) / TEMPERATURE)
    return jnp.where(logits <= SHUT, 0.0, opened)


_MULTIPLIERS = {
    'explicit': _Multiplier(1.0, lambda vector, key: vector),
    'sigmoid': _Multiplier(INITIAL / GAIN, _sigmoid_factor),
}


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
