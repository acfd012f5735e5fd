"""From a Linen module to the graph of its channel groups, by running it on names.

`trace` makes a jaxpr of the module's `apply`, gives every position of every variable's axes a name,
and walks the jaxpr with the rules of `jaxkd.graph.rules`. What hangs together is a channel group.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple
import warnings

from flax import linen as nn
from flax import traverse_util
from flax.core import Scope
import jax
import numpy as np

from jaxkd import cpu, errors
from jaxkd.graph import branches, names, resize, rules
from jaxkd.graph import cost as costs
from jaxkd.graph import table as tables

Keep = costs.Keep
INEXACT = ('freeze', 'allow')
# Of variables that the traced program does not read.
IDLE = 'not used when traced'


class Member(NamedTuple):
    """An axis of a parameter, or a stretch of one, that a group's units are cut from.

    Attributes:
      path: the parameter, such as 'params/stem/conv/kernel'.
      axis: which of its axes.
      range: from the first to the last position on it; which of them are each unit's is in
        `ChannelGroup.positions`.
    """

    path: str
    axis: int
    range: range


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that must be kept or removed together, unit by unit.

    Attributes:
      name: the layer that makes the channels.
      size: number of units.
      members: the parameter axes concerned.
      positions: for each member, int [size, k]: the positions of each unit.
      made: for each member, whether the channels are what a layer makes with this parameter: a
        kernel's output axis.
      frozen: why no unit may be removed, or None.
      primitive, source: the operation that froze the group, or made it inexact, and its line in the
        model's code.
      inexact: why the other channels change when units are removed, or None.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    positions: tuple[np.ndarray, ...]
    made: tuple[bool, ...]
    frozen: str | None = None
    primitive: str = ''
    source: str = ''
    inexact: str | None = None

    @property
    def channels(self) -> int:
        """How many channels of an array go with a unit: of the axis where they are most."""
        return max(positions.shape[1] for positions in self.positions)


class FrozenGroup(NamedTuple):
    group: str
    reason: str
    primitive: str
    source: str


class Follow(NamedTuple):
    """A field of a module that has to say the width of a group, whatever that is.

    Attributes:
      layer: path of the module, such as 'stage1/block0'.
      field: its name.
      group: whose width it says.
      channels: of each unit.
    """

    layer: str
    field: str
    group: str
    channels: int


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A network as channel groups and their cost. Made by `jaxkd.trace`.

    Attributes:
      model: the Linen module.
      variables: its variables as `jax.ShapeDtypeStruct`s, nested dicts.
      inputs, apply_kwargs: what it was traced with; arrays as `jax.ShapeDtypeStruct`s.
      program: the jaxpr of `model.apply`, from the leaves of variables and inputs to those of the
        outputs and of the variables that it changed.
      outputs: how many of its results are outputs.
      groups: all channel groups, in the order of the computation.
      unknown: primitives that were not understood, each with what that means and a line of the
        model's code.
      operations: the convolutions and dots, in the order of the computation.
      flow: how data runs through the network; see `removable`.
      inexact: as `trace` was told.
      follows: fields that change with the widths; see `jaxkd.graph.follow`.
    """

    model: nn.Module
    variables: Mapping[str, Any]
    inputs: tuple[Any, ...]
    apply_kwargs: Mapping[str, Any]
    program: jax.extend.core.ClosedJaxpr
    outputs: int
    groups: tuple[ChannelGroup, ...]
    polynomial: costs.Polynomial
    unknown: Mapping[str, str]
    operations: tuple[costs.Operation, ...]
    flow: branches.Flow
    inexact: str
    follows: tuple[Follow, ...] = ()

    @functools.cached_property
    def by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every variable, by its path."""
        return {path_string(path): leaf.shape for path, leaf in _leaves(self.variables)}

    @functools.cached_property
    def keys_of(self) -> dict[str, tuple[str, ...]]:
        """The keys that lead to every variable, by its path.

        Not the parts of the path: those of `nn.WeightNorm` have a '/' in their names.
        """
        return {
            path_string(path): tuple(map(key_string, path)) for path, _ in _leaves(self.variables)
        }

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return {group.name: group.size for group in self.groups}

    @functools.cached_property
    def resources(self) -> tuple[str, ...]:
        """What can be budgeted: latency only where it has been measured."""
        measured = any(term.resource == 'latency' for term in self.polynomial.terms)
        return costs.RESOURCES if measured else costs.COUNTED

    @property
    def frozen(self) -> tuple[FrozenGroup, ...]:
        """The groups that stay whole, with the reason, the primitive and the model's line."""
        return tuple(
            FrozenGroup(g.name, g.frozen, g.primitive, g.source) for g in self.groups if g.frozen
        )

    def keep_all(self) -> dict[str, np.ndarray]:
        """The keep that removes nothing: bool [size] by group name."""
        return {group.name: np.ones(group.size, bool) for group in self.groups}

    def complete(self, keep: Keep | None) -> dict[str, np.ndarray]:
        """`keep` checked, with the groups that it does not mention kept whole.

        Where it takes all units of a group in a residual branch, the rest of the branch goes too:
        see `emptied`. What the branch still adds is a constant for each channel, by the parameters
        of its last layers that belong to what is added to (a bias, a BatchNorm): these stay, and
        `compact` folds it into one bias.

        Raises:
          GraphError: for an unknown group, a wrong shape or dtype, a frozen group that would lose
            units, or groups that would lose all although nothing leads around them.
        """
        result = self.keep_all()
        for name, alive in (keep or {}).items():
            group = self.by_name.get(name)
            if group is None:
                raise errors.GraphError(
                    f'no channel group is named {name!r}; there are: {", ".join(self.by_name)}'
                )
            alive = np.asarray(alive)
            if alive.dtype != bool or alive.shape != (group.size,):
                raise errors.GraphError(
                    f'keep of group {name!r} must be bool [{group.size}], '
                    f'not {alive.dtype} {list(alive.shape)}'
                )
            if group.frozen and not alive.all():
                raise errors.GraphError(
                    f'group {name!r} cannot be cut: {group.frozen} ({group.source})'
                )
            result[name] = alive
        empty = [name for name, alive in result.items() if not alive.any()]
        gone = self.emptied(empty) if empty else ()
        if gone is None:
            alone = [name for name in empty if self.emptied([name]) is None]
            raise errors.GraphError(
                f'group {(alone or empty)[0]!r} must keep at least one unit: nothing else leads '
                "from the network's inputs to its outputs"
                + ('' if alone else f' once {", ".join(empty[1:])} are gone')
            )
        return result | {name: np.zeros(self.sizes[name], bool) for name in gone}

    def emptied(self, names: Collection[str]) -> frozenset[str] | None:
        """All groups that go when the groups `names` lose all of their units.

        They are `names` and the rest of the residual branches that they interrupt. None where an
        output would no longer depend on the inputs: then they have to keep something.
        """
        return self._emptied(frozenset(names))

    @functools.cached_property
    def _emptied(self) -> Callable[[frozenset[str]], frozenset[str] | None]:
        # What only carries constants, such as an embedding of positions, is no part of a branch.
        movable = branches.useful(self.flow) - self.flow.whole
        movable -= {group.name for group in self.groups if group.frozen}
        return functools.cache(functools.partial(branches.emptied, self.flow, movable))

    def removable(self, names: Collection[str] | None = None) -> frozenset[str]:
        """The groups, of `names` or of all, that may lose all of their units, even all at once.

        Those in residual branches, and all parallel branches but the last. A group is only among
        them if all that would go with it are.
        """
        wanted = frozenset(self.by_name if names is None else names)
        gone: frozenset[str] = frozenset()
        for group in self.groups:
            if group.name in wanted - gone:
                more = self.emptied(gone | {group.name})
                gone = more if more is not None and more <= wanted else gone
        return gone

    def cost(self, keep: Keep | None = None) -> costs.Cost:
        """The cost of one example with `keep` (of the full network without)."""
        return self.polynomial.cost(self.complete(keep))

    def amount(
        self, kept: np.ndarray, resource: str, layers: Collection[str] | None = None
    ) -> float:
        """One resource of `cost`, in all layers or those named, where it is asked for often.

        Of a keep as one vector, bool [units of all groups] (see `vector`), which is not checked.
        """
        if not np.logical_or.reduceat(kept, self._first).all():  # a branch may have gone
            kept = self.vector(self.complete(self.by_group(kept)))
        return self._meter(resource, None if layers is None else frozenset(layers))(kept)

    @functools.cached_property
    def _meter(self) -> Callable[[str, frozenset[str] | None], Callable[[np.ndarray], float]]:
        return functools.cache(
            lambda resource, layers: self.polynomial.meter(resource, self.sizes, layers)
        )

    @functools.cached_property
    def _first(self) -> np.ndarray:
        """Where each group begins in `vector`."""
        return np.cumsum([0, *self.sizes.values()])[:-1]

    def vector(self, by_group: Mapping[str, np.ndarray], missing: Any = True) -> np.ndarray:
        """Arrays [units] by group name as one, in the order of the groups."""
        return np.concatenate(
            [
                by_group[name] if name in by_group else np.full(size, missing)
                for name, size in self.sizes.items()
            ]
        )

    def by_group(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `vector`."""
        return dict(zip(self.sizes, np.split(vector, self._first[1:]), strict=True))

    def price(
        self, keep: Keep | None, resource: str, layers: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """What one more unit costs: ∂resource/∂keep at `keep`, float64 [size] by group name.

        In all layers, or those named.
        """
        costs.check_resource(resource)
        if resource not in self.resources:
            raise errors.ConfigError('resource', resource, why=costs.UNMEASURED)
        return self.polynomial.price(self.complete(keep), resource, self.sizes, layers)

    def table(self, keep: Keep | None = None) -> str:
        """The layers, the groups with their members, and the costs, for people to read."""
        return tables.table(self, keep)


def trace(
    model: nn.Module,
    variables: Any,
    *inputs: Any,
    inexact: str = 'freeze',
    **apply_kwargs: Any,
) -> Graph:
    """Finds the channel groups of a Linen module and what they cost.

    Args:
      model: any Linen module.
      variables: its variables, arrays or `jax.ShapeDtypeStruct`s; nothing is computed with them.
      *inputs: arguments of the module, arrays or `jax.ShapeDtypeStruct`s (or trees of them). The
        leading axis of each is the batch.
      inexact: what becomes of channels over which a mean, a maximum or the like is taken, as
        LayerNorm does: 'freeze' keeps them; 'allow' lets them be removed, although the channels
        that are left then change.
      **apply_kwargs: further arguments of `model.apply`, such as `train=False`, which stay as they
        are. No arrays but scalars and what is in `rngs`: an array is an input, and where the model
        takes it by keyword alone there is `method=lambda model, x, mask: model(x, mask=mask)`.

    Returns:
      The graph. Warns with the reasons if most of the parameters are in layers that stay whole.

    Raises:
      GraphError: where the module cannot be applied to these variables and inputs.
      ConfigError: for an array among the keyword arguments.
    """
    if inexact not in INEXACT:
        raise errors.ConfigError('inexact', inexact, allowed=INEXACT)
    _refuse_arrays(apply_kwargs)
    variables = jax.tree.map(_abstract, plain(variables))
    inputs = jax.tree.map(_abstract, tuple(inputs))
    try:
        make = jax.make_jaxpr(applied(model, apply_kwargs), return_shape=True)
        jaxpr, (shapes, _) = make(variables, inputs)
    except Exception as error:
        shapes = ', '.join(str(leaf) for leaf in jax.tree.leaves(inputs))
        raise errors.GraphError(
            f'{type(model).__name__} cannot be applied to inputs {shapes}: '
            f'{type(error).__name__}: {error}'
        ) from error

    context = rules.Context(allow_inexact=inexact == 'allow')
    paths = [(path_string(path), leaf) for path, leaf in _leaves(variables)]
    starts: list[tuple[str, int, int, int]] = []  # path, axis, first name, number of names
    operands: dict[str, rules.Array] = {}
    for path, leaf in paths:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise errors.GraphError(
                f'the variable {path} is a random key: hand it in by rngs=, or keep its data '
                '(jax.random.key_data)'
            )
        axes = []
        for axis, n in enumerate(leaf.shape):
            starts.append((path, axis, context.ties.count, n))
            axes.append((names.Part(n, context.ties.fresh(n)),))
        operands[path] = tuple(axes)
    by_leaf = list(operands.values())
    for leaf in jax.tree.leaves(inputs):
        axes = [names.bound(n, names.INPUT) for n in leaf.shape]
        if axes:
            axes[0] = names.bound(leaf.shape[0], names.BATCH)
        by_leaf.append(context.receive(axes, leaf.dtype.itemsize))

    read = {id(atom) for eqn in rules.live(jaxpr.jaxpr) for atom in eqn.invars}
    read.update(map(id, jaxpr.jaxpr.outvars))
    idle = names.Frozen(IDLE, 'input', 'the variables')
    for var, axes in zip(jaxpr.jaxpr.invars, by_leaf, strict=True):
        if id(var) not in read:  # such as the layers of an auxiliary loss, traced without it
            for axis in axes:
                context.ties.freeze(axis, idle)

    # Changed variables, which follow, are no outputs that anybody consumes.
    number = len(jax.tree.leaves(shapes))
    outputs = context.walk(jaxpr.jaxpr, jaxpr.consts, by_leaf)[:number]
    context.use(outputs)
    out = names.Frozen('network output', 'output', 'the value that the model returns')
    for output in outputs:
        for axis in output:
            context.ties.freeze(axis, out)

    found = context.ties.components()
    groups = _groups(context, starts, found)
    owner, unit = _owners(groups, starts, found)
    polynomial, operations = _polynomial(context, operands, starts, groups, owner, unit)
    graph = Graph(
        model=model,
        variables=variables,
        inputs=inputs,
        apply_kwargs=apply_kwargs,
        program=jaxpr,
        outputs=number,
        groups=groups,
        polynomial=polynomial,
        unknown=context.unknown,
        operations=operations,
        flow=_flow(context, outputs, groups, owner),
        inexact=inexact,
    )
    from jaxkd.graph import follow, settle  # they run and cut graphs, which are made here

    if isinstance(model, resize.CompactModule) and model.fields:
        there = follow.candidates(graph)
        follows = tuple(f for f in there if f.field in model.fields.get(f.layer, {}))
        graph = dataclasses.replace(graph, follows=follows)
    if context.fixes_sizes:
        graph = settle.settle(graph)
    warn_if_frozen(graph)
    _warn_if_idle(graph)
    return graph


def _refuse_arrays(apply_kwargs: Mapping[str, Any]) -> None:
    """As constants they would have the batch in them, which no cost may count or check change."""
    for name, value in apply_kwargs.items():
        for leaf in jax.tree.leaves(value) if name != 'rngs' else ():
            if getattr(leaf, 'ndim', 0):
                why = 'an array is an input, so pass it by position; its leading axis is the batch'
                raise errors.ConfigError(name, _abstract(leaf), why=why)


def outputs_of(model: nn.Module, apply_kwargs: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    """`model.apply` as a function of (variables, inputs), without the changed variables."""
    both = applied(model, apply_kwargs)
    return lambda variables, inputs: both(variables, inputs)[0]


def applied(model: nn.Module, apply_kwargs: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    """`model.apply` as a function from (variables, inputs) to (outputs, changed variables)."""

    def as_written(call, args, kwargs, context):
        if getattr(context.module, 'conv_general_dilated', None) is cpu.conv_general_dilated:
            # Inside `cpu.fast_layers`: a sum of shifted products has no cost to be seen.
            object.__setattr__(context.module, 'conv_general_dilated', None)
        if context.module.scope is not None:
            _trust_initializers(context.module.scope)
        return call(*args, **kwargs)

    def apply(variables, inputs):
        with nn.intercept_methods(as_written):
            out = resize.apply(model, variables, *inputs, **apply_kwargs)
        return out if apply_kwargs.get('mutable', False) else (out, {})

    return apply


def _trust_initializers(scope: Scope) -> None:
    """Lets a scope take a parameter that has the shape that its initializer is asked for.

    Flax traces the initializer of every parameter, to see whether it makes that shape: half of the
    time that tracing a network takes.
    """
    check = scope.param

    def param(name, init_fn, *args, unbox=True, **kwargs):
        if args and isinstance(args[0], tuple | list) and scope.has_variable('params', name):
            boxed = scope.get_variable('params', name)
            value = nn.meta.unbox(boxed)
            if tuple(args[0]) == getattr(value, 'shape', None):
                scope.reserve(name, 'params')
                return value if unbox else boxed
        return check(name, init_fn, *args, unbox=unbox, **kwargs)

    if 'param' not in vars(scope):  # not yet
        scope.param = param


def plain(tree: Any) -> Any:
    """Nested dicts of leaves: FrozenDicts and boxed parameters are opened."""
    return jax.tree.map(lambda leaf: leaf, nn.meta.unbox(_dicts(tree)))


def _dicts(tree: Any) -> Any:
    return {k: _dicts(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(leaf, 'shape'):
        leaf = np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def path_string(path: Sequence[Any]) -> str:
    """The path of a leaf, as members have it."""
    return '/'.join(map(key_string, path))


def key_string(entry: Any) -> str:
    """One step of a path: the key of a dict, the name of a field, the place in a tuple."""
    for attribute in ('key', 'name', 'idx'):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _module(path: str) -> str:
    """'stem/conv' for 'params/stem/conv/kernel'."""
    return '/'.join(path.split('/')[1:-1]) or path


def _groups(
    context: rules.Context,
    starts: Sequence[tuple[str, int, int, int]],
    found: names.Components,
) -> tuple[ChannelGroup, ...]:
    """The connected components that parameters are in, those of one shape together."""
    number = len(found.windows)
    axis_of = np.repeat(np.arange(len(starts)), [n for *_, n in starts])
    component = found.of[: len(axis_of)]  # the parameters' names come first

    # Components with as many positions on each axis of each parameter are units of one group: the
    # sum of a random number per position tells the shapes apart.
    marks = np.random.default_rng(0).integers(1, 1 << 62, len(starts), dtype=np.uint64)
    shape = np.zeros(number, np.uint64)
    np.add.at(shape, component, marks[axis_of])
    notes = {**found.inexact, **found.frozen}
    reasons = {why: i + 1 for i, why in enumerate(dict.fromkeys(notes.values()))}
    reason = np.zeros(number, np.uint64)
    for c, why in notes.items():
        reason[c] = reasons[why]
    producer = np.full(number, len(context.layers))
    for i in reversed(range(len(context.layers))):
        for out in context.layers[i].out:
            producer[found.of[out]] = i

    # A kernel's window is no channel; where it is tied to channels they have been frozen with it.
    wanted = np.flatnonzero((~found.windows | (reason > 0)) & (shape > 0))
    _, inverse = np.unique(
        np.stack([shape[wanted], reason[wanted]], axis=1), axis=0, return_inverse=True
    )
    order = np.argsort(component, kind='stable')
    ends = np.searchsorted(component[order], np.arange(number + 1))
    by_group: dict[int, list[int]] = {}
    for c, group in zip(wanted, inverse.reshape(-1), strict=True):
        by_group.setdefault(int(group), []).append(int(c))

    outputs = _outputs(context, starts)
    unnamed = []
    for units in by_group.values():
        where = np.stack([np.sort(order[ends[c] : ends[c + 1]]) for c in units])
        rank = producer[units[0]]
        if rank < len(context.layers):  # in the order of the channels of the layer that makes them
            made = found.of[np.concatenate(context.layers[rank].out)]
            first = {int(c): i for i, c in reversed(list(enumerate(made)))}
            where = where[np.argsort([first.get(c, 0) for c in units], kind='stable')]
        members, positions, made = [], [], []
        for axis in np.unique(axis_of[where[0]]):
            path, dimension, start, _ = starts[axis]
            columns = where[:, axis_of[where[0]] == axis] - start
            span = range(int(columns.min()), int(columns.max()) + 1)
            members.append(Member(path, dimension, span))
            positions.append(columns)
            made.append(bool(outputs[columns + start].any()))
        # What no layer makes and has one position leaves no choice.
        if rank < len(context.layers) or len(units) > 1 or units[0] in found.frozen:
            unnamed.append((rank, int(where.min()), members, positions, made, units[0]))

    unnamed.sort(key=lambda group: group[:2])
    last = {path: axis for path, axis, *_ in starts}
    used: dict[str, int] = {}
    groups = []
    for rank, _, members, positions, made, unit in unnamed:
        if rank < len(context.layers):
            name = _layer_name(context.layers[rank], starts)
        else:
            # By a parameter whose last axis it is: the others are read, not made.
            member = next((m for m in members if m.axis == last[m.path]), members[0])
            name = f'{_module(member.path)}:{member.path.split("/")[-1]}[{member.axis}]'
        used[name] = used.get(name, 0) + 1
        name = name if used[name] == 1 else f'{name}#{used[name]}'
        frozen, inexact = found.frozen.get(unit), found.inexact.get(unit)
        why = frozen or inexact
        groups.append(
            ChannelGroup(
                name,
                len(positions[0]),
                tuple(members),
                tuple(positions),
                tuple(made),
                frozen=frozen.reason if frozen else None,
                primitive=why.primitive if why else '',
                source=why.source if why else '',
                inexact=inexact.reason if inexact and not frozen else None,
            )
        )
    return tuple(groups)


def _outputs(context: rules.Context, starts: Sequence[tuple[str, int, int, int]]) -> np.ndarray:
    """Which of the parameters' names are those of channels that a kernel makes: bool [names]."""
    outputs = np.zeros(starts[-1][2] + starts[-1][3] if starts else 0, bool)
    for layer in context.layers:
        for out in layer.out:
            outputs[out[out < len(outputs)]] = True  # the others are of tables of some
    # What no layer was seen to use as its kernel, such as an embedding, makes its last axis.
    for path, axes in itertools.groupby(starts, key=lambda start: start[0]):
        spans = [slice(first, first + n) for _, _, first, n in axes]
        made = any(outputs[span].any() for span in spans)
        if path.startswith('params/') and len(spans) > 1 and not made:
            outputs[spans[-1]] = True
    return outputs


@functools.lru_cache(maxsize=4096)
def _neighbour(layer: str, layers: tuple[str, ...]) -> int:
    """The index of the first of `layers` that shares the longest path with `layer`."""

    def common(other: str) -> int:
        pairs = zip(layer.split('/'), other.split('/'), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    return max(range(len(layers)), key=lambda i: (common(layers[i]), -i), default=0)


def _layer_name(layer: rules.Layer, starts: Sequence[tuple[str, int, int, int]]) -> str:
    """The module that owns the kernel of a layer, or the scope where there is no such kernel."""
    for axis in layer.kernel:
        for vector in names.named(axis):
            # A parameter's, not of a table of some.
            if len(vector) and vector[0] < starts[-1][2] + starts[-1][3]:
                first = bisect.bisect_right(starts, vector[0], key=lambda start: start[2])
                return _module(starts[first - 1][0])
    # The scope begins with the class of the model, or with what runs it at other widths.
    scopes = layer.scope.split('/')
    modules = {path.split('/')[1] for path, *_ in starts if path.count('/')}
    inside = itertools.dropwhile(lambda scope: scope not in modules, scopes)
    return '/'.join(inside) or next((s for s in scopes[-1:] if '->' in s), layer.primitive)


def _owners(
    groups: Sequence[ChannelGroup],
    starts: Sequence[tuple[str, int, int, int]],
    found: names.Components,
) -> tuple[np.ndarray, np.ndarray]:
    """Of each name the index of its group, -1 for none, and its unit: int [names] each."""
    owner_of = np.full(len(found.windows), -1)
    unit_of = np.zeros(len(found.windows), int)
    first = {(path, axis): start for path, axis, start, _ in starts}
    for i, group in enumerate(groups):
        member, positions = group.members[0], group.positions[0]
        component = found.of[positions[:, 0] + first[member.path, member.axis]]
        owner_of[component] = i
        unit_of[component] = np.arange(group.size)
    return owner_of[found.of], unit_of[found.of]


def _flow(
    context: rules.Context,
    outputs: Sequence[rules.Array],
    groups: Sequence[ChannelGroup],
    owner: np.ndarray,
) -> branches.Flow:
    """The arrays that the network computes, with the groups in their axes instead of names."""

    vectors: dict[int, np.ndarray] = {}

    @functools.cache
    def owners(vector: int) -> frozenset[str | None]:
        return frozenset(
            groups[i].name if i >= 0 else None for i in np.unique(owner[vectors[vector]])
        )

    def members(axes: Sequence[names.Axis]) -> list[frozenset[str | None]]:
        found = [vector for axis in axes for vector in names.named(axis) if len(vector)]
        vectors.update((id(vector), vector) for vector in found)  # kept, so that ids stay their own
        return [owners(id(vector)) for vector in found]

    def step(made: rules.Step) -> branches.Step:
        axes = tuple(axis for axis in members(made.axes) if None not in axis)
        # What is left of a branch that has gone carries nothing on.
        empty = any(names.size(axis) == 0 for axis in made.axes)
        return branches.Step(axes, () if empty else made.read, made.sums)

    return branches.flow(
        [made and step(made) for made in context.steps],
        [array.step for array in outputs if array.step is not None],
        {name for axes in context.inside for axis in members(axes) for name in axis if name},
    )


def _polynomial(
    context: rules.Context,
    operands: Mapping[str, rules.Array],
    starts: Sequence[tuple[str, int, int, int]],
    groups: Sequence[ChannelGroup],
    owner: np.ndarray,
    unit: np.ndarray,
) -> tuple[costs.Polynomial, tuple[costs.Operation, ...]]:
    """The cost of every layer and parameter in terms of the groups' keeps, and the layers."""
    forms: list[costs.Form] = []
    known: dict[bytes, int] = {}

    def form(vector: np.ndarray) -> int:
        key = np.sort(owner[vector] * (1 << 32) + unit[vector]).tobytes()
        if key not in known:
            known[key] = len(forms)
            weights = {}
            for i in np.unique(owner[vector]):
                if i >= 0:
                    mine = unit[vector[owner[vector] == i]]
                    weights[groups[i].name] = np.bincount(mine, minlength=groups[i].size)
            forms.append(costs.Form(int(np.sum(owner[vector] < 0)), weights))
        return known[key]

    def product(factor: int, axes: Sequence[names.Axis]) -> tuple[int, tuple[int, ...]]:
        vectors = []
        for axis in axes:
            for part in axis:
                if part.names is not None:
                    vectors.append(form(part.names))
                elif part.bound != names.BATCH:
                    factor *= part.size
        return factor, tuple(vectors)

    def term(layer: str, resource: str, factor: int, axes: Sequence[names.Axis]) -> costs.Term:
        return costs.Term(layer, resource, *product(factor, axes))

    def widths(axes: Sequence[names.Axis]) -> tuple[tuple[costs.Width, ...], ...]:
        return tuple(
            tuple(
                costs.Width(part.size, None if part.names is None else form(part.names))
                for part in axis
            )
            for axis in axes
        )

    terms, operations = [], []
    ranks: dict[str, int] = {}
    for layer in context.layers:
        name = _layer_name(layer, starts)
        rank = ranks.setdefault(name, len(ranks))
        terms.append((rank, term(name, 'flops', 1, layer.factors)))
        terms.append((rank, term(name, 'activations', layer.itemsize, layer.outputs)))
        result = layer.outputs[: len(layer.shape)]
        operations.append(
            costs.Operation(name, layer.eqn, layer.rounds, widths(layer.contracted), widths(result))
        )
    for path, axes in operands.items():
        if path.startswith('params/'):
            # Layers that only have parameters (norms) are listed after the one they stand next to.
            rank = _neighbour(_module(path), tuple(ranks))
            terms.append((rank, term(_module(path), 'params', 1, axes)))
    terms.sort(key=lambda ranked: ranked[0])
    lives = tuple(
        costs.Live(*product(array.itemsize, array.axes), array.born, array.last)
        for array in context.stored
    )
    polynomial = costs.Polynomial(tuple(forms), tuple(term for _, term in terms), lives)
    return polynomial, tuple(operations)


def _warn_if_idle(graph: Graph) -> None:
    """Says which layers have parameters that the network does not use as it was traced."""
    layers = {
        '/'.join(graph.keys_of[member.path][1:-1])
        for group in graph.groups
        if group.frozen == IDLE
        for member in group.members
        if graph.keys_of[member.path][0] == 'params'
    }
    if layers:
        warnings.warn(
            f'{type(graph.model).__name__} does not use its layers {", ".join(sorted(layers))} as '
            'it was traced. They are never cut, so where it does use them (an auxiliary head, with '
            'train=True) they do not fit a network that was cut: train that without them',
            stacklevel=3,
        )


def warn_if_frozen(graph: Graph) -> None:
    """Says so if more than half of the parameters are in layers of which nothing can be removed."""
    movable = {member.path for g in graph.groups if not g.frozen for member in g.members}
    sizes = {
        '/'.join(('params', *path)): leaf.size
        for path, leaf in traverse_util.flatten_dict(graph.variables.get('params', {})).items()
    }
    whole = sum(n for path, n in sizes.items() if path not in movable)
    if 2 * whole > sum(sizes.values()):
        reasons = '\n'.join(
            f'  {f.group}: {f.reason} ({f.primitive}, {f.source})' for f in graph.frozen
        )
        hint = ''
        if any(f.reason == rules.REDUCED for f in graph.frozen):
            hint = (
                "\nThose of which one value is made can go under inexact='allow'; the rest changes."
            )
        warnings.warn(
            f'{whole:,} of the {sum(sizes.values()):,} parameters of {type(graph.model).__name__} '
            f'are in layers from which no channel can be removed:\n{reasons}{hint}',
            stacklevel=3,
        )
