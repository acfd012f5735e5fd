"""How much a channel matters, without training for it.

A criterion is called as `criterion(graph, variables, evidence)` and returns scores: float64 [size]
by group name, ≥ 0. Groups of which it can say nothing have no score, and are kept.

`jaxkd.select` removes what has the least score for its price, over all groups at once. So scores
of different groups are compared, and the papers that rank within a layer alone (l1, l2, fpgm,
activation) need a scale: here it is the group's mean.

MorphNet (Gordon et al. 2018, https://arxiv.org/abs/1711.06798) is no entry: its price × |γ| is a
penalty to train with (`jaxkd.search.penalty`), and what it reads off in the end is `bn_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import errors
from jaxkd.graph import cut
from jaxkd.graph import trace as tracing
from jaxkd.graph.trace import ChannelGroup, Graph
from jaxkd.search import gates as gating

Scores = dict[str, np.ndarray]

# Batches that are enough for the criteria that look at data.
BATCHES = 32
# Ranks become scores e^(STEEPNESS · rank), so that of two units whose ranks differ by more than a
# few per cent the lower goes first, whatever their prices. The largest is still far from overflow.
STEEPNESS = 600.0
# Where half of a group can go without loss, its units still need an order: this share of the
# largest increase of the loss is what they count for.
HARMLESS = 1e-3


class Evidence(NamedTuple):
    """What a criterion may measure the network with.

    Attributes:
      loss: `loss(variables, batch)`, the mean loss of a batch as a scalar that JAX can
        differentiate, with the network in its evaluation mode. None without data.
      batches: what `loss` takes, any pytrees of arrays. Each counts the same.
      seed: for what is drawn at random.
    """

    loss: Callable[[Any, Any], jax.Array] | None = None
    batches: Sequence[Any] = ()
    seed: int = 0


def random(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """Every channel is as likely to go as any other, whatever it costs: the baseline to beat.

    Mittal et al. 2018, Recovering from Random Pruning, https://arxiv.org/abs/1801.10447.
    """
    del variables
    generator = np.random.default_rng(evidence.seed if evidence else 0)
    return {
        group.name: np.exp(STEEPNESS * generator.random(group.size))
        for group in graph.groups
        if not group.frozen
    }


def uniform(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """The rank within the group by `l1`, so that the same share of every group goes.

    The uniform strategy that He et al. 2018, AMC, https://arxiv.org/abs/1802.03494, compare with.
    The shares of two groups differ by about log(p / q) / 600, for prices p and q of a channel, and
    by what `jaxkd.select` takes back in the end to fill the budget: less than the dearest channel
    costs, in cheaper ones.
    """
    return {
        name: np.exp(STEEPNESS * (_ranks(score) + 0.5) / len(score))
        for name, score in l1(graph, variables, evidence).items()
    }


def l1(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """Σ|w| over the filters that make a channel, relative to the group's mean.

    Li et al. 2017, Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710,
    section 3.1; relative, because filters of different layers have different sizes.
    """
    del evidence
    return {name: _relative(np.abs(w).sum(1)) for name, w in _filters(graph, variables)}


def l2(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """(Σ w²)^½ over the filters that make a channel, relative to the group's mean.

    He et al. 2018, Soft Filter Pruning, https://arxiv.org/abs/1808.06866.
    """
    del evidence
    return {name: _relative(np.linalg.norm(w, axis=1)) for name, w in _filters(graph, variables)}


def bn_scale(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """|γ| of the BatchNorms of a channel: the mean over those of a group.

    Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming,
    https://arxiv.org/abs/1708.06519, section 3. Groups without a BatchNorm have no score.

    Raises:
      GraphError: for a network without BatchNorm.
    """
    del evidence
    norms = gating.batch_norms(graph)
    if not norms:
        raise errors.GraphError(
            'the criterion bn_scale needs BatchNorm scales, and no channel group has one; '
            "criterion='l1' needs none"
        )
    params = tracing.plain(variables)['params']
    return {
        name: np.asarray(gating.magnitudes(scales, params), np.float64).mean(0)
        for name, scales in norms.items()
    }


def fpgm(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """Σ_j ‖F_c - F_j‖₂, the distances of channel c's filters to those of the group's others.

    He et al. 2019, Filter Pruning via Geometric Median, https://arxiv.org/abs/1811.00250: the
    filters nearest to the geometric median are those that the others can replace. Relative to the
    group's mean. Where several kernels make a channel, F_c is all of them.
    """
    del evidence
    scores = {}
    for name, filters in _filters(graph, variables):
        products = filters @ filters.T
        squares = np.diag(products)
        # |a - b|² = |a|² + |b|² - 2ab: one matrix product, where the differences would fill memory.
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0.0))
        np.fill_diagonal(distances, 0.0)
        scores[name] = _relative(distances.sum(1))
    return scores


def lamp(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """‖F_c‖² / Σ ‖F_j‖² over those j of the group with ‖F_j‖ ≥ ‖F_c‖.

    Lee et al. 2021, Layer-Adaptive Sparsity for the Magnitude-based Pruning,
    https://arxiv.org/abs/2010.07611, with whole filters for its single weights. The strongest
    channel of a group has score 1 unless it has an equal; every other has at most ½.
    """
    del evidence
    scores = {}
    for name, filters in _filters(graph, variables):
        power = np.square(filters).sum(1)
        ascending = np.sort(power)
        total = np.cumsum(ascending[::-1])[::-1]  # of each and all that follow it
        at_least = total[np.searchsorted(ascending, power, side='left')]
        scores[name] = power / np.maximum(at_least, 1e-300)
    return scores


def taylor(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """(Σ g·w)² over the filters that make a channel, g = ∂loss/∂w; the mean over the batches.

    Molchanov et al. 2019, Importance Estimation for Neural Network Pruning,
    https://arxiv.org/abs/1906.10771, section 3, the joint importance of a set of weights: to first
    order, the square of what the loss changes by when they become zero.
    """

    terms = {group.name: [_makers(group)] for group in graph.groups}
    return _first_order('taylor', graph, variables, evidence, terms)


def group_taylor(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """Σ_m (Σ g·w)² over all members m of the group; the mean over the batches.

    As `taylor`, for every parameter that goes with the channel: the kernels that make it, biases
    and norms, and the kernels that read it. Fang et al. 2023, DepGraph: Towards Any Structural
    Pruning, https://arxiv.org/abs/2301.12900, section 3.3: the importance of a group is the sum of
    its members'.
    """

    terms = {group.name: [[member] for member in _members(group)] for group in graph.groups}
    return _first_order('group_taylor', graph, variables, evidence, terms)


def fisher(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """(Σ g·w)² over all kernels that read a channel; the mean over the batches, best small ones.

    Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning,
    https://arxiv.org/abs/1801.05787, section 2: to second order, what the loss grows by when the
    channel is gone is half the Fisher information of a factor that multiplies it, the mean square
    of the loss's derivative in that factor. Here it is the factor of the channel wherever it is
    read, so that what it leads to through several layers counts together. Of a batch of n examples
    the square is 1/n of that of one, on average, if the labels are drawn from the network's
    own probabilities; with labels of the data it is the empirical one. The more batches the better:
    with k of them the score of a channel is off by about (2/k)^½. What no kernel reads (the width
    of attention's queries) is judged by the filters that make it.
    """

    ranks = {path: len(leaf.shape) for path, leaf in _leaves(graph.variables).items()}
    terms = {}
    for group in graph.groups:
        makers = _makers(group)
        made = {(member.path, member.axis) for member, _ in makers}
        readers = [
            (member, positions)
            for member, positions in _members(group)
            if (member.path, member.axis) not in made and ranks[member.path] > 1
        ]
        terms[group.name] = [readers or makers]
    return _first_order('fisher', graph, variables, evidence, terms)


def activation(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """The mean |output| of the layers that make a channel, relative to the group's mean.

    Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference,
    https://arxiv.org/abs/1611.06440, section 2.2, its mean activation. A channel has no one array
    that is "the activation" (sums, concatenations and activation functions come after), so it is
    taken where it can be in any network: at the outputs of the group's BatchNorms or, in a group
    without, of the layers whose kernels make it. Both stand before the activation function.

    The layers are watched while the loss is computed, so that nothing but the loss need be given.

    Raises:
      ConfigError: also where the loss does not run the layers of the model.
    """
    loss, batches = _data('activation', evidence)
    watched = _watched(graph)
    wanted: dict[str, set[int]] = {}
    for places in watched.values():
        for place in places:
            wanted.setdefault(place.layer, set()).add(place.axis)
    seen: dict[tuple[str, int], list[np.ndarray]] = {}

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == '__call__' and isinstance(out, jax.Array):
            path = '/'.join(context.module.path)
            for axis in wanted.get(path, ()):
                if out.ndim + axis >= 0:
                    others = tuple(i for i in range(out.ndim) if i != out.ndim + axis)
                    mean = jnp.abs(out.astype(jnp.float32)).mean(others)
                    jax.debug.callback(functools.partial(add, path, axis), mean)
        return out

    def add(path: str, axis: int, mean: jax.Array) -> None:
        seen.setdefault((path, axis), []).append(np.asarray(mean, np.float64))

    def watching(variables: Any, batch: Any) -> jax.Array:
        # A loss that is jitted and has run before would not run Python again.
        with nn.intercept_methods(watch), jax.disable_jit():
            return loss(variables, batch)

    run = jax.jit(watching)
    for batch in batches:
        jax.block_until_ready(run(tracing.plain(variables), batch))
    jax.effects_barrier()
    if not seen:
        raise errors.ConfigError(
            'loss',
            evidence.loss,
            why='it ran none of the layers whose activations were asked for; let it call '
            f'{type(graph.model).__name__}.apply(variables, …) itself',
        )
    scores = {}
    for name, places in watched.items():
        means = [
            np.mean(seen[p.layer, p.axis], axis=0)[p.positions].mean(1)
            for p in places
            if (p.layer, p.axis) in seen and len(seen[p.layer, p.axis][0]) == p.size
        ]
        if means:
            scores[name] = _relative(_finite('activation', np.mean(means, axis=0)))
    return scores


def sensitivity(graph: Graph, variables: Any, evidence: Evidence | None = None) -> Scores:
    """How much the loss grows without the weaker half of the group, times the rank by `l1`.

    Li et al. 2017, Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710,
    section 3.2: groups are masked one at a time, and those that the loss is sensitive to lose
    less. The growth is that for each masked channel, as a score is; the rank is in (0, 1].
    """
    loss, batches = _data('sensitivity', evidence)
    norms = l1(graph, variables)
    run = jax.jit(loss)

    def mean_loss(keep: dict[str, np.ndarray]) -> float:
        masked = cut.mask(graph, tracing.plain(variables), keep)
        return float(_finite('sensitivity', np.mean([run(masked, batch) for batch in batches])))

    before = mean_loss({})
    growth = {}
    for name, norm in norms.items():
        weaker = _ranks(norm) < len(norm) // 2
        growth[name] = (mean_loss({name: ~weaker}) - before) / max(weaker.sum(), 1)
    least = HARMLESS * max([*growth.values(), 1e-30])
    return {
        name: max(growth[name], least) * (_ranks(norm) + 1) / len(norm)
        for name, norm in norms.items()
    }


Criterion = Callable[[Graph, Any, Evidence | None], Scores]
CRITERIA: dict[str, Criterion] = {
    'random': random,
    'uniform': uniform,
    'l1': l1,
    'l2': l2,
    'bn_scale': bn_scale,
    'fpgm': fpgm,
    'lamp': lamp,
    'taylor': taylor,
    'group_taylor': group_taylor,
    'fisher': fisher,
    'activation': activation,
    'sensitivity': sensitivity,
}
# What is worth something, not a mere order.
MEASURES = tuple(name for name in CRITERIA if name not in ('random', 'uniform'))
ON_DATA = ('taylor', 'group_taylor', 'fisher', 'activation', 'sensitivity')  # what needs evidence


def _filters(graph: Graph, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of the filters that make each unit, float64 [size, weights], by group name.

    `tree` is shaped like the variables. Groups that no kernel makes are left out.
    """
    leaves = _leaves(tree)
    for group in graph.groups:
        rows = [
            _rows(leaves[member.path], member.axis, positions)
            for member, positions in _makers(group)
        ]
        if rows and not group.frozen:
            yield group.name, np.concatenate(rows, axis=1)


_Members = list[tuple[tracing.Member, np.ndarray]]


def _members(group: ChannelGroup) -> _Members:
    """A group's members among the parameters, with their positions."""
    members = zip(group.members, group.positions, strict=True)
    return [(m, positions) for m, positions in members if m.path.startswith('params/')]


def _makers(group: ChannelGroup) -> _Members:
    """The output axes of kernels among a group's members, with their positions."""
    members = zip(group.members, group.positions, group.made, strict=True)
    return [(member, positions) for member, positions, made in members if made]


def _rows(leaf: Any, axis: int, positions: np.ndarray) -> np.ndarray:
    """The elements of `leaf` at each unit's positions: float64 [size, elements]."""
    elements = np.moveaxis(np.asarray(leaf, np.float64), axis, 0)
    return elements[positions].reshape(len(positions), -1)


def _relative(score: np.ndarray) -> np.ndarray:
    return score / max(score.mean(), 1e-30)


def _ranks(score: np.ndarray) -> np.ndarray:
    """int [size]: 0 for the least score; of equal ones the first is the least."""
    ranks = np.empty(len(score), int)
    ranks[np.argsort(score, kind='stable')] = np.arange(len(score))
    return ranks


class _Place(NamedTuple):
    """An output to watch: that of `layer`, on its `axis` from the end, of `size` positions."""

    layer: str
    axis: int
    size: int
    positions: np.ndarray


def _watched(graph: Graph) -> dict[str, list[_Place]]:
    """Where the channels of each group that may be cut can be seen."""
    shapes = _leaves(graph.variables)
    made: dict[str, set[int]] = {}
    for group in graph.groups:
        for member, _ in _makers(group):
            made.setdefault(member.path, set()).add(member.axis)
    norms = gating.batch_norms(graph)
    places = {}
    for group in graph.groups:
        if group.frozen:
            continue
        found = []
        for scale in norms.get(group.name, ()):
            size = shapes['/'.join(('params', *scale.path))].shape[0]
            found.append(_Place('/'.join(scale.path[:-1]), -1, size, scale.positions))
        if not found:
            for member, positions in _makers(group):
                # A kernel's output axes, in their order, are the last of the layer's output. They
                # need not be the last of the kernel: those of a transposed one are not.
                axis = -sum(other >= member.axis for other in made[member.path])
                layer = '/'.join(graph.keys_of[member.path][1:-1])
                size = shapes[member.path].shape[member.axis]
                found.append(_Place(layer, axis, size, positions))
        places[group.name] = found
    return places


def _data(
    criterion: str, evidence: Evidence | None
) -> tuple[Callable[[Any, Any], jax.Array], tuple[Any, ...]]:
    """The loss and the batches that a criterion cannot do without."""
    if evidence is None or evidence.loss is None:
        raise errors.ConfigError(
            'criterion',
            criterion,
            why='it measures the network on data: give jaxkd.prune(…, loss=, batches=), or '
            'Evidence(loss, batches, seed) where you call it; loss(variables, batch) is the mean '
            'loss of one of the batches',
        )
    if not callable(evidence.loss):
        raise errors.ConfigError('loss', evidence.loss, why='it must be a function')
    batches = tuple(evidence.batches)
    if not batches:
        why = f'the criterion {criterion} needs at least one batch'
        raise errors.ConfigError('batches', evidence.batches, why=why)

    def loss(variables: Any, batch: Any) -> jax.Array:
        value = evidence.loss(variables, batch)
        if not jax.tree_util.all_leaves([value]):
            kind = type(value).__name__
            why = f'it must return a scalar alone, not a {kind}: evaluation changes no variables'
            raise errors.ConfigError('loss', evidence.loss, why=why)
        if jnp.shape(value):
            why = f'it must return a scalar, not an array of shape {list(jnp.shape(value))}'
            raise errors.ConfigError('loss', evidence.loss, why=why)
        return value

    return loss, batches


def _finite(criterion: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise errors.ConfigError(
            'criterion',
            criterion,
            why='what it measured with this loss and these batches is not finite',
        )
    return values


def _first_order(
    criterion: str,
    graph: Graph,
    variables: Any,
    evidence: Evidence | None,
    terms: dict[str, list[_Members]],
) -> Scores:
    """Σ_terms (Σ_members Σ g·w)² of each unit, g = ∂loss/∂w; the mean over the batches.

    Groups that are frozen or without members have no score.
    """
    loss, batches = _data(criterion, evidence)
    terms = {
        group.name: [members for members in terms[group.name] if members]
        for group in graph.groups
        if not group.frozen
    }
    keys = graph.keys_of
    wanted = {keys[m.path] for members in terms.values() for term in members for m, _ in term}

    @jax.jit
    def squares(leaves: dict[tuple[str, ...], jax.Array], batch: Any) -> dict[str, jax.Array]:
        fixed = {path: leaf for path, leaf in leaves.items() if path not in wanted}

        def scalar(moving: dict[tuple[str, ...], jax.Array]) -> jax.Array:
            return loss(traverse_util.unflatten_dict({**fixed, **moving}), batch)

        moving = {path: leaves[path] for path in sorted(wanted)}
        gradients = jax.grad(scalar)(moving)

        def total(member: tracing.Member, positions: np.ndarray) -> jax.Array:
            """Σ g·w of each unit, float32 [units]."""
            weights, slopes = moving[keys[member.path]], gradients[keys[member.path]]
            product = slopes.astype(jnp.float32) * weights.astype(jnp.float32)
            others = tuple(axis for axis in range(product.ndim) if axis != member.axis)
            return product.sum(others)[positions].sum(1)

        return {
            name: sum(jnp.square(sum(total(*member) for member in term)) for term in members)
            for name, members in terms.items()
            if members
        }

    leaves = traverse_util.flatten_dict(tracing.plain(variables))
    found = [jax.device_get(squares(leaves, batch)) for batch in batches]
    return {
        name: _finite(criterion, np.mean([score[name] for score in found], axis=0, dtype=float))
        for name in found[0]
    }


def _leaves(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tracing.plain(tree), sep='/')
